"""Moves of values into arrays, both ways they are compiled, against NumPy; what they compile to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.sharding import PartitionSpec as P

import maskopt
from maskopt import _moves
from maskopt._bits import added

# Shapes, and which positions of each dimension; None is all of them. The tiles of a turn are whole
# columns, several to a column, one value (131 and 1009 are prime), few (over a million elements).
PRODUCTS = [
  ((40, 6), ([0, 3, 39], None)),
  ((40, 6), (None, [1, 4])),
  ((300, 5), (None, [0, 4])),
  ((131, 4), (None, [2])),
  ((1009, 3), (None, [0, 2])),
  ((3, 3, 8, 16), (None, None, [1, 2, 7], None)),
  ((3, 3, 8, 16), (None, None, None, [1, 2, 7, 15])),
  ((5, 7, 6), ([1, 4], None, [0, 5])),
  ((5, 7, 6), ([1, 4], [2, 3, 6], None)),
  ((9,), ([0, 4, 8],)),
  ((1100, 1000), (None, [0, 500, 999])),
  ((4, 9, 2), (None, [3, 8], None)),
]


def product(shape, sets):
  at = np.ix_(
    *(np.arange(n) if s is None else np.array(s) for n, s in zip(shape, sets, strict=True))
  )
  block = tuple(n if s is None else len(s) for n, s in zip(shape, sets, strict=True))
  dims = tuple(jnp.array(s, jnp.int32) for s in sets if s is not None)
  return _moves.Product(block), {"dims": dims}, at


def operands(shape, block, dtype=np.float32):
  """An array of odd values, and values to add, one in three of them zero."""
  rng = np.random.default_rng(0)
  x = reference.with_specials(rng, shape, dtype, np.ones(shape, bool))
  return x, np.where(rng.random(block) < 1 / 3, 0, rng.normal(size=block)).astype(dtype)


def in_place(move, index, x, values):
  return _moves.add(move, index, x, values)


def scattered(move, index, x, values):
  """What other platforms compile."""
  return move._scatter(_moves._scatter_of(added), index, x, values)


def layouts_of(freeze_mask, params):
  tx = maskopt.selective_transform(optax.sgd(0.1), freeze_mask=freeze_mask, prefer="memory")
  return maskopt.mask_of(tx.init(jax.tree.map(jnp.asarray, params)))


@pytest.mark.parametrize("way", [in_place, scattered])
@pytest.mark.parametrize(("shape", "sets"), PRODUCTS)
def test_products_are_added_to_as_numpy_does(shape, sets, way):
  move, index, at = product(shape, sets)
  x, values = operands(shape, move.block)
  after = np.asarray(jax.jit(way, static_argnums=0)(move, index, x, values))
  assert reference.same_bits(after[at][values == 0], x[at][values == 0])
  with np.errstate(invalid="ignore"):
    np.testing.assert_array_equal(after[at][values != 0], (x[at] + values)[values != 0])
  rest = np.ones(shape, bool)
  rest[at] = False
  assert reference.same_bits(after[rest], x[rest])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("shape", "sets"), PRODUCTS)
def test_products_are_read_and_replaced_as_numpy_does(shape, sets, dtype):
  move, index, at = product(shape, sets)
  x, _ = operands(shape, move.block, jnp.dtype(dtype))
  values = x[at][::-1].copy()  # odd ones among them
  assert reference.same_bits(_moves.read(move, index, x), x[at])
  after = np.asarray(_moves.put(move, index, x, values))
  assert reference.same_bits(after[at], values)
  rest = np.ones(shape, bool)
  rest[at] = False
  assert reference.same_bits(after[rest], x[rest])


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("sets", [([0, 3, 39], None), (None, [1, 4]), ([2, 5], [0, 1, 5])])
def test_moves_into_products_have_both_derivatives(sets, adds):
  move, index, at = product((40, 6), sets)
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(2, 40, 6)).astype(np.float32)
  values = rng.normal(size=move.block).astype(np.float32)
  run = _moves.add if adds else _moves.put

  def f(x, values):
    return (run(move, index, x, values) * w).sum()

  by_x, by_values = jax.grad(f, argnums=(0, 1))(x, values)
  expected = w.copy()
  if not adds:
    expected[at] = 0
  np.testing.assert_array_equal(by_x, expected)
  np.testing.assert_array_equal(by_values, w[at])
  assert float(jax.jvp(f, (x, values), (x, values))[1]) == pytest.approx(float(f(x, values)), 1e-4)


def test_a_product_is_written_in_turns_on_a_cpu_and_scattered_elsewhere():
  move, index, _ = product((1024, 512), ([3, 5, 800], None))
  x, values = jnp.zeros((1024, 512)), jnp.ones(move.block)
  traced = jax.jit(lambda *args: _moves.add(move, *args)).trace(index, x, values)
  for platform, turns in (("cpu", True), ("cuda", False), ("tpu", False)):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.while" in text, "stablehlo.scatter" in text) == (turns, not turns)


@pytest.mark.parametrize("kind", ["rows", "columns", "elements"])
def test_values_are_written_into_donated_arrays_without_another(kind):
  """Nothing as large as the leaf is made, and no second copy of the values."""
  shape = (1024, 512)
  if kind == "elements":
    flat = np.sort(np.random.default_rng(0).permutation(1024 * 512)[:5000])
    move, index = _moves.Points(inside=True), {"flat": jnp.asarray(flat, jnp.int32)}
    values = jnp.ones(5000)
  else:
    some = list(range(0, 500, 9))
    move, index, _ = product(shape, (some, None) if kind == "rows" else (None, some))
    values = jnp.ones(move.block)
  run = jax.jit(lambda x, *args: _moves.add(move, args[0], x, 2 * args[1]), donate_argnums=0)
  memory = run.lower(jnp.zeros(shape), index, values).compile().memory_analysis()
  assert memory.alias_size_in_bytes == 4 * 1024 * 512
  assert memory.temp_size_in_bytes < 1.1 * values.nbytes + 1000


def test_leaves_of_one_shape_are_traced_once(monkeypatch):
  counts = []
  write = _moves.Product.write
  monkeypatch.setattr(_moves.Product, "write", lambda *args: counts.append(1) or write(*args))
  masks = {str(k): (np.arange(77) % 7 != k)[:, None] for k in range(7)}
  params = {k: jnp.ones((77, 3)) for k in masks}

  def f(params, layouts):
    return maskopt.unpack(maskopt.pack(params, layouts), params, layouts)

  layouts = layouts_of(masks, params)
  jax.jit(f).trace(params, layouts)
  assert len(counts) == 1


@pytest.mark.parametrize("mask", ["rows", "columns", "scattered", "block"])
def test_values_that_vary_over_devices_go_into_parameters_that_do_not(mask):
  """Inside shard_map, with its check of what varies: one update for each device."""
  frozen = {
    "rows": (np.arange(12) % 3 > 0)[:, None],
    "columns": np.arange(8) % 2 > 0,
    "scattered": np.random.default_rng(0).random((12, 8)) < 0.5,
    "block": (np.arange(12) > 4)[:, None],
  }[mask]
  x = np.random.default_rng(1).normal(size=(12, 8)).astype(np.float32)
  layouts = layouts_of(frozen, x)
  (layout,), (index,) = layouts.static.layouts, layouts.index
  mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

  def added_here(x, index, scale):
    return layout.add(layout.take(x, index) * scale[0], x, index)[None]

  run = jax.shard_map(added_here, mesh=mesh, in_specs=(P(), P(), P("d")), out_specs=P("d"))
  out = jax.jit(run)(x, index, jnp.arange(4.0))
  for k in range(4):
    np.testing.assert_allclose(out[k], np.where(frozen, x, x + k * x), rtol=1e-6)
    assert reference.moved(x, out[k], frozen) == []
