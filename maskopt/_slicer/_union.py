"""The elements of disjoint blocks as one vector, in the order in which they lie in the array.

  in_order([x[r] for r in regions], regions, x.shape) = x.ravel()[sorted flat positions in them]

The array is never built. A block's elements keep their order, so their places in the vector are a
sum of one list of numbers per dimension, and rows that train alike fill stretches of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from .._sharded import unsharded
from . import _index as ix
from ._region import Region

Lists = list[np.ndarray]  # one for each dimension


def in_order(blocks: Sequence[Any], regions: Sequence[Region], shape: Sequence[int]) -> jax.Array:
  """Join disjoint blocks of an array to the vector of their elements.

  Args:
    blocks: the elements of every region.
    regions: disjoint; two that agree in their leading dimensions have, in the next one, the same
      positions or none in common.
    shape: of the array.
  Returns:
    Their elements by flat position; differentiable, and no bit is changed.
  """
  places = _places([[ix.positions(d, n) for d, n in zip(r, shape, strict=True)] for r in regions])
  widths = [_width(along) for along in places]
  blocks = [unsharded(b) for b in blocks]
  flat = [lax.reshape(b, (b.size // w, w)) for b, w in zip(blocks, widths, strict=True)]
  if all(rows.shape[0] == 1 for rows in flat):
    order = sorted(range(len(flat)), key=lambda k: _first(places[k]))
    return lax.concatenate([lax.reshape(flat[k], (widths[k],)) for k in order], 0)
  size = sum(rows.size for rows in flat)
  whole = lax.full((size,), 0, flat[0].dtype)
  for rows, along in zip(flat, places, strict=True):
    whole = _write(whole, rows, _starts(along))
  return whole


def _places(sets: list[Lists]) -> list[Lists]:
  """For each block, numbers along each dimension whose sums are its elements' places."""
  if not sets[0]:
    return [[] for _ in sets]
  alike: dict[bytes, list[int]] = {}
  for k, (first, *_) in enumerate(sets):
    alike.setdefault(first.tobytes(), []).append(k)
  heads = [sets[members[0]][0] for members in alike.values()]
  each = [sum(_size(sets[k][1:]) for k in members) for members in alike.values()]
  rows = np.concatenate(heads)
  counts = np.repeat(each, [len(h) for h in heads])
  order = np.argsort(rows)
  starts = np.empty_like(rows)
  starts[order] = np.cumsum(counts[order]) - counts[order]
  found: list[Lists] = [[]] * len(sets)
  low = 0
  for head, members in zip(heads, alike.values(), strict=True):
    inner = _places([sets[k][1:] for k in members])
    for k, along in zip(members, inner, strict=True):
      found[k] = [starts[low : low + len(head)], *along]
    low += len(head)
  return found


def _size(sets: Lists) -> int:
  return math.prod(map(len, sets))


def _first(along: Lists) -> int:
  return sum(int(v[0]) for v in along)


def _contiguous(along: Lists) -> int:
  """How many trailing dimensions fill one stretch together."""
  width = 1
  for k, v in enumerate(reversed(along)):
    if not np.array_equal(v, v[0] + width * np.arange(len(v))):
      return k
    width *= len(v)
  return len(along)


def _width(along: Lists) -> int:
  return _size(along[len(along) - _contiguous(along) :])


def _starts(along: Lists) -> jax.Array:
  """The place of every stretch, summed in the program: it holds one list per dimension."""
  leading = len(along) - _contiguous(along)
  lists = [*along[:leading], np.array([_first(along[leading:])])]
  lists = [lax.convert_element_type(v, np.int32) for v in lists]

  def outer(a: Any, b: Any) -> Any:
    shape = (a.shape[0], b.shape[0])
    total = lax.broadcast_in_dim(a, shape, (0,)) + lax.broadcast_in_dim(b, shape, (1,))
    return lax.reshape(total, (a.shape[0] * b.shape[0],))

  return functools.reduce(outer, lists)


def _write(whole: jax.Array, rows: jax.Array, starts: jax.Array) -> jax.Array:
  numbers = lax.ScatterDimensionNumbers(
    update_window_dims=(1,), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,)
  )
  return lax.scatter(
    whole,
    lax.expand_dims(starts, (1,)),
    rows,
    numbers,
    indices_are_sorted=True,
    unique_indices=True,
    mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
  )
