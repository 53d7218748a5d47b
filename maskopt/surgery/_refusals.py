"""What is wrong with one layer, on its way to the single error that lists every such fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn, ParamSpec, TypeVar

from .._errors import Problem, fail

P = ParamSpec("P")
T = TypeVar("T")


class Refusal(Exception):
  """Faults found in one place; whoever knows the call says which it is."""

  def __init__(self, problems: Sequence[Problem], remedy: str) -> None:
    super().__init__(f"{'; '.join(map(str, problems))}. {remedy}")
    self.problems, self.remedy = list(problems), remedy


def refuse(
  path: str, expected: str, got: str, remedy: str, kind: type[Exception] = ValueError
) -> NoReturn:
  """Raise a `Refusal` of one problem."""
  raise Refusal([Problem(path, expected, got, kind)], remedy)


def told(where: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
  """What the function returns; a refusal becomes the error of the call `where`."""
  refusals = Refusals()
  result = refusals.tried(function, *args, **kwargs)
  refusals.raise_all(where)
  return result  # pyright: ignore[reportReturnType]  # None only after a refusal, which was raised


class Refusals:
  """The refusals of one call."""

  def __init__(self) -> None:
    self._problems: dict[Problem, None] = {}
    self._remedies: dict[str, None] = {}

  def tried(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """What the function returns; None if it refuses, which is noted."""
    try:
      return function(*args, **kwargs)
    except Refusal as refusal:
      self.add(refusal.problems, refusal.remedy)
    return None

  def add(self, problems: Sequence[Problem], remedy: str) -> None:
    self._problems |= dict.fromkeys(problems)
    self._remedies[remedy] = None

  def refuse_all(self) -> None:
    """Hand all of them on as one refusal; return if there are none."""
    if self._problems:
      raise Refusal(list(self._problems), " ".join(self._remedies))

  def raise_all(self, where: str) -> None:
    """Raise one error for all of them, each remedy said once; return if there are none."""
    if self._problems:
      fail(where, list(self._problems), " ".join(self._remedies))
