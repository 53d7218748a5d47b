"""Which dense array stands for which packed values, for as long as the array lives.

Where `grad`, `update` and `apply_updates` meet in one trace, the dense arrays between them need
never be built. The memory is an optimisation only: losing it costs speed and never a bit.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Record:
  """What an array was made of: `layout.put(values, index)`.

  Attributes:
    layout: the leaf's layout.
    index: the arrays the layout needs at run time.
    values: the packed values.
    sets: whether the values replace the parameter's own instead of being added to them.
  """

  layout: Any
  index: Any
  values: Any
  sets: bool = False

  def values_of(self, layout: Any, index: Any) -> Any:
    """What this layout would take from the array; None if that is not at hand."""
    if self.sets or not self.is_of_mask(layout, index):
      return None
    if self.layout == layout:
      return self.values
    alike = self.layout.stores_like(layout)
    return self.values.reshape(layout.packed_shape) if alike else None

  def is_of_mask(self, layout: Any, index: Any) -> bool:
    """Whether the values belong to the very mask of this layout, however that stores it."""
    if layout.digest or self.layout.digest:
      return self.layout.digest == layout.digest
    # Without a digest the mask is data, and only the same arrays are known to be the same mask.
    return self.index.keys() == index.keys() and all(self.index[k] is index[k] for k in index)


class Memory(Generic[T]):
  """Notes on arrays, by identity, for arrays are not hashable.

  The weak reference drops a note with its array, so a traced value never outlives its trace here.
  """

  def __init__(self) -> None:
    self._notes: dict[int, tuple[weakref.ref, T]] = {}

  def remember(self, array: Any, note: T) -> Any:
    """Note something of this very array and return the array."""
    key = id(array)
    self._notes[key] = (weakref.ref(array, lambda _: self._notes.pop(key, None)), note)
    return array

  def recall(self, array: Any) -> T | None:
    """The note on this very array, or None."""
    entry = self._notes.get(id(array))
    return entry[1] if entry is not None and entry[0]() is array else None


# Which packed values a dense array was made of.
made_of: Memory[Record] = Memory()
# The whole gradient, as values, of which one with zeros at a mask's frozen elements was made.
unmasked: Memory[Record] = Memory()
