"""Which positions of an axis, and which elements of an array, an index takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from . import _traced
from ._complaints import Complaint
from ._errors import describe

FITS = "Name fewer parameters with the pattern, or use a value that fits them all."
_INDEX = "Write what np.s_ gives, e.g. np.s_[:, :3] or np.s_[[0, -1]]."
_PARTS = "an index of ints, slices and lists of ints"
_POSITIONS = "an int, ints, a slice or a bool array"


@dataclasses.dataclass(frozen=True)
class Positions:
  """Positions along an axis: a slice, ints, or the ints of a bool array of length `size`."""

  idx: slice | tuple[int, ...]
  size: int | None = None

  def __repr__(self) -> str:
    return repr(self.idx if isinstance(self.idx, slice) else list(self.idx))

  def within(self, n: int, what: str) -> np.ndarray:
    """The positions along an axis of length n, not negative; raises `Complaint` outside it."""
    if self.size not in (None, n):
      raise Complaint(f"a bool array for {n} {what}", f"one for {self.size}", FITS)
    if isinstance(self.idx, slice):
      found = np.arange(n)[self.idx]
      if n and not found.size:
        raise Complaint(f"{what} among {n}", f"{self.idx}, which selects none", FITS)
      return found
    outside = [k for k in self.idx if not -n <= k < n]
    if outside:
      raise Complaint(f"{what} in [{-n}, {n - 1}]", str(outside)[1:-1][:60], FITS)
    return np.asarray(self.idx, np.int64) % max(n, 1)


def positions(idx: Any) -> Positions:
  """Read what a caller wrote; raises `Complaint` if it can be no positions of any axis."""
  _traced.refuse(idx, _POSITIONS)
  if isinstance(idx, slice):
    return Positions(idx)
  array = np.asarray(idx)
  if array.dtype == np.bool_ and array.ndim == 1:
    return Positions(tuple(np.flatnonzero(array).tolist()), array.size)
  if array.size and (not np.issubdtype(array.dtype, np.integer) or array.ndim > 1):
    remedy = "Count units from 0; negative ones count from the end."
    raise Complaint(_POSITIONS, describe(array), remedy, TypeError)
  return Positions(tuple(int(k) for k in array.reshape(-1)))


def chosen(positions: np.ndarray, n: int) -> np.ndarray:
  """The positions as bools along an axis of length n."""
  keep = np.zeros(n, bool)
  keep[positions] = True
  return keep


def indexed(index: tuple[Any, ...], shape: tuple[int, ...]) -> np.ndarray:
  """The elements that `parameter[index]` takes, by NumPy's rules."""
  index = _every_axis(index, shape)
  lists = [k for k, part in enumerate(index) if not isinstance(part, (int, np.integer, slice))]
  if len(lists) > 1:
    return _paired(index, shape)
  mask = np.ones((1,) * len(shape), bool)
  for axis, (part, n) in enumerate(zip(index, shape, strict=True)):
    if isinstance(part, slice) and part == slice(None):
      continue
    keep = chosen(positions(part).within(n, f"indices of axis {axis}"), n)
    mask = mask & keep.reshape([n if k == axis else 1 for k in range(len(shape))])
  return mask


def _every_axis(index: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[Any, ...]:
  """The index with one part for each axis."""
  _traced.refuse(index, _PARTS)
  dots = [k for k, part in enumerate(index) if part is ...]
  for part in index:
    if not _is_index(part):
      raise Complaint(_PARTS, describe(part), _INDEX, TypeError)
  given = len(index) - len(dots)
  if len(dots) > 1 or given > len(shape):
    got = f"one of {given} axes" if len(dots) < 2 else "two ellipses"
    raise Complaint(f"an index for shape {shape}", got, FITS)
  at = dots[0] if dots else len(index)
  rest = (slice(None),) * (len(shape) - given)
  return index[:at] + rest + index[at + len(dots) :]


def _is_index(part: Any) -> bool:
  if part is ... or isinstance(part, (int, np.integer, slice, range)):
    return not isinstance(part, bool)
  if not isinstance(part, (list, np.ndarray)):
    return False
  array = np.asarray(part)
  # A list of bools is refused: NumPy reads it along the first axis, a mask along the last.
  is_flags = array.dtype == np.bool_ and isinstance(part, np.ndarray)
  return array.ndim <= 1 and (is_flags or np.issubdtype(array.dtype, np.integer) or not array.size)


def _paired(index: tuple[Any, ...], shape: tuple[int, ...]) -> np.ndarray:
  """Lists on several axes are paired element by element, so the mask has every element."""
  parts = tuple(np.asarray(p, int) if isinstance(p, (list, range)) else p for p in index)
  mask = np.zeros(shape, bool)
  try:
    mask[parts] = True
  except IndexError as error:
    raise Complaint(f"an index for shape {shape}", str(error), FITS) from None
  return mask
