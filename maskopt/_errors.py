"""What a mistake says: function, argument, path, expected, got, remedy; all bad leaves at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NoReturn


@dataclasses.dataclass(frozen=True)
class Problem:
  """One leaf's complaint; `kind` is TypeError for a wrong sort of value, else ValueError."""

  path: str
  expected: str
  got: str
  kind: type[Exception] = ValueError

  def __str__(self) -> str:
    return f"at {show(self.path)}, expected {self.expected}, got {self.got}"


def show(path: str) -> str:
  """The path as errors write it; a bare array has no path of its own."""
  return path or "the root"


def fail(where: str, problems: Sequence[Problem], remedy: str) -> NoReturn:
  """Raise one error that lists every problem; TypeError as soon as one of them is of that kind."""
  kind = TypeError if any(p.kind is TypeError for p in problems) else ValueError
  raise kind(f"`{where}`: {'; '.join(map(str, problems))}. {remedy}")


def describe(value: object) -> str:
  """A short phrase for what arrived, e.g. `float32 of shape (3,)`."""
  shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
  if shape is not None and dtype is not None:
    return f"{dtype} of shape {tuple(shape)}"
  name, text = type(value).__name__, repr(value)
  if "\n" in text:  # a module or a state, drawn over many lines
    return name
  return (text if text.startswith(name) else f"{name} {text}")[:80]
