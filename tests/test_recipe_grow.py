"""`maskopt demo grow` against NumPy, and against plain Optax on the new weights alone."""

import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from recipes import facts, told
from reference import bits, moved, same_bits

import maskopt
from maskopt.demo import _continual, _data, _grow_picture

recipe = sys.modules["maskopt.demo.grow"]  # the package has the command by that name
PAIRS = [[0, 1], [2, 3], [4, 5]]
STEPS = 6


@pytest.fixture(autouse=True)
def lenient():
  """Optax promotes dtypes."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture(scope="module")
def data():
  return _data.digits(0)


@pytest.fixture(scope="module")
def outcomes(data):
  """Three pairs, learnt for a few steps, with the old units frozen and with nothing frozen."""

  def silent(*_):
    return lambda _: None

  with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
    patch.setattr(recipe, "PAIRS", PAIRS)
    return [recipe.learn(way, *data, STEPS, 0, silent) for way in recipe.WAYS[:2]]


def plain(network):
  """The network's parameters as NumPy arrays in dicts."""
  return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(network, nnx.Param)))


@pytest.fixture(scope="module")
def stages(data):
  """A network with a used optimizer, under the mask, and the same network grown."""
  with jax.numpy_dtype_promotion("standard"):
    network = recipe.Network(nnx.Rngs(0))
    params = nnx.state(network, nnx.Param)
    tx = recipe.masked(False)
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = tx.update(grads, tx.init(params), params)
    old = recipe.Stage(network, False, tx, state)
    return old, recipe.grown(old, recipe.masked, data[1].pixels[:32], jax.random.key(1))


def new_elements():
  """What the second pair brings, by hand: units 32 to 63 and outputs 2 and 3."""
  return {
    "hidden": {"kernel": np.arange(64) >= np.full((64, 1), 32), "bias": np.arange(64) >= 32},
    "head": {"kernel": np.arange(4) >= np.full((64, 1), 2), "bias": np.arange(4) >= 2},
  }


LEAVES = [(layer, name) for layer in ("hidden", "head") for name in ("kernel", "bias")]


def logits_in_numpy(p, pixels):
  p = jax.tree.map(np.float64, p)
  hidden = np.maximum(pixels @ p["hidden"]["kernel"] + p["hidden"]["bias"], 0)
  return hidden @ p["head"]["kernel"] + p["head"]["bias"]


def test_forgetting_by_hand():
  nan = np.nan
  a = np.array([[0.9, nan, nan], [0.5, 0.8, nan], [0.7, 0.9, 1.0]])
  # After the second task: 0.9 -> 0.5. After the third: 0.9 -> 0.7, and 0.8 became 0.9.
  np.testing.assert_allclose(_continual.forgetting(a), [nan, 0.4, (0.2 - 0.1) / 2])
  np.testing.assert_allclose(_continual.average(a), [0.9, 0.65, 2.6 / 3])


def test_forgetting_is_the_papers_sum():
  a = np.random.default_rng(0).random((6, 6))
  a[np.triu_indices(6, 1)] = np.nan
  for k in range(1, 6):
    total = sum(max(a[m, j] for m in range(j, k)) - a[k, j] for j in range(k))
    assert _continual.forgetting(a)[k] == pytest.approx(total / k)


def test_accuracy_with_and_without_the_task_told():
  # Three tasks, the last without outputs yet.
  logits = np.array([[3, 1, 9, 0], [2, 4, 0, 0], [9, 0, 2, 1], [0, 0, 3, 1], [5, 5, 5, 9]])
  labels, tasks = np.array([0, 0, 2, 3, 4]), [[0, 1], [2, 3], [4, 5]]
  aware = _continual.task_aware(logits, labels, tasks)
  among_all = _continual.class_incremental(logits, labels, tasks)
  np.testing.assert_array_equal(aware, [0.5, 0.5, np.nan])
  np.testing.assert_array_equal(among_all, [0.0, 0.0, np.nan])
  np.testing.assert_array_equal(
    _continual.class_incremental(logits[:, [0, 1, 3, 2]], labels, tasks), [0, 0.5, np.nan]
  )


def test_growing_keeps_old_weights_and_frees_the_new_ones(stages):
  old, grown = plain(stages[0].network), plain(stages[1].network)
  mask, new = nnx.to_pure_dict(stages[1].freeze_mask), new_elements()
  for layer, name in LEAVES:
    x, is_new = grown[layer][name], new[layer][name]
    assert x.shape == is_new.shape
    assert np.array_equal(np.broadcast_to(mask[layer][name], x.shape), ~is_new), (layer, name)
    corner = tuple(slice(n) for n in old[layer][name].shape)
    assert np.array_equal(bits(x[corner]), bits(old[layer][name])), (layer, name)
  assert not grown["head"]["kernel"][32:, :2].any()  # new units say nothing to old outputs
  assert grown["head"]["kernel"][:, 2:].all() and grown["hidden"]["kernel"][:, 32:].all()


def counts(state):
  """Adam's step counts."""
  return [int(x) for x in jax.tree.leaves(state) if x.dtype == jnp.int32 and x.ndim == 0]


def test_the_state_comes_from_the_surgery_and_goes_on(data, stages):
  old, grown = stages
  expected = grown.tx.init(nnx.state(grown.network, nnx.Param))
  shapes = [[x.shape for x in jax.tree.leaves(s)] for s in (grown.state, expected)]
  assert shapes[0] == shapes[1]
  moments = [x for x in jax.tree.leaves(grown.state) if x.dtype == jnp.float32]
  new = sum(x.sum() for layer in new_elements().values() for x in layer.values())
  assert sum(x.size for x in moments) == 2 * new == 2 * 2210
  assert not any(x.any() for x in moments)  # nothing that trains is old
  assert any(x.any() for x in jax.tree.leaves(old.state) if x.dtype == jnp.float32)
  assert set(counts(expected)) == {0} and set(counts(grown.state)) == {1}
  stage = grown._replace(network=nnx.clone(grown.network))
  batches = data[0].of([2, 3]).batches(2, 0)
  done, _ = recipe.trained(stage, recipe.WAYS[0], [2, 3], batches, lambda *_: lambda _: None)
  assert set(counts(done.state)) == {3}


def test_every_way_begins_with_the_same_new_weights(data, stages):
  network = recipe.Network(nnx.Rngs(0))
  tx = recipe.unmasked()
  free = recipe.Stage(network, False, tx, tx.init(nnx.state(network, nnx.Param)))
  other = recipe.grown(free, recipe.unmasked, data[1].pixels[:32], jax.random.key(1))
  assert same_bits(plain(other.network), plain(stages[1].network))


@pytest.mark.parametrize("own", [False, True])
def test_new_weights_train_as_if_they_were_variables_of_their_own(data, stages, own):
  train, test = data
  network = nnx.clone(stages[1].network)
  start, new = plain(network), new_elements()
  stage = stages[1]._replace(network=network, state=stages[1].tx.init(nnx.state(network)))
  way, batches = recipe.Way("", freezes=True, own=own), list(train.of([2, 3]).batches(4, 0))
  before = recipe.outputs(network, test)
  done, _ = recipe.trained(stage, way, [2, 3], batches, lambda *_: lambda _: None)
  after, ours = recipe.outputs(done.network, test), plain(done.network)
  assert np.array_equal(bits(before[:, :2]), bits(after[:, :2]))
  assert not np.array_equal(before[:, 2:], after[:, 2:])

  @jax.jit
  @jax.grad
  def grad(v, pixels, labels):
    h, o = start["hidden"], start["head"]
    first = jax.nn.relu(pixels @ h["kernel"][:, :32] + h["bias"][None, :32])
    second = jax.nn.relu(pixels @ v["in"] + v["in_bias"][None])
    old = first @ o["kernel"][:32, :2] + o["bias"][None, :2]
    scores = jnp.concatenate([first, second], 1) @ v["out"] + v["out_bias"][None]
    scores = scores if own else jnp.concatenate([old, scores], 1)
    answers = labels - 2 if own else labels
    return -jax.nn.log_softmax(scores)[jnp.arange(len(labels)), answers].mean()

  v = {
    "in": start["hidden"]["kernel"][:, 32:],
    "in_bias": start["hidden"]["bias"][32:],
    "out": start["head"]["kernel"][:, 2:],
    "out_bias": start["head"]["bias"][2:],
  }
  tx = optax.adamw(3e-3, weight_decay=0.01)
  state = tx.init(v)
  for x in batches:
    updates, state = tx.update(grad(v, x.pixels, x.labels), state, v)
    v = optax.apply_updates(v, updates)
  for (layer, name), x in zip(LEAVES, v.values(), strict=True):
    assert moved(start[layer][name], ours[layer][name], ~new[layer][name]) == [], (layer, name)
    shape = x.shape
    # Two programs in float32; four steps of 3e-3.
    got = ours[layer][name][new[layer][name]].reshape(shape)
    np.testing.assert_allclose(got, x, rtol=0, atol=3e-5)


def test_old_weights_and_outputs_keep_their_bits_to_the_end(outcomes):
  ours, free = outcomes
  for k, learnt in enumerate(ours.learnt):
    # 64 weights and a bias a unit; of two outputs the weights from every unit, and a bias.
    hidden, classes = 32 * (k + 1), 2 * (k + 1)
    trainable = 64 * 32 + 32 + 2 * hidden + 2
    total = 64 * hidden + hidden + hidden * classes + classes
    assert (learnt.shape, learnt.total) == ((hidden, classes), total)
    assert (learnt.audit.trainable, learnt.audit.frozen) == (trainable, total - trainable)
    assert learnt.audit.changed == 0 and learnt.audit.moved > 0.5 * trainable
    assert learnt.outputs_kept and learnt.ok
    # Two moments, the count, and the positions of blocks.
    assert 8 * trainable < learnt.state_bytes < 8 * trainable + 200
    assert free.learnt[k].total == total
    assert free.learnt[k].state_bytes == 8 * total + 4
  assert not any(x.ok for x in free.learnt[1:])


def test_growing_changes_old_outputs_by_no_more_than_rounding(data, outcomes):
  ours = outcomes[0]
  p, pixels = jax.tree.map(np.asarray, ours.params), data[1].pixels
  small = {
    "hidden": {"kernel": p["hidden"]["kernel"][:, :32], "bias": p["hidden"]["bias"][:32]},
    "head": {"kernel": p["head"]["kernel"][:32, :2], "bias": p["head"]["bias"][:2]},
  }
  # The first network within the last one: the same function of the pixels.
  np.testing.assert_allclose(
    logits_in_numpy(small, pixels), logits_in_numpy(p, pixels)[:, :2], rtol=1e-12, atol=1e-12
  )
  assert not p["head"]["kernel"][32:, :2].any() and not p["head"]["kernel"][64:, 2:4].any()
  assert all(x.difference <= 1e-6 for x in ours.learnt)


def test_matrices_are_what_the_final_network_says(data, outcomes):
  test = data[1]
  for outcome in outcomes:
    assert outcome.task_aware.shape == outcome.class_incremental.shape == (3, 3)
    upper = np.triu_indices(3, 1)
    assert np.isnan(outcome.task_aware[upper]).all()
    assert np.isfinite(outcome.task_aware[np.tril_indices(3)]).all()
    logits = logits_in_numpy(jax.tree.map(np.asarray, outcome.params), test.pixels)
    for j, pair in enumerate(PAIRS):
      about = np.isin(test.labels, pair)
      two = np.argmax(logits[about][:, pair], axis=1) + pair[0]
      every = np.argmax(logits[about], axis=1)
      assert outcome.task_aware[-1, j] == np.mean(two == test.labels[about])
      assert outcome.class_incremental[-1, j] == np.mean(every == test.labels[about])
  # Outputs with the same bits give the same answers.
  kept = outcomes[0].task_aware
  assert kept[0, 0] == kept[1, 0] == kept[2, 0] and kept[1, 1] == kept[2, 1]
  assert np.all(_continual.forgetting(kept)[1:] == 0)


def test_joint_training_sees_the_old_digits(monkeypatch, data):
  seen = {}

  def note(stage, way, pair, batches, tick):
    del tick
    labels = np.concatenate([x.labels for x in batches])
    seen.setdefault(way.name, []).append(sorted(set(labels.tolist())))
    return stage, 0

  monkeypatch.setattr(recipe, "trained", note)
  monkeypatch.setattr(recipe, "PAIRS", PAIRS[:2])
  for way in recipe.WAYS[1:3]:
    recipe.learn(way, *data, 5, 0, lambda *_: lambda _: None)
  assert list(seen.values()) == [[[0, 1], [2, 3]], [[0, 1], [0, 1, 2, 3]]]


def test_the_story_in_json(capsys, monkeypatch, tmp_path):
  monkeypatch.setattr(recipe, "PAIRS", PAIRS[:2])
  monkeypatch.setattr(recipe, "WAYS", recipe.WAYS[:1] + recipe.WAYS[2:4])
  said = facts(capsys, "grow", "--steps", "2", "--seed", "3", "--out", str(tmp_path))
  assert (said["demo"], said["seed"], said["steps"], said["ok"]) == ("grow", 3, 2, True)
  assert [x["name"] for x in said["runs"]] == [x.name for x in recipe.WAYS]
  for run in said["runs"]:
    second = run["tasks"][1]
    assert run["task_aware"]["accuracy"][0][1] is None
    assert run["task_aware"]["forgetting"][0] is None
    assert second["old_outputs_bit_equal"] == run["freezes"]
    assert (second["old_elements_changed"] == 0) == run["freezes"]
    assert second["trainable"] == (2210 if run["freezes"] else second["parameters"])
    assert second["old_elements"] == 64 * 32 + 32 + 64 * 2 + 2
  assert [(x["images"], x["loss_over"]) for x in said["runs"]] == [
    ("the pair's", "all digits so far"),
    ("all so far", "all digits so far"),
    ("the pair's", "the pair"),
  ]
  header = (tmp_path / "grow.png").read_bytes()[:24]
  assert header[:8] == b"\x89PNG\r\n\x1a\n"
  assert min(struct.unpack(">II", header[16:24])) > 900


def test_a_leak_is_told_and_exits_with_1(capsys, monkeypatch, tmp_path, outcomes):
  monkeypatch.setattr(recipe, "PAIRS", PAIRS)
  monkeypatch.setattr(_grow_picture, "save", lambda outcomes, images, path: path)
  ours, free = outcomes
  given = dict(zip(recipe.WAYS, (ours, free, free, ours, free), strict=True))
  monkeypatch.setattr(recipe, "learn", lambda way, *_: given[way]._replace(way=way))
  code, out = told(capsys, "grow", "--steps", "1", "--out", str(tmp_path))
  assert code == 0 and "CHANGED" not in out and "4,548 kept" in out and "grow.png" in out

  last = ours.learnt[-1]
  for slip in ({"outputs_kept": False}, {"audit": free.learnt[-1].audit}):
    leaking = ours._replace(learnt=[*ours.learnt[:-1], last._replace(**slip)])
    given[recipe.WAYS[3]] = leaking
    code, out = told(capsys, "grow", "--steps", "1", "--out", str(tmp_path))
    assert code == 1 and "FAILED" in out, slip
    given[recipe.WAYS[0]] = leaking
    code, out = told(capsys, "grow", "--steps", "1", "--out", str(tmp_path))
    assert code == 1 and "CHANGED" in out, slip


def test_an_optimizer_that_leaks_is_found(data, monkeypatch):
  def leaking(freeze_mask):
    return optax.chain(maskopt.masked_freeze(freeze_mask), recipe.unmasked())

  monkeypatch.setattr(recipe, "PAIRS", PAIRS[:2])
  monkeypatch.setattr(recipe, "masked", leaking)
  outcome = recipe.learn(recipe.WAYS[0], *data, 2, 0, lambda *_: lambda _: None)
  second = outcome.learnt[1]
  assert not second.ok and second.audit.changed > 1000
