"""What happens to gradients and updates in a trace, written down only while somebody asks.

The steps of `maskopt` leave notes here; `maskopt.explain` opens the journal around one trace of a
user's step and reads them. Closed, it costs one look at a context variable.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata

_MARK = "maskopt updates of "


@dataclasses.dataclass(frozen=True)
class Gradient:
  """One `grad`: FLOPs as JAX would do them and as they are done, and what stopped a demand."""

  flops_full: int
  flops_sliced: int
  stops: tuple[Any, ...]
  layouts: Any


@dataclasses.dataclass(frozen=True)
class Received:
  """One leaf's gradient in `update`: whether its packed values came along."""

  path: str
  kind: str
  packed: bool


@dataclasses.dataclass(frozen=True)
class Applied:
  """One leaf in `apply_updates`: whether only its trainable elements were touched."""

  path: str
  in_place: bool


Note = Gradient | Received | Applied

_times = itertools.count()
_open: contextvars.ContextVar[list[Note] | None] = contextvars.ContextVar("journal", default=None)


@contextlib.contextmanager
def opened() -> Iterator[list[Note]]:
  """Collect the notes of everything traced inside, what `jit` has traced before too.

  JAX keeps traces by what surrounds them: an attribute that is new every time makes it trace anew.
  """
  notes: list[Note] = []
  token = _open.set(notes)
  try:
    with set_xla_metadata(journal=str(next(_times))):
      yield notes
  finally:
    _open.reset(token)


def write(made: Callable[[], Iterable[Note]]) -> None:
  """Leave notes, if anybody reads; only then are they made."""
  notes = _open.get()
  if notes is not None:
    notes.extend(made())


def marked(update: Any, path: str) -> Any:
  """The same update, to be found again in the program by `mark_of`, if anybody reads."""
  return update if _open.get() is None else checkpoint_name(update, _MARK + path)


def mark_of(name: str) -> str | None:
  """The path of a mark, or None for a name of somebody else's."""
  return name.removeprefix(_MARK) if name.startswith(_MARK) else None
