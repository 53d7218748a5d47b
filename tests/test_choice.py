"""Which layout a mask gets: from its structure, its share and the platform."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import maskopt
from maskopt import _choice, _masks

N = 1024


def kind(mask, platform="cpu", prefer="time", keep_rank=False, shape=(N, N), dtype=jnp.float32):
  leaf = jax.ShapeDtypeStruct(shape, dtype)
  mask = (
    mask.reshape((1,) * (len(shape) - mask.ndim) + mask.shape) if hasattr(mask, "ndim") else mask
  )
  layout, _ = _choice.choose(
    mask, leaf, dtype, platform=platform, prefer=prefer, keep_rank=keep_rank
  )
  return type(layout).__name__


def rows(share):
  mask = np.ones((N, 1), bool)
  mask[np.linspace(0, N - 1, int(share * N), dtype=int)] = False
  return mask


def scattered(share, shape=(N, N)):
  return np.random.default_rng(0).random(shape) >= share


def block(n):
  mask = np.ones((N, N), bool)
  mask[8 : 8 + n, 8 : 8 + n] = False
  return mask


@pytest.mark.parametrize(
  ("mask", "expected"),
  [
    (True, "Frozen"),
    (False, "Full"),
    (np.ones((N, 1), bool), "Frozen"),
    (np.zeros((1, N), bool), "Full"),
    (rows(0.01), "Block"),
    (rows(0.2), "Block"),
    (rows(0.9), "Dense"),
    (rows(0.1).T, "Block"),
    (rows(0.5).T, "Dense"),
    (block(64), "Slice"),
    (block(700), "Slice"),
    (block(1000), "Dense"),
    (scattered(0.01), "Elements"),
    (scattered(0.5), "Dense"),
    (scattered(0.01, (8, 8)), "Dense"),
  ],
)
def test_by_time_on_cpu(mask, expected):
  shape = (8, 8) if getattr(mask, "shape", ()) == (8, 8) else (N, N)
  if shape == (8, 8):
    mask = mask.copy()
    mask[1, 1] = mask[3, 2] = False
  assert kind(mask, shape=shape) == expected


@pytest.mark.parametrize(
  ("mask", "memory", "values"),
  [
    (rows(0.9), "Block", "Block"),
    (block(1000), "Slice", "Slice"),
    (scattered(0.5), "Elements", "Elements"),
    (scattered(0.9), "Dense", "Elements"),
  ],
)
def test_by_memory_and_by_values(mask, memory, values):
  assert (kind(mask, prefer="memory"), kind(mask, prefer="values")) == (memory, values)


def test_tpu_packs_scattered_elements_only_for_memory():
  assert kind(scattered(0.01), "tpu") == "Dense"
  assert kind(scattered(0.01), "tpu", prefer="memory") == "Elements"
  assert kind(rows(0.01), "tpu") == "Block"


def test_an_unknown_platform_is_treated_as_a_gpu():
  assert kind(scattered(0.2), "other") == kind(scattered(0.2), "gpu") == "Elements"


def test_keep_rank_keeps_blocks():
  assert kind(rows(0.9), keep_rank=True) == "Block"
  assert kind(scattered(0.9), keep_rank=True) == "Dense"


def test_positions_beyond_32_bits_stay_dense():
  # Flat positions past 2**31 would wrap silently; rows are counted over the leading dimension only.
  shape = (2**17, 2**17)
  columns = np.ones((1, 2**17), bool)
  columns[0, [5, 77]] = False
  assert kind(columns, shape=shape) == "Dense"
  assert kind(columns.T, shape=shape) == "Block"


def test_runtime_masks():
  mask = jnp.zeros((4, 4), bool)
  for count, expected in ((None, "Dense"), (3, "Elements")):
    assert kind(_masks.Runtime(mask, count), shape=(4, 4)) == expected


def test_prng_keys_are_frozen():
  key = jax.random.key(0)
  layout, _ = _choice.choose(True, key, key.dtype, platform="cpu", prefer="time", keep_rank=False)
  assert layout.kind == "Frozen"


def test_platform_is_that_of_the_parameters():
  assert _choice.platform_of([jnp.ones(2)]) == "cpu"
  assert _choice.platform_of([jax.ShapeDtypeStruct((2,), jnp.float32)]) == jax.default_backend()


@given(hnp.arrays(np.bool_, st.sampled_from(((6,), (3, 4), (2, 3, 2)))))
def test_index_sets_are_found_exactly_where_they_exist(trainable):
  sets = _choice.index_sets(trainable, trainable.shape)
  grid = np.zeros(trainable.shape, bool)
  projections = [
    np.flatnonzero(trainable.any(tuple(k for k in range(trainable.ndim) if k != d)))
    for d in range(trainable.ndim)
  ]
  grid[np.ix_(*projections)] = True
  assert (sets is not None) == np.array_equal(grid, trainable)
  if sets is not None:
    assert all(np.array_equal(a, b) for a, b in zip(sets, projections, strict=True))


@pytest.mark.parametrize("prefer", ["time", "memory", "values"])
def test_positions_past_32_bits_are_never_packed(prefer):
  leaf = jax.ShapeDtypeStruct((2**16, 2**16), np.float32)
  layout, _ = _choice.choose(
    (np.arange(2**16) % 100 > 0)[None],
    leaf,
    leaf.dtype,
    platform="cpu",
    prefer=prefer,
    keep_rank=True,
  )
  assert layout.kind == "Dense"


@pytest.mark.parametrize("prefer", ["time", "memory"])
@pytest.mark.parametrize("frozen", [[True, False, False, True], [True, False, True, False]])
@pytest.mark.parametrize("shape", [(10**9, 4), (4, 10**9)])
def test_a_whole_dimension_costs_nothing(shape, frozen, prefer):
  """A billion rows of which the mask says one thing: positions would be 8 GB."""
  mask = {"w": np.array(frozen).reshape([4 if n == 4 else 1 for n in shape])}
  params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
  tx = maskopt.selective_transform(optax.adam(0.1), freeze_mask=mask, prefer=prefer)
  tracemalloc.start()
  try:
    shown = str(maskopt.summary(params, mask))
    state = jax.eval_shape(tx.init, params)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < 10_000_000
  assert "2,000,000,000" in shown
  layout = maskopt.mask_of(state).static.layouts[0]
  assert layout.count == 2 * 10**9
  assert range(10**9) in [d for d in layout.blocks[0] if isinstance(d, range)]
