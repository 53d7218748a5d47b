"""maskopt.grad against jax.grad with the frozen part struck out, and what it computes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from pairs import every_pair

import maskopt
from maskopt._slicer import count_flops


@pytest.fixture(autouse=True)
def _optax_promotes():
  # Optax computes decay**count, a float to an int: not ours to be strict about.
  with jax.numpy_dtype_promotion("standard"):
    yield


WIDTH, BATCH, LAYERS = 64, 32, 3


def rng():
  return np.random.default_rng(0)


def network(dtype=np.float32):
  r = rng()
  return {
    f"layer_{i}": {
      "kernel": jnp.asarray(r.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5, dtype),
      "bias": jnp.asarray(r.normal(size=WIDTH), dtype),
    }
    for i in range(LAYERS)
  }


def loss(params, x):
  for i in range(LAYERS):
    layer = params[f"layer_{i}"]
    x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
  return (x**2).mean()


def batch(dtype=np.float32):
  return jnp.asarray(rng().normal(size=(BATCH, WIDTH)), dtype)


def l_shape():
  frozen = np.ones((WIDTH, WIDTH), bool)
  frozen[:6] = False
  frozen[:, 10:14] = False
  return frozen


def few(k):
  """All frozen but k scattered elements."""
  frozen = np.ones(WIDTH * WIDTH, bool)
  frozen[rng().choice(WIDTH * WIDTH, k, replace=False)] = False
  return frozen.reshape(WIDTH, WIDTH)


UNITS = np.arange(WIDTH) % 10 != 3
MASKS = {
  "nothing": False,
  "lowest layers": {"layer_0": True, "layer_1": True, "layer_2": False},
  "units": {f"layer_{i}": {"kernel": UNITS, "bias": UNITS} for i in range(LAYERS)},
  "inputs": {f"layer_{i}": {"kernel": UNITS[:, None], "bias": False} for i in range(LAYERS)},
  "contiguous": {"layer_0": True, "layer_1": {"kernel": np.arange(WIDTH) > 5, "bias": True},
                 "layer_2": True},
  "two blocks": {"layer_0": True, "layer_1": {"kernel": l_shape(), "bias": True}, "layer_2": False},
  "union": {"layer_0": True, "layer_1": {"kernel": l_shape(), "bias": True}, "layer_2": True},
  "sampled": {"layer_0": True, "layer_1": {"kernel": few(12), "bias": True}, "layer_2": True},
  "scattered": {"layer_0": {"kernel": few(800), "bias": True}, "layer_1": False, "layer_2": True},
  "most units": {f"layer_{i}": {"kernel": ~UNITS, "bias": ~UNITS} for i in range(LAYERS)},
  "runtime": {"layer_0": True, "layer_1": {"kernel": jnp.asarray(few(700)), "bias": True},
              "layer_2": True},
}  # fmt: skip
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 4e-3}


def dense_mask(freeze_mask, params):
  """The mask as full bool arrays, by NumPy broadcasting alone."""
  if isinstance(params, dict):
    return {
      k: dense_mask(freeze_mask[k] if isinstance(freeze_mask, dict) else freeze_mask, v)
      for k, v in params.items()
    }
  return np.broadcast_to(np.asarray(freeze_mask), params.shape)


def assert_sliced(gradient, params, freeze_mask, full, tolerance):
  masks = dense_mask(freeze_mask, params)
  for got, frozen, expected, p in zip(
    *map(jax.tree.leaves, (gradient, masks, full, params)), strict=True
  ):
    assert got.shape == p.shape and got.dtype == p.dtype
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert (reference.bits(got)[frozen] == 0).all()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got[~frozen], expected[~frozen], atol=tolerance * scale, rtol=0)


@every_pair(name=MASKS, jit=[False, True], dtype=TOLERANCE)
def test_equals_jax_where_it_trains_and_zero_elsewhere(name, jit, dtype):
  params, x = network(dtype), batch(dtype)
  fun = maskopt.value_and_grad(loss, MASKS[name])
  value, g = (jax.jit(fun) if jit else fun)(params, x)
  expected, full = jax.value_and_grad(loss)(params, x)
  np.testing.assert_allclose(float(value), float(expected), rtol=TOLERANCE[dtype])
  assert_sliced(g, params, MASKS[name], full, TOLERANCE[dtype])


def test_everything_trainable_is_the_program_of_jax():
  params, x = network(), batch()
  ours = jax.make_jaxpr(maskopt.value_and_grad(loss, False))(params, x)
  theirs = jax.make_jaxpr(jax.value_and_grad(loss))(params, x)
  assert [e.primitive.name for e in ours.eqns] == [e.primitive.name for e in theirs.eqns]
  assert count_flops(ours) == count_flops(theirs)


def test_backward_stops_at_the_lowest_layer_that_trains():
  params, x = network(), batch()
  one = 2 * BATCH * WIDTH * WIDTH
  mask = {"layer_0": True, "layer_1": True, "layer_2": False}
  closed = jax.make_jaxpr(maskopt.grad(loss, mask))(params, x)
  assert count_flops(closed) == LAYERS * one + one


def test_flops_of_units_are_the_least():
  params, x = network(), batch()
  one, trains = 2 * BATCH * WIDTH * WIDTH, int((~UNITS).sum()) / WIDTH
  # Forward, dx of the upper layers, and a share of each dW. The lowest trains too, so every dx of
  # the layers above it is needed, and of the lowest none.
  least = LAYERS * one + (LAYERS - 1) * one + LAYERS * trains * one
  # Units below need only their own columns of dx.
  least -= (LAYERS - 1) * one
  least += one + one * trains  # dx of the top layer whole for the middle one's dx; the next in part
  closed = jax.make_jaxpr(maskopt.grad(loss, MASKS["units"]))(params, x)
  assert count_flops(closed) == pytest.approx(least, rel=0.02)


@pytest.mark.parametrize("name", ["units", "inputs", "contiguous", "union", "sampled"])
def test_one_jit_never_builds_the_dense_gradient(name):
  params, x = network(), batch()
  tx = maskopt.selective_transform(optax.adam(1e-3), freeze_mask=MASKS[name], prefer="memory")
  state = tx.init(params)

  def step(params, state, x):
    g = maskopt.grad(loss, maskopt.mask_of(state))(params, x)
    updates, state = tx.update(g, state, params)
    return maskopt.apply_updates(params, updates), state

  closed = jax.make_jaxpr(step)(params, state, x)
  live = live_shapes(closed.jaxpr)
  assert live.count((WIDTH, WIDTH)) <= LAYERS  # the parameters' own updates, one write a kernel


def live_shapes(jaxpr):
  """Shapes of what equations that some output needs write, inner programs included; no moves."""
  needed, shapes = set(map(id, jaxpr.outvars)), []
  for eqn in reversed(jaxpr.eqns):
    if not any(id(v) in needed for v in eqn.outvars):
      continue
    needed |= {id(v) for v in eqn.invars}
    inner = [j for j in eqn.params.values() if hasattr(j, "jaxpr")]
    for j in inner:
      shapes += live_shapes(j.jaxpr)
    if not inner and eqn.primitive.name not in ("reshape", "transpose", "copy"):
      shapes += [v.aval.shape for v in eqn.outvars]
  return shapes


SIDE = 512


def unions():
  """Freeze masks whose trainable elements are a few blocks."""
  few_rows = np.isin(np.arange(SIDE), rng().choice(SIDE, 7, replace=False))
  cross = ~(few_rows[:, None] | few_rows)
  corner, apart = np.ones((SIDE, SIDE), bool), np.ones((SIDE, SIDE), bool)
  corner[:7] = corner[:, 20:24] = False
  apart[3:9, 400:] = apart[300:310, 5:50] = apart[400:402, 3:9] = False
  return {"rows and columns": cross, "corner": corner, "apart": apart}


@pytest.mark.parametrize("name", unions())
def test_unions_are_packed_without_the_dense_gradient(name):
  freeze_mask = unions()[name]
  w = jnp.asarray(rng().normal(size=(SIDE, SIDE)) / SIDE**0.5, np.float32)
  x = jnp.asarray(rng().normal(size=(2, SIDE)), np.float32)

  def fun(w):
    return jnp.tanh(x @ w).sum()

  compiled = jax.jit(maskopt.grad(fun, freeze_mask, packed=True)).lower(w).compile()
  np.testing.assert_allclose(
    compiled(w).values, np.asarray(jax.grad(fun)(w))[~freeze_mask], rtol=2e-5, atol=1e-6
  )
  program = compiled.as_text()
  made = re.findall(rf"= f32\[{SIDE},{SIDE}\]\S* (\S+)\(|= f32\[{SIDE * SIDE}\]", program)
  assert set(made) == {"parameter"}
  assert compiled.memory_analysis().temp_size_in_bytes < w.nbytes / 8


@pytest.mark.parametrize("name", MASKS)
def test_twenty_steps_equal_the_dense_path(name):
  params, x = network(), batch()
  tx = maskopt.selective_transform(optax.adamw(1e-2), freeze_mask=MASKS[name])

  def train(gradient):
    @jax.jit
    def step(params, state):
      updates, state = tx.update(gradient(state)(params, x), state, params)
      return maskopt.apply_updates(params, updates), state

    p, state = params, tx.init(params)
    for _ in range(20):
      p, state = step(p, state)
    return p

  ours = train(lambda state: maskopt.grad(loss, maskopt.mask_of(state)))
  dense = train(lambda state: jax.grad(loss))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(dense), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)
  for before, after, frozen in zip(
    *map(jax.tree.leaves, (params, ours, dense_mask(MASKS[name], params))), strict=True
  ):
    assert reference.moved(before, after, frozen) == []


def test_packed_gradients_accumulate_and_train():
  params, x = network(), batch()
  tx = maskopt.selective_transform(optax.adam(1e-2), freeze_mask=MASKS["units"], prefer="memory")
  state = tx.init(params)
  fun = jax.jit(maskopt.grad(loss, MASKS["units"], packed=True))
  halves = [fun(params, x[:16]), fun(params, x[16:])]
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
  updates, _ = tx.update(mean, state, params)
  new = optax.apply_updates(params, updates)
  expected, _ = tx.update(jax.grad(loss)(params, x), state, params)
  expected = maskopt.apply_updates(params, expected)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), new, expected)
  sizes = {
    leaf.values.size for leaf in jax.tree.leaves(mean, is_leaf=lambda v: hasattr(v, "layout"))
  }
  assert max(sizes) < WIDTH * WIDTH / 9


def test_argnums_aux_and_keywords():
  def fun(a, b, *, scale):
    return (a * b).sum() * scale, {"kept": a.sum(), "name": "aux", "none": None}

  a, b, first = jnp.arange(3.0), jnp.arange(3.0) + 1, np.array([True, False, False])
  (value, aux), g = maskopt.value_and_grad(fun, first, argnums=1, has_aux=True)(a, b, scale=2.0)
  assert (float(value), float(aux["kept"])) == (16.0, 3.0)
  assert (aux["name"], aux["none"], g.tolist()) == ("aux", None, [0.0, 2.0, 4.0])
  both, aux = maskopt.grad(fun, (True, first), argnums=(0, 1), has_aux=True)(a, b, scale=1.0)
  assert [x.tolist() for x in both] == [[0.0] * 3, [0.0, 1.0, 2.0]] and aux["name"] == "aux"
  last = maskopt.grad(lambda a, b: (a * b).sum(), first, argnums=np.int64(-1))(a, b)
  assert last.tolist() == [0.0, 1.0, 2.0]


def test_frozen_integers_pass_and_holomorphic_functions_too():
  params = {"w": jnp.ones(3), "count": jnp.arange(3), "hole": None}
  mask = {"w": np.array([True, False, False]), "count": True, "hole": None}
  g = maskopt.grad(lambda p: (p["w"] * 2).sum(), mask)(params)
  assert g["count"].dtype == jax.dtypes.float0 and g["hole"] is None
  assert g["w"].tolist() == [0.0, 2.0, 2.0]
  z = jnp.array([1j, 2.0])
  g = maskopt.grad(lambda z: (z**2).sum(), np.array([True, False]), holomorphic=True)(z)
  assert g.tolist() == [0, 4.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_values_pass_as_in_jax(bad):
  params, x = network(), batch().at[0, 0].set(bad)
  g = jax.jit(maskopt.grad(loss, MASKS["units"]))(params, x)
  full = jax.grad(loss)(params, x)
  for got, expected in zip(jax.tree.leaves(g), jax.tree.leaves(full), strict=True):
    trains = np.broadcast_to(~UNITS, got.shape)
    same = np.isfinite(np.asarray(got)) == np.isfinite(np.asarray(expected))
    assert same[trains].all() and (np.asarray(got)[~trains] == 0).all()


def test_second_derivatives_and_vmap():
  mask = np.array([True, False, False, True, False, True, True, True])

  def fun(w, x):
    return jnp.tanh(w @ x).sum() ** 2

  w, xs = jnp.linspace(0.0, 1.0, 8), jnp.asarray(rng().normal(size=(5, 8)), np.float32)
  hessian = jax.jacrev(maskopt.grad(fun, mask))(w, xs[0])
  expected = jax.hessian(fun)(w, xs[0])
  np.testing.assert_allclose(hessian[~mask], expected[~mask], rtol=1e-5)
  assert not hessian[mask].any()
  per_example = jax.vmap(maskopt.grad(fun, mask), in_axes=(None, 0))(w, xs)
  every = jax.vmap(jax.grad(fun), in_axes=(None, 0))(w, xs)
  np.testing.assert_allclose(per_example, np.where(mask, 0, every), rtol=1e-5)


def test_runtime_mask_changes_without_a_retrace():
  traces = []

  @jax.jit
  def step(params, state, mask):
    traces.append(1)
    g = maskopt.grad(lambda p: (p**2).sum(), maskopt.mask_of(state))(params)
    updates, state = tx.update(g, state, params, freeze_mask=mask)
    return maskopt.apply_updates(params, updates), state

  first = maskopt.runtime(np.arange(8) < 5, count=3)
  tx = maskopt.selective_transform(optax.sgd(0.1), freeze_mask=first)
  start = jnp.arange(1.0, 9.0)
  params, state = start, tx.init(start)
  params, state = step(params, state, first)
  assert (params != start).tolist() == [False] * 5 + [True] * 3
  before = params
  params, state = step(params, state, maskopt.runtime(np.arange(8) >= 3, count=3))
  # The gradient was taken with the mask of the state; the update's mask is the next one.
  assert (params != before).tolist() == [False] * 8 and len(traces) == 1
  params, state = step(params, state, maskopt.runtime(np.arange(8) >= 3, count=3))
  assert (params != before).tolist() == [True] * 3 + [False] * 5 and len(traces) == 1


def test_one_trace_of_the_loss():
  traces = []

  def counted(params, x):
    traces.append(1)
    return loss(params, x)

  params, x = network(), batch()
  fun = jax.jit(maskopt.grad(counted, MASKS["units"]))
  fun(params, x), fun(params, x)
  assert len(traces) == 1


def test_errors_name_path_expected_got_and_remedy():
  params, x = network(), batch()
  bad = {"layer_0": {"kernel": np.ones(3, bool), "bias": 1.0}, "layer_1": False, "head": True}
  with pytest.raises(TypeError) as raised:
    maskopt.grad(loss, bad)(params, x)
  text = str(raised.value)
  for part in (
    "maskopt.grad(freeze_mask=...)",
    "at layer_0/kernel, expected bool broadcastable to (64, 64), got bool of shape (3,)",
    "at layer_0/bias, expected bool broadcastable to (64,), got float 1.0",
    "at layer_2/bias, expected a freeze mask, got none",
    "at head, expected a parameter, got none of that path",
    "maskopt.build_mask",
  ):
    assert part in text
  match = r"`maskopt.grad\(argnums=...\)`: at the root, expected argnums below 2.*got 2. Count arg"
  with pytest.raises(ValueError, match=match):
    maskopt.grad(loss, False, argnums=2)(params, x)
  with pytest.raises(TypeError, match=r"`maskopt.grad\(argnums=.*an int or a tuple.*got str 'x'"):
    maskopt.grad(loss, False, argnums="x")
  with pytest.raises(TypeError, match=r"`maskopt.grad\(fun, ...\)`.*a function .*got int 3. Give"):
    maskopt.grad(3, True)
  with pytest.raises(TypeError, match="the module Linear.*Use maskopt.nnx.grad"):
    maskopt.grad(lambda m: 0.0, False)(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("library", ["nnx", "linen", "equinox"])
def test_any_library(library):
  import equinox as eqx
  from flax import linen

  x = batch()
  if library == "linen":
    module = linen.Dense(8)
    params = module.init(jax.random.key(0), x)

    def fun(params):
      return (module.apply(params, x) ** 2).sum()

    mask = maskopt.build_mask(params, [("params/kernel", maskopt.units([0])), (..., True)])
  elif library == "nnx":
    graph, params = nnx.split(nnx.Linear(WIDTH, 8, rngs=nnx.Rngs(0)))

    def fun(params):
      return (nnx.merge(graph, params)(x) ** 2).sum()

    mask = maskopt.build_mask(params, [("kernel", maskopt.units([0])), (..., True)])
  else:
    params = eqx.nn.Linear(WIDTH, 8, key=jax.random.key(0))

    def fun(model):
      return (jax.vmap(model)(x) ** 2).sum()

    mask = maskopt.build_mask(params, [("weight", np.s_[0]), (..., True)])
  ours, theirs = maskopt.grad(fun, mask)(params), jax.grad(fun)(params)
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b, m in zip(*map(jax.tree.leaves, (ours, theirs, mask)), strict=True):
    np.testing.assert_allclose(a, np.where(m, 0, b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["Block", "Elements"])
def test_gradient_of_a_mask_fits_whatever_the_optimizer_stores_it_as(kind, packed):
  """Two products are blocks to the gradient, elements to the optimizer; between is nothing dense.

  The mask may come as it was, broadcast, or as the transform works with it.
  """
  params, x = {"w": jnp.ones((1024, 512))}, jnp.full((8, 1024), 1e-3)
  columns = np.arange(512) % 10 > 0
  whole = np.tile(columns, (1024, 1))
  if kind == "Elements":
    whole[512:] = np.roll(columns, 1)
  masks = [{"w": whole}] + [{"w": columns}] * (kind == "Block")
  tx = maskopt.selective_transform(optax.adam(0.1), freeze_mask=masks[-1])
  state = tx.init(params)
  assert dict(maskopt.mask_of(state).items())["w"].kind == kind

  def compiled(mask):
    def step(params, state, x):
      loss = maskopt.grad(lambda p, x: jnp.tanh(x @ p["w"]).sum(), mask, packed=packed)
      updates, state = tx.update(loss(params, x), state, params)
      return maskopt.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x).compile()

  for mask in (*masks, maskopt.mask_of(state)):
    program = compiled(mask)
    assert program.as_text().count(" scatter(") == (kind == "Elements")  # the parameter's own
    assert program.memory_analysis().temp_size_in_bytes < params["w"].nbytes / 2
    copies = jax.tree.map(jnp.array, (params, state))
    new, _ = program(*copies, x)
    moved = np.asarray(new["w"] != params["w"])
    np.testing.assert_array_equal(moved, ~whole)
