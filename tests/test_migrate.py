"""State from one transform to another, against NumPy oracles that know single elements only."""

import functools
import itertools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest
import reference
from reference import bits, same_bits

import maskopt
from maskopt import _fresh, _packing, _tree

RNG = np.random.default_rng(0)
SHAPE = (6, 4)
P = {
  "w": RNG.standard_normal(SHAPE).astype(np.float32),
  "b": RNG.standard_normal(4).astype(np.float32),
}
GRADS = [
  jax.tree.map(lambda x: RNG.standard_normal(x.shape).astype(np.float32), P) for _ in range(8)
]


def _scattered(share):
  mask = np.ones(SHAPE, bool)
  mask.flat[RNG.permutation(24)[: round(24 * share)]] = False
  return mask


def _rows(*rows):
  return ~np.isin(np.arange(6), rows)[:, None]


MASKS = {
  "frozen": True,
  "full": False,
  "rows": _rows(1, 2, 5),
  "slice": _rows(2, 3, 4),
  "columns": np.array([True, False, True, False]),
  "scattered": _scattered(0.3),
  "other_scattered": _scattered(0.5),
  "dense": maskopt.runtime(_scattered(0.9)),
  "runtime_count": maskopt.runtime(_scattered(0.25), 6),
}


@pytest.fixture(autouse=True)
def _promotion():
  """Optax's Adam itself needs promotion."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def params():
  return jax.tree.map(jnp.asarray, P)


def selective(mask, inner=None, **kwargs):
  freeze_mask = mask if isinstance(mask, dict) else {"w": mask, "b": False}
  inner = optax.adam(0.1) if inner is None else inner
  return maskopt.selective_transform(inner, freeze_mask=freeze_mask, prefer="memory", **kwargs)


def trained(tx, steps, p=None, state=None, jit=True):
  """Parameters and state after the steps, one for each gradient."""
  p = params() if p is None else p
  state = tx.init(p) if state is None else state

  def step(p, state, g):
    updates, state = tx.update(g, state, p)
    return maskopt.apply_updates(p, updates), state

  step = jax.jit(step) if jit else step
  for g in steps:
    p, state = step(p, state, jax.tree.map(lambda x, y: y.astype(x.dtype), p, g))
  return p, state


def frozen(state, k="w"):
  return np.broadcast_to(maskopt.mask_of(state).freeze_mask[k], P[k].shape)


def moment(state, field, k="w"):
  """A moment in the parameter's shape, NaN where there is none."""
  layouts = maskopt.mask_of(state)
  position = layouts.static.paths.index(k)
  layout, index = layouts.static.layouts[position], layouts.index[position]
  node = next(
    x for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "nu")) if hasattr(x, "nu")
  )
  values = getattr(node, field)[k]
  whole = jnp.full(P[k].shape, jnp.nan, jnp.float32)
  return np.asarray(whole if _tree.is_hole(values) else layout.put(values, whole, index))


@functools.cache
def _trained_under(name):
  return trained(selective(MASKS[name]), GRADS[:3])


@pytest.mark.parametrize(("old", "new"), list(itertools.product(MASKS, MASKS)))
@pytest.mark.filterwarnings("ignore:.*elements thaw with empty moments")
def test_from_any_layout_to_any_layout(old, new):
  b = selective(MASKS[new])
  p, before = _trained_under(old)
  after = maskopt.migrate(before, p, to=b)
  assert jax.tree.structure(after) == jax.tree.structure(b.init(p))
  stay = ~frozen(before) & ~frozen(after)
  begun = frozen(before) & ~frozen(after)
  for field in ("mu", "nu"):
    x, y = moment(before, field), moment(after, field)
    assert np.array_equal(bits(x)[stay], bits(y)[stay])
    assert (y[begun] == 0).all()
    assert np.isnan(y[frozen(after)]).all()
    assert np.array_equal(bits(moment(before, field, "b")), bits(moment(after, field, "b")))
  assert int(after.inner_state[0].count) == 3
  b.update(GRADS[3], after, p)


def history(p, thawed, t):
  """Per element: its own gradients, the first of them t times as if it had trained all along."""
  new = {}
  for k, x in p.items():
    flat = np.empty(x.size)
    for i in range(x.size):
      own = [g[k].flat[i] for g in GRADS]
      past = own if not thawed[k].flat[i] else [own[t]] * t + own[t:]
      flat[i] = reference.adam(x.flat[i], past)
      if thawed[k].flat[i]:
        flat[i] += x.flat[i] - reference.adam(x.flat[i], past[:t])
    new[k] = flat.reshape(x.shape)
  return new


@pytest.mark.parametrize("form", ["static", "runtime", "runtime_count"])
def test_a_thawed_element_follows_its_own_adam(form):
  t, first, second = 3, _scattered(0.5), _scattered(0.5)
  second = first & second | (~first & (np.arange(24).reshape(SHAPE) % 3 == 0))
  second.flat[np.flatnonzero(second & first)[: int(second.sum()) - 12]] = False
  second.flat[np.flatnonzero(~second & ~first)[: 12 - int(second.sum())]] = True
  assert (~second).sum() == (~first).sum() == 12
  if form == "static":
    p, state = trained(selective(first), GRADS[:t])
    tx = selective(second)
    state = maskopt.migrate(state, p, to=tx, grads=GRADS[t])
    p, state = trained(tx, GRADS[t:], p, state)
  else:
    count = 12 if form == "runtime_count" else None
    tx = selective(maskopt.runtime(first, count))
    p, state = trained(tx, GRADS[:t])

    @jax.jit
    def step(p, state, g, mask):
      mask = {"w": maskopt.runtime(mask, count), "b": False}
      updates, state = tx.update(g, state, p, freeze_mask=mask)
      return maskopt.apply_updates(p, updates), state

    for g in GRADS[t:]:
      p, state = step(p, state, jax.tree.map(jnp.asarray, g), second)
  want = history(P, {"w": first & ~second, "b": np.zeros(4, bool)}, t)
  both = ~first & ~second
  np.testing.assert_allclose(p["w"][both], want["w"][both], atol=2e-5)
  np.testing.assert_allclose(p["w"][first & ~second], want["w"][first & ~second], atol=2e-4)
  np.testing.assert_allclose(p["b"], want["b"], atol=2e-5)
  assert reference.moved(P["w"], p["w"], first & second) == []


@pytest.mark.parametrize("steps", [1, 20, 1500])
def test_the_first_update_after_a_thaw_is_one_learning_rate_long(steps):
  inner = optax.chain(optax.clip_by_global_norm(0.3), optax.adam(0.1))
  a, b = selective(_rows(0, 1), inner), selective(False, inner)
  p = params()
  state = a.init(p)
  count = jnp.asarray(steps, jnp.int32)
  state = jax.tree.map(lambda x: count if x.dtype == jnp.int32 and x.ndim == 0 else x, state)
  seeded = maskopt.migrate(state, p, to=b, grads=GRADS[0])
  updates, _ = b.update(GRADS[0], seeded, p)
  np.testing.assert_allclose(np.abs(updates["w"][2:]), 0.1, rtol=2e-3)
  with pytest.warns(UserWarning, match=f"at w, elements thaw .* has run {steps} steps"):
    plain = maskopt.migrate(state, p, to=b)
  updates, _ = b.update(GRADS[0], plain, p)
  if steps == 1500:
    assert np.abs(updates["w"][2:]).min() > 0.25


def test_without_a_gradient_an_element_starts_as_its_neighbours():
  a, b = selective({"w": True, "b": False}), selective(False)
  p, state = trained(a, GRADS[:3])
  grads = {"w": GRADS[0]["w"] * (np.arange(6) > 2)[:, None], "b": GRADS[0]["b"]}
  state = maskopt.migrate(state, p, to=b, grads=grads)
  later = {"w": np.full(SHAPE, 1.0, np.float32), "b": GRADS[0]["b"]}
  updates, _ = b.update(later, state, p)
  assert np.abs(updates["w"][:3]).max() < 0.1


STRUCTURES = {
  "chain": lambda m: optax.chain(
    optax.scale(1.0), selective(m, optax.chain(optax.clip(1.0), optax.adamw(0.1)))
  ),
  "named_chain": lambda m: optax.named_chain(("a", selective(m)), ("b", optax.scale(0.5))),
  "injected": lambda m: selective(m, optax.inject_hyperparams(optax.adam)(lambda t: 0.1 / (t + 1))),
  "injected_outside": lambda m: optax.inject_hyperparams(
    lambda learning_rate: selective(m, optax.adam(learning_rate))
  )(learning_rate=0.1),
  "gathered_inside": lambda m: selective(m, optax.MultiSteps(optax.adam(0.1), 2)),
  "gathered_outside": lambda m: optax.MultiSteps(selective(m), 2),
  "scheduled": lambda m: selective(m, optax.adam(optax.linear_schedule(0.1, 0.0, 10))),
  "if_finite": lambda m: optax.apply_if_finite(selective(m), 3),
  "optax_partition": lambda m: selective(
    m,
    optax.partition(
      {"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.9)}, {"w": "a", "b": "b"}
    ),
  ),
  "masked": lambda m: selective(m, optax.masked(optax.adam(0.1), {"w": True, "b": False})),
}


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.filterwarnings("ignore:.*elements thaw with empty moments")
def test_states_of_any_structure(name):
  a, b = (STRUCTURES[name](m) for m in (_rows(0, 1, 2), _rows(1, 2, 4)))
  p, before = trained(a, GRADS[:4])
  for grads in (None, GRADS[0]) if name == "chain" else (GRADS[0],):
    after = maskopt.migrate(before, p, to=b, grads=grads)
    assert jax.tree.structure(after) == jax.tree.structure(b.init(p))
    stay = ~frozen(before) & ~frozen(after)
    assert stay.sum() == 8
    for field in ("mu", "nu"):
      x, y = moment(before, field), moment(after, field)
      assert x[stay].all() and np.array_equal(bits(x)[stay], bits(y)[stay])
  # Everything that belongs to no parameter goes on.
  old, new = ([x for x in jax.tree.leaves(s) if jnp.ndim(x) == 0] for s in (before, after))
  assert same_bits(old, new)
  trained(b, GRADS[4:5], p, after)


def test_there_and_back_through_plain_optax():
  p, plain = trained(optax.adam(0.1), GRADS[:3])
  tx = selective(MASKS["scattered"])
  state = maskopt.migrate(plain, p, to=tx)
  there = moment(state, "nu")
  assert np.array_equal(there[~MASKS["scattered"]], plain[0].nu["w"][~MASKS["scattered"]])
  back = maskopt.migrate(state, p, to=optax.adam(0.1), grads=GRADS[3])
  stay = ~MASKS["scattered"]
  assert np.array_equal(bits(back[0].nu["w"])[stay], bits(plain[0].nu["w"])[stay])
  updates, _ = optax.adam(0.1).update(GRADS[3], back, p)
  np.testing.assert_allclose(np.abs(updates["w"])[~stay], 0.1, rtol=1e-3)


@pytest.mark.parametrize("old", ["plain", "rows", "scattered"])
def test_to_a_runtime_schedule_and_back(old):
  """A schedule begins at its step 0; away from it, what trains now is what had the moments."""
  inner = optax.adam(0.1)
  schedule = maskopt.unfreeze_schedule(
    {n: {"w": _rows(n, n + 1), "b": False} for n in range(3)}, mode="runtime"
  )
  start = inner if old == "plain" else selective(MASKS[old])
  runtime = maskopt.selective_transform(inner, freeze_mask=schedule)
  p, before = trained(start, GRADS[:3])
  state = maskopt.migrate(before, p, to=runtime, grads=GRADS[3])
  assert jax.tree.structure(state) == jax.tree.structure(runtime.init(p))
  assert int(state.step) == 0 and int(state.inner_state.inner_state[0].count) == 3
  known = np.broadcast_to(False, SHAPE) if old == "plain" else frozen(before)
  full = before[0].nu["w"] if old == "plain" else moment(before, "nu")
  stay = ~known & ~_rows(0, 1)
  assert stay.any()
  assert np.array_equal(bits(moment(state, "nu"))[stay], bits(full)[stay])
  p, state = trained(runtime, GRADS[3:5], p, state)
  assert int(state.placed) == 1  # and mask_of looks ahead, to stage 2
  there = state.inner_state.inner_state[0].nu["w"].reshape(2, 4)
  after = maskopt.migrate(state, p, to=selective(_rows(2, 3)), grads=GRADS[5])
  assert same_bits(after.inner_state[0].nu["w"][0], there[1])
  back = maskopt.migrate(state, p, to=inner, grads=GRADS[5])
  assert same_bits(back[0].nu["w"][1:3], there) and int(back[0].count) == 5


def test_a_runtime_schedule_goes_on_where_another_stood():
  schedule = maskopt.unfreeze_schedule(
    {0: _rows(0, 1), 2: _rows(1, 2), 4: _rows(2, 3)}, mode="runtime"
  )
  a, b = (
    maskopt.selective_transform(optax.adam(rate), freeze_mask=schedule) for rate in (0.1, 0.01)
  )
  w = jnp.asarray(P["w"])
  state = a.init(w)
  for g in GRADS[:4]:
    _, state = a.update(g["w"], state, w)
  after = maskopt.migrate(state, w, to=b, grads=GRADS[4]["w"])
  assert int(after.step) == 4
  assert np.array_equal(maskopt.mask_of(after).freeze_mask, np.broadcast_to(_rows(2, 3), SHAPE))
  updates, _ = b.update(GRADS[4]["w"], after, w)
  assert np.array_equal(np.asarray(updates) != 0, np.broadcast_to(~_rows(2, 3), SHAPE))


def test_a_scheduled_state_maps_over_its_parameters():
  schedule = maskopt.unfreeze_schedule({0: _rows(0, 1), 2: _rows(1, 2)}, mode="runtime")
  tx = maskopt.selective_transform(optax.adam(0.1), freeze_mask=schedule)
  state = optax.tree_map_params(tx, lambda x: x + 7, tx.init(jnp.asarray(P["w"])))
  assert (state.inner_state.inner_state[0].mu == 7).all() and int(state.step) == 0
  assert state.masks[""].shape == (2, 2, 1)


def test_masters_go_along():
  p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
  a, b = (
    selective(m, optax.sgd(1e-4), master_dtype=jnp.float32) for m in (_rows(0, 1), _rows(1, 2))
  )
  q, state = trained(a, GRADS[:4], p)
  after = maskopt.migrate(state, q, to=b)
  assert same_bits(after.masters["w"][0], state.masters["w"][1])
  assert same_bits(after.masters["w"][1], q["w"][2].astype(jnp.float32))
  assert same_bits(after.masters["b"], state.masters["b"])


def test_stacks_of_past_values_go_along():
  inner = optax.chain(optax.scale_by_lbfgs(memory_size=3), optax.scale(-0.1))
  a, b = selective(_rows(0, 1, 2), inner), selective(_rows(1, 2), inner)
  p, state = trained(a, GRADS[:3])
  after = maskopt.migrate(state, p, to=b)
  old, new = (s.inner_state[0].diff_params_memory["w"] for s in (state, after))
  assert new.shape == (3, 2, 4) and same_bits(new, old[:, 1:])


PARTS = {"slow": optax.adam(0.01), "fast": optax.adam(0.1)}


def test_elements_change_groups_with_their_moments():
  """The growing recipe: what was new and fast becomes old and slow."""
  labels = [{"w": np.where(np.arange(6) < n, "slow", "fast")[:, None], "b": "slow"} for n in (2, 4)]
  a, b = (maskopt.partition(PARTS, each, prefer="memory") for each in labels)
  p, state = trained(a, GRADS[:3])
  after = maskopt.migrate(state, p, to=b)

  def nu(s, name):
    return s.inner_states[name].inner_state[0].nu["w"]

  assert same_bits(nu(after, "slow")[:2], nu(state, "slow"))
  assert same_bits(nu(after, "slow")[2:], nu(state, "fast")[:2])
  assert same_bits(nu(after, "fast"), nu(state, "fast")[2:])
  one = selective(False)
  whole = maskopt.migrate(after, p, to=one)
  assert same_bits(whole.inner_state[0].nu["w"][4:], nu(after, "fast"))
  assert same_bits(whole.inner_state[0].nu["w"][:4], nu(after, "slow"))
  parted = maskopt.migrate(whole, p, to=a)
  assert same_bits(nu(parted, "slow"), nu(state, "slow"))


def test_a_group_of_another_optimizer_starts_anew():
  a = maskopt.partition({"x": optax.adam(0.1)}, {"w": "x", "b": "x"})
  b = maskopt.partition({"x": optax.adam(0.1), "y": optax.sgd(0.1, 0.9)}, {"w": "x", "b": "y"})
  p, state = trained(a, GRADS[:3])
  after = maskopt.migrate(state, p, to=b)
  assert same_bits(
    after.inner_states["x"].inner_state[0].mu["w"], state.inner_states["x"].inner_state[0].mu["w"]
  )
  assert not after.inner_states["y"].inner_state[0].trace["b"].any()


def test_reset_starts_every_element_anew_and_counts_go_on():
  a, b = selective(_rows(0, 1)), selective(_rows(1, 2))
  p, state = trained(a, GRADS[:3])
  after = maskopt.migrate(state, p, to=b, moments="reset", grads=GRADS[3])
  assert int(after.inner_state[0].count) == 3
  updates, _ = b.update(GRADS[3], after, p)
  np.testing.assert_allclose(np.abs(updates["w"][1:3]), 0.1, rtol=1e-3)


def test_held_moments_come_back():
  masks = [_rows(0, 1, 2), _rows(2, 3), _scattered(0.2) | _rows(0, 3), _rows(0, 1, 2, 3)]
  p, state = trained(selective(masks[0]), GRADS[:3])
  known = moment(state, "nu")
  for mask in masks[1:]:
    tx = selective(mask)
    state = maskopt.migrate(state, p, to=tx, moments="hold", grads=GRADS[0])
    assert same_bits(maskopt.mask_of(state).freeze_mask["b"], False)
    updates, again = jax.jit(tx.update)(GRADS[3], state, p)
    assert jax.tree.structure(again) == jax.tree.structure(state)
  here = np.broadcast_to(~_rows(0, 1), SHAPE)
  assert np.array_equal(bits(moment(state, "nu"))[here], bits(known)[here])
  assert maskopt.migrate(state, p, to=tx).held is None


def test_nothing_held_is_nothing_stored():
  p, state = trained(selective(_rows(0)), GRADS[:1])
  assert (
    maskopt.migrate(state, p, to=selective(_rows(0, 1)), moments="hold", grads=GRADS[0]).held
    is None
  )


def test_a_state_from_a_file_under_another_mask():
  a, b = selective(_rows(0, 1)), selective(_rows(1, 2))
  p, state = trained(a, GRADS[:3])
  data = flax.serialization.to_bytes(state)
  restored = flax.serialization.from_bytes(a.init(p), data)
  assert same_bits(
    maskopt.migrate(restored, p, to=b, grads=GRADS[0]),
    maskopt.migrate(state, p, to=b, grads=GRADS[0]),
  )


def test_an_unchanged_leaf_shares_its_arrays():
  p, state = trained(selective(_rows(0, 1)), GRADS[:2])
  after = maskopt.migrate(state, p, to=selective(_rows(0, 1)))
  assert after.inner_state[0].mu["w"] is state.inner_state[0].mu["w"]


def test_runtime_masks_of_constant_count_never_retrace():
  traces = []
  tx = selective(maskopt.runtime(_scattered(0.5), 12))

  @jax.jit
  def step(p, state, g, mask):
    traces.append(1)
    mask = {"w": maskopt.runtime(mask, 12), "b": False}
    updates, state = tx.update(g, state, p, freeze_mask=mask)
    return maskopt.apply_updates(p, updates), state

  p = params()
  state = tx.init(p)
  for g in GRADS:  # a new mask for every task
    mask = _scattered(0.5)
    q, state = step(p, state, jax.tree.map(jnp.asarray, g), mask)
    assert reference.moved(p["w"], q["w"], mask) == []
    assert (bits(p["w"]) != bits(q["w"]))[~mask].all()
    assert np.array_equal(frozen(state), mask)
    p = q
  assert len(traces) == 1


@pytest.mark.parametrize("name", sorted(optimizers.TABLE))
@pytest.mark.filterwarnings("ignore:.*the optimizer depends on the shape of a leaf")
@pytest.mark.filterwarnings("ignore:.* deprecated:DeprecationWarning")
def test_a_fresh_state_is_that_of_init_to_the_bit(name):
  """Whatever `init` does: constants that are written late, copies of parameters, keys, counts."""
  tx = selective(MASKS["scattered"], optimizers.TABLE[name].make())
  found, want = _fresh.whole(_fresh.state(tx.init, params())), tx.init(params())
  assert jax.tree.structure(found) == jax.tree.structure(want)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    if not jnp.issubdtype(getattr(y, "dtype", None), jax.dtypes.prng_key):
      assert same_bits(x, y)


def _constants(state):
  return [x for x in jax.tree.leaves(state) if isinstance(x, _fresh.Constant)]


def test_moments_that_begin_as_one_number_are_not_written():
  state = _fresh.state(selective(MASKS["rows"], optax.adagrad(0.1)).init, params())
  assert sorted(x.shape for x in _constants(state)) == [(3, 4), (4,)]
  assert all(x.value == np.float32(0.1) for x in _constants(state))


def test_a_mask_of_the_values_is_asked_at_every_migration():
  """It cannot be traced, and what it reads beside the parameters may have changed."""
  seen = [_rows(0, 1)]

  def by_value(p):
    seen.append(float(np.asarray(p["w"]).sum()))
    return {"w": seen[0], "b": False}

  tx = maskopt.selective_transform(optax.adam(0.1), freeze_mask=by_value)
  p, state = trained(selective(False), GRADS[:2])
  for mask in (_rows(0, 1), _rows(2, 5)):
    seen[0] = mask
    after = maskopt.migrate(state, p, to=tx)
    assert np.array_equal(frozen(after), np.broadcast_to(mask, SHAPE))
  by_rows = maskopt.selective_transform(
    optax.adam(0.1), freeze_mask=lambda p: {"w": seen[0], "b": False}
  )
  for mask in (_rows(0, 1), _rows(2, 5)):
    seen[0] = mask
    after = maskopt.migrate(state, p, to=by_rows)
    assert np.array_equal(frozen(after), np.broadcast_to(mask, SHAPE))


@pytest.mark.filterwarnings("ignore:.*elements thaw with empty moments")
def test_moments_stay_on_their_mesh():
  mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
  p = {"w": jax.device_put(P["w"], sharding)}
  a, b = (maskopt.selective_transform(optax.adam(0.1), freeze_mask=m) for m in (True, False))
  state = maskopt.migrate(a.init(p), p, to=b)
  assert state.inner_state[0].mu["w"].sharding.is_equivalent_to(sharding, 2)


def test_packed_state_moves_without_a_dense_array():
  """The moments of a million parameters, a thousand of them trainable, in a traced migration."""
  n = 1_000_000
  masks = [np.arange(n) % 1000 != k for k in (0, 500)]
  carry = maskopt.runtime(jnp.asarray(masks[0]), 1000)
  layouts = _packing.layouts_of(carry, jnp.zeros(n), "test")
  other = _packing.layouts_of(maskopt.runtime(jnp.asarray(masks[1]), 1000), jnp.zeros(n), "test")
  move = functools.partial(_moved, layouts.static.layouts[0])
  lowered = jax.jit(move).lower(layouts.index[0], other.index[0], jnp.ones(1000), jnp.zeros(1000))
  assert lowered.compile().memory_analysis().temp_size_in_bytes < 100_000


def _moved(layout, old, new, before, after):
  from maskopt import _carry

  return _carry.carrier(layout, old, layout, new)(before, after)


def _wrong(**kwargs):
  p, state = trained(selective(_rows(0, 1)), GRADS[:1])
  return functools.partial(maskopt.migrate, **({"state": state, "params": p} | kwargs))


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"moments": "drop"}, r'migrate\(moments=...\)`: .*expected "keep", "reset" or "hold", got'),
    (
      {"to": selective(False, optax.sgd(0.1, momentum=0.9))},
      r"at inner_state/0, expected TraceState\(trace\), got ScaleByAdamState\(count, mu, nu\)",
    ),
    (
      {"to": selective(False, optax.chain(optax.adam(0.1), optax.adam(0.1)))},
      "at inner_state/0, expected a tuple of 2, got ScaleByAdamState",
    ),
    (
      {"to": selective(False, optax.adam(0.1, mu_dtype=jnp.bfloat16))},
      r"at inner_state/0/mu/b, expected bfloat16 of shape \(4,\), got float32 of shape \(4,\)",
    ),
    ({"state": 3.0}, "at inner_state, expected a tuple of 2, got float 3.0"),
  ],
)
def test_what_has_no_place_is_refused(kwargs, message):
  call = _wrong(**({"to": selective(_rows(1, 2))} | kwargs))
  with pytest.raises(ValueError, match=message):
    call()


def test_a_state_of_other_parameters_is_refused():
  tx = selective(False)
  _, state = trained(tx, GRADS[:1])
  taller = {"w": jnp.ones((7, 4)), "b": jnp.ones(4)}
  message = r"at inner_state/0/mu/w, expected a parameter of shape \(7, 4\), got .* \(6, 4\)"
  with pytest.raises(ValueError, match=message):
    maskopt.migrate(state, taller, to=tx)
  with pytest.raises(
    ValueError, match="at inner_state/0/mu, expected leaves for v, ..., got for b, w"
  ):
    maskopt.migrate(state, {"v": jnp.ones(2)}, to=selective({"v": False}))


def test_one_number_for_a_leaf_has_no_place_when_the_mask_changes():
  a, b = (selective(m, optax.novograd(0.1)) for m in (_rows(0, 1), _rows(1, 2)))
  p, state = trained(a, GRADS[:2])
  with pytest.raises(
    ValueError, match="at inner_state/0/nu/w, expected a value for each trainable"
  ):
    maskopt.migrate(state, p, to=b)
  after = maskopt.migrate(state, p, to=b, moments="reset", grads=GRADS[0])
  assert int(after.inner_state[0].count) == 2
  assert same_bits(maskopt.migrate(state, p, to=a), state)


def test_what_is_no_transform_and_other_parameters_are_refused_in_its_own_name():
  tx = maskopt.selective_transform(optax.adam(0.1), freeze_mask={"w": np.array([True, False])})
  params = {"w": jnp.ones(2)}
  state = tx.init(params)
  with pytest.raises(
    TypeError, match=r"`maskopt.migrate\(to=...\)`.*expected an Optax transformation, got int 3"
  ):
    maskopt.migrate(state, params, to=3)
  for others, said in (({"v": params["w"]}, "at v"), ({"w": jnp.ones(3)}, "at w")):
    match = rf"`maskopt.migrate\(params=...\)`.*that `to` was made for, got.*{said}, expected.*Give"
    with pytest.raises(ValueError, match=match):
      maskopt.migrate(state, others, to=tx)
