"""The transforms: properties, state, masters, and what they refuse."""

import copy
import pickle
import re
import warnings

import flax.core
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import strategies
from flax import nnx
from hypothesis import given, settings, strategies as st

import maskopt
from maskopt import _packing

W = {"w": jnp.arange(1.0, 7.0).reshape(2, 3)}
UNITS = np.array([True, False, False])


@pytest.fixture(autouse=True)
def _promotion():
  """Optax's Adam itself needs promotion; `test_own_code_promotes_nothing` checks ours."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def steps(tx, params, seeds=(0, 1, 2), jit=False, apply=maskopt.apply_updates):
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return apply(params, updates), state

  step = jax.jit(step) if jit else step
  state = tx.init(params)
  for seed in seeds:
    params, state = step(params, state, strategies.gradients(seed, params))
  return params


INNER = {
  "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
  "momentum": lambda: optax.sgd(0.1, momentum=0.9),
  "clip": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
}
inners = st.sampled_from(sorted(INNER))
prefers = st.sampled_from(("time", "memory"))


@given(strategies.problems(), inners, prefers)
def test_frozen_bits_are_unchanged_and_the_rest_trains_alone(problem, inner, prefer):
  """Independent oracle: Optax on the trainable numbers of each leaf, as a vector."""
  params, mask, full = problem
  tx = maskopt.selective_transform(INNER[inner](), freeze_mask=mask, prefer=prefer)
  after = steps(tx, params)
  for k in params:
    assert reference.moved(params[k], after[k], full[k]) == []

  def alone(tree):
    return {k: jnp.asarray(np.asarray(x)[~full[k]]) for k, x in tree.items()}

  sub, optimizer = alone(params), INNER[inner]()
  state = optimizer.init(sub)
  for seed in (0, 1, 2):
    grads = alone(strategies.gradients(seed, params))
    updates, state = optimizer.update(grads, state, sub)
    sub = optax.apply_updates(sub, updates)
  for k in params:
    np.testing.assert_allclose(np.asarray(after[k])[~full[k]], sub[k], rtol=1e-5, atol=1e-6)


@given(strategies.problems(), inners)
def test_nothing_frozen_is_the_inner_optimizer_bitwise(problem, inner):
  params, *_ = problem
  tx = maskopt.selective_transform(INNER[inner](), freeze_mask=False)
  expected = steps(INNER[inner](), params, apply=optax.apply_updates)
  assert reference.same_bits(steps(tx, params), expected)


@given(strategies.problems(), inners)
def test_everything_frozen_changes_nothing(problem, inner):
  params, *_ = problem
  tx = maskopt.selective_transform(INNER[inner](), freeze_mask=True)
  assert all(x.ndim == 0 for x in jax.tree.leaves(tx.init(params)))  # step counts only
  assert reference.same_bits(steps(tx, params), params)


@given(strategies.problems(max_leaves=2), inners, prefers)
def test_jit_is_eager(problem, inner, prefer):
  params, mask, full = problem
  tx = maskopt.selective_transform(INNER[inner](), freeze_mask=mask, prefer=prefer)
  eager, jitted = steps(tx, params), steps(tx, params, jit=True)
  for k in params:
    np.testing.assert_allclose(eager[k], jitted[k], rtol=1e-5, atol=1e-6)
    assert reference.moved(eager[k], jitted[k], full[k]) == []


@given(strategies.problems(), st.sampled_from((0.0, -0.0, np.nan, np.inf)))
def test_masked_freeze_is_a_where(problem, value):
  params, mask, full = problem
  tx = maskopt.masked_freeze(mask)
  grads = {
    k: jnp.asarray(np.where(full[k], np.float32(value), g))
    for k, g in strategies.gradients(0, params).items()
  }
  updates, _ = tx.update(grads, tx.init(params), params)
  for k, u in updates.items():
    # -0.0 and not 0.0, for adding 0.0 would turn -0.0 into 0.0
    expected = np.where(full[k], np.float32(-0.0), np.asarray(grads[k]))
    assert reference.same_bits(u, expected)


@given(strategies.problems())
def test_stop_gradient_stops_frozen_elements(problem):
  params, mask, full = problem

  def loss(p):
    return sum(jnp.sum(x**2) for x in maskopt.stop_gradient(p, mask).values())

  for k, g in jax.grad(loss)(params).items():
    np.testing.assert_array_equal(g, np.where(full[k], 0, 2 * np.asarray(params[k])))


@settings(max_examples=8)
@given(strategies.problems(max_leaves=2), st.booleans())
def test_containers_and_prefixes_do_not_matter(problem, frozen):
  """dict = FrozenDict = nnx.State, and a bool for a subtree is that bool for each of its leaves."""
  params, mask, full = problem
  params = {"a": params, "b": jax.tree.map(lambda x: x + 1, params)}
  fine = {"a": full, "b": {k: np.full(m.shape, frozen) for k, m in full.items()}}
  coarse = {"a": mask, "b": frozen}

  def after(params, mask):
    tx = maskopt.selective_transform(INNER["momentum"](), freeze_mask=mask, prefer="memory")
    return steps(tx, params)

  expected = after(params, fine)
  for container in (dict, flax.core.freeze, lambda p: nnx.State(jax.tree.map(nnx.Param, p))):
    got = after(container(params), coarse)
    assert jax.tree.structure(got) == jax.tree.structure(container(params))
    assert reference.same_bits(jax.tree.leaves(got), jax.tree.leaves(expected))
  assert reference.same_bits(after(params, flax.core.freeze(coarse)), expected)


def test_adam_against_numpy():
  rng = np.random.default_rng(0)
  params = {"w": jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)}
  frozen = rng.random((4, 5)) < 0.5
  tx = maskopt.selective_transform(
    optax.adamw(0.1, weight_decay=0.1), freeze_mask={"w": frozen}, prefer="memory"
  )
  after = steps(tx, params, seeds=range(10))
  grads = [np.asarray(strategies.gradients(seed, params)["w"])[~frozen] for seed in range(10)]
  expected = reference.adam(np.asarray(params["w"])[~frozen], grads, weight_decay=0.1)
  np.testing.assert_allclose(np.asarray(after["w"])[~frozen], expected, rtol=1e-4, atol=1e-5)


# State.


def test_state_bytes_follow_the_trainable_share():
  def size(state):
    return sum(x.nbytes for x in jax.tree.leaves(state))

  params = {"w": jnp.zeros((1000, 100))}
  rows = np.ones((1000, 1), bool)
  rows[::100] = False
  scattered = np.ones((1000, 100), bool)
  scattered.flat[np.random.default_rng(0).permutation(100_000)[:100]] = False
  for mask, limit in (
    (True, 4),
    (rows, 4 + 8 * 1000 + 4 * 10),
    (scattered, 4 + (8 + 4) * 100),
    (False, 4 + 8 * 100_000),
  ):
    tx = maskopt.selective_transform(optax.adam(0.1), freeze_mask={"w": mask}, prefer="memory")
    assert size(tx.init(params)) <= limit
  dense = maskopt.selective_transform(
    optax.adam(0.1), freeze_mask={"w": np.random.default_rng(0).random((1000, 100)) < 0.1}
  )
  assert size(dense.init(params)) <= 4 + (8 + 1) * 100_000


def test_a_state_of_another_mask_is_refused():
  a = maskopt.selective_transform(optax.adam(0.1), freeze_mask={"w": UNITS}, prefer="memory")
  again = maskopt.selective_transform(optax.adam(0.1), freeze_mask={"w": UNITS}, prefer="memory")
  assert reference.same_bits(again.update(W, a.init(W), W), a.update(W, a.init(W), W))
  b = maskopt.selective_transform(optax.adam(0.1), freeze_mask={"w": ~UNITS})
  match = r"`maskopt.selective_transform\(.*at w, expected a state that trains 4, got 2.*call init"
  with pytest.raises(ValueError, match=match):
    a.update(W, b.init(W), W)
  match = r"at w, expected an array of shape \(2, 3\), got float32 of shape \(2, 2\).*mask_of"
  with pytest.raises(ValueError, match=match):
    a.update({"w": jnp.ones((2, 2))}, a.init(W), W)
  with pytest.raises(ValueError, match=r"at w, expected a leaf, got none; at v, expected no leaf"):
    a.update({"v": jnp.ones((2, 2))}, a.init(W), W)
  with pytest.raises(ValueError, match=r"expected the state that init\(params\) returned, got int"):
    a.update(W, a.init(W)._replace(layouts=3), W)
  c = maskopt.masked_freeze({"w": UNITS})
  with pytest.raises(ValueError, match=r"`maskopt.masked_freeze\(.*at w, expected a state that"):
    c.update(W, maskopt.masked_freeze({"w": ~UNITS}).init(W))


def test_apply_updates_refuses_other_trees():
  match = (
    r"`maskopt.apply_updates\(.*\)`: at w, expected a leaf, got none; at v, .*no leaf.*Give the up"
  )
  with pytest.raises(ValueError, match=match):
    maskopt.apply_updates(W, {"v": jnp.ones(3)})
  match = r"at w, expected an update of shape \(2, 3\), got float32 of shape \(3,\).*Give"
  with pytest.raises(ValueError, match=match):
    maskopt.apply_updates(W, {"w": jnp.ones(3)})


def test_other_bad_arguments():
  with pytest.raises(TypeError, match=r"expected an Optax transformation, got float 0.1.*adam"):
    maskopt.selective_transform(0.1, freeze_mask=True)
  with pytest.raises(ValueError, match=r'expected "time" or "memory", got \'speed\''):
    maskopt.selective_transform(optax.sgd(0.1), freeze_mask=True, prefer="speed")
  tx = maskopt.selective_transform(optax.sgd(0.1), freeze_mask=True, master_dtype=jnp.float32)
  with pytest.raises(ValueError, match=r"expected the parameters as update's third argument.*Call"):
    tx.update(W, tx.init(W))
  tx = maskopt.selective_transform(
    optax.sgd(0.1), freeze_mask={"w": maskopt.runtime(UNITS)}, prefer="memory"
  )
  with pytest.raises(ValueError, match=r"third argument .*freeze_mask= read.*, got None.*Call tx"):
    tx.update(W, tx.init(W), freeze_mask={"w": maskopt.runtime(~UNITS)})
  with pytest.raises(ValueError, match=r"mask_of\(state\)`: .*one freeze mask, got one with 0"):
    maskopt.mask_of(optax.adam(0.1).init(W))
  two = optax.chain(maskopt.masked_freeze({"w": UNITS}), maskopt.masked_freeze({"w": ~UNITS}))
  with pytest.raises(ValueError, match=r"one freeze mask, got one with 2.*state of one maskopt"):
    maskopt.mask_of(two.init(W))


def test_a_mask_is_analysed_once(monkeypatch):
  analyses, analyse = [], _packing.layouts_of
  monkeypatch.setattr(
    _packing, "layouts_of", lambda *args, **kwargs: analyses.append(1) or analyse(*args, **kwargs)
  )
  tx = maskopt.selective_transform(optax.sgd(0.1), freeze_mask={"w": UNITS})
  state = tx.init(W)
  assert len(analyses) == 1
  for _ in range(3):
    _, state = tx.update(W, state, W)
  assert len(analyses) == 1


def test_mask_of_finds_the_mask_anywhere():
  mask = {"w": UNITS}
  tx = optax.chain(
    optax.MultiSteps(
      maskopt.selective_transform(optax.adam(0.1), freeze_mask=mask, prefer="memory"), 2
    )
    .gradient_transformation(),
    maskopt.masked_freeze(True),
  )  # fmt: skip
  inner = tx.init(W)[0]
  found = maskopt.mask_of(inner)
  np.testing.assert_array_equal(found.freeze_mask["w"], np.tile(UNITS, (2, 1)))
  assert "w: Block trains 4 of 6" in repr(found)


def test_a_mask_of_a_state_is_a_freeze_mask():
  tx = maskopt.selective_transform(optax.sgd(0.1), freeze_mask={"w": UNITS}, prefer="memory")
  mask = maskopt.mask_of(tx.init(W))
  again = maskopt.selective_transform(optax.sgd(0.1), freeze_mask=mask)
  assert reference.same_bits(steps(tx, W), steps(again, W))
  assert maskopt.pack(W, mask)["w"].values.shape == (2, 2)


def test_donating_a_state_leaves_the_mask_to_the_caller():
  frozen = np.tile(UNITS, (2, 1))  # of the leaf's own shape, so nothing reshapes it on the way
  mask = maskopt.runtime(jnp.asarray(frozen))
  tx = maskopt.selective_transform(optax.sgd(0.1), freeze_mask={"w": mask})
  for _ in range(2):
    p, s = jax.tree.map(jnp.array, W), tx.init(W)
    jax.jit(lambda p, s: tx.update(W, s, p), donate_argnums=1)(p, s)
  assert mask.mask.tolist() == frozen.tolist()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_states_survive_pickle_and_deepcopy(clone):
  mask = {"w": np.array([[True, False, True], [False, True, True]])}
  tx = maskopt.selective_transform(optax.adam(0.1), freeze_mask=mask, prefer="memory")
  state = tx.init(W)
  again = clone(state)
  assert jax.tree.structure(again) == jax.tree.structure(state)
  assert reference.same_bits(tx.update(W, again, W)[0], tx.update(W, state, W)[0])


@pytest.mark.parametrize("kind", ["block", "rows", "elements", "dense"])
def test_orbax_restores_no_state_of_another_mask(tmp_path, kind):
  """Both masks train as much, so that every array has the shape that is asked for."""
  checkpoint = pytest.importorskip("orbax.checkpoint")
  frozen = {
    "block": np.arange(6) < 3,
    "rows": (np.arange(4) % 2 > 0)[:, None],
    "elements": np.random.default_rng(0).permutation(24).reshape(4, 6) < 12,
    "dense": np.random.default_rng(0).permutation(24).reshape(4, 6) < 2,
  }[kind]
  params = {"w": jnp.ones((4, 6))}
  one, other = (
    maskopt.selective_transform(optax.adam(0.1), freeze_mask={"w": m}, prefer="memory")
    for m in (frozen, np.flip(frozen))
  )
  with checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", one.init(params))
    checkpointer.wait_until_finished()
    with pytest.raises(ValueError, match=r"(?s)w@.*Source: MISSING"):
      checkpointer.restore(tmp_path / "state", other.init(params))


def test_states_survive_flax_serialization():
  mask = {"w": np.array([[True, False, True], [False, True, True]])}
  tx = maskopt.selective_transform(
    optax.adam(0.1), freeze_mask=mask, prefer="memory", master_dtype=jnp.float32
  )
  params = {"w": W["w"].astype(jnp.bfloat16)}
  state = tx.update(params, tx.init(params), params)[1]
  data = flax.serialization.to_bytes(state)
  again = flax.serialization.from_bytes(tx.init(params), data)
  assert jax.tree.structure(again) == jax.tree.structure(state)
  assert reference.same_bits(again, state)
  other = maskopt.selective_transform(optax.adam(0.1), freeze_mask=True, master_dtype=jnp.float32)
  with pytest.raises(ValueError, match="expected a state for mask .*Restore into a state of"):
    flax.serialization.from_bytes(other.init(params), data)


def test_states_survive_orbax(tmp_path):
  checkpoint = pytest.importorskip("orbax.checkpoint")
  mask = {"w": np.array([[True, False, True], [False, True, True]])}
  tx = maskopt.selective_transform(optax.adam(0.1), freeze_mask=mask, prefer="memory")
  state = tx.update(W, tx.init(W), W)[1]
  with checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", state)
    checkpointer.wait_until_finished()
    again = checkpointer.restore(tmp_path / "state", tx.init(W))
  assert jax.tree.structure(again) == jax.tree.structure(state)
  assert reference.same_bits(again, state)
  assert reference.same_bits(tx.update(W, again, W)[0], tx.update(W, state, W)[0])


# Masters.


def _bf16(**kwargs):
  return maskopt.selective_transform(
    optax.sgd(1e-3), freeze_mask={"w": np.array([True, False])}, prefer="memory", **kwargs
  )


def _hundred(tx, apply, jit=True):
  params = {"w": jnp.ones(2, jnp.bfloat16)}
  state = tx.init(params)

  def step(params, state):
    updates, state = tx.update({"w": jnp.ones(2, jnp.bfloat16)}, state, params)
    return apply(params, updates), state

  step = jax.jit(step) if jit else step
  for _ in range(100):
    params, state = step(params, state)
  return params["w"].astype(jnp.float32).tolist(), state


@pytest.mark.parametrize("apply", [maskopt.apply_updates, optax.apply_updates])
def test_masters_keep_what_bfloat16_loses(apply):
  assert _hundred(_bf16(), apply)[0] == [1.0, 1.0]
  after, state = _hundred(_bf16(master_dtype=jnp.float32), apply)
  assert after == [1.0, float(jnp.float32(0.9).astype(jnp.bfloat16))]
  np.testing.assert_allclose(state.masters["w"], 0.9, rtol=1e-5)


def test_masters_cost_only_trainable_elements_and_skip_wide_leaves():
  params = {"w": jnp.ones((8, 4), jnp.bfloat16), "v": jnp.ones(3), "z": jnp.ones(5, jnp.bfloat16)}
  mask = {"w": np.arange(4) > 0, "v": False, "z": True}
  tx = maskopt.selective_transform(
    optax.sgd(0.1), freeze_mask=mask, prefer="memory", master_dtype=jnp.float32
  )
  masters = tx.init(params).masters
  assert masters["w"].shape == (8, 1) and masters["w"].dtype == jnp.float32
  assert isinstance(masters["v"], optax.MaskedNode) and isinstance(masters["z"], optax.MaskedNode)


@pytest.mark.parametrize("apply", [maskopt.apply_updates, optax.apply_updates])
def test_masters_keep_a_trainable_infinity(apply):
  """Whether the parameter is set or, in a trace of its own, moved by the difference."""
  params = {"w": jnp.array([jnp.inf, -jnp.inf, 1.0], jnp.bfloat16)}
  tx = maskopt.selective_transform(optax.sgd(0.5), freeze_mask=False, master_dtype=jnp.float32)
  updates, _ = jax.jit(tx.update)({"w": jnp.ones(3, jnp.bfloat16)}, tx.init(params), params)
  assert apply(params, updates)["w"].tolist() == [jnp.inf, -jnp.inf, 0.5]


def test_masters_give_way_to_parameters_set_by_somebody_else():
  tx = _bf16(master_dtype=jnp.float32)
  _, state = _hundred(tx, maskopt.apply_updates)
  params = {"w": jnp.full(2, 3.0, jnp.bfloat16)}
  _, state = tx.update({"w": jnp.zeros(2, jnp.bfloat16)}, state, params)
  assert state.masters["w"].tolist() == [3.0]


@pytest.mark.parametrize("trains", [[1, 3], [0, 1, 2, 3], [1, 2]])  # Elements, Full, Slice
def test_after_masters_comes_their_difference(trains):
  """What a parameter is set to is no gradient: the next transform of a chain sees the step."""
  mask = {"w": ~np.isin(np.arange(4), trains)}
  kwargs = {"freeze_mask": mask, "prefer": "memory"}
  first = maskopt.selective_transform(optax.sgd(0.25), master_dtype=jnp.float32, **kwargs)
  tx = optax.chain(first, maskopt.selective_transform(optax.scale(0.5), **kwargs))
  params = {"w": jnp.ones(4, jnp.bfloat16)}

  def step(params, state):
    updates, state = tx.update(params, state, params)
    return maskopt.apply_updates(params, updates)["w"].astype(jnp.float32)

  for call in (step, jax.jit(step)):
    assert call(params, tx.init(params)).tolist() == np.where(mask["w"], 1, 0.875).tolist()


def test_runtime_masks_keep_moments_of_what_stays_trainable():
  def mask(*trains):
    return {"w": maskopt.runtime(~np.isin(np.arange(6), trains), 2)}

  params = {"w": jnp.zeros(6)}
  tx = maskopt.selective_transform(optax.sgd(1.0, momentum=0.5), freeze_mask=mask(1, 4))
  state = tx.init(params)
  _, state = tx.update({"w": jnp.arange(6.0)}, state, params)
  updates, state = tx.update({"w": jnp.arange(6.0)}, state, params, freeze_mask=mask(4, 5))
  assert updates["w"].tolist() == [0, 0, 0, 0, -6.0, -5.0]  # 4: 4 + 4/2; 5 starts anew
  assert maskopt.mask_of(state).freeze_mask["w"].tolist() == [1, 1, 1, 1, 0, 0]
  with pytest.raises(ValueError, match=r"at w, expected a static mask, as init was given"):
    static = maskopt.selective_transform(optax.sgd(1.0), freeze_mask={"w": np.arange(6) < 3})
    static.update(params, static.init(params), params, freeze_mask=mask(0, 1))


@pytest.mark.parametrize("name", ["masked_freeze", "selective_transform"])
def test_update_refuses_what_is_no_state_of_its_own(name):
  mask, params = {"w": np.array([True, False])}, {"w": jnp.ones(2)}
  selects = name == "selective_transform"
  tx = (
    maskopt.selective_transform(optax.sgd(0.1), freeze_mask=mask)
    if selects
    else maskopt.masked_freeze(mask)
  )
  others = {
    "a tuple of 2": optax.sgd(0.1).init(params),
    "a dict of 1": params,  # arguments in another order
    "NoneType None": None,
    r"ScaleByAdamState\(count, mu, nu\)": optax.scale_by_adam().init(params),
    "int 0": tx.init(params)._replace(layouts=0),
  }
  for got, state in others.items():
    with pytest.raises(
      ValueError,
      match=rf"`maskopt.{name}\(freeze_mask=...\).update`: at the root, expected the state that "
      rf"init\(params\) returned, got {got}. Call tx.update\(grads, state, params\)",
    ):
      tx.update(params, state, params)
  assert tx.update(params, tx.init(params), params)


@pytest.mark.parametrize(
  ("dtype", "got"), [(jnp.int32, "int32"), ("float33", "str 'float33'"), (jnp.complex64, "complex")]
)
@pytest.mark.parametrize("freeze_mask", [True, False])
def test_master_dtype_is_checked_when_the_transform_is_built(dtype, got, freeze_mask):
  with pytest.raises(
    TypeError, match=rf"selective_transform\(master_dtype=...\)`.*expected a float dtype, got {got}"
  ):
    maskopt.selective_transform(optax.sgd(0.1), freeze_mask=freeze_mask, master_dtype=dtype)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit])
@pytest.mark.parametrize(
  ("of_gradient", "warned"),
  [
    ({"w": np.arange(8) != 2, "b": False}, "at w"),  # another unit
    ({"w": np.arange(8) == 1, "b": False}, "at w"),  # upside down
    ({"w": True, "b": True}, "at b, w"),
    ({"w": np.arange(8) != 1, "b": False}, None),
    ({"w": np.arange(8) > 1, "b": np.arange(8) > 1}, None),  # more than trains, and less
    ({"w": np.tile(np.arange(8) != 1, (8, 1)), "b": False}, None),  # the same, said otherwise
  ],
)
def test_a_gradient_of_another_mask_is_told(jit, of_gradient, warned):
  params = {"w": jnp.ones((8, 8)), "b": jnp.ones(8)}
  mask = {"w": np.arange(8) != 1, "b": False}
  tx = maskopt.selective_transform(optax.sgd(0.1), freeze_mask=mask, prefer="memory")

  @jit
  def step(params, state):
    grads = maskopt.grad(lambda p: jnp.sum(jnp.tanh(p["w"]) @ p["b"]), of_gradient)(params)
    return tx.update(grads, state, params)

  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    step(params, tx.init(params))
  assert len(caught) == (warned is not None)
  if warned is not None:
    text = rf"`maskopt.selective_transform.*`: {warned}, the gradient .* another mask, .*mask_of"
    assert re.search(text, str(caught[0].message))


@pytest.mark.parametrize("inner", [True, False, np.array([True, False, False])])
@pytest.mark.parametrize("around", [lambda tx: tx, lambda tx: optax.chain(optax.clip(1.0), tx)])
def test_an_optimizer_that_selects_already_is_refused(inner, around):
  """The inner one would see packed values: with an array, of other shapes than its mask."""
  params = {"w": jnp.ones((4, 3))}
  tx = around(maskopt.selective_transform(optax.adam(0.1), freeze_mask={"w": inner}))
  rows = np.array([[True], [False], [True], [True]])
  match = (
    r"optimizer, \.\.\.\)`: at optimizer, expected an optimizer of whole parameters, got one of "
    r"maskopt\.selective_transform\. It would select twice\. Join the masks"
  )
  with pytest.raises(ValueError, match=match):
    maskopt.selective_transform(tx, freeze_mask={"w": rows}, prefer="memory").init(params)


def test_a_partition_under_a_mask_is_no_second_selection():
  tx = maskopt.partition({"a": optax.adam(0.1)}, {"w": "a"})
  maskopt.selective_transform(tx, freeze_mask={"w": False}).init({"w": jnp.ones(3)})
