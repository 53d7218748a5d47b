"""Several optimizers in one tree: every group trains as if it were alone."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from reference import adam, moved, same_bits

import maskopt

RNG = np.random.default_rng(0)
W = RNG.standard_normal((6, 4)).astype(np.float32)
B = RNG.standard_normal(4).astype(np.float32)
COLUMNS = np.array(["old", "old", "new", "new"])
CODES = RNG.integers(0, 3, (6, 4))
GRADS = [
  {
    "w": RNG.standard_normal((6, 4)).astype(np.float32),
    "b": RNG.standard_normal(4).astype(np.float32),
  }
  for _ in range(5)
]


@pytest.fixture(autouse=True)
def _promotion():
  """Optax's Adam itself needs promotion."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def params():
  return {"w": jnp.asarray(W), "b": jnp.asarray(B)}


def trained(tx, params, apply=maskopt.apply_updates, jit=True, form=lambda g, s: g):
  def step(params, state, grads):
    updates, state = tx.update(form(grads, state), state, params)
    return apply(params, updates), state

  state = tx.init(params)
  step = jax.jit(step) if jit else step
  for g in GRADS:
    params, state = step(params, state, jax.tree.map(jnp.asarray, g))
  return params, state


def packed(grads, state):
  return maskopt.pack(grads, maskopt.mask_of(state))


def oracle(codes, rates):
  """Each element by a NumPy Adam at the rate of its label; rate 0 stays."""
  new = np.array(W)
  for code, rate in rates.items():
    here = codes == code
    if rate:
      new[here] = adam(W[here], [g["w"][here] for g in GRADS], lr=rate)
  return new


@pytest.mark.parametrize("prefer", ["time", "memory"])
@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("form", [lambda g, s: g, packed])
def test_each_element_follows_the_adam_of_its_label(prefer, jit, form):
  labels = {"w": CODES, "b": 0}
  tx = maskopt.partition({0: optax.adam(0.1), 1: optax.adam(0.01), 2: None}, labels, prefer=prefer)
  new, _ = trained(tx, params(), jit=jit, form=form)
  np.testing.assert_allclose(new["w"], oracle(CODES, {0: 0.1, 1: 0.01, 2: 0}), atol=5e-6)
  assert moved(W, new["w"], CODES == 2) == []


@pytest.mark.parametrize("apply", [maskopt.apply_updates, optax.apply_updates])
def test_two_learning_rates_by_columns(apply):
  labels = {"w": COLUMNS, "b": COLUMNS}
  tx = maskopt.partition(
    {"old": optax.adam(0.001), "new": optax.adam(0.1)}, labels, prefer="memory"
  )
  new, state = trained(tx, params(), apply)
  codes = np.broadcast_to(COLUMNS, W.shape)
  np.testing.assert_allclose(new["w"], oracle(codes, {"old": 0.001, "new": 0.1}), atol=5e-6)
  assert state.inner_states["new"].inner_state[0].mu["w"].shape == (6, 2)


def test_norms_do_not_mix():
  clip = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))
  labels = {"w": COLUMNS, "b": "old"}
  tx = maskopt.partition({"old": clip, "new": optax.sgd(1.0)}, labels)
  grads = {"w": jnp.full((6, 4), 2.0).at[:, 2:].set(jnp.inf), "b": jnp.zeros(4)}
  updates, _ = tx.update(grads, tx.init(params()), params())
  np.testing.assert_allclose(updates["w"][:, :2], -0.1 / np.sqrt(12), rtol=1e-5)
  assert np.all(np.isneginf(updates["w"][:, 2:]))


def test_whole_leaves_agree_with_optax_bit_for_bit():
  optimizers = {"a": optax.adam(0.1), "b": optax.sgd(0.01)}
  labels = {"w": "a", "b": "b"}
  ours, _ = trained(maskopt.partition(optimizers, labels), params(), jit=False)
  theirs, _ = trained(optax.partition(optimizers, labels), params(), optax.apply_updates, jit=False)
  assert same_bits(ours, theirs)


def test_set_to_zero_freezes_and_its_elements_are_in_the_mask():
  tx = maskopt.partition(
    {"old": optax.set_to_zero(), "new": optax.adam(0.1)}, {"w": COLUMNS, "b": "old"}
  )
  mask = maskopt.mask_of(tx.init(params())).freeze_mask
  assert mask["b"] is True
  assert np.array_equal(mask["w"], np.broadcast_to(COLUMNS == "old", W.shape))


def test_the_mask_is_full_where_the_groups_leave_nothing_out():
  tx = maskopt.partition(
    {0: optax.sgd(0.1), 1: optax.sgd(1.0), 2: optax.sgd(0.2)}, {"w": CODES, "b": 1}
  )
  assert maskopt.mask_of(tx.init(params())).freeze_mask == {"w": False, "b": False}


def test_labels_may_be_a_prefix_in_other_containers_or_a_function():
  nested = {"layer": params(), "head": jnp.ones(3)}
  optimizers = {"slow": optax.sgd(0.1), "fast": optax.sgd(1.0)}
  forms = [
    {"layer": "slow", "head": "fast"},
    FrozenDict({"layer": "slow", "head": "fast"}),
    lambda p: {"layer": {"w": "slow", "b": "slow"}, "head": jnp.ones(p["head"].shape, jnp.int32)},
  ]
  optimizers_by_code = {"slow": optax.sgd(0.1), 1: optax.sgd(1.0)}
  results = []
  for labels in forms:
    tx = maskopt.partition(optimizers_by_code if callable(labels) else optimizers, labels)
    grads = jax.tree.map(jnp.ones_like, nested)
    results.append(tx.update(grads, tx.init(nested), nested)[0])
  assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


def test_masters_are_set_not_added():
  p = {"w": jnp.ones((6, 4), jnp.bfloat16), "b": jnp.ones(4, jnp.bfloat16)}
  tx = maskopt.partition(
    {"old": optax.sgd(1e-3), "new": optax.sgd(1e-2)},
    {"w": COLUMNS, "b": "old"},
    master_dtype=jnp.float32,
  )
  for jit in (True, False):
    state, new = tx.init(p), p
    step = lambda q, s: (lambda u, s: (maskopt.apply_updates(q, u), s))(*tx.update(p, s, q))  # noqa: E731
    step = jax.jit(step) if jit else step
    for _ in range(20):
      new, state = step(new, state)
    np.testing.assert_allclose(new["w"][0].astype(jnp.float32), [0.98, 0.98, 0.8, 0.8], atol=4e-3)
  dense, _ = tx.update(p, tx.init(p), p)
  np.testing.assert_allclose(dense["w"][0, 3], -0.0117, atol=1e-3)


def test_a_factor_after_it_scales_every_group():
  tx = optax.chain(
    maskopt.partition({"old": optax.sgd(0.1), "new": optax.sgd(1.0)}, {"w": COLUMNS, "b": "old"}),
    maskopt.scale_by_multiplier({"w": np.array([1.0, 2.0, 1.0, 2.0], np.float32), "b": 0.0}),
  )
  ones = jax.tree.map(jnp.ones_like, params())
  new = jax.jit(lambda p: maskopt.apply_updates(p, tx.update(ones, tx.init(p), p)[0]))(params())
  np.testing.assert_allclose(new["w"], W - np.array([0.1, 0.2, 1.0, 2.0]), rtol=1e-5, atol=1e-6)
  assert moved(B, new["b"], True) == []


def test_gradients_of_its_own_mask_reach_it_packed():
  labels = {"w": CODES, "b": 2}
  tx = maskopt.partition(
    {0: optax.adam(0.1), 1: optax.adam(0.01), 2: None}, labels, prefer="memory"
  )

  def step(p, state, packed):
    loss = lambda q: (q["w"] ** 2).sum() + (q["b"] ** 3).sum()  # noqa: E731
    grads = maskopt.grad(loss, maskopt.mask_of(state), packed=packed)(p)
    updates, state = tx.update(grads, state, p)
    return maskopt.apply_updates(p, updates)

  state = tx.init(params())
  results = [jax.jit(step, static_argnums=2)(params(), state, form) for form in (True, False)]
  assert same_bits(*results)
  assert moved(W, results[0]["w"], CODES == 2) == [] and moved(B, results[0]["b"], True) == []
  assert (np.asarray(results[0]["w"]) != W)[CODES != 2].all()


def test_updates_are_never_dense_in_one_jit():
  shape = (512, 512)
  codes = np.where(np.arange(512) < 8, 1, np.where(np.arange(512) < 16, 2, 0))[:, None]
  tx = maskopt.partition({0: None, 1: optax.adam(0.1), 2: optax.adam(0.01)}, codes)
  p = jnp.ones(shape)

  def step(p, state, g):
    updates, state = tx.update(g, state, p)
    return maskopt.apply_updates(p, updates), state

  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(p, tx.init(p), p).compile()
  assert compiled.cost_analysis()["flops"] < 20 * 16 * 512
  assert compiled.memory_analysis().temp_size_in_bytes < 16 * 512 * 4 * 6


def test_state_maps_over_parameters():
  tx = maskopt.partition({"a": optax.adam(0.1), "b": optax.sgd(0.1)}, {"w": "a", "b": "b"})
  state = tx.init(params())
  doubled = optax.tree_map_params(tx, lambda x: x + 1, state)
  assert float(doubled.inner_states["a"].inner_state[0].mu["w"][0, 0]) == 1.0


@pytest.mark.parametrize(
  ("labels", "message"),
  [
    ({"w": 5, "b": 0}, r"expected one of the labels 0, 1, got 5. Write one of them, or"),
    (
      {"w": [0, 1, 0, 1], "b": 0},
      r"at w/0, .* A list or dict is a tree of its own: write np.array",
    ),
    ({"w": np.zeros(6, int), "b": 1}, r"\(NumPy aligns the last axes: give it the shape \(6, 1\)"),
    ({"w": np.full((6, 4), 7), "b": 0}, "at w, expected one of the labels 0, 1, got 7"),
    ({"w": 0, "b": 0}, "expected an element with the label 1, got none"),
    ({"w": np.zeros(3, int), "b": 1}, r"at w, expected .* broadcast to \(6, 4\), got int64 of"),
    ({"w": np.zeros((1,), int), "b": 1}, "one element on a larger leaf"),
    ({"w": True, "b": 1}, "at w, expected a label"),
    ({"w": np.array([True] * 4), "b": 1}, "at w, expected str or int labels, got bool"),
    ({"w": 0, "b": 1.5}, "at b, expected a label, .* got float 1.5"),
    ({"w": 1}, "at b, expected a label, got none. The parameters are .* Give each parameter"),
    ({"w": 1, "b": 0, "c": 0}, "at c, expected a parameter, got none of that path"),
  ],
)
def test_wrong_labels_say_where(labels, message):
  tx = maskopt.partition({0: optax.sgd(0.1), 1: optax.sgd(0.2)}, labels)
  with pytest.raises((ValueError, TypeError), match=r"maskopt.partition\(labels=...\).*" + message):
    tx.init(params())


@pytest.mark.parametrize(
  ("optimizers", "message"),
  [
    ([optax.sgd(0.1)], "expected a dict of optimizers, got list"),
    ({1.5: optax.sgd(0.1)}, r"at optimizers.1.5., expected a label, str or int, as key, got float"),
    (
      {"a": 0.1},
      r"partition\(optimizers=...\)`: at optimizers.'a'., expected an Optax tr.* float 0.1",
    ),
    ({1: optax.sgd(0.1), "1": optax.sgd(0.2)}, "labels that read differently, got both '1' and 1"),
    ({"a": None, "b": optax.set_to_zero()}, "at least one optimizer that trains, got none"),
  ],
)
def test_wrong_optimizers_are_refused(optimizers, message):
  with pytest.raises((ValueError, TypeError), match=message):
    maskopt.partition(optimizers, {"w": "a"})


def test_a_foreign_state_is_refused():
  tx = maskopt.partition({"a": optax.sgd(0.1)}, {"w": "a", "b": "a"})
  other = maskopt.partition({"b": optax.sgd(0.1)}, {"w": "b", "b": "b"})
  for state in (other.init(params()), optax.sgd(0.1).init(params())):
    with pytest.raises(ValueError, match="expected the state of groups a"):
      tx.update(params(), state, params())


def test_the_masks_of_a_partition_die_with_its_state():
  """Their index sets would be gigabytes after some masks; eager steps work each union out once."""
  labels = {"w": np.arange(4) % 2, "b": 0}
  tx = maskopt.partition({0: optax.sgd(0.1), 1: optax.sgd(1.0)}, labels, prefer="memory")
  state = tx.init(params())
  _, state = tx.update(params(), state, params())
  union = maskopt.mask_of(state).static
  assert maskopt.mask_of(tx.update(params(), state, params())[1]).static is union
  alive = [
    weakref.ref(union),
    *(weakref.ref(s.layouts.static) for s in state.inner_states.values()),
  ]
  del union, state
  gc.collect()
  assert [ref() for ref in alive] == [None] * 3
