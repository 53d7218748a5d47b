"""What goes wrong elsewhere: each a failure of today's tools, shown where it is short, and ours.

Masks, states, steps and thaws; `test_failures_bits.py` has the bits and what sees whole leaves.
"""

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx

import maskopt

PARAMS = {"w": jnp.ones(4), "b": jnp.ones(2)}
ELEMENTS = np.array([True, False, True, False])


@pytest.fixture(autouse=True)
def _promotion():
  """Optax's Adam itself needs promotion."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def run(tx, grads, params=PARAMS, steps=3, apply=maskopt.apply_updates):
  state = tx.init(params)
  for _ in range(steps):
    updates, state = tx.update(grads, state, params)
    params = apply(params, updates)
  return params


def ours(inner, mask, **kwargs):
  return maskopt.selective_transform(inner, freeze_mask=mask, **kwargs)


# Masks.


@pytest.mark.parametrize("transform", ["freeze", "selective_transform", "masked"])
def test_array_masks(transform):
  """Optax freezes whole leaves only: an array is asked for its truth value."""
  mask = {"w": ELEMENTS, "b": False}
  theirs = {
    "freeze": lambda: optax.chain(optax.sgd(0.5), optax.freeze(mask)),
    "selective_transform": lambda: optax.selective_transform(optax.sgd(0.5), freeze_mask=mask),
    "masked": lambda: optax.masked(optax.sgd(0.5), mask),
  }[transform]
  with pytest.raises(ValueError, match="truth value of an array"):
    run(theirs(), PARAMS, apply=optax.apply_updates)
  after = run(ours(optax.sgd(0.5), mask), PARAMS, steps=1)
  assert after["w"].tolist() == [1, 0.5, 1, 0.5]


def test_a_mask_that_is_a_function():
  """optax.selective_transform takes a function for a true value and freezes everything."""

  def mask(params):
    return {"w": True, "b": False}

  theirs = optax.selective_transform(optax.sgd(0.5), freeze_mask=mask)
  assert run(theirs, PARAMS, apply=optax.apply_updates)["b"].tolist() == [1, 1]
  assert run(ours(optax.sgd(0.5), mask), PARAMS, steps=1)["b"].tolist() == [0.5, 0.5]


def test_the_string_false_is_not_a_mask():
  mask = {"w": "False", "b": "False"}
  theirs = optax.selective_transform(optax.sgd(0.5), freeze_mask=mask)
  assert run(theirs, PARAMS, apply=optax.apply_updates)["w"].tolist() == [1] * 4  # frozen
  with pytest.raises(TypeError, match=r"at b, expected bool .*, got str 'False'; at w, .*'False'"):
    ours(optax.sgd(0.5), mask).init(PARAMS)


def test_a_one_element_array_is_not_a_bool():
  mask = {"w": np.array([[True]]), "b": np.array([True])}
  theirs = optax.selective_transform(optax.sgd(0.5), freeze_mask=mask)
  assert run(theirs, PARAMS, apply=optax.apply_updates)["w"].tolist() == [1] * 4  # as a scalar
  with pytest.raises(
    ValueError, match=r"at b, .*one element on a larger leaf: write a bool\); at w"
  ):
    ours(optax.sgd(0.5), mask).init(PARAMS)


def test_frozen_means_frozen_and_not_unmasked():
  """optax.masked hands raw gradients on where the mask is False, and they are added."""
  train = {"w": True, "b": False}
  theirs = optax.masked(optax.adamw(0.1), train)
  assert run(theirs, PARAMS, steps=1, apply=optax.apply_updates)["b"].tolist() == [2, 2]
  after = run(ours(optax.adamw(0.1), maskopt.invert(train)), PARAMS)
  assert reference.same_bits(after["b"], PARAMS["b"])


def test_a_traced_mask():
  def step(mask):
    return run(ours(optax.sgd(0.5), {"w": mask, "b": False}), PARAMS, steps=1)

  def theirs(mask):
    tx = optax.selective_transform(optax.sgd(0.5), freeze_mask={"w": mask, "b": False})
    return run(tx, PARAMS, steps=1, apply=optax.apply_updates)

  with pytest.raises(jax.errors.TracerBoolConversionError):
    jax.jit(theirs)(jnp.array(True))
  assert jax.jit(step)(jnp.asarray(ELEMENTS))["w"].tolist() == [1, 0.5, 1, 0.5]


def test_a_state_of_another_mask_is_an_error_in_words():
  a = optax.selective_transform(optax.adam(0.1), freeze_mask={"w": True, "b": False})
  b = optax.selective_transform(optax.adam(0.1), freeze_mask={"w": False, "b": True})
  with pytest.raises(ValueError, match="pytree structure error"):  # and no word of a mask
    a.update(PARAMS, b.init(PARAMS), PARAMS)
  every = optax.selective_transform(optax.adam(0.1), freeze_mask={"w": False, "b": False})
  with pytest.raises(TypeError, match="can't multiply sequence by non-int"):
    every.update(PARAMS, a.init(PARAMS), PARAMS)
  a, b = (ours(optax.adam(0.1), {"w": w, "b": not w}) for w in (True, False))
  match = r"at b, expected a state that trains 2, got 0; at w, .*another mask: call init again"
  with pytest.raises(ValueError, match=match):
    a.update(PARAMS, b.init(PARAMS), PARAMS)
  with pytest.raises(ValueError, match=r"at w, expected a state that trains 4, got 0"):
    ours(optax.adam(0.1), False).update(PARAMS, a.init(PARAMS), PARAMS)


@pytest.mark.parametrize("container", [flax.core.freeze, lambda p: nnx.State(
  {k: nnx.Param(v) for k, v in p.items()})], ids=["FrozenDict", "nnx.State"])  # fmt: skip
def test_a_plain_dict_of_masks_fits_other_containers(container):
  params = container(PARAMS)
  mask = {"w": True, "b": False}
  with pytest.raises(Exception):  # noqa: B017 - structures that differ
    optax.selective_transform(optax.sgd(0.5), freeze_mask=mask).init(params)
  after = run(ours(optax.sgd(0.5), mask), params, params, steps=1)
  assert jax.tree.structure(after) == jax.tree.structure(params)
  b, w = jax.tree.leaves(after)
  assert (b.tolist(), w.tolist()) == ([0.5, 0.5], [1, 1, 1, 1])


def test_a_callable_module_of_masks_is_no_function():
  """A callable Equinox module as mask or labels: optax.partition calls it."""
  eqx = pytest.importorskip("equinox")

  class Linear(eqx.Module):
    weight: object

    def __call__(self, x):
      raise AssertionError("a module of masks must not be called")

  params, mask = Linear(jnp.ones(4)), Linear(ELEMENTS)
  with pytest.raises(AssertionError, match="must not be called"):
    optax.partition({"a": optax.sgd(0.5)}, Linear("a")).init(params)
  after = run(ours(optax.sgd(0.5), mask), params, params, steps=1)
  assert after.weight.tolist() == [1, 0.5, 1, 0.5]


# Optimizers that move what is frozen.


def test_weight_decay_after_freezing():
  """Frozen gradients are zero, yet decay moves the weight: 1.0 becomes 0.9703 in three steps."""
  adamw = optax.adamw(0.1, weight_decay=0.1)
  theirs = optax.chain(optax.freeze({"w": True, "b": False}), adamw)
  moved = run(theirs, PARAMS, apply=optax.apply_updates)["w"]
  np.testing.assert_allclose(moved, 0.9703, atol=1e-4)
  after = run(ours(adamw, {"w": ELEMENTS, "b": False}), PARAMS)
  assert reference.moved(PARAMS["w"], after["w"], ELEMENTS) == []
  assert (np.asarray(after["w"])[~ELEMENTS] < 0.97).all()


def test_momentum_after_zeroed_gradients():
  """Gradients zeroed under a running Adam: three steps at 0.1 move the weights by -0.21."""
  adam, params = optax.adam(0.1), {"w": jnp.ones(4)}
  state = adam.init(params)
  for _ in range(3):
    _, state = adam.update({"w": jnp.ones(4)}, state, params)
  theirs = params
  for _ in range(3):
    updates, state = adam.update({"w": jnp.zeros(4)}, state, theirs)
    theirs = optax.apply_updates(theirs, updates)
  np.testing.assert_allclose(theirs["w"], 1 - 0.2108, atol=1e-4)

  tx = ours(adam, {"w": maskopt.runtime(jnp.zeros(4, bool))})
  state = tx.init(params)
  for _ in range(3):
    _, state = tx.update({"w": jnp.ones(4)}, state, params)
  now = {"w": maskopt.runtime(jnp.asarray(ELEMENTS))}
  ours_after = params
  for _ in range(3):
    updates, state = tx.update({"w": jnp.zeros(4)}, state, ours_after, freeze_mask=now)
    ours_after = maskopt.apply_updates(ours_after, updates)
  assert reference.moved(params["w"], ours_after["w"], ELEMENTS) == []


def test_noise_moves_frozen_weights():
  noisy = optax.noisy_sgd(0.1, key=0)
  theirs = run(optax.chain(optax.freeze({"w": True, "b": False}), noisy), PARAMS)
  assert (np.asarray(theirs["w"]) != 1).all()
  after = run(ours(noisy, {"w": ELEMENTS, "b": False}), PARAMS)
  assert reference.moved(PARAMS["w"], after["w"], ELEMENTS) == []


# Frozen gradients that reach what trains.


def test_a_large_frozen_gradient_and_the_global_norm():
  """Clipping first lets frozen gradients shrink the trainable step: 0.1 becomes 0.0004."""
  params = {"w": jnp.ones(6), "b": jnp.zeros(2)}
  grads = {"w": jnp.full(6, 100.0), "b": jnp.array([1.0, 0.0])}
  mask = {"w": True, "b": False}
  inner = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
  theirs = run(optax.chain(inner, optax.freeze(mask)), grads, params, steps=1)
  np.testing.assert_allclose(-theirs["b"][0], 0.0004, atol=1e-5)
  after = run(ours(inner, mask), grads, params, steps=1)
  np.testing.assert_allclose(-after["b"][0], 0.1, rtol=1e-5)
  # The same for elements of one leaf.
  grads = {"w": jnp.where(ELEMENTS, 100.0, jnp.array([0.0, 1.0, 0.0, 0.0])), "b": jnp.zeros(2)}
  after = run(ours(inner, {"w": ELEMENTS, "b": False}), grads, steps=1)
  np.testing.assert_allclose(1 - after["w"][1], 0.1, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_nan_in_a_frozen_gradient(value):
  grads = {"w": jnp.full(4, value), "b": jnp.ones(2)}
  inner = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
  theirs = run(optax.chain(inner, optax.freeze({"w": True, "b": False})), grads)
  assert np.isnan(theirs["b"]).all() or (np.asarray(theirs["b"]) == 1).all()
  for mask in ({"w": True, "b": False}, {"w": np.ones(4, bool), "b": np.array([True, False])}):
    after = run(ours(inner, mask), grads)
    assert reference.same_bits(after["w"], PARAMS["w"])
    assert np.isfinite(after["b"]).all() and after["b"][1] < 1
  # The same beside trainable elements of one leaf: dense with zeros, packed, and as runtime data.
  grads["w"] = jnp.where(ELEMENTS, value, 1.0)
  for w, prefer in (
    (ELEMENTS, "time"),
    (ELEMENTS, "memory"),
    (maskopt.runtime(ELEMENTS), "time"),
    (maskopt.runtime(ELEMENTS, 2), "time"),
  ):
    after = run(ours(inner, {"w": w, "b": True}, prefer=prefer), grads)
    assert reference.moved(PARAMS["w"], after["w"], ELEMENTS) == []
    np.testing.assert_allclose(np.asarray(after["w"])[~ELEMENTS], 1 - 0.3 / 2**0.5, rtol=1e-5)


def test_apply_if_finite_outside_skips_good_steps():
  grads = {"w": jnp.full(4, np.nan), "b": jnp.ones(2)}
  mask = {"w": True, "b": False}
  theirs = optax.apply_if_finite(optax.selective_transform(optax.sgd(0.1), freeze_mask=mask), 9)
  assert run(theirs, grads, apply=optax.apply_updates)["b"].tolist() == [1, 1]
  after = run(ours(optax.apply_if_finite(optax.sgd(0.1), 9), mask), grads)
  np.testing.assert_allclose(after["b"], 0.7, rtol=1e-6)


# Freezing and thawing.


def _adam_steps(update, state, params, grads, freeze):
  for g in grads:
    updates, state = update({"w": g}, state, params, freeze_mask={"w": freeze})
  return updates, state


def test_stale_moments_after_a_thaw():
  """Frozen after Adam, then thawed: the old moments point the wrong way. Ours start anew."""
  params = {"w": jnp.zeros(2)}
  state = optax.adam(0.1).init(params)
  for g in (1.0, 1.0, 0.0, 0.0, -0.1):  # two steps, frozen by zeros twice, then the other way
    updates, state = optax.adam(0.1).update({"w": jnp.full(2, g)}, state, params)
  assert (np.asarray(updates["w"]) < 0).all()  # downhill is up

  thawed = maskopt.runtime(jnp.array([True, False]), 1)
  other = maskopt.runtime(jnp.array([False, True]), 1)
  tx = ours(optax.adam(0.1), {"w": thawed})
  state, update = tx.init(params), jax.jit(tx.update)
  _, state = _adam_steps(update, state, params, [jnp.ones(2)] * 2, thawed)
  _, state = _adam_steps(update, state, params, [jnp.ones(2)] * 2, other)
  updates, _ = _adam_steps(update, state, params, [jnp.full(2, -0.1)], thawed)
  assert updates["w"][1] > 0 and updates["w"][0] == 0


def test_zeroed_gradients_and_the_first_step_after_a_thaw():
  """Gradients zeroed for 1,000 steps under Adam: the first steps are of 2.5 to 5.2 learning rates.

  Its bias correction is global: at step 1,000 it corrects nothing, though these moments are new.
  """

  def late(state):
    adam = state[0]._replace(count=jnp.array(1000, jnp.int32))
    return (adam, *state[1:])

  adam, params = optax.adam(1.0), {"w": jnp.zeros(2)}
  state, theirs = late(adam.init(params)), []
  for _ in range(20):  # the 19th is the longest
    updates, state = adam.update({"w": jnp.ones(2)}, state, params)
    theirs.append(-float(updates["w"][0]))
  np.testing.assert_allclose((theirs[0], max(theirs)), (2.515, 5.241), atol=1e-3)

  before, after = (maskopt.runtime(jnp.array([f, not f]), 1) for f in (True, False))
  tx = ours(adam, {"w": before})
  state = tx.init(params)
  state = state._replace(inner_state=late(state.inner_state))
  steps = []
  grads, update = {"w": jnp.ones(2)}, jax.jit(tx.update)
  for _ in range(20):
    updates, state = update(grads, state, params, freeze_mask={"w": after})
    assert updates["w"][1] == 0
    steps.append(-float(updates["w"][0]))
  np.testing.assert_allclose(steps, 1.0, atol=1e-4)


# State.


def test_pruned_weights_have_no_optimizer_state():
  """A mask over a dense optimizer keeps its whole state; at 1% density ours keeps 1.5%."""
  params = {"w": jnp.zeros(1_000_000)}
  mask = np.ones(1_000_000, bool)
  mask[np.random.default_rng(0).permutation(1_000_000)[:10_000]] = False
  dense = sum(x.nbytes for x in jax.tree.leaves(optax.adamw(0.1).init(params)))
  packed = sum(x.nbytes for x in jax.tree.leaves(ours(optax.adamw(0.1), {"w": mask}).init(params)))
  assert (dense, packed) == (8_000_004, 120_004)  # 12 bytes an element: two moments, one position


def test_accumulated_gradients_of_frozen_leaves():
  """MultiSteps around a frozen leaf of a million elements holds its gradients; inside it does not.

  optax.selective_transform gives MultiSteps the same choice, but whole leaves only.
  """
  params = {"base": jnp.zeros(1_000_000), "head": jnp.zeros(10)}
  mask = {"base": True, "head": False}

  def size(tx):
    return sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))

  for freezing in (optax.selective_transform, maskopt.selective_transform):
    assert size(optax.MultiSteps(freezing(optax.adam(0.1), freeze_mask=mask), 2)) == 4_000_132
  assert size(ours(optax.MultiSteps(optax.adam(0.1), 2), mask)) == 132
  # The same for one element of a leaf, of which Optax would hold all.
  mask["base"] = np.arange(1_000_000) != 7
  assert size(ours(optax.MultiSteps(optax.adam(0.1), 2), mask)) <= 132 + 4 * 4


def test_batch_norm_statistics_are_not_parameters():
  """Freezing by a filter leaves running statistics to move, and so do we: no update touches them.

  A mask is over parameters; what a forward pass writes is the layer's to freeze. This test says
  which is which: `use_running_average` holds the statistics, the mask holds scale and bias.
  """
  for frozen_statistics in (False, True):
    norm = nnx.BatchNorm(3, use_running_average=frozen_statistics, rngs=nnx.Rngs(0))
    tx = ours(optax.adamw(0.1), True)
    optimizer = nnx.Optimizer(norm, tx, wrt=nnx.Param)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(norm)))

    def loss(m):
      return (m(jnp.arange(12.0).reshape(4, 3)) ** 2).sum()

    optimizer.update(norm, nnx.grad(loss)(norm))
    after = nnx.to_pure_dict(nnx.state(norm))
    assert reference.same_bits(after["scale"], before["scale"])
    assert reference.same_bits(after["mean"], before["mean"]) == frozen_statistics
