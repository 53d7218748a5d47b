"""Which dense array stands for which packed values, for as long as the array lives.

Where `update` and `apply_updates` meet in one trace, the dense updates between them need never be
built. The memory is an optimisation only: an array it does not know is treated as any other array.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any


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


# By identity, for arrays are not hashable; the weak reference drops the entry with its array, so a
# traced value never outlives its trace here.
_records: dict[int, tuple[weakref.ref, Record]] = {}


def remember(array: Any, record: Record) -> Any:
  """Note what the array was made of and return it."""
  key = id(array)
  _records[key] = (weakref.ref(array, lambda _: _records.pop(key, None)), record)
  return array


def recall(array: Any) -> Record | None:
  """What this very array was made of, or None if nobody said."""
  entry = _records.get(id(array))
  return entry[1] if entry is not None and entry[0]() is array else None
