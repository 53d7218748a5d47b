"""What is wrong with one rule, on its way to the single error that lists every such fault."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from ._errors import Problem, fail


class Complaint(Exception):
  """One fault, raised where it is seen; whoever knows the rule or the path says where it is."""

  def __init__(
    self, expected: str, got: str, remedy: str, kind: type[Exception] = ValueError
  ) -> None:
    super().__init__(f"expected {expected}, got {got}. {remedy}")
    self.expected, self.got, self.remedy, self.kind = expected, got, remedy, kind


class Complaints:
  """The faults of one call."""

  def __init__(self) -> None:
    self._problems: list[Problem] = []
    self._remedies: dict[str, None] = {}

  def add(self, path: str, complaint: Complaint) -> None:
    self._problems.append(Problem(path, complaint.expected, complaint.got, complaint.kind))
    self._remedies[complaint.remedy] = None

  def raise_all(self, where: str) -> None:
    """Raise one error for all faults, each remedy said once; return if there are none."""
    if self._problems:
      fail(where, self._problems, " ".join(self._remedies))


def check_takes(function: Callable[..., Any], names: Sequence[str], remedy: str) -> None:
  """Raise a `Complaint` unless the function can be called with so many arguments."""
  try:
    signature = inspect.signature(function)
  except (TypeError, ValueError):
    return  # built in: it will say so itself
  try:
    signature.bind(*names)
  except TypeError:
    expected = f"a function of ({', '.join(names)})"
    raise Complaint(expected, f"one of {signature}", remedy, TypeError) from None


def listing(names: list[str], most: int = 12) -> str:
  """The names in a row, the middle left out where there are many."""
  if len(names) <= most:
    return ", ".join(names)
  half = most // 2
  return ", ".join([*names[:half], "...", *names[-half:]])
