"""The main demonstration: its story holds, and it says so in every form."""

import json
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import maskopt
from maskopt.cli import main
from maskopt.demo import _compare, _data

digits = sys.modules["maskopt.demo.digits"]  # the package's attribute of that name is the command


@pytest.fixture(autouse=True)
def _as_users_run_it():
  """Optax's bias correction promotes an int to a float."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def run(monkeypatch, capsys, *args):
  monkeypatch.setattr(sys, "argv", ["maskopt", "demo", *args])
  with pytest.raises(SystemExit) as stopped:
    main()
  return stopped.value.code, *capsys.readouterr()


def test_the_story_in_json(monkeypatch, capsys, tmp_path):
  args = ("--steps", "40", "--seed", "1", "--out", str(tmp_path / "new"), "--json")
  code, out, err = run(monkeypatch, capsys, *args)
  assert code == 0
  assert "learn 0 to 4" in err and "learn 5 to 9" in err
  said = json.loads(out)
  assert (said["demo"], said["seed"], said["steps"], said["ok"]) == ("digits", 1, 40, True)
  free, leaking, ours = said["runs"]

  assert ours["frozen_elements_changed"] == 0 and ours["largest_frozen_change"] == 0
  assert ours["old_outputs_bit_equal"] and ours["old"] == said["before"]["old"]
  assert ours["new"] > said["before"]["new"] + 0.2
  assert leaking["frozen_elements_changed"] > ours["frozen_elements"] / 2
  assert 0 < leaking["largest_frozen_change"] < free["largest_frozen_change"]
  assert not leaking["old_outputs_bit_equal"] and not free["old_outputs_bit_equal"]
  assert ours["optimizer_bytes"] < 0.3 * free["optimizer_bytes"]

  header = (tmp_path / "new" / "digits.png").read_bytes()[:24]
  assert header[:8] == b"\x89PNG\r\n\x1a\n"
  assert min(struct.unpack(">II", header[16:24])) > 900


def test_a_leak_is_told_and_exits_with_1(monkeypatch, capsys, tmp_path):
  def leaking(optimizer, *, freeze_mask, prefer):
    del prefer
    return optax.chain(maskopt.masked_freeze(freeze_mask), optimizer)

  monkeypatch.setattr(maskopt, "selective_transform", leaking)
  code, out, _ = run(monkeypatch, capsys, "--steps", "2", "--out", str(tmp_path))
  assert code == 1
  assert out.count("FAILED") == 3 and "passed" not in out
  assert "digits.png" in out


def test_the_same_seed_tells_the_same():
  first, second = (digits.three_ways(steps=3, seed=5) for _ in range(2))
  for a, b in zip(first.outcomes, second.outcomes, strict=True):
    assert (a.curve, a.audit, a.state_bytes) == (b.curve, b.audit, b.state_bytes)


def test_old_outputs_do_not_see_spare_units():
  network, pixels = digits.Network(nnx.Rngs(0)), np.random.default_rng(0).random((30, 64), "f4")
  kept_1, kept_2 = digits.kept_units(network, pixels)
  digits.renew_spare(network, digits.Network(nnx.Rngs(1)), kept_1, kept_2)
  before = np.asarray(network(jnp.asarray(pixels)))
  for layer, kept in ((network.hidden_1, kept_1), (network.hidden_2, kept_2)):
    spare = np.setdiff1d(np.arange(digits.HIDDEN), kept)
    assert len(spare) == digits.HIDDEN - digits.KEPT
    layer.kernel[...] = layer.kernel[...].at[:, spare].add(1.0)
  after = np.asarray(network(jnp.asarray(pixels)))
  old, new = (np.ascontiguousarray(x).view(np.uint32) for x in (before, after))
  assert np.array_equal(old[:, digits.OLD], new[:, digits.OLD])
  assert not np.any(old[:, digits.NEW] == new[:, digits.NEW])


def test_kept_units_are_those_that_carry_most():
  network, pixels = digits.Network(nnx.Rngs(3)), np.random.default_rng(0).random((20, 64), "f4")
  w1, b1 = (np.asarray(x[...]) for x in (network.hidden_1.kernel, network.hidden_1.bias))
  w2, b2 = (np.asarray(x[...]) for x in (network.hidden_2.kernel, network.hidden_2.bias))
  first = np.maximum(pixels @ w1 + b1, 0)
  second = np.maximum(first @ w2 + b2, 0)
  into_old = np.abs(np.asarray(network.output.kernel[...])[:, :5]).sum(1)
  expected = second.mean(0) * into_old
  _, kept = digits.kept_units(network, pixels)
  spare = np.setdiff1d(np.arange(digits.HIDDEN), kept)
  assert expected[kept].min() >= expected[spare].max() * (1 - 1e-4)


def test_scores_ask_among_the_old_among_the_new_and_among_all():
  # Each image's outputs; the old are 0 and 1, the new 2 and 3.
  logits = np.array([[5, 1, 9, 0], [4, 3, 0, 0], [9, 0, 2, 1], [0, 0, 1, 3]], np.float32)
  test = _data.Images(np.zeros((4, 64), np.float32), np.array([0, 1, 2, 3], np.int32))
  exam = _compare.Exam(None, test, [0, 1], [2, 3])
  exam.logits = lambda params: logits
  assert exam.scores(None) == (0.5, 1.0, 0.25)


def test_data_is_split_without_overlap_and_batches_are_seeded():
  train, test = _data.digits(seed=7)
  assert len(train.labels) + len(test.labels) == 1797
  assert train.pixels.dtype == np.float32 and train.labels.dtype == np.int32
  assert (train.pixels.min(), train.pixels.max()) == (0.0, 1.0)
  assert np.all(np.bincount(test.labels) >= 40)
  other, _ = _data.digits(seed=8)
  assert not np.array_equal(train.labels, other.labels)
  old = train.of(range(5))
  assert set(old.labels) == set(range(5))
  first, again = (list(old.batches(3, seed=1)) for _ in range(2))
  for a, b in zip(first, again, strict=True):
    assert a.pixels.shape == (64, 64)
    assert np.array_equal(a.pixels, b.pixels) and np.array_equal(a.labels, b.labels)
