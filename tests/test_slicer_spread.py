"""Blocks put back among zeros without a scatter, and what the steps of small leaves consist of."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_slicer import block_of

import maskopt
from maskopt._slicer import _spread, region, spread

R = np.random.default_rng(0)

REGIONS: list[tuple[tuple[int, ...], tuple[Any, ...]]] = [
  ((7,), ([0, 3, 4],)),
  ((6, 5), (None, [1, 4])),
  ((6, 5), ([0, 5], [2])),
  ((6, 5), (range(2, 5), range(0, 5, 2))),
  ((6, 5), (None, None)),
  ((6, 5), ([], None)),
  ((3, 4, 5), ([1], None, [0, 2, 3])),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64", "int8"])
@pytest.mark.parametrize(("shape", "dims"), REGIONS)
def test_a_block_stands_among_zeros(shape: Any, dims: Any, dtype: str) -> None:
  whole = jnp.asarray(R.normal(size=shape) * 9, dtype)
  r = region(shape, *dims)
  block = jnp.asarray(block_of(np.asarray(whole), r))
  out = jax.jit(lambda b: spread(b, r, shape))(block)
  inside = np.zeros(shape, bool)
  chosen = zip(dims, shape, strict=True)
  inside[np.ix_(*(np.arange(n) if d is None else np.array(d, int) for d, n in chosen))] = True
  assert out.dtype == block.dtype and out.shape == shape
  expected = np.where(inside, np.asarray(whole), np.zeros((), block.dtype))
  assert np.array_equal(np.asarray(out), expected)


def test_odd_values_keep_their_bits_and_stay_in_place() -> None:
  block = jnp.asarray([[np.nan, -0.0], [np.inf, 1e-40]], jnp.float32)
  out = np.asarray(spread(block, region((2, 4), None, [1, 3]), (2, 4)))
  assert np.array_equal(out[:, [1, 3]].view(np.int32), np.asarray(block).view(np.int32))
  assert not out[:, [0, 2]].view(np.int32).any()


def test_spreading_is_differentiable() -> None:
  weights = jnp.arange(8.0).reshape(2, 4)
  r = region((2, 4), None, [1, 3])
  g = jax.grad(lambda b: jnp.sum(weights * spread(b, r, (2, 4))))(jnp.zeros((2, 2)))
  assert g.tolist() == [[1.0, 3.0], [5.0, 7.0]]


def _step(size: int, kind: str, from_state: bool) -> Any:
  """A lowered step of Adam, three units of one layer training."""
  params: Any = {"w": jnp.zeros((size, size)), "b": jnp.zeros(size)}
  frozen = np.ones(size, bool)
  frozen[[1, 2, 7]] = False
  mask = {"w": frozen[None] if kind == "columns" else frozen[:, None], "b": frozen}
  tx = maskopt.selective_transform(optax.adam(1e-3), freeze_mask=mask)
  state = tx.init(params)

  def loss(p: Any, x: Any) -> Any:
    return jnp.sum(jnp.tanh(x @ p["w"] + p["b"][None]) ** 2)

  def step(p: Any, state: Any, x: Any) -> Any:
    g = maskopt.grad(loss, maskopt.mask_of(state) if from_state else mask)(p, x)
    updates: Any
    updates, state = tx.update(g, state, p)
    return maskopt.apply_updates(p, updates), state

  with jax.numpy_dtype_promotion("standard"):  # Optax computes decay**count, a float to an int
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, jnp.ones((4, size)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what is measured on a CPU")
@pytest.mark.parametrize("from_state", [True, False])
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_the_step_of_small_leaves_scatters_nothing(kind: str, from_state: bool) -> None:
  assert "scatter" not in _step(16, kind, from_state).as_text()


def test_large_leaves_are_written_in_place() -> None:
  assert not _spread.spread_pays((257, 256))
  memory = _step(1024, "rows", from_state=True).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 1024**2  # a quarter of the leaf
  assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1000
