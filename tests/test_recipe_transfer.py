"""`maskopt demo transfer` against NumPy and Optax on what is left to train, and its stored runs."""

import json
import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes import facts, told
from reference import bits, same_bits, special

import maskopt
from maskopt._slicer._rule import scan_parts
from maskopt.demo import _curves, _data
from maskopt.demo._curves import Curves, Mean
from maskopt.demo._ledger import Ledger

recipe = sys.modules["maskopt.demo.transfer"]  # the package has the command by that name
STEPS = "8"


@pytest.fixture(autouse=True)
def lenient():
  """Optax promotes dtypes."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The folder of an experiment that nobody interrupted: one split, 22 runs."""
  folder = tmp_path_factory.mktemp("whole") / "transfer-8-steps"
  folder.mkdir()
  ledger = recipe._ledger(folder, int(STEPS), [])
  with jax.numpy_dtype_promotion("standard"):
    recipe.perform(recipe.plan(range(1)), int(STEPS), ledger, lambda *_: None)
  return folder


def contents(folder):
  return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def base(seed=0):
  return recipe.above_anew(recipe.blank(), 0, jax.random.key(seed))


def batches(steps, task="B"):
  return recipe._stacked(recipe.tasks(0)[task].train.batches(steps, 0, 64))


def forward(layers, x):
  """The activities that each layer receives, and the outputs, in float64."""
  seen = [np.asarray(x, np.float64)]
  for k, layer in enumerate(layers):
    y = seen[-1] @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
    seen.append(y if k == len(layers) - 1 else np.maximum(y, 0))
  return seen


def test_over_all_frozen_layers_a_softmax_regression_follows_adamw_by_hand():
  params, data = base(), batches(8)
  after, losses = recipe.trainer(5)(params, data)
  assert same_bits(after[:5], params[:5])
  p = {k: np.asarray(x, np.float64) for k, x in params[5].items()}
  mu, nu = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
  for t, (pixels, labels) in enumerate(zip(*data, strict=True), 1):
    features = forward(params, pixels)[5]
    scores = features @ p["kernel"] + p["bias"]
    shares = np.exp(scores - scores.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    loss = -np.log(shares[np.arange(64), labels]).mean()
    np.testing.assert_allclose(losses[t - 1], loss, rtol=1e-5)
    error = (shares - np.eye(5)[labels]) / 64
    for k, g in (("kernel", features.T @ error), ("bias", error.sum(0))):
      mu[k], nu[k] = 0.9 * mu[k] + 0.1 * g, 0.999 * nu[k] + 0.001 * g * g
      step = (mu[k] / (1 - 0.9**t)) / (np.sqrt(nu[k] / (1 - 0.999**t)) + 1e-8)
      p[k] = p[k] - 3e-3 * (step + 0.01 * p[k])
  for k in p:
    # float32 against float64: a hundredth of one step.
    np.testing.assert_allclose(after[5][k], p[k], rtol=0, atol=3e-5)


@pytest.mark.parametrize("n", [0, 2])
def test_layers_above_frozen_ones_follow_optax_on_the_network_of_them_alone(n):
  params, data = base(), batches(8)
  after, _ = recipe.trainer(n)(params, data)
  assert same_bits(after[:n], params[:n])
  upper, tx = params[n:], optax.adamw(3e-3, weight_decay=0.01)

  @jax.jit
  @jax.grad
  def gradient(upper, x, labels):
    for k, layer in enumerate(upper):
      x = x @ layer["kernel"] + layer["bias"][None]
      x = x if k == len(upper) - 1 else jnp.maximum(x, 0)
    return -jax.nn.log_softmax(x)[jnp.arange(64), labels].mean()

  state = tx.init(upper)
  for pixels, labels in zip(*data, strict=True):
    features = forward(params, pixels)[n].astype(np.float32)
    updates, state = tx.update(gradient(upper, features, labels), state, upper)
    upper = optax.apply_updates(upper, updates)
  for ours, theirs in zip(jax.tree.leaves(after[n:]), jax.tree.leaves(upper), strict=True):
    # Where a gradient is near 0, Adam's step is rounding made large; eight steps are 2.4e-2.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_frozen_layers_are_in_no_gradient_and_in_no_moment():
  params, data = base(), batches(2)

  def operations(jaxpr):
    for eqn in jaxpr.eqns:
      yield eqn
      for value in eqn.params.values():
        for inner in value if isinstance(value, (tuple, list)) else (value,):
          if hasattr(inner, "jaxpr"):
            yield from operations(inner.jaxpr)
          elif hasattr(inner, "eqns"):
            yield from operations(inner)

  for n in range(6):
    program = list(operations(jax.make_jaxpr(recipe.trainer(n))(params, data).jaxpr))
    matmuls = sum(eqn.primitive.name == "dot_general" for eqn in program)
    # Six forward; one for each kernel that trains, one through each layer above the lowest of them.
    assert matmuls == 6 + (6 - n) + (5 - n)
    (scan,) = (eqn for eqn in program if eqn.primitive.name == "scan")
    skip, count = scan_parts(scan, scan.params["jaxpr"].jaxpr)
    carried = sum(x.aval.size for x in scan.invars[skip : skip + count])
    trained = sum(np.size(x) for x in jax.tree.leaves(params[n:]))
    everything = sum(np.size(x) for x in jax.tree.leaves(params))
    # The network (frozen layers may be constants of the loop), two moments, a step count or two.
    assert 3 * trained < carried <= everything + 2 * trained + 8


def test_the_mask_is_what_surgery_returns_for_layers_that_start_anew():
  params = base()
  for n in range(1, 6):
    mask = recipe.first_are_frozen(n)
    assert mask == [{"kernel": k < n, "bias": k < n} for k in range(6)]
    done = maskopt.surgery.reset(params, [(slice(n, None), True)])
    wide = jax.tree.map(lambda m, x: np.broadcast_to(m, np.shape(x)), done.freeze_mask, params)
    expected = jax.tree.map(lambda m, x: np.full(np.shape(x), m), mask, params)
    assert jax.tree.all(jax.tree.map(np.array_equal, wide, expected))
  assert not any(jax.tree.leaves(recipe.first_are_frozen(0)))


def test_new_layers_are_the_same_above_either_base_and_start_by_he():
  a, b, key = base(1), base(2), jax.random.key(7)
  for n in (1, 4):
    over_a, over_b = (recipe.above_anew(x, n, key) for x in (a, b))
    assert same_bits(over_a[:n], a[:n]) and same_bits(over_b[:n], b[:n])
    assert same_bits(over_a[n:], over_b[n:])
    pairs = zip(over_a[n:], a[n:], strict=True)
    assert all(not np.array_equal(x["kernel"], y["kernel"]) for x, y in pairs)
  shapes = [np.shape(layer["kernel"]) for layer in a]
  assert shapes == [(64, 24), (24, 24), (24, 24), (24, 24), (24, 24), (24, 5)]
  np.testing.assert_allclose(np.std(a[0]["kernel"]), np.sqrt(2 / 64), rtol=0.1)
  assert not any(np.any(layer["bias"]) for layer in a)


def test_the_halves_share_no_digit_and_most_images_examine():
  images = {x.tobytes(): y for part in _data.digits(3) for x, y in zip(*part, strict=True)}
  both = recipe.tasks(3)
  assert sorted(both["A"].classes + both["B"].classes) == list(range(10))
  assert len(both["A"].classes) == 5
  assert recipe.tasks(4)["A"].classes != both["A"].classes
  for task in both.values():
    for part in (task.train, task.test):
      shown = [images[x.tobytes()] for x in part.pixels]
      assert np.array_equal(np.array(task.classes)[part.labels], shown)
    trained = {x.tobytes() for x in task.train.pixels}
    assert not any(x.tobytes() in trained for x in task.test.pixels)
    assert 2.9 < len(task.test.labels) / len(task.train.labels) < 3.1


def test_runs_are_named_as_in_the_paper_and_stand_after_their_base():
  runs = recipe.plan(range(2, 4))
  assert [run.name for run in runs[:7]] == ["baseA", "baseB", "B1B", "B1B+", "A1B", "A1B+", "B2B"]
  assert len(runs) == len({run.file for run in runs}) == 2 * (2 + 4 * 5)
  for k, run in enumerate(runs):
    assert run.task == ("A" if run.name == "baseA" else "B")
    assert run.frozen == (0 if "+" in run.name or run.name.startswith("base") else run.n)
    if run.n:
      assert run.base.name == f"base{run.name[0]}" and run.base in runs[:k]
      assert run.seed == run.base.seed


def test_new_layers_are_shared_by_the_four_runs_of_a_seed_and_an_n_and_by_no_others():
  def value(run):
    return tuple(jax.random.key_data(run.key).tolist())

  runs = recipe.plan(range(2))
  shared = {(run.seed, run.n): value(run) for run in runs if run.n}
  assert all(value(run) == shared[run.seed, run.n] for run in runs if run.n)
  bases = [value(run) for run in runs if not run.n]
  assert len({*shared.values(), *bases}) == 2 * (5 + 2)


def test_stored_runs_hold_what_was_measured(whole):
  ledger = recipe._ledger(whole, int(STEPS), [])
  runs = recipe.plan(range(1))
  stored = ledger.read(run.file for run in runs)
  assert len(stored) == 22
  data, task = batches(8), recipe.tasks(0)["B"]
  for kind in ("BnB", "AnB+"):
    run = recipe.Run(0, kind, 3)
    lower = stored[f"seed-0-base{kind[0]}"]["layers"]
    params = recipe.above_anew(lower, 3, run.key)
    after, losses = recipe.trainer(run.frozen)(params, data)
    assert same_bits(params[:3], lower[:3])
    assert same_bits(after[:3], lower[:3]) == (kind == "BnB")
    answers = forward(after, task.test.pixels)[-1].argmax(1)
    result = stored[run.file]
    assert result["right"] == np.sum(answers == task.test.labels)
    assert result["of"] == len(task.test.labels)
    assert result["last_loss"] == float(losses[-1])
    below = 64 * 24 + 24 + 2 * (24 * 24 + 24)
    assert (result["frozen"], result["frozen_changed"]) == (below if kind == "BnB" else 0, 0)
    assert result["frozen"] + result["trainable"] == 4 * 600 + 1560 + 125
  b = stored["seed-0-baseB"]
  assert b["classes"] == task.classes and not same_bits(b["layers"], base())


@pytest.mark.parametrize("after", [1, 2, 9, 21])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(
  capsys, monkeypatch, tmp_path, whole, after
):
  args = ("transfer", "--steps", STEPS, "--seeds", "1", "--out", str(tmp_path))
  write, train = Ledger.write, recipe.Split.train
  trained = []

  def stopping(self, name, result):
    if len(trained) > after:
      raise KeyboardInterrupt  # before the run is stored
    write(self, name, result)

  def counting(self, run, params):
    trained.append(run.name)
    return train(self, run, params)

  monkeypatch.setattr(recipe.Split, "train", counting)
  with monkeypatch.context() as patch:
    patch.setattr(Ledger, "write", stopping)
    patch.setattr(sys, "argv", ["maskopt", "demo", *args])
    with pytest.raises(SystemExit) as stopped:
      recipe_main()
  assert stopped.value.code == 130
  assert f"Stopped: {after} of 22 runs are in" in capsys.readouterr().err
  folder = tmp_path / "transfer-8-steps"
  assert len(contents(folder)) == after and not (tmp_path / "transfer.png").exists()
  # What a killed process may leave beside them.
  (folder / "seed-0-A2B.1.unfinished").write_text('{"settings"')

  trained.clear()
  said = facts(capsys, *args)
  assert said["stored_before"] == after and len(trained) == 22 - after
  found = contents(folder)
  del found["seed-0-A2B.1.unfinished"]
  assert found == contents(whole)


def recipe_main():
  from maskopt.cli import main

  main()


def test_more_seeds_train_the_new_ones_only_and_the_old_numbers_stay(capsys, tmp_path, whole):
  folder = tmp_path / "transfer-8-steps"
  folder.mkdir()
  for name, data in contents(whole).items():
    (folder / name).write_bytes(data)
  args = ("transfer", "--steps", STEPS, "--out", str(tmp_path))
  first = facts(capsys, *args, "--seeds", "1")
  second = facts(capsys, *args, "--seeds", "2")
  assert (first["stored_before"], second["stored_before"]) == (22, 22)
  assert second["classes_of_A"][0] == first["classes_of_A"][0] != second["classes_of_A"][1]
  for kind in _curves.KINDS:
    for one, two in zip(first["kinds"][kind], second["kinds"][kind], strict=True):
      assert one["accuracy"] == two["accuracy"][:1] and one["standard_error"] is None
      a, b = np.array(two["accuracy"]) - second["baseB"]
      np.testing.assert_allclose(two["change"], (a + b) / 2, atol=2e-3)
      np.testing.assert_allclose(two["standard_error"], abs(a - b) / 2, atol=2e-3)
  right = json.loads((folder / "seed-0-A5B.json").read_text())["result"]
  assert first["kinds"]["AnB"][4]["accuracy"] == [round(100 * right["right"] / right["of"], 3)]
  header = (tmp_path / "transfer.png").read_bytes()[:24]
  assert header[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", header[16:24])) > 800


def test_a_leak_is_told_and_exits_with_1(capsys, monkeypatch, tmp_path):
  def leaking(optimizer, *, freeze_mask):
    return optax.chain(maskopt.masked_freeze(freeze_mask), optimizer)

  monkeypatch.setattr(recipe, "LAYERS", 1)
  monkeypatch.setattr(maskopt, "selective_transform", leaking)
  recipe.trainer.cache_clear()
  args = ("transfer", "--steps", "1", "--seeds", "1", "--out", str(tmp_path))
  try:
    code, out = told(capsys, *args)
  finally:
    recipe.trainer.cache_clear()
  assert code == 1 and "FAILED" in out
  # It is stored, so telling it again needs no training.
  monkeypatch.setattr(recipe.Split, "train", None)
  assert told(capsys, *args)[0] == 1


def test_the_story_in_words(capsys, tmp_path, whole):
  (tmp_path / "transfer-8-steps").symlink_to(whole)
  args = ("transfer", "--steps", STEPS, "--seeds", "1", "--out", str(tmp_path))
  code, out = told(capsys, *args)
  assert code == 0
  assert "22 trainings of 5 hidden layers of 24 units" in out and "BnB+" in out
  for trainable in ("2,525", "1,925", "1,325", "725", "125"):
    assert f" {trainable} " in out
  assert "One split says little" in out and "±" not in out
  assert f"Picture: {tmp_path / 'transfer.png'}" in out
  assert "Every frozen layer kept its bits in every run." in out


def curves(changes, base=(90.0, 94.0, 92.0), layers=2):
  rows = np.tile(np.array(base)[:, None], (1, layers))
  return Curves(np.array(base), {k: rows + changes.get(k, 0.0) for k in _curves.KINDS})


def test_changes_are_those_of_the_same_split_with_their_standard_error():
  change = np.array([[1.0, -8.0], [3.0, -2.0], [2.0, -5.0]])
  found = curves({"AnB": change})
  one, two = found.changes("AnB")
  np.testing.assert_allclose(one, (2.0, np.sqrt(1 / 3)), rtol=1e-12)
  np.testing.assert_allclose(two, (-5.0, np.sqrt(9 / 3)), rtol=1e-12)
  assert found.changes("BnB") == [(0.0, 0.0)] * 2 and found.layers == 2
  assert (str(one), str(Mean(-0.25, 0.0))) == ("+2.0 ± 0.6", "-0.2")
  # The spread of the splits themselves, 2 points here, is in none of them.
  assert one.is_clear and not two.is_clear and not Mean(5.0, 0.0).is_clear


def test_findings_say_no_more_than_the_numbers():
  noise = np.array([[0.3, 0.1], [-0.3, 0.2], [0.1, -0.2]])
  loss = np.array([[-4.0, -9.0], [-5.0, -9.5], [-6.0, -10.0]])
  specific, own, start, again = _curves.findings(curves({"BnB": noise, "AnB": loss, "AnB+": noise}))
  assert specific.endswith("-5.0 ± 0.5 at n = 1, -9.5 ± 0.2 at n = 2.")
  assert "not clear of 0" in own and own.startswith("Adapted to each other (BnB): +0.0")
  assert start.endswith("No clear gain; on ImageNet the paper has one.")
  assert again == "B as a start (BnB+): +0.0 (n = 1) at best."
  start = _curves.findings(curves({"AnB+": noise + [[2.0, 2.1]]}))[2]
  assert "+2.1 ± 0.1 (n = 2) at best" in start and "No clear gain" not in start


def test_a_result_comes_back_with_every_bit(tmp_path):
  ledger = Ledger(tmp_path, {"steps": 3})
  values = special(np.float32).reshape(-1, 1)
  result = {"right": 5, "loss": 0.1 + 0.2, "layers": [{"kernel": values, "bias": values[:0, 0]}]}
  ledger.write("one+", result)
  before = contents(tmp_path)
  assert list(before) == ["one+.json"]
  found = ledger.read(["one+", "two"])
  assert list(found) == ["one+"] and found["one+"]["loss"] == result["loss"]
  (layer,) = found["one+"]["layers"]
  assert layer["kernel"].dtype == np.float32 and layer["kernel"].shape == values.shape
  assert np.array_equal(bits(layer["kernel"]), bits(values)) and layer["bias"].shape == (0,)
  ledger.write("one+", found["one+"])
  assert contents(tmp_path) == before


def test_a_run_is_stored_whole_or_not_at_all(tmp_path, monkeypatch):
  ledger = Ledger(tmp_path, {})
  ledger.write("run", {"right": 1})

  def broken(self, target):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(Path, "replace", broken)
    with pytest.raises(OSError, match="No space"):
      ledger.write("run", {"right": 2})
  assert ledger.read(["run"]) == {"run": {"right": 1}}
  with pytest.raises(TypeError, match="Cannot cast"):
    ledger.write("run", {"x": np.zeros(2)})


def test_every_broken_or_foreign_file_is_named_in_one_error(tmp_path):
  ledger = Ledger(tmp_path, {"steps": 3, "width": 24})
  names = ["good", "cut", "text", "other", "flipped", "renamed", "wider", "folder", "bytes"]
  for name in names:
    if name != "folder":
      ledger.write(name, {"right": 12})
  whole = ledger.path("good").read_text()
  ledger.path("cut").write_text(whole[: len(whole) // 2])
  ledger.path("text").write_text("")
  ledger.path("other").write_text('{"settings": 1}')
  ledger.path("flipped").write_text(ledger.path("flipped").read_text().replace("12", "13"))
  ledger.path("renamed").write_text(whole)
  Ledger(tmp_path, {"steps": 3, "width": 48}).write("wider", {"right": 12})
  ledger.path("folder").mkdir()
  ledger.path("bytes").write_bytes(b"\xff\xfe\x00")
  before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
  with pytest.raises(ValueError, match="`maskopt demo --out`") as raised:
    ledger.read(names)
  said = str(raised.value)
  for name, got in (
    ("cut", "a broken file, which is no JSON"),
    ("text", "a broken file, which is no JSON"),
    ("other", "a file of something else"),
    ("flipped", "a broken file, whose checksum is another"),
    ("renamed", "the run good"),
    ("wider", "one with width 48 for 24"),
    ("folder", "what cannot be read (Is a directory)"),
    ("bytes", "a broken file, which is no JSON"),
  ):
    assert f"at {ledger.path(name)}, expected the run {name}, got {got}" in said, name
  assert str(ledger.path("good")) not in said
  assert said.endswith("or give another directory.")
  assert before == {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
  assert ledger.read(["good"]) == {"good": {"right": 12}}


def test_a_broken_file_stops_the_command_before_any_training(capsys, monkeypatch, tmp_path):
  folder = tmp_path / "transfer-8-steps"
  folder.mkdir()
  (folder / "seed-0-A5B+.json").write_text('{"settings":')
  monkeypatch.setattr(recipe.Split, "train", None)
  monkeypatch.setattr(
    sys, "argv",
    ["maskopt", "demo", "transfer", "--steps", STEPS, "--seeds", "1", "--out", str(tmp_path)],
  )  # fmt: skip
  with pytest.raises(SystemExit) as stopped:
    recipe_main()
  captured = capsys.readouterr()
  assert (stopped.value.code, captured.out) == (2, "")
  said = "".join(captured.err.replace("│", "").split())
  assert "seed-0-A5B+.json" in said and "abrokenfile,whichisnoJSON" in said
  assert "--out" in said and "Deletethesefiles" in said


def test_a_file_in_the_place_of_the_folder_is_wrong_usage(capsys, monkeypatch, tmp_path):
  (tmp_path / "transfer-8-steps").touch()
  monkeypatch.setattr(
    sys, "argv", ["maskopt", "demo", "transfer", "--steps", STEPS, "--out", str(tmp_path)]
  )
  with pytest.raises(SystemExit) as stopped:
    recipe_main()
  assert stopped.value.code == 2
  assert "cannot make the directory" in capsys.readouterr().err
