"""Leaves as small images: the frozen share of each block, how far it moved, and where it leaked.

  share[r, c] = mean of freeze_mask over the block
  change[r, c] = max |after - before| over the block

A leaf of any shape is read as a matrix of its last axis, (h * w * in, out) for a kernel. The share
comes from what the layout knows and not from a dense mask; the change is a maximum, because a mean
would hide one leak among a million elements.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .._joint import Joint
from .._layout import Elements, Frozen, Full, Index, Layout
from . import _elements
from ._audit import differs

# Blocks along each side of an image; beyond the pixels a panel has, more only cost time.
_SIDE = 128


class Grid(NamedTuple):
  """Where the blocks of an image begin, along rows and columns of the leaf's matrix."""

  rows: np.ndarray
  columns: np.ndarray
  shape: tuple[int, int]

  @property
  def blocks(self) -> tuple[int, int]:
    """Shape of the image."""
    return len(self.rows), len(self.columns)

  @property
  def heights(self) -> np.ndarray:
    """Rows of the leaf's matrix in each row of blocks."""
    return np.diff(self.rows, append=self.shape[0])

  @property
  def widths(self) -> np.ndarray:
    """Columns of the leaf's matrix in each column of blocks."""
    return np.diff(self.columns, append=self.shape[1])


def grid(shape: tuple[int, ...]) -> Grid:
  """Cut a leaf's matrix into at most 128 x 128 blocks of nearly equal size."""
  columns = shape[-1] if shape else 1
  rows = math.prod(shape[:-1])
  return Grid(_starts(rows), _starts(columns), (rows, columns))


def _starts(n: int) -> np.ndarray:
  count = min(n, _SIDE)
  return np.arange(count) * n // max(count, 1)


def frozen_share(layout: Layout, index: Index, to: Grid) -> np.ndarray:
  """The frozen share of each block, in [0, 1]."""
  if isinstance(layout, (Frozen, Full)):
    return np.full(to.blocks, float(isinstance(layout, Frozen)))
  if isinstance(layout, Joint):
    parts = _elements.parts(layout, index)
    return 1 - np.sum([1 - frozen_share(*part, to) for part in parts], axis=0)
  along = _elements.trained_along(layout, index)
  if along is not None:
    rows = _trained_rows(along[:-1], layout.shape[:-1], to)
    whole = along[-1].size != to.shape[1]
    columns = np.ones(to.blocks[1]) if whole else _mean(along[-1], to.columns, 0)
    return 1 - np.outer(rows, columns)
  if isinstance(layout, Elements):
    return 1 - _density(_elements.flat_positions(layout, index), to)
  return _dense_share(_elements.dense_mask(index), layout.shape, to)


def _trained_rows(along: list[np.ndarray], shape: tuple[int, ...], to: Grid) -> np.ndarray:
  """The share of rows that train in each row of blocks; where all do, none is looked at."""
  if all(trains.size == 1 for trains in along):
    return np.ones(to.blocks[0])
  rows = np.ones(1, bool)
  for trains, n in zip(along, shape, strict=True):
    rows = np.outer(rows, np.broadcast_to(trains, (n,))).reshape(-1)
  return _mean(rows, to.rows, 0)


def _mean(x: np.ndarray, starts: np.ndarray, axis: int) -> np.ndarray:
  sizes = np.diff(starts, append=x.shape[axis])
  sums = np.add.reduceat(x, starts, axis=axis, dtype=np.float64)
  return sums / sizes.reshape([-1 if a == axis else 1 for a in range(x.ndim)])


def _density(flat: np.ndarray, to: Grid) -> np.ndarray:
  """The share of each block that scattered positions make up."""
  row, column = np.divmod(flat, to.shape[1])
  block = np.searchsorted(to.rows, row, "right") - 1
  block = block * len(to.columns) + np.searchsorted(to.columns, column, "right") - 1
  counts = np.bincount(block, minlength=math.prod(to.blocks)).reshape(to.blocks)
  return counts / np.outer(to.heights, to.widths)


def _dense_share(mask: np.ndarray, shape: tuple[int, ...], to: Grid) -> np.ndarray:
  """The share of a mask as it broadcasts: an axis that it does not name is never expanded."""
  mask = mask.reshape((1,) * (max(len(shape), 1) - mask.ndim) + mask.shape)
  if any(n > 1 for n in mask.shape[:-1]):
    leading = np.broadcast_to(mask, (*shape[:-1], mask.shape[-1]))
    mask = _mean(leading.reshape(to.shape[0], -1), to.rows, 0)
  else:
    mask = mask.reshape(1, -1)
  if mask.shape[1] > 1:
    mask = _mean(mask, to.columns, 1)
  return np.broadcast_to(mask.astype(float), to.blocks)


def change(
  old: np.ndarray, new: np.ndarray, layout: Layout, index: Index, to: Grid
) -> tuple[np.ndarray, np.ndarray]:
  """(largest |new - old| of each block, number of frozen elements with other bits in it).

  Works through one row of blocks after another, so the largest leaf needs no second copy. NaN and
  infinity count as infinite where the bits differ.
  """
  size = np.zeros(to.blocks)
  leaks = np.zeros(to.blocks, int)
  frozen = _elements.frozen_mask(layout, index).reshape(to.shape)
  old, new = (x.reshape(*to.shape, *x.shape[len(layout.shape) :]) for x in (old, new))
  for i, (start, height) in enumerate(zip(to.rows, to.heights, strict=True)):
    rows = slice(start, start + height)
    a, b = old[rows], new[rows]
    other = differs(a, b, a.shape[:2])
    if not other.any():
      continue
    size[i] = np.maximum.reduceat(_distance(a, b, other).max(axis=0), to.columns)
    leaks[i] = np.add.reduceat(np.count_nonzero(other & frozen[rows], axis=0), to.columns)
  return size, leaks


def _distance(a: np.ndarray, b: np.ndarray, other: np.ndarray) -> np.ndarray:
  if a.shape != other.shape:
    return other.astype(float)  # keys of random numbers: other or not
  wide = np.complex128 if np.iscomplexobj(a) else np.float64
  with np.errstate(all="ignore"):
    distance = np.abs(b.astype(wide) - a.astype(wide))
  return np.where(np.isnan(distance), np.where(other, np.inf, 0.0), distance)
