"""Which dense array stands for which packed values, for as long as the array lives.

Where `grad`, `update` and `apply_updates` meet in one trace, the dense arrays between them need never
be built. The memory is an optimisation only: an array it does not know is treated as any other.
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

  def stands_for(self, layout: Any, index: Any) -> bool:
    """Whether the values are what this layout would take from the array."""
    if self.sets or self.layout != layout:
      return False
    # Without a digest the positions are data, and equal layouts may mean different elements.
    mine, other = (tuple(x[k] for k in sorted(x)) for x in (self.index, index))
    return bool(layout.digest) or all(a is b for a, b in zip(mine, other, strict=True))


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
# The gradient as JAX gave it, of which a gradient with zeros at frozen elements was made.
unmasked: Memory[Any] = Memory()
