"""The transforms among Optax's wrappers, JAX's transformations and other people's trainers."""

import warnings

import equinox as eqx
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import strategies
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from optax import contrib

import maskopt

UNITS = np.array([True, False, True])
PARAMS = {"w": jnp.arange(1.0, 7.0).reshape(2, 3), "b": jnp.arange(3.0)}
MASK = {"w": UNITS, "b": True}
FROZEN = {"w": np.tile(UNITS, (2, 1)), "b": np.ones(3, bool)}


@pytest.fixture(autouse=True)
def _promotion():
  """Optax's Adam itself needs promotion."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def selective(inner, mask=MASK, **kwargs):
  return maskopt.selective_transform(inner, freeze_mask=mask, **{"prefer": "memory"} | kwargs)


def train(tx, params=PARAMS, steps=5, apply=maskopt.apply_updates, seed=0, frozen_value=None):
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return apply(params, updates), state

  step, state = jax.jit(step), tx.init(params)
  for i in range(steps):
    grads = strategies.gradients(seed + i, params)
    if frozen_value is not None:
      grads = {k: jnp.where(FROZEN[k], frozen_value, g) for k, g in grads.items()}
    params, state = step(params, state, grads)
  return params, state


def unmoved(after, before=PARAMS):
  return all(reference.moved(before[k], after[k], FROZEN[k]) == [] for k in before)


def same_trainable(a, b):
  for k in a:
    trains = ~FROZEN[k]
    np.testing.assert_allclose(np.asarray(a[k])[trains], np.asarray(b[k])[trains], rtol=1e-5)


def alone(inner, steps=5):
  """The inner optimizer on the trainable column by itself, back in place."""
  params, state = {"w": PARAMS["w"][:, 1:2]}, inner.init({"w": PARAMS["w"][:, 1:2]})
  for i in range(steps):
    grads = {"w": strategies.gradients(i, PARAMS)["w"][:, 1:2]}
    updates, state = inner.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return PARAMS | {"w": PARAMS["w"].at[:, 1:2].set(params["w"])}


# Wrappers of Optax.

WRAPPERS = {
  "chain": lambda tx: optax.chain(tx, optax.scale(0.5)),
  "named_chain": lambda tx: optax.named_chain(("a", tx), ("b", optax.scale(0.5))),
  "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
  "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
  "flatten": lambda tx: optax.flatten(tx),
  "with_extra_args": optax.with_extra_args_support,
  "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step > 1),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_inside_a_wrapper_is_as_if_alone(name):
  inner = WRAPPERS[name](optax.adam(0.1))
  after, _ = train(selective(inner), frozen_value=jnp.nan)
  assert unmoved(after)
  same_trainable(after, alone(optax.with_extra_args_support(inner)))


@pytest.mark.parametrize("name", sorted(set(WRAPPERS) - {"flatten"}))
def test_below_a_wrapper(name):
  after, _ = train(WRAPPERS[name](selective(optax.adam(0.1))))
  assert unmoved(after)
  same_trainable(after, alone(WRAPPERS[name](optax.adam(0.1))))


def test_flatten_outside_hides_the_leaves_and_is_refused():
  with pytest.raises(ValueError, match=r"at w, expected a parameter, got none of that path"):
    optax.flatten(selective(optax.adam(0.1))).init(PARAMS)


def test_apply_if_finite_inside_ignores_frozen_gradients():
  """Outside, a NaN in a frozen gradient skips good steps; inside it is never seen."""
  inside, _ = train(selective(optax.apply_if_finite(optax.sgd(0.1), 5)), frozen_value=jnp.nan)
  outside, _ = train(optax.apply_if_finite(selective(optax.sgd(0.1)), 9), frozen_value=jnp.nan)
  same_trainable(inside, alone(optax.sgd(0.1)))
  assert reference.same_bits(outside, PARAMS)


def test_inject_hyperparams_inside_and_outside():
  def build(learning_rate):
    return selective(optax.sgd(learning_rate))

  for tx, hyperparams in (
    (selective(optax.inject_hyperparams(optax.sgd)(0.1)), lambda s: s.inner_state.hyperparams),
    (optax.inject_hyperparams(build)(learning_rate=0.1), lambda s: s.hyperparams),
  ):
    after, state = train(tx)
    assert unmoved(after)
    same_trainable(after, alone(optax.sgd(0.1)))
    hyperparams(state)["learning_rate"] = jnp.array(0.0)
    updates, _ = tx.update(PARAMS, state, PARAMS)
    assert not np.any(np.asarray(updates["w"]))


def _looked_ahead(params, tx, steps=5):
  params = optax.LookaheadParams.init_synced(params)
  state = tx.init(params)

  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return maskopt.apply_updates(params, updates), state

  for seed in range(steps):
    grads = strategies.gradients(seed, PARAMS)
    grads = {k: g if params.fast[k].shape == g.shape else g[:, 1:2] for k, g in grads.items()
             if k in params.fast}  # fmt: skip
    params, state = step(params, state, grads)
  return params


@pytest.mark.parametrize("steps", [3, 4])  # between two synchronisations, and at one
def test_below_lookahead(steps):
  """Both trees: frozen elements stay, trainable ones are those of lookahead on the column alone."""
  both = _looked_ahead(PARAMS, optax.lookahead(selective(optax.adam(0.1)), 2, 0.5), steps)
  column = {"w": PARAMS["w"][:, 1:2]}
  want = _looked_ahead(column, optax.lookahead(optax.adam(0.1), 2, 0.5), steps)
  assert unmoved(both.fast) and unmoved(both.slow)
  for got, expected in zip(both, want, strict=True):
    np.testing.assert_allclose(got["w"][:, 1:2], expected["w"], rtol=1e-6)
  assert np.allclose(both.fast["w"], both.slow["w"], rtol=1e-6) == (steps % 2 == 0)
  assert (np.asarray(both.slow["w"])[:, 1] != np.asarray(PARAMS["w"])[:, 1]).all()


@pytest.mark.parametrize("guarded", [False, True])
def test_bits_below_lookahead(guarded):
  """It moves the fast parameters to the slow by their difference, which no infinity survives.

  `masked_freeze` after it keeps all bits; the two trees need arrays of their own for that.
  """
  special = reference.special(np.float32)
  p = {"w": jnp.asarray(np.concatenate([special, np.ones(3, np.float32)]))}
  frozen = np.arange(p["w"].size) < special.size
  tx = optax.lookahead(selective(optax.sgd(0.1), {"w": frozen}), 2, 0.5)
  if guarded:
    tx = optax.chain(tx, maskopt.masked_freeze({"w": frozen}))
  params = optax.LookaheadParams(p, jax.tree.map(jnp.array, p))
  state = tx.init(params)
  for _ in range(4):
    updates, state = tx.update({"w": jnp.ones(p["w"].shape)}, state, params)
    params = maskopt.apply_updates(params, updates)
  signalling = np.isnan(special) & (reference.bits(special) & 1 << 22 == 0)
  lost = np.flatnonzero(np.isinf(special) | signalling)
  assert len(lost) == 5
  for tree in params:
    assert reference.moved(p["w"], tree["w"], frozen) == ([] if guarded else [[i] for i in lost])
    assert (np.asarray(tree["w"])[~frozen] < 1).all()


@pytest.mark.parametrize("frozen", [MASK, {"w": FROZEN["w"] ^ np.eye(2, 3, dtype=bool), "b": True}])
@pytest.mark.parametrize("steps", [3, 4])
def test_around_lookahead(steps, frozen):
  """One mask over both copies, which may be the same arrays."""
  inner = selective(optax.lookahead(optax.adam(0.1), 2, 0.5), frozen)
  both = _looked_ahead(PARAMS, inner, steps)
  want = _looked_ahead(PARAMS, optax.lookahead(optax.adam(0.1), 2, 0.5), steps)
  whole = np.broadcast_to(frozen["w"], (2, 3))
  for got, expected in zip(both, want, strict=True):
    assert reference.moved(PARAMS["w"], got["w"], whole) == []
    assert reference.moved(PARAMS["b"], got["b"], FROZEN["b"]) == []
    trained = np.asarray(expected["w"])[~whole]
    np.testing.assert_allclose(np.asarray(got["w"])[~whole], trained, rtol=1e-6)
  state = inner.init(optax.LookaheadParams.init_synced(PARAMS))
  assert {k: np.any(v) for k, v in maskopt.mask_of(state).freeze_mask.items()} == {"w": 1, "b": 1}
  trains = int((~whole).sum())
  index = sum(x.nbytes for x in jax.tree.leaves(state.layouts))
  assert index <= 4 * trains  # once, not for each copy
  assert sum(x.nbytes for x in jax.tree.leaves(state)) == 8 * trains + index + 8  # two counts


def test_bits_around_lookahead():
  """Here no frozen value is ever read, so infinities and signalling NaN survive as well."""
  special = reference.special(np.float32)
  p = {"w": jnp.asarray(np.concatenate([special, np.ones(3, np.float32)]))}
  frozen = np.arange(p["w"].size) < special.size
  tx = selective(optax.lookahead(optax.sgd(0.1), 2, 0.5), {"w": frozen})
  params = optax.LookaheadParams.init_synced(p)
  state = tx.init(params)
  for _ in range(4):
    updates, state = tx.update({"w": jnp.full(p["w"].shape, jnp.nan)}, state, params)
    params = maskopt.apply_updates(params, updates)
  for tree in params:
    assert reference.moved(p["w"], tree["w"], frozen) == []
    assert np.isnan(np.asarray(tree["w"])[~frozen]).all()


def test_around_lookahead_with_masters_and_a_schedule():
  """bfloat16 follows its masters in both copies, under a mask that changes, as under migrations."""
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
  stages = {0: {"w": UNITS, "b": True}, 2: {"w": np.array([False, True, True]), "b": True}}
  grads = jax.tree.map(jnp.ones_like, half)

  def tx_of(mask):
    inner = optax.lookahead(optax.adam(1e-3), 2, 0.5)
    return selective(inner, mask, master_dtype=jnp.float32)

  def run(tx, state, params, steps):
    for _ in range(steps):
      updates, state = tx.update(grads, state, params)
      params = maskopt.apply_updates(params, updates)
    return params, state

  synced = optax.LookaheadParams.init_synced(half)
  scheduled = tx_of(maskopt.unfreeze_schedule(stages, mode="runtime"))
  together, _ = run(scheduled, scheduled.init(synced), synced, 4)

  first, second = tx_of(stages[0]), tx_of(stages[2])
  params, state = run(first, first.init(synced), synced, 2)
  state = maskopt.migrate(state, params, to=second, grads=grads)
  params, state = run(second, state, params, 2)
  for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(params), strict=True):
    assert reference.moved(a, b, np.ones(a.shape, bool)) == []
  assert jax.tree.map(jnp.shape, state.masters.fast) == jax.tree.map(jnp.shape, state.masters.slow)


def test_gradients_of_both_copies_are_refused():
  tx = selective(optax.lookahead(optax.sgd(0.1), 2, 0.5))
  synced = optax.LookaheadParams.init_synced(PARAMS)
  with pytest.raises(ValueError, match=r"gradients of the fast .* Differentiate at params.fast"):
    tx.update(synced, tx.init(synced), synced)


def test_schedule_free_inside_does_not_drift():
  tx = selective(contrib.schedule_free(optax.sgd(0.1), 0.1))
  after, state = train(tx, steps=20)
  assert unmoved(after)
  same_trainable(after, alone(contrib.schedule_free(optax.sgd(0.1), 0.1), steps=20))


@pytest.mark.parametrize("partition", [optax.partition, optax.multi_transform])
def test_partition(partition):
  labels = {"w": "a", "b": "b"}
  with jax.checking_leaks():
    outside = partition({"a": selective(optax.adam(0.1), UNITS_MASK), "b": optax.sgd(0.1)}, labels)
    after, _ = train(outside)
  assert reference.moved(PARAMS["w"], after["w"], FROZEN["w"]) == []
  assert (np.asarray(after["b"]) != np.asarray(PARAMS["b"])).all()
  inside = selective(partition({"a": optax.adam(0.1), "b": optax.sgd(0.1)}, labels))
  assert unmoved(train(inside)[0])
  same_trainable(train(inside)[0], train(selective(optax.adam(0.1)))[0])


UNITS_MASK = {"w": UNITS}


def test_masked_inside_sees_frozen_leaves_as_masked():
  inner = optax.masked(optax.adam(0.1), lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
  after, _ = train(selective(inner))
  assert unmoved(after)


def test_tree_map_params():
  """Optax finds what is shaped like a parameter; our index arrays are not."""
  tx = optax.chain(selective(optax.adam(0.1)), optax.scale(1.0))
  state = tx.init(PARAMS)
  doubled = optax.tree_map_params(tx, lambda x: x + 1, state)
  moments = doubled[0].inner_state[0]
  assert moments.mu["w"].tolist() == [[1.0], [1.0]] and int(moments.count) == 0
  assert doubled[0].layouts.static == state[0].layouts.static
  # What is no parameter gets one value for the whole mask: a prefix, as shardings may be.
  specs = optax.tree_map_params(tx, lambda _: P("data"), state, transform_non_params=lambda _: P())
  assert specs[0].inner_state[0].mu["w"] == P("data") and specs[0].layouts == P()


def test_multi_steps_inside_accumulates_trainable_elements_only():
  """One frozen million-element leaf: outside, MultiSteps holds its gradients; inside, nothing."""
  params = {"base": jnp.zeros(1_000_000), "head": jnp.zeros(10)}
  mask = {"base": True, "head": False}

  def size(tx):
    return sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))

  inside = size(selective(optax.MultiSteps(optax.adam(0.1), 2), mask))
  outside = size(optax.MultiSteps(selective(optax.adam(0.1), mask), 2).gradient_transformation())
  assert inside <= 140 and outside == inside + 4_000_000


# Transformations of JAX.


def test_scan_and_eval_shape():
  tx = selective(optax.adam(0.1))

  def step(carry, grads):
    params, state = carry
    updates, state = tx.update(grads, state, params)
    return (maskopt.apply_updates(params, updates), state), updates["w"]

  grads = jax.tree.map(lambda x: jnp.stack([x] * 4), PARAMS)
  (after, _), _ = jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), grads)
  assert unmoved(after)
  shapes = jax.eval_shape(tx.init, PARAMS)
  state = tx.init(PARAMS)
  assert jax.tree.structure(shapes) == jax.tree.structure(state)
  assert [x.shape for x in jax.tree.leaves(shapes)] == [x.shape for x in jax.tree.leaves(state)]


def test_vmap_with_a_shared_mask():
  tx = selective(optax.adam(0.1))
  many = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), PARAMS)

  def member(params):
    state = tx.init(params)
    for _ in range(3):
      updates, state = tx.update(params, state, params)
      params = maskopt.apply_updates(params, updates)
    return params

  for f in (jax.vmap(member), jax.jit(jax.vmap(member))):
    after = f(many)
    for i in range(3):
      one = jax.tree.map(lambda x, i=i: x[i], (many, after))
      assert unmoved(one[1], one[0])
      same_trainable(one[1], member(one[0]))


@pytest.mark.parametrize("count", [None, 3])
def test_vmap_with_a_mask_per_member(count):
  rng = np.random.default_rng(0)
  masks = np.stack([rng.permuted(np.arange(6) < 3).reshape(2, 3) for _ in range(4)])
  params = jnp.stack([PARAMS["w"]] * 4)

  def member(w, mask):
    tx = maskopt.selective_transform(
      optax.adam(0.1), freeze_mask={"w": maskopt.runtime(mask, count)}
    )
    p, s = {"w": w}, tx.init({"w": w})
    for _ in range(3):
      updates, s = tx.update(p, s, p)
      p = maskopt.apply_updates(p, updates)
    return p["w"]

  after = jax.jit(jax.vmap(member))(params, jnp.asarray(masks))
  assert reference.moved(params, after, masks) == []
  assert (np.asarray(after)[~masks] != np.asarray(params)[~masks]).all()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_shard_map_with_replicated_parameters(kind):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  tx = selective(optax.sgd(0.1))

  @jax.jit
  @jax.shard_map(mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
  def step(params, state, batch):
    grads = jax.grad(lambda p: (p["w"].sum(0) * batch[0]).sum() + p["b"].sum())(params)
    updates, _ = tx.update(grads, state, params)
    return maskopt.apply_updates(params, updates)

  batch = jax.device_put(jnp.ones((8, 3)), NamedSharding(mesh, P("data")))
  params, state = jax.device_put((PARAMS, tx.init(PARAMS)), NamedSharding(mesh, P()))
  after = step(params, state, batch)
  assert unmoved(after)
  np.testing.assert_allclose(after["w"][:, 1], PARAMS["w"][:, 1] - 0.8, rtol=1e-6)


@pytest.mark.parametrize("prefer", ["memory", "time"])
def test_gradients_pass_through_a_training_step(prefer):
  """Meta-learning: not silently zero. Oracle: one step of momentum-free descent by hand."""
  mask = np.array([[True, False, True], [False, True, False]])
  tx = maskopt.selective_transform(optax.sgd(0.5), freeze_mask={"w": mask}, prefer=prefer)
  w = {"w": PARAMS["w"]}
  state = tx.init(w)

  def loss(w, g):
    updates, _ = tx.update({"w": g}, state, {"w": w})
    return (maskopt.apply_updates({"w": w}, updates)["w"] ** 2).sum()

  g = jnp.ones((2, 3))
  after = np.where(mask, w["w"], np.asarray(w["w"]) - 0.5)
  for f in (loss, jax.jit(loss)):
    by_w, by_g = jax.grad(f, argnums=(0, 1))(w["w"], g)
    np.testing.assert_allclose(by_w, 2 * after, rtol=1e-6)
    np.testing.assert_allclose(by_g, np.where(mask, 0, -after), rtol=1e-6)


def test_gradients_pass_through_unpack():
  mask = {"w": np.array([[True, False, True], [False, True, False]]), "b": True}
  packed = maskopt.pack(PARAMS, mask)

  def loss(packed):
    return (maskopt.unpack(packed, PARAMS, mask)["w"] ** 3).sum()

  grad = jax.grad(loss)(packed)
  np.testing.assert_allclose(
    grad["w"].values, 3 * np.asarray(PARAMS["w"])[~mask["w"]] ** 2, rtol=1e-6
  )


def test_no_tracer_leaks():
  tx = selective(optax.adam(0.1))
  with jax.checking_leaks():

    def step(params, state):
      updates, state = tx.update(params, state, params)
      return maskopt.apply_updates(params, updates), state

    assert unmoved(jax.jit(step)(PARAMS, tx.init(PARAMS))[0])


def test_own_code_promotes_nothing():
  """Strict promotion: our code adds no implicit cast to an optimizer that needs none."""
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    for mask in (MASK, maskopt.runtime(MASK), {"w": FROZEN["w"] ^ (np.arange(3) > 1), "b": False}):
      for kwargs in ({}, {"master_dtype": jnp.float32}, {"prefer": "time"}):
        tx = selective(optax.sgd(0.1, momentum=0.9), mask, **kwargs)
        train(optax.chain(tx, maskopt.masked_freeze(mask)), params)
        maskopt.unpack(maskopt.pack(params, mask), params, mask)
        jax.grad(lambda p, m=mask: maskopt.stop_gradient(p, m)["w"].sum())(params)


# Programs: compiled once, in place, nothing dense.


def _compiled(mask, n, dtype=jnp.float32, prefer="time"):
  tx = maskopt.selective_transform(optax.adam(1e-3), freeze_mask=mask, prefer=prefer)

  def step(p, s, g):
    updates, s = tx.update(g, s, p)
    return maskopt.apply_updates(p, updates), s

  p = jax.ShapeDtypeStruct((n,), dtype)
  state = jax.eval_shape(tx.init, p)
  return jax.jit(step, donate_argnums=(0, 1)).lower(p, state, p).compile()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["Slice", "Elements"])
def test_a_donated_step_is_in_place_and_builds_nothing_dense(kind, dtype):
  n = 2**22
  frozen = np.ones(n, bool)
  if kind == "Slice":
    frozen[1000:2000] = False
  else:
    frozen[np.random.default_rng(0).permutation(n)[:1000]] = False
  compiled = _compiled(frozen, n, dtype)
  memory = compiled.memory_analysis()
  width = jnp.dtype(dtype).itemsize
  assert memory.alias_size_in_bytes >= n * width
  # XLA:CPU never writes through a bitcast in place, and bfloat16 keeps its bits only through one.
  copies = 1 if dtype == jnp.bfloat16 else 0
  assert memory.temp_size_in_bytes < copies * n * width + n // 8
  # The program's own text: nothing of the leaf's size is made, but the parameter written in place.
  name = {4: "f32", 2: "bf16"}[width]
  made = [
    line
    for line in compiled.as_text().splitlines()
    if f"= {name}[{n}]" in line and not any(w in line for w in ("parameter(", "fusion(", "scatter"))
  ]
  dense = [line for line in made if any(w in line for w in ("broadcast(", "select(", " add("))]
  assert dense == []


def test_a_frozen_leaf_is_not_touched():
  compiled = _compiled(True, 2**20)
  assert compiled.cost_analysis().get("flops", 0) < 10
  assert compiled.memory_analysis().temp_size_in_bytes < 1024


@pytest.mark.parametrize("count", [None, 3])
def test_runtime_masks_change_without_a_retrace(count):
  traces = 0
  tx = selective(optax.adam(0.1), {"w": maskopt.runtime(jnp.arange(6) >= 3, count)})
  params = {"w": jnp.zeros(6)}

  @jax.jit
  def step(params, state, mask):
    nonlocal traces
    traces += 1
    updates, state = tx.update({"w": jnp.ones(6)}, state, params, freeze_mask={"w": mask})
    return maskopt.apply_updates(params, updates), state

  state = tx.init(params)
  for i in range(4):
    frozen = np.roll(np.arange(6) >= 3, i)
    after, state = step(params, state, maskopt.runtime(frozen, count))
    assert reference.moved(params["w"], after["w"], frozen) == []
    assert (np.asarray(after["w"])[~frozen] != np.asarray(params["w"])[~frozen]).all()
    params = after
  assert traces == 1


def test_masked_freeze_takes_the_next_mask_too():
  tx = maskopt.masked_freeze({"w": maskopt.runtime(jnp.arange(6) >= 3)})
  params = {"w": jnp.ones(6)}
  update = jax.jit(tx.update)
  _, state = update(params, tx.init(params), params)
  mask = {"w": maskopt.runtime(jnp.arange(6) < 3)}
  updates, state = update(params, state, params, freeze_mask=mask)
  assert updates["w"].tolist() == [0, 0, 0, 1, 1, 1]
  assert maskopt.mask_of(state).freeze_mask["w"].tolist() == [1, 1, 1, 0, 0, 0]


def test_static_masks_trace_once():
  traces = 0
  tx = selective(optax.adam(0.1))

  @jax.jit
  def step(params, state):
    nonlocal traces
    traces += 1
    updates, state = tx.update(params, state, params)
    return maskopt.apply_updates(params, updates), state

  carry = PARAMS, tx.init(PARAMS)
  for _ in range(3):
    carry = step(*carry)
  step(PARAMS, tx.init(PARAMS))
  assert traces == 1


# Extra arguments.


def test_extra_arguments_are_packed_and_functions_see_full_parameters():
  seen = {}

  def update(updates, state, params=None, *, value, grad, value_fn, **extra):
    seen["grad"], seen["value"] = jax.tree.map(jnp.shape, grad), value
    seen["loss"] = value_fn(params)
    return updates, state

  inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
  tx = selective(inner)

  def loss(p):
    return (p["w"] ** 2).sum() + p["b"].sum()

  tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=3.0, grad=PARAMS, value_fn=loss)
  assert seen["value"] == 3.0 and seen["loss"] == loss(PARAMS)
  assert seen["grad"]["w"] == (2, 1) and isinstance(seen["grad"]["b"], optax.MaskedNode)


def test_a_lone_scalar_is_a_loss_and_no_parameter():
  """Beside one frozen scalar as the whole tree, whose packed value would be nothing."""
  seen = []

  def update(updates, state, params=None, *, value, **extra):
    seen.append(value)
    return updates, state

  tx = selective(optax.GradientTransformationExtraArgs(lambda p: (), update), True)
  p = jnp.array(1.0)
  tx.update(p, tx.init(p), p, value=jnp.array(3.0))
  assert seen[-1] == 3.0


# Packed gradients, and trainers that are not ours.


def test_packed_gradients_are_the_array_gradients():
  rng = np.random.default_rng(0)
  masks = {"w": rng.random((2, 3)) < 0.5, "b": np.array([True, False, False])}
  for mask in (masks, MASK, True, False, maskopt.runtime(masks)):
    tx = selective(optax.adam(0.1), mask)
    state = tx.init(PARAMS)
    packed = maskopt.pack(PARAMS, maskopt.mask_of(state))
    expected, _ = tx.update(PARAMS, state, PARAMS)
    got, _ = tx.update(packed, state, PARAMS)
    assert reference.same_bits(
      optax.apply_updates(PARAMS, got), maskopt.apply_updates(PARAMS, expected)
    )
    assert reference.same_bits(
      maskopt.apply_updates(PARAMS, got), maskopt.apply_updates(PARAMS, expected)
    )


def test_packed_gradients_accumulate_and_scale():
  mask = {"w": UNITS, "b": True}
  packed = maskopt.pack(PARAMS, mask)
  total = jax.tree.map(lambda a, b: 0.5 * (a + b), packed, packed)
  assert reference.same_bits(jax.tree.leaves(total), jax.tree.leaves(packed))
  tx = selective(optax.sgd(1.0))
  updates, _ = tx.update(total, tx.init(PARAMS), PARAMS)
  assert maskopt.apply_updates(PARAMS, updates)["w"][:, 1].tolist() == [0, 0]


def test_packed_updates_that_somebody_changed_are_refused():
  tx = selective(optax.sgd(1.0))
  state = tx.init(PARAMS)
  updates, _ = tx.update(maskopt.pack(PARAMS, maskopt.mask_of(state)), state, PARAMS)
  match = r"expected the update as maskopt.selective_transform returned it.*inside selective_transf"
  for changed in (
    jax.tree.map(lambda u: 2 * u, updates),
    jax.jit(lambda u: u)(updates),
  ):
    for apply in (optax.apply_updates, maskopt.apply_updates):
      with pytest.raises(ValueError, match=match):
        apply(PARAMS, changed)


def test_packed_gradients_of_another_mask_are_refused():
  tx = selective(optax.sgd(1.0))
  other = jax.tree.map(lambda x: x, maskopt.pack(PARAMS, {"w": ~UNITS, "b": True}))
  with pytest.raises(ValueError, match=r"at w, expected .* values of \(2, 1\), got .*\(2, 2\)"):
    tx.update(other, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("packed", [False, True])
def test_flax_train_state(packed):
  tx = selective(optax.adam(0.1))
  state = flax.training.train_state.TrainState.create(
    apply_fn=None, params=jax.tree.map(jnp.array, PARAMS), tx=tx
  )

  @jax.jit
  def step(state):
    grads = state.params
    if packed:
      grads = maskopt.pack(grads, maskopt.mask_of(state.opt_state))
    return state.apply_gradients(grads=grads)

  for _ in range(3):
    state = step(state)
  assert unmoved(state.params) and int(state.step) == 3
  assert (np.asarray(state.params["w"])[:, 1] != np.asarray(PARAMS["w"])[:, 1]).all()


@pytest.mark.parametrize("packed", [False, True])
def test_nnx_optimizer(packed):
  model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
  tx = selective(optax.adam(0.1), {"kernel": UNITS, "bias": True})
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    grads = nnx.grad(lambda m: (m(jnp.ones((4, 2))) ** 2).sum())(model)
    if packed:
      grads = maskopt.pack(grads, maskopt.mask_of(nnx.as_pure(optimizer.opt_state)))
    optimizer.update(model, grads)

  for _ in range(3):
    step(model, optimizer)
  after = nnx.to_pure_dict(nnx.state(model))
  assert reference.moved(before["kernel"], after["kernel"], UNITS) == []
  assert reference.moved(before["bias"], after["bias"], True) == []
  assert (np.asarray(after["kernel"])[:, 1] != before["kernel"][:, 1]).all()


# Leaf-coupled optimizers.

SCATTERED = np.random.default_rng(0).random((8, 6)) < 0.5


@pytest.mark.parametrize("inner", [contrib.muon, optax.adafactor])
@pytest.mark.parametrize(
  ("prefer", "words"), [("memory", "a vector"), ("time", "a leaf with zeros")]
)
def test_leaf_coupled_optimizers_warn_and_name_the_leaf(inner, prefer, words):
  params = {"a": jnp.ones((8, 6)), "b": jnp.ones((8, 6)), "c": jnp.ones((8, 6))}
  mask = {"a": SCATTERED, "b": SCATTERED[:, :1], "c": False}
  with pytest.warns(UserWarning, match=rf"at a, .*shape of a leaf.*no block.*{words}") as caught:
    selective(inner(0.1), mask, prefer=prefer).init(params)
  assert len(caught) == 1


@pytest.mark.parametrize("inner", [optax.adamw, optax.sgd, optax.lion, optax.lamb, optax.lars])
def test_elementwise_and_norm_optimizers_do_not_warn(inner):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    selective(inner(0.1), {"w": SCATTERED}).init({"w": jnp.ones((8, 6))})


def test_blocks_show_leaf_coupled_optimizers_a_real_matrix():
  """Muon on two rows is muon on a matrix of two rows, whatever the share."""
  params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)}
  rows = np.ones((8, 1), bool)
  rows[[0, 2, 3, 4, 5, 7]] = False
  tx = maskopt.selective_transform(contrib.muon(0.1), freeze_mask={"w": rows})
  updates, _ = tx.update(params, tx.init(params), params)
  sub = {"w": params["w"][~rows[:, 0]]}
  inner = contrib.muon(0.1)
  expected, _ = inner.update(sub, inner.init(sub), sub)
  np.testing.assert_allclose(updates["w"][~rows[:, 0]], expected["w"], rtol=1e-4, atol=1e-6)


def test_equinox_models_with_functions_among_their_leaves_train():
  """As `eqx.nn.MLP` has its activations: no optimizer is asked for a moment of these."""
  model = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
  mask = maskopt.build_mask(model, [("layers/0", maskopt.units([0, 5]))])
  tx = maskopt.selective_transform(optax.adamw(0.1), freeze_mask=mask)
  before, state = maskopt.snapshot(model), tx.init(model)

  @eqx.filter_jit
  def step(model, state):
    grads = eqx.filter_grad(lambda m: jnp.sum(jax.vmap(m)(jnp.ones((4, 3)))))(model)
    updates, state = tx.update(grads, state, model)
    return maskopt.apply_updates(model, updates), state

  for _ in range(3):
    model, state = step(model, state)
  report = maskopt.audit(before, model, mask)
  assert report.ok and report.moved > 0 and callable(model.activation)
