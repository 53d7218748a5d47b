"""Which positions of an axis belong to which unit, and where they go when units are added.

A label says `unit * STRIDE + place within the unit's block`; NONE is a position of no unit. Labels
survive reshapes: channels flattened with their pixels, gates side by side, heads and their width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .._complaints import Complaint

STRIDE = 1 << 32
NONE = -1
Labels = np.ndarray

_STRUCTURE = (
  "Name the consumers: consumers=[...], or reshape in the forward so that units stay apart."
)


def labels_of(size: int, units: int, parts: int = 1) -> Labels:
  """The labels of an axis of `parts` x `units` x (size / parts / units) positions."""
  inner = size // (units * parts)
  one = np.arange(units)[:, None] * STRIDE + np.arange(inner)
  return np.tile(one.reshape(-1), parts)


def joined(a: Labels | None, b: Labels) -> Labels:
  """What two sources know together; raises `Complaint` where they disagree."""
  if a is None:
    return b
  both = (a != NONE) & (b != NONE)
  if np.any(a[both] != b[both]):
    expected = "one order of units along an axis"
    raise Complaint(expected, "two that disagree", _STRUCTURE)
  return np.where(a == NONE, b, a)


@dataclasses.dataclass(frozen=True)
class GrownAxis:
  """An axis before and after.

  Attributes:
    size: the new size.
    kept: for each old position its new one.
    source: for each new position the old one that it is, or would copy.
    share: for each new position, over how many copies the unit it copies is spread.
  """

  size: int
  kept: np.ndarray
  source: np.ndarray
  share: np.ndarray

  @property
  def before(self) -> int:
    """The old size."""
    return len(self.kept)

  def spread(self, values: np.ndarray, new: Any) -> np.ndarray:
    """What is known of each old position, at its new one; `new` for those that are new."""
    wide = np.full(self.size, new, values.dtype)
    wide[self.kept] = values
    return wide


def grown(labels: Labels, units: int, copied: np.ndarray) -> GrownAxis:
  """The axis with `len(copied)` more units after each run of the `units` there are.

  Raises:
    Complaint: units stand apart or are not all there.
  """
  counts = 1 + np.bincount(copied, minlength=units)
  source: list[np.ndarray] = []
  old: list[np.ndarray] = []
  for start, stop, inner in _runs(labels, units):
    run = np.arange(start, stop)
    source.append(run)
    old.append(np.ones(len(run), bool))
    if inner:
      extra = start + copied[:, None] * inner + np.arange(inner)
      source.append(extra.reshape(-1))
      old.append(np.zeros(extra.size, bool))
  sources, is_old = np.concatenate(source), np.concatenate(old)
  unit = labels[sources] // STRIDE
  share = np.where(labels[sources] == NONE, 1, counts[np.maximum(unit, 0)])
  return GrownAxis(len(sources), np.flatnonzero(is_old), sources, share)


def _runs(labels: Labels, units: int) -> Iterator[tuple[int, int, int]]:
  """(start, stop, positions of each unit) of every run; 0 positions for what is of no unit."""
  at = 0
  while at < len(labels):
    if labels[at] == NONE:
      stop = at + int(np.argmin(np.append(labels[at:], 0) == NONE))
      yield at, stop, 0
    else:
      steps = np.append(labels[at:], NONE) == labels[at] + np.arange(len(labels) - at + 1)
      inner = int(np.argmin(steps))
      stop = at + units * inner
      if not np.array_equal(labels[at:stop], labels_of(units * inner, units)):
        got = f"an axis of {len(labels)} on which units stand apart"
        raise Complaint("all units of the layer side by side", got, _STRUCTURE)
      yield at, stop, inner
    at = stop


def whole_runs(labels: Labels, units: int) -> Labels:
  """The labels without those of units that a slice has cut off from the rest of their layer."""
  result, at = labels.copy(), 0
  while at < len(labels):
    if labels[at] == NONE:
      at += 1
      continue
    known = labels[at:]
    stop = at + int(np.argmin(np.append(known[1:] > known[:-1], False))) + 1
    size = stop - at
    if size % units or not np.array_equal(labels[at:stop], labels_of(size, units)):
      result[at:stop] = NONE
    at = stop
  return result


def flattened(labels: Labels, dims: Sequence[int], axis: int) -> Labels:
  """The labels of several axes as one, of which one has labels."""
  after = math.prod(dims[axis + 1 :])
  wide = np.where(labels[:, None] == NONE, NONE, _scaled(labels, after)[:, None] + np.arange(after))
  return np.tile(wide.reshape(-1), math.prod(dims[:axis]))


def _scaled(labels: Labels, by: int) -> Labels:
  unit, place = np.divmod(labels, STRIDE)
  return unit * STRIDE + place * by


def split(labels: Labels, dims: Sequence[int], where: str = "") -> tuple[int, Labels]:
  """The one axis of several that carries the labels of their product.

  Args:
    labels: of the product.
    dims: sizes of the axes.
    where: the place that errors name.

  Raises:
    Complaint: no axis does, for units are cut in two.
  """
  for axis in reversed(range(len(dims))):
    after = math.prod(dims[axis + 1 :])
    block = labels.reshape(-1, dims[axis], after)
    base = np.where(block == NONE, NONE, block - np.arange(after))
    found = base.max(axis=(0, 2))
    agree = (base == NONE) | (base == found[None, :, None])
    if agree.all() and not np.any(found[found != NONE] % STRIDE % after):
      unit, place = np.divmod(found, STRIDE)
      return axis, np.where(found == NONE, NONE, unit * STRIDE + place // after)
  got = f"a reshape of {len(labels)} positions to {tuple(dims)} that cuts units in two{where}"
  remedy = (
    "Grow whole groups of them, as a group normalisation has: of= says how many groups there are; "
    "or name the consumers: consumers=[...]."
  )
  raise Complaint("units that stay whole", got, remedy)
