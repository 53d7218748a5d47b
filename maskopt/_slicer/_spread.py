"""Put a block back among zeros: the inverse of reading a region.

spread(x[r], r, x.shape)[i] = x[i] if i in r else 0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import jax
import numpy as np
from jax import lax

from .._sharded import unsharded
from . import _index as ix
from ._region import Region

# Writing into zeros is a scatter, which XLA:CPU compiles anew for every leaf (13 ms each, of a
# layer's 3 ms), and reading zeros beside the block a gather, which equal layers share. Up to this
# many elements they take equally long, also where the optimizer reads them straight from the block:
# columns of 512 x 512 took Adam 1.1 ms in place of 0.2.
MOST: Final = 2**16


def spread_pays(shape: Sequence[int]) -> bool:
  """Whether an array of this shape is better read from a block than written into."""
  return int(np.prod(shape)) <= MOST and jax.default_backend() == "cpu"


def spread(block: Any, r: Region, shape: Sequence[int]) -> jax.Array:
  """Return an array of that shape with a block at a region and zeros elsewhere.

  Args:
    block: the elements of the region, any dtype.
    r: the region; static.
    shape: of the array.
  Returns:
    The array; differentiable, and no bit of the block is changed.
  """
  block = unsharded(block, [index is not None for index in r])
  for d, index in enumerate(r):
    if index is not None:
      block = _spread_along(block, d, ix.positions(index, shape[d]), shape[d])
  return block


def _spread_along(block: Any, dim: int, positions: np.ndarray, size: int) -> jax.Array:
  """Gather along one dimension from the block with one zero after it."""
  source = np.full(size, len(positions), np.int32)
  source[positions] = np.arange(len(positions))
  padding = [(0, int(d == dim), 0) for d in range(block.ndim)]
  padded = lax.pad(block, np.zeros((), block.dtype), padding)
  rest = tuple(d for d in range(block.ndim) if d != dim)
  sizes = tuple(1 if d == dim else n for d, n in enumerate(block.shape))
  numbers = lax.GatherDimensionNumbers(rest, (dim,), (dim,))
  # Not [:, None]: a stride of zero is lowered as one more broadcast.
  starts = source.reshape(-1, 1)
  mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
  return lax.gather(padded, starts, numbers, sizes, mode=mode)
