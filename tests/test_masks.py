"""What a freeze mask may be, what it may not be, and its algebra."""

import copy
import pickle
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import strategies
from hypothesis import given, strategies as st

import maskopt
from maskopt import _masks, _tree

PARAMS = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}, "scale": jnp.ones(())}
WHERE = "maskopt.f(freeze_mask=...)"


def full(mask, params):
  """The mask as full arrays, leaf by leaf."""
  leaves = _tree.flatten(params).leaves
  resolved = _masks.resolve(mask, params, WHERE)
  return [
    None if m is None else np.broadcast_to(m.mask if isinstance(m, _masks.Runtime) else m, x.shape)
    for m, x in zip(resolved, leaves, strict=True)
  ]


def same(a, b):
  return all(x is y or np.array_equal(x, y) for x, y in zip(a, b, strict=True))


COLUMNS = np.array([True, False, True, False])


@pytest.mark.parametrize(
  ("mask", "kernel"),
  [
    (True, np.ones((3, 4), bool)),
    ({"dense": True, "scale": False}, np.ones((3, 4), bool)),
    (np.bool_(False), np.zeros((3, 4), bool)),
    ({"dense": {"kernel": COLUMNS, "bias": COLUMNS}, "scale": True}, np.tile(COLUMNS, (3, 1))),
    (
      {"dense": {"kernel": np.array([[1], [0], [1]], bool), "bias": False}, "scale": False},
      np.tile([[True], [False], [True]], (1, 4)),
    ),
    (lambda p: jax.tree.map(lambda x: x.ndim == 2, p), np.ones((3, 4), bool)),
    (
      {"dense": {"kernel": jnp.asarray(COLUMNS), "bias": False}, "scale": False},
      np.tile(COLUMNS, (3, 1)),
    ),
  ],
  ids=["bool", "prefix", "numpy bool", "units", "rows", "function", "runtime"],
)
def test_every_form(mask, kernel):
  bias, got, scale = full(mask, PARAMS)  # JAX sorts keys
  np.testing.assert_array_equal(got, kernel)
  assert bias.shape == (4,) and scale.shape == ()


def test_a_function_is_called_once_with_the_parameters():
  calls = []

  def mask(params):
    calls.append(params)
    return True

  tx = maskopt.selective_transform(optax.sgd(0.1), freeze_mask=mask)
  state = tx.init(PARAMS)
  tx.update(PARAMS, state, PARAMS)
  tx.update(PARAMS, state, PARAMS)
  assert len(calls) == 1 and calls[0] is PARAMS


def test_none_leaves_pass_through():
  params = {"a": None, "b": jnp.ones(2)}
  below = {"a": {"kernel": True}, "b": True}  # a layer that this model leaves out
  for mask in ({"a": None, "b": True}, {"a": True, "b": True}, {"b": True}, True, below):
    tx = maskopt.selective_transform(optax.sgd(0.1), freeze_mask=mask)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["a"] is None
    assert maskopt.apply_updates(params, updates)["a"] is None


def test_integer_leaves_may_be_frozen():
  params = {"q": jnp.arange(4, dtype=jnp.int8), "key": jax.random.key(0), "w": jnp.ones(2)}
  grads = {"q": np.zeros(4, jax.dtypes.float0), "key": np.zeros((), jax.dtypes.float0)}
  tx = maskopt.selective_transform(optax.sgd(0.1), freeze_mask={"q": True, "key": True, "w": False})
  updates, _ = tx.update({**grads, "w": jnp.ones(2)}, tx.init(params), params)
  after = maskopt.apply_updates(params, updates)
  assert after["q"].dtype == jnp.int8 and (after["q"] == params["q"]).all()
  assert after["key"] == params["key"]
  np.testing.assert_allclose(after["w"], 0.9)


# Bad input: where, expected, got and the remedy; several at once in one raise.
BAD = [
  ("strings", {"w": "False", "b": True}, TypeError, r"at w, expected bool.* \(3, 4\), got str 'F"),
  ("floats", {"w": np.ones((3, 4)), "b": 1.0}, TypeError, r"at b, .*float 1.0; at w, .*float64"),
  ("integers", {"w": 1, "b": np.array([0, 1, 1, 0])}, TypeError, r"at b, .*int64.*; at w, .*int 1"),
  ("shape", {"w": np.ones(3, bool), "b": True}, ValueError, r"at w, .*\(3, 4\), got bool .*\(3,\)"),
  ("rank", {"w": True, "b": np.ones((2, 4), bool)}, ValueError, r"at b, .*\(4,\), got .*\(2, 4\)"),
  ("one", {"w": np.array([[True]]), "b": True}, ValueError, r"at w.*one element on a larger leaf"),
  ("missing", {"w": True}, ValueError, r"at b, expected a freeze mask, got none"),
  ("extra", {"w": True, "b": True, "c": True}, ValueError, r"at c, expected a parameter, got none"),
  ("lists", {"w": [True, False, True], "b": True}, ValueError, r"at w, expected a freeze.*w/0"),
  ("model", {"x": True, "y": True}, ValueError, r"at b, .*at w, .*at x, .*at y, .*are b, w\."),
  ("function", lambda p: {"w": 1.0, "b": True}, TypeError, r"at w, .*got float 1.0"),
  ("prefix", np.ones(4, bool), ValueError, r"at b, expected a bool, for .* to a subtree"),
  ("count", maskopt.runtime({"w": np.ones((3, 4), bool), "b": np.ones(4, bool)}, 99), ValueError,
   r"at b, expected a count of trainable elements in \[0, 4\], got 99; at w, .*\[0, 12\], got 99"),
]  # fmt: skip
REMEDIES = {
  "count": "Give maskopt.runtime the count",
  "lists": r"A list or dict is a tree of its own: write np.array\(\[...\]\)",
}
CALLS = {
  "selective_transform": lambda m, p: maskopt.selective_transform(
    optax.sgd(0.1), freeze_mask=m
  ).init(p),
  "masked_freeze": lambda m, p: maskopt.masked_freeze(m).init(p),
  "stop_gradient": lambda m, p: maskopt.stop_gradient(p, m),
  "pack": lambda m, p: maskopt.pack(p, m),
  "unpack": lambda m, p: maskopt.unpack(p, p, m),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("name", "mask", "kind", "match"), BAD, ids=[b[0] for b in BAD])
def test_bad_masks_are_refused(call, name, mask, kind, match):
  params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
  before = jax.tree.map(np.array, params)
  where = rf"`maskopt\.{call}\(freeze_mask=\.\.\.\)`: "
  remedy = REMEDIES.get(name, "Build the mask with maskopt.build_mask")
  with pytest.raises(kind, match=rf"(?s){where}.*{match}.*{remedy}"):
    CALLS[call](mask, params)
  assert all(np.array_equal(before[k], params[k]) for k in params)


@pytest.mark.parametrize("call", CALLS)
def test_a_bool_among_the_arguments_of_jit_is_refused(call):
  """It is a tracer by then, and no longer says at trace time whether the leaf trains."""
  params = {"dense": {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}, "scale": jnp.ones(())}
  trace = jax.jit(lambda mask: CALLS[call](mask, params))
  units = jnp.asarray(COLUMNS)
  remedy = r"\. What jit, vmap or scan traces is data, a bool too: make it outside and close over"
  bad = r"at dense/b, expected bool broadcastable to \(4,\), got a traced bool"
  also = r"at dense/w, expected bool broadcastable to \(3, 4\), got a traced bool"
  for mask, match in (
    ({"dense": {"w": units, "b": True}, "scale": True}, bad + remedy),
    ({"dense": {"w": np.True_, "b": False}, "scale": True}, f"{bad}; {also}{remedy}"),
    ({"dense": True, "scale": True}, f"{bad}; {also}{remedy}"),  # given to a subtree
    (maskopt.runtime({"dense": {"w": COLUMNS, "b": False}, "scale": True}), bad + remedy),
  ):
    with pytest.raises(ValueError, match=rf"`maskopt\.{call}\(freeze_mask=\.\.\.\)`: {match}"):
      trace(mask)
  # Beside a complaint of another kind, the general remedy.
  with pytest.raises(TypeError, match=rf"{bad}; at dense/w, .*float32.*Build the mask"):
    trace({"dense": {"w": np.ones(4, np.float32), "b": False}, "scale": True})
  # Closed over, or whole arrays: both are masks. A scalar parameter's mask is a scalar.
  good = CALLS[call] if call != "unpack" else lambda m, p: maskopt.unpack(maskopt.pack(p, m), p, m)
  jax.jit(lambda w: good({"dense": {"w": w, "b": True}, "scale": True}, params))(units)
  jax.jit(lambda m: good(m, params))({"dense": {"w": units, "b": units}, "scale": True})


def test_a_traced_bool_as_the_next_mask_is_refused():
  mask = {"w": maskopt.runtime(COLUMNS), "b": True}
  params = {"w": jnp.ones(4), "b": jnp.ones(2)}
  tx = maskopt.selective_transform(optax.sgd(0.1), freeze_mask=mask)
  state = tx.init(params)
  step = jax.jit(lambda m: tx.update(params, state, params, freeze_mask=m)[0])
  with pytest.raises(ValueError, match=r"selective_transform.*at b, .*\(2,\), got a traced bool"):
    step(mask)
  updates = jax.jit(lambda w: tx.update(params, state, params, freeze_mask={"w": w, "b": True})[0])(
    maskopt.runtime(~COLUMNS)
  )
  assert updates["w"].tolist() == [np.float32(-0.1) if f else 0 for f in COLUMNS]


@pytest.mark.parametrize("call", ["selective_transform", "masked_freeze", "pack"])
def test_training_an_integer_leaf_is_refused(call):
  params = {"q": jnp.arange(4), "w": jnp.ones(2)}
  match = (
    r"at q, expected a float or complex parameter, got int32.* Freeze what is not float or complex"
  )
  for mask in (False, {"q": np.array([1, 1, 1, 0], bool), "w": True}):
    with pytest.raises(TypeError, match=match):
      CALLS[call](mask, params)


@pytest.mark.parametrize("call", ["selective_transform", "masked_freeze", "pack"])
def test_one_array_at_two_paths_is_refused(call):
  shared = jnp.ones(2)
  with pytest.raises(ValueError, match=r"at b, expected an array of its own, got the one.* at a"):
    CALLS[call](True, {"a": shared, "b": shared})


def test_a_count_that_lies_is_refused():
  mask = maskopt.runtime({"w": np.array([True, False, False])}, count=1)
  with pytest.raises(ValueError, match=r"at w, expected 1 trainable elements, got a mask with 2"):
    CALLS["selective_transform"](mask, {"w": jnp.ones(3)})


def test_runtime_refuses_what_is_not_boolean():
  with pytest.raises(
    TypeError, match=r"`maskopt.runtime\(freeze_mask=...\)`: at w, expected a bool"
  ):
    maskopt.runtime({"w": np.ones(3)})


def test_a_bare_array_is_the_root():
  with pytest.raises(ValueError, match=r"at the root, expected bool broadcastable to \(3,\)"):
    CALLS["pack"](np.ones(4, bool), jnp.ones(3))


# Algebra.


@given(strategies.problems(), st.data())
def test_algebra_is_elementwise(problem, data):
  params, a, full_a = problem
  drawn = {k: data.draw(strategies.leaf_masks(p.shape)) for k, p in params.items()}
  b, full_b = ({k: v[i] for k, v in drawn.items()} for i in (0, 1))
  for op, expected in (
    (maskopt.union, {k: full_a[k] | full_b[k] for k in params}),
    (maskopt.intersection, {k: full_a[k] & full_b[k] for k in params}),
  ):
    assert same(full(op(a, b), params), expected.values())
  assert same(full(maskopt.invert(a), params), [~full_a[k] for k in params])
  # De Morgan, through other objects than those compared above
  left = maskopt.invert(maskopt.union(a, b))
  right = maskopt.intersection(maskopt.invert(a), maskopt.invert(b))
  assert same(full(left, params), full(right, params))


def test_algebra_keeps_structure():
  rows, units = np.array([[True], [False], [True]]), np.array([True, False, True, False])
  assert maskopt.union({"w": rows}, {"w": ~rows})["w"].shape == (3, 1)
  assert maskopt.invert({"w": rows})["w"].shape == (3, 1)
  assert maskopt.union({"w": rows}, {"w": units})["w"].shape == (3, 4)
  assert maskopt.union({"w": rows}, True) == {"w": True}
  assert maskopt.intersection({"w": rows}, False) == {"w": False}


def test_algebra_accepts_prefixes_functions_and_runtime():
  fine = {"a": {"w": np.array([True, False]), "b": True}, "c": False}
  assert maskopt.intersection({"a": True, "c": True}, fine) == maskopt.union(fine, False)
  later = maskopt.union(lambda p: {"a": True, "c": False}, fine)
  assert later({}) == {"a": {"w": True, "b": True}, "c": False}
  assert maskopt.invert(lambda p: {"a": True})({}) == {"a": False}
  data = maskopt.union(maskopt.runtime({"w": np.array([True, False])}, 1), {"w": np.ones(2, bool)})
  assert isinstance(data["w"], _masks.Runtime) and data["w"].count is None
  assert data["w"].mask.tolist() == [True, True]
  assert maskopt.union({"w": None}, {"w": None}) == {"w": None}


@pytest.mark.parametrize("wrong", [1, 1.0, "False", np.ones((2, 3)), jnp.ones(3, jnp.int32)])
def test_algebra_refuses_what_is_no_mask(wrong):
  mask = {"b": True, "w": wrong}
  with pytest.raises(TypeError, match=r"maskopt.invert\(a\).*at w, expected a bool or a boolean"):
    maskopt.invert(mask)
  for op in (maskopt.union, maskopt.intersection):
    for pair in ((mask, {"b": True, "w": True}), (True, mask)):
      with pytest.raises(TypeError, match="at w, expected a bool or a boolean array, got"):
        op(*pair)


def test_algebra_names_the_masks_that_do_not_fit():
  with pytest.raises(
    ValueError, match=r"`maskopt.union\(a, b\)`: at w, .*in both.*; at v, .*only one"
  ):
    maskopt.union({"w": True}, {"v": True})
  a, b = {"w": np.ones(3, bool)}, {"w": np.ones(4, bool)}
  with pytest.raises(
    ValueError, match=r"at w, expected bools that broadcast together, got bool of"
  ):
    maskopt.intersection(a, b)


def test_algebra_tells_a_subtree_from_a_leaf():
  with pytest.raises(
    ValueError, match=r"at d/w, expected a bool at d, for .* subtree, got bool of"
  ):
    maskopt.union({"d": np.ones(3, bool)}, {"d": {"w": True}})


@pytest.mark.parametrize("call", ["union", "intersection", "invert"])
def test_algebra_refuses_what_it_would_read_wrongly(call):
  """Step 0 of a schedule for all of it; the index arrays of a working mask, or none, for a mask."""
  mask, params = {"w": True, "b": False}, {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}

  def run(a):
    return maskopt.invert(a) if call == "invert" else getattr(maskopt, call)(mask, a)

  stages = {0: mask, 5: {"w": False, "b": False}}
  match = rf"maskopt.{call}\(a.*expected a mask that stays as it is, got Schedule.* masks of its st"
  with pytest.raises(TypeError, match=match):
    run(maskopt.unfreeze_schedule(stages))
  state = maskopt.selective_transform(optax.sgd(0.1), freeze_mask=mask).init(params)
  match = (
    rf"maskopt.{call}\(a.*expected a tree of bools, got what maskopt.mask_of returns.*freeze_m"
  )
  with pytest.raises(TypeError, match=match):
    run(maskopt.mask_of(state))
  assert maskopt.invert(maskopt.mask_of(state).freeze_mask) == {"w": False, "b": True}


def test_a_billion_elements_cost_kilobytes():
  params = {"w": jax.ShapeDtypeStruct((2**15, 2**15), jnp.float32)}
  rows = np.ones((2**15, 1), bool)
  rows[[7, 9_000]] = False
  rows = {"w": rows}
  tx = maskopt.selective_transform(optax.adam(0.1), freeze_mask=rows)
  jax.eval_shape(tx.init, params)  # JAX's own caches, once
  tracemalloc.start()
  mask = maskopt.union(maskopt.invert(maskopt.invert(rows)), {"w": False})
  state = jax.eval_shape(tx.init, params)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert mask["w"].shape == (2**15, 1)
  assert state.inner_state[0].mu["w"].shape == (2, 2**15)
  assert peak < 2**20, f"{peak:,} bytes"


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_masks_survive_pickle_and_deepcopy(clone):
  mask = {"w": COLUMNS, "r": maskopt.runtime(COLUMNS, 2), "b": True}
  again = clone(mask)
  assert again["b"] is True and np.array_equal(again["w"], COLUMNS)
  assert again["r"].count == 2 and np.array_equal(again["r"].mask, COLUMNS)
  later = clone(maskopt.union(_everything, {"w": COLUMNS}))
  assert later({"w": jnp.ones(4)}) == {"w": True}


def _everything(params):
  return jax.tree.map(lambda _: True, params)


def test_a_function_of_path_and_leaf_is_a_rule():
  message = (
    r"a function of \(params\), got one of \(path, leaf\)\. .* is a rule: maskopt\.build_mask"
  )
  tx = maskopt.selective_transform(optax.sgd(0.1), freeze_mask=lambda path, leaf: True)
  with pytest.raises(TypeError, match=message):
    tx.init({"w": jnp.ones(3)})


def test_labels_belong_to_a_partition():
  tx = maskopt.selective_transform(optax.sgd(0.1), freeze_mask={"w": "frozen"})
  with pytest.raises(TypeError, match="got str 'frozen'.*Labels .* are for maskopt.partition"):
    tx.init({"w": jnp.ones(3)})


@pytest.mark.parametrize("frozen", [True, False, np.array([True, False, True])])
def test_linen_statistics_do_not_train(frozen):
  variables = {"params": {"w": jnp.ones(3)}, "batch_stats": {"bn": {"mean": jnp.ones(3)}}}
  tx = maskopt.selective_transform(
    optax.adamw(0.1), freeze_mask={"params": False, "batch_stats": {"bn": {"mean": frozen}}}
  )
  if frozen is True:
    tx.init(variables)
  else:
    message = r"at batch_stats/bn/mean, expected statistics that are frozen.*variables\['params'\]"
    with pytest.raises(ValueError, match=message):
      tx.init(variables)
  # The name alone means nothing.
  alone = {"batch_stats": {"w": jnp.ones(3)}}
  maskopt.selective_transform(optax.adamw(0.1), freeze_mask=False).init(alone)
