"""What jit, vmap or scan traces has no value to read yet: a mask may be such data, a rule not."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.core import Tracer

from ._complaints import Complaint
from ._errors import Problem, describe

REMEDY = (
  "What jit, vmap or scan traces is data, a bool too: make it outside and close over it. A mask "
  "may be data, as a bool array that broadcasts to the parameter (maskopt.runtime)."
)


@dataclasses.dataclass(frozen=True)
class Traced(Problem):
  """A complaint about a traced value; what else would be right of it does not matter."""


def is_traced(x: Any) -> bool:
  """Whether x is traced, or a list, tuple or slice that holds what is."""
  if isinstance(x, slice):
    x = (x.start, x.stop, x.step)
  return isinstance(x, Tracer) or (isinstance(x, (list, tuple)) and any(map(is_traced, x)))


def told(x: Any) -> str:
  """A short phrase for a traced value."""
  if not isinstance(x, Tracer):
    return f"a {type(x).__name__} of traced values"
  return f"a traced {x.dtype}" if x.ndim == 0 else f"a traced {describe(x)}"


def refuse(x: Any, expected: str) -> None:
  """Raise a `Complaint` if x is traced, where a rule needs a value to read."""
  if is_traced(x):
    raise Complaint(expected, told(x), REMEDY, TypeError)
