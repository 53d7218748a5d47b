"""Which units of a layer: their indices in order, held as small as the mask that chose them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_AT_ONCE = 2**14
_SHOWN = 8


class Units(Sequence[Any]):
  """Indices of units, in order; of several dimensions they are tuples. Equal to a tuple of them.

    list(Units(which, shape)) = list(np.argwhere(np.broadcast_to(which, shape)))

  It holds the bools and makes an index only when asked for it: all units of a layer cost one byte,
  however many they are, and some cost a byte each where a tuple of them would cost forty.
  """

  def __init__(self, which: np.ndarray, shape: tuple[int, ...]):
    """Keep bools of the shape's rank that broadcast to it."""
    self._which, self.shape = which, shape
    self._repeated = math.prod(n for n, held in zip(shape, which.shape, strict=True) if held != n)
    self._count = int(np.count_nonzero(which)) * self._repeated

  def __len__(self) -> int:
    return self._count

  def __iter__(self) -> Iterator[Any]:
    if not self.shape:  # NumPy unravels nothing there
      yield from [()] * len(self)
      return
    size = math.prod(self.shape)
    for start in range(0, size, _AT_ONCE):
      at = np.unravel_index(np.arange(start, min(start + _AT_ONCE, size)), self.shape)
      held = zip(at, self._which.shape, strict=True)
      found = self._which[tuple(i if n > 1 else np.zeros_like(i) for i, n in held)]
      columns = [i[found].tolist() for i in at]
      yield from columns[0] if len(columns) == 1 else zip(*columns, strict=True)

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      chosen = range(*index.indices(len(self)))
      if len(self) == math.prod(self.shape):
        return tuple(map(self.__getitem__, chosen))
      if chosen.step > 0:
        return tuple(itertools.islice(self, chosen.start, chosen.stop, chosen.step))
      return tuple(self)[index]
    place = range(len(self))[index]
    if len(self) == math.prod(self.shape):  # all units, whose indices are their places
      at = tuple(int(i) for i in np.unravel_index(place, self.shape)) if self.shape else ()
      return at[0] if len(at) == 1 else at
    return next(itertools.islice(self, place, None))

  def __eq__(self, other: object) -> bool:
    if isinstance(other, Units) and self.shape == other.shape:
      return bool(np.all(self._which == other._which))
    if not isinstance(other, (tuple, Units)) or len(self) != len(other):
      return NotImplemented if not isinstance(other, (tuple, Units)) else False
    return all(a == b for a, b in zip(self, other, strict=True))

  def __hash__(self) -> int:
    return hash((self._count, self[0] if self._count else None))

  def __repr__(self) -> str:
    first = self[:_SHOWN]
    if len(self) <= _SHOWN:
      return repr(first)
    return f"({', '.join(map(repr, first))}, ... {len(self):,} in all)"
