"""Which positions of an axis, and which elements of an array, an index takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from . import _traced
from ._complaints import Complaint
from ._errors import describe

FITS = "Name fewer parameters with the pattern, or use a value that fits them all."
_INDEX = "Write what np.s_ gives, e.g. np.s_[:, :3] or np.s_[[0, -1]]."
_PARTS = "an index of ints, slices and lists of ints"
_POSITIONS = "an int, ints, a slice or a bool array"


_COUNT = "Count from 0, or from the end by negative numbers; a bool array has a bool for each."
_SLICE = "Write a slice of ints, such as slice(3), slice(-2, None) or slice(0, None, 2)."
_TWICE = "Name each once; an array of 0 and 1 becomes a mask by x != 0."
_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class Positions:
  """Positions along an axis: a slice, or ints as the bytes of an int64 array.

  Attributes:
    idx: the slice or the bytes; a tuple of as many ints would take the room five times.
    size: length of the bool array that the ints come from, if they do.
  """

  idx: slice | bytes
  size: int | None = None

  @property
  def ints(self) -> np.ndarray:
    """The ints; there are none of a slice."""
    return np.frombuffer(self.idx if isinstance(self.idx, bytes) else b"", np.int64)

  def __repr__(self) -> str:
    if isinstance(self.idx, slice):
      return repr(self.idx)
    first = self.ints[:_SHOWN].tolist()
    more = self.ints.size - len(first)
    return f"[{', '.join(map(str, first))}, ... {more:,} more]" if more else repr(first)

  def within(self, n: int, what: str, remedy: str = FITS) -> slice | np.ndarray:
    """The positions along an axis of length n, not negative; raises `Complaint` outside it.

    A slice comes back as one that steps upwards.
    """
    if self.size not in (None, n):
      raise Complaint(f"a bool array for {n} {what}", f"one for {self.size}", remedy)
    if isinstance(self.idx, slice):
      found = range(*self.idx.indices(n))
      if n and not found:
        raise Complaint(f"{what} among {n}", f"{self.idx}, which selects none", remedy)
      found = found if found.step > 0 else found[::-1]
      return slice(found.start, found.stop, found.step)
    outside = self.ints[(self.ints < -n) | (self.ints >= n)]
    if outside.size:
      raise Complaint(f"{what} in [{-n}, {n - 1}]" if n else f"no {what}", _few(outside), remedy)
    return self.ints % max(n, 1)


def positions(idx: Any) -> Positions:
  """Read what a caller wrote; raises `Complaint` if it can be no positions of any axis."""
  _traced.refuse(idx, _POSITIONS)
  if isinstance(idx, slice):
    return Positions(_checked(idx))
  try:
    array = np.asarray(idx)
  except ValueError:  # rows of several lengths
    raise Complaint(_POSITIONS, describe(idx), _COUNT, TypeError) from None
  if array.dtype == np.bool_ and array.ndim == 1:
    return Positions(np.flatnonzero(array).astype(np.int64).tobytes(), array.size)
  if array.size and (not np.issubdtype(array.dtype, np.integer) or array.ndim > 1):
    raise Complaint(_POSITIONS, describe(idx), _COUNT, TypeError)
  if array.size and array.max() > np.iinfo(np.int64).max:
    raise Complaint("ints of 64 bits", describe(idx), _COUNT)
  # A mask written as 0 and 1 would be read as the positions 0 and 1, and nobody would hear of it.
  if (repeated := _repeated(array)).size:
    raise Complaint("each index once", f"{_few(repeated)} more often", _TWICE)
  return Positions(array.astype(np.int64).tobytes())


def _repeated(array: np.ndarray) -> np.ndarray:
  """The values that an array has more than once."""
  array = array.reshape(-1)
  if (array[1:] <= array[:-1]).any():  # not in order: only then is a sorted copy worth its bytes
    array = np.sort(array)
  return np.unique(array[1:][array[1:] == array[:-1]])


def _few(ints: np.ndarray) -> str:
  """The first of some ints, as errors write them."""
  return str(ints[:_SHOWN].tolist())[1:-1] + (", ..." if ints.size > _SHOWN else "")


def _checked(part: slice) -> slice:
  """The slice, of ints that slice something."""
  ends = [x for x in (part.start, part.stop, part.step) if x is not None]
  if any(isinstance(x, bool) or not isinstance(x, (int, np.integer)) for x in ends):
    raise Complaint("a slice of ints", repr(part), _SLICE, TypeError)
  if part.step == 0:
    raise Complaint("a slice with a step other than 0", repr(part), _SLICE)
  return part


def chosen(positions: slice | np.ndarray, n: int) -> np.ndarray:
  """The positions as bools along an axis of length n; one bool where it is all of them."""
  if positions == slice(0, n, 1) if isinstance(positions, slice) else not n:
    return np.ones(1, bool)
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
    mask = mask & keep.reshape([-1 if k == axis else 1 for k in range(len(shape))])
  return mask


def _every_axis(index: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[Any, ...]:
  """The index with one part for each axis."""
  _traced.refuse(index, _PARTS)
  dots = [k for k, part in enumerate(index) if part is ...]
  for part in index:
    if not _is_index(part):
      raise Complaint(_PARTS, describe(part), _advice(part), TypeError)
  given = len(index) - len(dots)
  if len(dots) > 1 or given > len(shape):
    got = f"one of {given} axes" if len(dots) < 2 else "two ellipses"
    raise Complaint(f"an index for shape {shape}", got, FITS)
  at = dots[0] if dots else len(index)
  rest = (slice(None),) * (len(shape) - given)
  return index[:at] + rest + index[at + len(dots) :]


def _advice(part: Any) -> str:
  """What to write in place of what is no index."""
  if isinstance(part, (np.ndarray, jax.Array)):
    if not np.issubdtype(part.dtype, np.integer) and part.dtype != np.bool_:
      return "Write True where frozen; an array of numbers becomes a mask by x != 0."
    return (
      "A mask is a bool array by itself (of an array of 0 and 1, x != 0); an index is a list of "
      "ints along one axis."
    )
  flags = isinstance(part, (list, tuple)) and part and all(isinstance(x, bool) for x in part)
  # A list of bools is refused: NumPy reads it along the first axis, a mask along the last.
  return (
    "Write a mask as a bool array, which broadcasts as in NumPy: np.array(...)."
    if flags
    else _INDEX
  )


def _is_index(part: Any) -> bool:
  if part is ... or isinstance(part, (int, np.integer, slice, range)):
    return not isinstance(part, bool)
  if not isinstance(part, (list, np.ndarray, jax.Array)):
    return False
  try:
    array = np.asarray(part)
  except (TypeError, ValueError):  # rows of several lengths
    return False
  is_flags = array.dtype == np.bool_ and not isinstance(part, list)
  return array.ndim <= 1 and (is_flags or np.issubdtype(array.dtype, np.integer) or not array.size)


def _paired(index: tuple[Any, ...], shape: tuple[int, ...]) -> np.ndarray:
  """Lists on several axes are paired element by element, so the mask has every element."""
  parts = tuple(p if isinstance(p, (int, np.integer, slice)) else np.asarray(p) for p in index)
  parts = tuple(_checked(p) if isinstance(p, slice) else p for p in parts)
  mask = np.zeros(shape, bool)
  try:
    mask[parts] = True
  except IndexError as error:
    raise Complaint(f"an index for shape {shape}", str(error), FITS) from None
  return mask
