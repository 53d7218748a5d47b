"""Which positions along one dimension are wanted: everything, a range, or a sorted list.

  Index = None (the whole dimension) | range (contiguous or strided) | Points (anything else)

Ranges stay symbolic, so a demand for a million contiguous rows costs nothing to keep, join or
compare, and becomes a slice in the program where a list of positions would become a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np


class Points:
  """Sorted unique positions that no range describes; hashable, so analyses can be remembered."""

  __slots__ = ("_hash", "_starts", "values")

  def __init__(self, values: np.ndarray):
    self.values = values
    self._hash = hash(values.tobytes())
    self._starts: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.values)

  def __hash__(self) -> int:
    return self._hash

  def __eq__(self, other: object) -> bool:
    if self is other:
      return True
    return (
      isinstance(other, Points)
      and self._hash == other._hash
      and np.array_equal(self.values, other.values)
    )

  def __repr__(self) -> str:
    return f"Points({len(self)} of {self.values[0]}..{self.values[-1]})"

  @property
  def starts(self) -> np.ndarray:
    """The positions as gather starts, int32 of shape (len, 1).

    One object per index set: a program that reads the set twice holds one constant.
    """
    if self._starts is None:
      # Not [:, None]: a stride of zero is lowered as one more broadcast.
      self._starts = self.values.astype(np.int32).reshape(-1, 1)
    return self._starts


Index: TypeAlias = None | range | Points


def from_positions(values: np.ndarray) -> Index:
  """The index of sorted unique positions; a range whenever their gaps are equal."""
  if len(values) < 2:
    start = int(values[0]) if len(values) else 0
    return range(start, start + len(values))
  step = int(values[1] - values[0])
  evenly = int(values[-1] - values[0]) == step * (len(values) - 1)
  if evenly and (step == 1 or bool((np.diff(values) == step).all())):
    return range(int(values[0]), int(values[-1]) + 1, step)
  return Points(values)


def make_index(wanted: slice | range | Sequence[int] | np.ndarray | None, size: int) -> Index:
  """The index for what a caller wrote: a slice, a range, integers, bools or None."""
  if wanted is None:
    return None
  if isinstance(wanted, slice):
    wanted = range(*wanted.indices(size))
  if isinstance(wanted, range):
    wanted = wanted if wanted.step > 0 else wanted[::-1]
    return canonical(wanted, size)
  array = np.asarray(wanted)
  array = np.flatnonzero(array) if array.dtype == bool else np.unique(array.astype(np.int64))
  return canonical(from_positions(array), size)


def canonical(index: Index, size: int) -> Index:
  """None where the index is the whole dimension."""
  return None if index is None or len(index) == size else index


def count(index: Index, size: int) -> int:
  return size if index is None else len(index)


def positions(index: Index, size: int) -> np.ndarray:
  if index is None:
    return np.arange(size)
  return (
    np.arange(index.start, index.stop, index.step) if isinstance(index, range) else index.values
  )


def contains(outer: Index, inner: Index) -> bool:
  if outer is None or outer is inner:
    return True
  if inner is None or len(inner) > len(outer):
    return False
  if not len(inner):
    return True
  if isinstance(outer, range):
    if isinstance(inner, range):
      aligned = len(inner) == 1 or inner.step % outer.step == 0
      return aligned and inner[0] in outer and inner[-1] in outer
    v = inner.values
    inside = v[0] >= outer[0] and v[-1] <= outer[-1]
    return bool(inside and ((v - outer.start) % outer.step == 0).all())
  v = positions(inner, 0)
  at = np.searchsorted(outer.values, v)
  return bool(at[-1] < len(outer) and (outer.values[at] == v).all())


def union(a: Index, b: Index, size: int) -> Index:
  if contains(a, b):
    return a
  if contains(b, a):
    return b
  assert a is not None and b is not None
  if isinstance(a, range) and isinstance(b, range) and a.step == b.step:
    low, high = (a, b) if a.start <= b.start else (b, a)
    if (high.start - low.start) % a.step == 0 and high.start <= low[-1] + a.step:
      return canonical(range(low.start, max(low[-1], high[-1]) + 1, a.step), size)
  return canonical(from_positions(np.union1d(positions(a, size), positions(b, size))), size)


def relative(have: Index, want: Index) -> Index:
  """Positions of `want` within `have`, which contains it: have[relative] = want."""
  if have is None or want is None:
    return want
  if len(have) == len(want):
    return None
  if isinstance(have, range):
    if isinstance(want, range):
      return affine(want, -have.start, have.step) if len(want) else want
    return from_positions((want.values - have.start) // have.step)
  return from_positions(np.searchsorted(have.values, positions(want, 0)))


def affine(index: range, shift: int, divide: int) -> range:
  """(position + shift) / divide, for a range whose positions all divide."""
  first, last = (index[0] + shift) // divide, (index[-1] + shift) // divide
  return range(first, last + 1, max(1, index.step // divide))


def moved(index: Index, size: int, scale: int, shift: int) -> Index:
  """Scale * position + shift: where a dimension of that size lands under a strided window."""
  if index is None:
    index = range(size)
  if isinstance(index, range):
    if not len(index):
      return index
    return range(scale * index[0] + shift, scale * index[-1] + shift + 1, scale * index.step)
  return Points(scale * index.values + shift)


def within(index: Index, size: int, low: int, high: int) -> Index:
  """Members in [low, high), not renumbered."""
  if index is None:
    return range(max(low, 0), max(low, 0, min(high, size)))
  if isinstance(index, range):
    first = -(-(low - index.start) // index.step) if low > index.start else 0
    last = -(-(high - index.start) // index.step) if high > index.start else 0
    return index[first:last]
  v = index.values
  return from_positions(v[np.searchsorted(v, low) : np.searchsorted(v, high)])


def cover(index: Index) -> Index:
  """The smallest range that contains the index."""
  if not isinstance(index, Points):
    return index
  step = int(np.gcd.reduce(np.diff(index.values)))
  return range(int(index.values[0]), int(index.values[-1]) + 1, step)


def runs(index: Points) -> list[range]:
  """Maximal contiguous runs, in order."""
  v = index.values
  cuts = np.flatnonzero(np.diff(v) != 1) + 1
  heads, tails = np.r_[0, cuts], np.r_[cuts, len(v)] - 1
  return [range(int(v[h]), int(v[t]) + 1) for h, t in zip(heads, tails, strict=True)]
