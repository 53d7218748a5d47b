"""Layouts: take, put and add, against NumPy indexing; bits, derivatives and hashes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from maskopt import _bits, _choice, _masks

SHAPES = ((7,), (4, 6), (3, 1, 4), (2, 3, 2, 2))


def layout_of(mask, prefer="values", dtype=np.float32, runtime=False, count=None):
  leaf = np.zeros(mask.shape, dtype)
  given_mask = _masks.Runtime(jnp.asarray(mask), count) if runtime else mask
  layout, index = _choice.choose(
    given_mask, leaf, leaf.dtype, platform="cpu", prefer=prefer, keep_rank=False
  )
  return layout, jax.tree.map(jnp.asarray, index)


@st.composite
def masks(draw):
  shape = draw(st.sampled_from(SHAPES))
  if draw(st.booleans()):
    return draw(hnp.arrays(np.bool_, shape))
  mask = np.ones(shape, bool)  # a product of index sets
  sets = [draw(st.sets(st.integers(0, n - 1), min_size=1)) for n in shape]
  mask[np.ix_(*map(sorted, sets))] = False
  return mask


@given(masks(), st.sampled_from(("values", "time")))
def test_take_and_put_are_numpy_indexing(mask, prefer):
  layout, index = layout_of(mask, prefer)
  rng = np.random.default_rng(0)
  x = reference.with_specials(rng, mask.shape, np.float32, mask)
  values = layout.take(jnp.asarray(x), index)
  if layout.kind == "Frozen":
    assert mask.all() and values is None
  elif layout.kind == "Dense":
    assert reference.same_bits(values, np.where(mask, np.float32(0), x))
  else:
    assert reference.same_bits(np.ravel(values), x[~mask])
    assert values.shape == layout.packed_shape and layout.count == (~mask).sum()
  base = reference.normal(rng, mask.shape, np.float32)
  after = np.asarray(layout.put(values, jnp.asarray(base), index))
  assert reference.moved(base, after, mask) == []
  assert reference.moved(x, after, ~mask) == []


@given(masks(), st.booleans())
def test_runtime_layouts_are_the_static_ones(mask, counted):
  layout, index = layout_of(mask, runtime=True, count=int((~mask).sum()) if counted else None)
  x = reference.normal(np.random.default_rng(0), mask.shape, np.float32)
  values = layout.take(jnp.asarray(x), index)
  expected = x[~mask] if counted else np.where(mask, np.float32(0), x)
  assert reference.same_bits(values, expected)
  after = layout.put(2 * values, jnp.asarray(x), index)
  assert reference.same_bits(after, np.where(mask, x, 2 * x))


def test_positions_past_the_end_read_zero_and_write_nothing():
  """A runtime mask that trains fewer elements than its count, as a schedule may."""
  frozen = jnp.array([True, False, True, True])
  flat = _choice.positions(frozen, (4,), 3)
  assert flat.tolist() == [1, 5, 6]  # sorted and unique, as the gather is told
  layout, _ = layout_of(np.asarray(frozen), runtime=True, count=3)
  x = jnp.arange(1.0, 5.0)
  assert layout.take(x, {"flat": flat}).tolist() == [2, 0, 0]
  assert layout.put(jnp.array([7.0, 8.0, 9.0]), x, {"flat": flat}).tolist() == [1, 7, 3, 4]


def test_more_trainable_elements_than_the_count_are_left_out():
  assert _choice.positions(jnp.zeros(4, bool), (4,), 2).tolist() == [0, 1]


@pytest.mark.parametrize("kind", ["Slice", "Block", "Elements", "Dense"])
def test_take_and_put_are_linear(kind):
  mask = {
    "Slice": np.arange(24).reshape(4, 6) % 6 > 2,
    "Block": np.arange(24).reshape(4, 6) % 6 % 2 > 0,
    "Elements": np.random.default_rng(0).random((4, 6)) < 0.5,
    "Dense": np.random.default_rng(0).random((4, 6)) < 0.5,
  }[kind]
  layout, index = layout_of(mask, "time" if kind == "Dense" else "values")
  assert type(layout).__name__ == kind
  x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6)), jnp.float32)

  grad = jax.grad(lambda x: (layout.take(x, index) ** 2).sum())(x)
  np.testing.assert_allclose(grad, np.where(mask, 0, 2 * np.asarray(x)), rtol=1e-6)

  values = layout.take(x, index)
  by_values, by_base = jax.grad(lambda v, b: (layout.put(v, b, index) ** 2).sum(), argnums=(0, 1))(
    values, x
  )
  np.testing.assert_allclose(by_values, 2 * np.asarray(values), rtol=1e-6)
  np.testing.assert_allclose(by_base, np.where(mask, 2 * np.asarray(x), 0), rtol=1e-6)
  batched = jax.vmap(lambda x: layout.take(x, index))(jnp.stack([x, 2 * x]))
  np.testing.assert_array_equal(batched[1], 2 * values)


def test_added_is_addition_and_its_derivative():
  p, u = jnp.array([1.0, -0.0, 2.0]), jnp.array([0.5, 0.0, -1.0])
  np.testing.assert_array_equal(_bits.added(p, u), [1.5, -0.0, 1.0])
  dp, du = jax.grad(lambda p, u: _bits.added(p, u).sum(), argnums=(0, 1))(p, u)
  assert dp.tolist() == du.tolist() == [1, 1, 1]


def test_many_values_are_added_in_one_pass_that_keeps_one_array():
  """Values that the program computes, zeros among them: what they are made of is not kept too."""
  shape = (2048, 1024)
  frozen = np.add.outer(np.arange(shape[0]), np.arange(shape[1])) % 2 == 0
  layout, index = layout_of(frozen)
  assert layout.kind == "Elements" and layout.count == 2**20
  rng = np.random.default_rng(0)
  adds = ~frozen & (rng.random(shape) < 0.7)
  x = rng.integers(0, 2**32, shape, np.uint32)  # any bits at all where nothing is added
  x[adds] = rng.standard_normal(adds.sum(), np.float32).view(np.uint32)
  x = x.view(np.float32)
  values = np.where(adds, rng.standard_normal(shape, np.float32), np.float32(0))[~frozen]

  def step(x, values, index):
    return layout.add(-0.5 * (values / (1 + jnp.sqrt(values * values))), x, index)

  run = jax.jit(step, donate_argnums=0).lower(x, values, index).compile()
  after = np.asarray(run(jnp.asarray(x), jnp.asarray(values), index))
  assert reference.same_bits(after[~adds], x[~adds])
  moved = values[adds[~frozen]]
  expected = x[adds] - 0.5 * (moved / (1 + np.abs(moved)))
  np.testing.assert_allclose(after[adds], expected, rtol=1e-5, atol=1e-6)
  assert run.memory_analysis().temp_size_in_bytes < 1.1 * values.nbytes


@pytest.mark.parametrize("name", [*reference.REAL, "float8_e4m3fn", "float8_e5m2"])
def test_bits_and_back(name):
  dtype = jnp.dtype(name)
  uint = np.dtype(f"uint{8 * dtype.itemsize}")
  patterns = np.arange(0, 256, dtype=np.uint64)
  patterns = (patterns << (8 * (dtype.itemsize - 1))) | patterns  # every sign and exponent
  with jax.enable_x64(name == "float64"):
    x = jnp.asarray(patterns.astype(uint).view(dtype))
    assert reference.same_bits(_bits.from_bits(_bits.bits(x), x.dtype), x)
    assert _bits.bits(x).tolist() == patterns.astype(uint).tolist()


def test_layouts_are_equal_exactly_if_they_store_the_same():
  a, b = np.arange(6) < 2, np.arange(6) < 3
  assert layout_of(a)[0] == layout_of(a.copy())[0]
  assert hash(layout_of(a)[0]) == hash(layout_of(a.copy())[0])
  assert layout_of(a)[0] != layout_of(b)[0]
  assert layout_of(a)[0] != layout_of(a, dtype=np.float16)[0]


@pytest.mark.parametrize("prefer", ["time", "values"])
def test_index_arrays_are_arguments_and_no_constants(prefer):
  mask = np.random.default_rng(0).random(200_000) < 0.95
  layout, index = layout_of(mask, prefer)
  text = jax.jit(layout.take).lower(jnp.zeros(mask.shape), index).as_text()
  assert len(text) < 20_000
