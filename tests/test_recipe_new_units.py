"""`maskopt demo new-units` against NumPy's gradients and plain Optax on separate variables."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes import facts, told
from reference import bits, moved

from maskopt.demo import _data, _ways

recipe = sys.modules["maskopt.demo.new_units"]  # the package has the command by that name


@pytest.fixture(autouse=True)
def lenient():
  """Optax promotes dtypes."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture(scope="module")
def images():
  return _data.digits(0)[0]


@pytest.fixture(scope="module")
def grown():
  return recipe.grow(recipe.small(0), 1)


def widened(p):
  """What is new in a grown network, True = new: units 256 to 265, output 10."""
  kernel = np.zeros((266, 11), bool)
  kernel[:, 10] = True
  return {
    "features": {"kernel": np.zeros((64, 128), bool), "bias": np.zeros(128, bool)},
    "dense": {
      "kernel": np.broadcast_to(np.arange(266) >= 256, (128, 266)),
      "bias": np.arange(266) >= 256,
    },
    "output": {"kernel": kernel, "bias": np.arange(11) == 10},
  }


def in_numpy(p, batches, rate):
  """Adam in float64 on the new weights, with gradients derived by hand."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
  new = widened(p)
  mu, nu = (jax.tree.map(np.zeros_like, p) for _ in range(2))
  for t, (pixels, labels) in enumerate(batches, 1):
    first = np.maximum(pixels @ p["features"]["kernel"] + p["features"]["bias"], 0)
    second = np.maximum(first @ p["dense"]["kernel"] + p["dense"]["bias"], 0)
    scores = second @ p["output"]["kernel"] + p["output"]["bias"]
    shares = np.exp(scores - scores.max(1, keepdims=True))
    error = (shares / shares.sum(1, keepdims=True) - np.eye(11)[labels]) / len(labels)
    below = (error @ p["output"]["kernel"].T) * (second > 0)
    g = {
      "features": jax.tree.map(np.zeros_like, p["features"]),
      "dense": {"kernel": first.T @ below, "bias": below.sum(0)},
      "output": {"kernel": second.T @ error, "bias": error.sum(0)},
    }
    mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mu, g)
    nu = jax.tree.map(lambda n, g: 0.999 * n + 0.001 * g * g, nu, g)
    p = jax.tree.map(
      lambda x, m, n, w, t=t: np.where(
        w, x - rate * (m / (1 - 0.9**t)) / (np.sqrt(n / (1 - 0.999**t)) + 1e-8), x
      ),
      p, mu, nu, new,
    )  # fmt: skip
  return p


@pytest.mark.parametrize("make", [_ways.masked, _ways.stopped])
def test_new_weights_follow_a_hand_written_adam_and_old_ones_stay(images, grown, make):
  batches = list(recipe.with_broken(images, 0).batches(5, 0))
  way = make(optax.adam(3e-3), recipe.new_loss, recipe.old_is_frozen(grown))
  after, _ = _ways.train(way, grown, batches)
  expected, new = in_numpy(grown, batches, 3e-3), widened(grown)
  for layer, name in ((x, y) for x in grown for y in ("kernel", "bias")):
    old, x = grown[layer][name], np.asarray(after[layer][name])
    assert moved(old, x, ~new[layer][name]) == [], (layer, name)
    # float32 against float64: a thousandth of one step.
    np.testing.assert_allclose(x, expected[layer][name], rtol=0, atol=3e-6)
    assert (not np.array_equal(x, old)) == new[layer][name].any(), (layer, name)


def test_the_masks_are_the_old_and_the_new_part(grown):
  new = widened(grown)
  for layer, name in ((x, y) for x in grown for y in ("kernel", "bias")):
    shape = grown[layer][name].shape
    frozen = np.broadcast_to(recipe.old_is_frozen(grown)[layer][name], shape)
    assert np.array_equal(frozen, ~new[layer][name]), (layer, name)
    spare = new[layer][name].copy()
    if (layer, name) == ("output", "kernel"):
      spare[256:] = True  # the zeros between new units and old outputs belong to neither
    other = np.broadcast_to(recipe.new_is_frozen(grown)[layer][name], shape)
    assert np.array_equal(other, spare), (layer, name)


def test_growing_keeps_every_bit_of_the_old_outputs(images, grown):
  old, pixels = recipe.small(0), images.pixels
  assert grown["dense"]["kernel"].shape == (128, 266) and grown["output"]["kernel"].shape == (
    266,
    11,
  )
  outputs = np.asarray(jax.jit(recipe.grown_outputs)(grown, pixels))
  alone = np.asarray(jax.jit(recipe.old_outputs)(old, pixels))
  assert np.array_equal(bits(outputs[:, :10]), bits(alone))
  straight = np.asarray(jax.jit(recipe.old_outputs)(grown, pixels))  # matmuls of the grown widths
  np.testing.assert_allclose(outputs, straight, rtol=1e-5, atol=1e-5)
  assert np.ptp(outputs[:, 10]) > 0.1


def test_alternating_is_two_optimizers_on_variables_of_their_own(images, grown):
  digits = list(images.batches(6, 1))
  mixed = list(recipe.with_broken(images, 0).batches(6, 2))
  slow = _ways.masked(optax.adam(1e-4), recipe.old_loss, recipe.new_is_frozen(grown))
  fast = _ways.masked(optax.adam(3e-3), recipe.new_loss, recipe.old_is_frozen(grown))
  after, _ = _ways.alternate(slow, fast, grown, zip(digits, mixed, strict=True))

  def dense(layer, x):
    return x @ layer["w"] + layer["b"][None]

  def cross_entropy(scores, labels):
    return -jax.nn.log_softmax(scores)[jnp.arange(len(labels)), labels].mean()

  def outputs(old, new, pixels):
    first = jax.nn.relu(dense(old[0], pixels))
    second = jax.nn.relu(dense(old[1], first))
    joined = jnp.concatenate([second, jax.nn.relu(dense(new[0], first))], axis=1)
    return dense(old[2], second), dense(new[1], joined)

  @jax.jit
  @jax.grad
  def of_old(old, new, x):
    return cross_entropy(outputs(old, new, x.pixels)[0], x.labels)

  @jax.jit
  @jax.grad
  def of_new(new, old, x):
    return cross_entropy(jnp.concatenate(outputs(old, new, x.pixels), axis=1), x.labels)

  d, o = grown["dense"], grown["output"]
  old = [
    {"w": grown["features"]["kernel"], "b": grown["features"]["bias"]},
    {"w": d["kernel"][:, :256], "b": d["bias"][:256]},
    {"w": o["kernel"][:256, :10], "b": o["bias"][:10]},
  ]
  new = [
    {"w": d["kernel"][:, 256:], "b": d["bias"][256:]},
    {"w": o["kernel"][:, 10:], "b": o["bias"][10:]},
  ]
  old_tx, new_tx = optax.adam(1e-4), optax.adam(3e-3)
  old_state, new_state = old_tx.init(old), new_tx.init(new)
  for x, y in zip(digits, mixed, strict=True):
    updates, old_state = old_tx.update(of_old(old, new, x), old_state)
    old = optax.apply_updates(old, updates)
    updates, new_state = new_tx.update(of_new(new, old, y), new_state)
    new = optax.apply_updates(new, updates)

  small, fresh = recipe.small_part(after), recipe.new_part(after)
  # Two programs in float32; a slow step is 1e-4, a fast one 3e-3.
  for layer, x in zip(("features", "dense", "output"), old, strict=True):
    np.testing.assert_allclose(small[layer]["kernel"], x["w"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(small[layer]["bias"], x["b"], rtol=0, atol=1e-6)
  flat = [x[k] for x in new for k in ("w", "b")]
  for ours, x in zip(fresh, flat, strict=True):
    np.testing.assert_allclose(ours, x, rtol=0, atol=1e-5)
  assert not np.asarray(after["output"]["kernel"][256:, :10]).any()


def test_both_steps_are_one_program_traced_once(images, grown):
  traced = []

  def counted(loss):
    def counting(params, x):
      traced.append(loss)
      return loss(params, x)

    return counting

  def traces(steps):
    traced.clear()
    slow, fast = (
      _ways.masked(optax.sgd(0.1), counted(loss), mask(grown))
      for loss, mask in (
        (recipe.old_loss, recipe.new_is_frozen),
        (recipe.new_loss, recipe.old_is_frozen),
      )
    )
    batches = list(images.batches(steps, 0))
    _ways.alternate(slow, fast, grown, zip(batches, batches, strict=True))
    return len(traced)

  assert 2 <= traces(1) == traces(4)


def test_broken_digits_are_two_halves_of_different_digits(images):
  both, n = recipe.with_broken(images, 3), len(images.labels)
  broken = both.pixels[n:]
  assert set(both.labels[n:]) == {10} and np.array_equal(both.labels[:n], images.labels)
  assert len(broken) > 0.8 * n
  tops = {x[:32].tobytes(): y for x, y in zip(images.pixels, images.labels, strict=True)}
  bottoms = {x[32:].tobytes(): y for x, y in zip(images.pixels, images.labels, strict=True)}
  assert all(x[:32].tobytes() in tops and x[32:].tobytes() in bottoms for x in broken)
  whole = {x.tobytes() for x in images.pixels}
  assert not any(x.tobytes() in whole for x in broken)


def test_the_story_in_json_and_in_words(capsys, monkeypatch):
  said = facts(capsys, "new-units", "--steps", "8", "--seed", "1")
  assert said["ok"] and said["steps"] == 8
  rows = {row["way"]: row for row in said["new_only"]}
  for optimizer in ("Adam", "AdamW"):
    ours = rows[f"freeze mask, {optimizer}"]
    assert ours["old_outputs_bit_equal"] and ours["frozen_changed"] == 0
    # 64 * 128 + 128 features, 128 * 256 + 256 units, all of the old outputs' columns and biases.
    assert ours["frozen"] == 64 * 128 + 128 + 128 * 256 + 256 + 266 * 10 + 10
    assert ours["optimizer_bytes"] < 13_000
  assert rows["stop_gradient, Adam"]["old_outputs_bit_equal"]
  assert rows["stop_gradient, AdamW"]["frozen_changed"] > 1000
  assert not rows["stop_gradient, AdamW"]["old_outputs_bit_equal"]
  two, stopped, shared = said["alternating"]
  assert max(two["old_weights_from_alone"], stopped["old_weights_from_alone"]) < 1e-6
  assert shared["old_weights_from_alone"] > 1e-4

  monkeypatch.setattr(recipe, "train_new", lambda *_: said["new_only"])
  monkeypatch.setattr(recipe, "train_both", lambda *_: said["alternating"])
  code, out = told(capsys, "new-units", "--steps", "1")
  assert code == 0
  assert "tf.stop_gradient(W_old)" in out and '("dense", maskopt.units(slice(256)))' in out
  assert out.count("CHANGED") == 2  # weights and outputs under stop_gradient and AdamW
  said["new_only"][0]["frozen_changed"] = 1
  code, out = told(capsys, "new-units", "--steps", "1")
  assert code == 1 and "FAILED" in out
