"""Read a region out of the block of a larger one, as slices wherever slices can say it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import lax

from .._sharded import unsharded
from . import _index as ix
from ._index import Index, Points
from ._region import Region

# A few long runs are read as slices: the compiler moves memory and holds no index constant. Short
# ones are gathered like any other positions, for XLA:CPU compiles equal kernels once, and a gather
# is the same kernel in every layer while slices are cut at places of their own (some 20 ms each).
MAX_RUNS = 4
LONG_RUN = 16


def take(block: Any, have: Region, want: Region) -> jax.Array:
  """Slice a block that holds `have` down to `want`, which it covers.

  take(x[have], have, want) = x[want]

  Args:
    block: the elements of `have`, any dtype.
    have: the region that the block holds.
    want: a region covered by `have`; static.
  Returns:
    The elements of `want`; differentiable, its transpose is a pad or a scatter-add.
  """
  relative = [ix.relative(h, w) for h, w in zip(have, want, strict=True)]
  block = unsharded(block, [r is not None for r in relative])
  if any(isinstance(r, range) for r in relative):
    block = _slice(block, relative)
  gathers = [(len(r), d, r) for d, r in enumerate(relative) if isinstance(r, Points)]
  for _, dim, points in sorted(gathers, key=lambda g: g[0] / np.shape(block)[g[1]]):
    block = _take_points(block, dim, points)
  return block


def _slice(block: Any, relative: list[Index]) -> jax.Array:
  dims = [r if isinstance(r, range) else range(n)
          for r, n in zip(relative, np.shape(block), strict=True)]  # fmt: skip
  starts = [d.start for d in dims]
  stops = [d[-1] + 1 if len(d) else d.start for d in dims]
  return lax.slice(block, starts, stops, [d.step for d in dims])


def _take_points(block: Any, dim: int, points: Points) -> jax.Array:
  runs = ix.runs(points)
  if len(runs) <= MAX_RUNS and len(points) >= LONG_RUN * len(runs):
    parts = [lax.slice_in_dim(block, r.start, r.stop, axis=dim) for r in runs]
    return lax.concatenate(parts, dim)
  sizes = list(np.shape(block))
  rest = tuple(d for d in range(len(sizes)) if d != dim)
  sizes[dim] = 1
  numbers = lax.GatherDimensionNumbers(
    offset_dims=rest, collapsed_slice_dims=(dim,), start_index_map=(dim,)
  )
  return lax.gather(
    block,
    points.starts,
    numbers,
    tuple(sizes),
    unique_indices=True,
    indices_are_sorted=True,
    mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
  )
