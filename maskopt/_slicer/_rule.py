"""What a rule is: how one region of one output of an equation follows from regions of its inputs.

  block(output, got) = emit(block(input_0, ins_0), block(input_1, ins_1), ...)    got covers wanted

A rule never has to exist: an equation without one is computed whole and its readers slice it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.extend import core, source_info_util

from ._region import Demand, Region, Wanted, full

Equation: TypeAlias = core.JaxprEqn
Blocks: TypeAlias = list[tuple[Wanted, Any]]  # the regions of one variable and their values
Picks: TypeAlias = Sequence[jax.Array]  # the index arrays of all picks


class Piece(NamedTuple):
  """How one region of a one-output equation is computed.

  Args:
    ins: the region of every operand that is read; None where an operand is not.
    emit: maps those blocks (None where not read) to the block of `got`.
    got: the region that comes out where it had to be rounded up; None means just what was asked.
    needs_picks: whether `emit` takes the index arrays as well, before the blocks.
  """

  ins: Sequence[Wanted | None]
  emit: Callable[..., Any]
  got: Region | None = None
  needs_picks: bool = False


class Step(NamedTuple):
  """What the analysis decided for one equation.

  Args:
    eqn: the equation.
    ins: the demand on every operand, in order.
    run: maps the blocks of every operand (one list each) and the index arrays of picks to the
      blocks of every output.
    stopped: why a partial demand did not go through, else None.
    plans: the plans of inner jaxprs that `run` evaluates.
  """

  eqn: Equation
  ins: Sequence[Demand]
  run: Callable[[list[list[Any]], Picks], list[Blocks]]
  stopped: str | None = None
  plans: Sequence[Any] = ()


Rule: TypeAlias = Callable[[Equation, Region], Piece | None]
RULES: dict[str, Rule] = {}  # by primitive name; one output


def rule(*names: str) -> Callable[[Rule], Rule]:
  """Enter a function into the table under the names of its primitives."""

  def enter(function: Rule) -> Rule:
    for name in names:
      assert name not in RULES, name
      RULES[name] = function
    return function

  return enter


def shape_of(v: Any) -> tuple[int, ...]:
  """The shape of a variable; tokens and references have none and are only ever wanted whole."""
  return tuple(getattr(v.aval, "shape", ()))


def out_shape(eqn: Equation) -> tuple[int, ...]:
  return shape_of(eqn.outvars[0])


def whole(v: Any) -> Demand:
  return (full(len(shape_of(v))),)


def bind(eqn: Equation, *operands: Any, **changed: Any) -> Any:
  """Apply the equation's primitive to other operands, with some parameters changed."""
  params = eqn.primitive.get_bind_params({**eqn.params, **changed})
  # JAX before 0.9 hands back (functions, params): a call primitive binds the functions first.
  functions, params = params if isinstance(params, tuple) else ((), params)
  return eqn.primitive.bind(*functions, *operands, **params)


def rebind(eqn: Equation, **changed: Any) -> Callable[..., Any]:
  return lambda *operands: bind(eqn, *operands, **changed)


@contextlib.contextmanager
def context_of(eqn: Equation) -> Iterator[None]:
  """The name stack, source line and configuration under which the equation was traced."""
  info = eqn.source_info
  names = source_info_util.current_name_stack() + info.name_stack
  with source_info_util.user_context(info.traceback, name_stack=names), eqn.ctx.manager:
    yield


def has_side_effects(eqn: Equation) -> bool:
  """Whether the equation prints, calls back or writes; a named axis in scope is no side effect."""
  return any(type(e).__name__ != "NamedAxisEffect" for e in eqn.effects)


def is_literal(v: Any) -> bool:
  return isinstance(v, core.Literal)


def is_closed(jaxpr: Any) -> bool:
  return isinstance(jaxpr, core.ClosedJaxpr)


def scan_parts(eqn: Equation, jaxpr: core.Jaxpr) -> tuple[int, int]:
  """How many operands of a scan are constants, and how many its carry.

  What is scanned over has one dimension less inside; the parameters that say so change with JAX.
  """

  def stacked(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    pairs = zip(outer, inner, strict=True)
    return sum(len(shape_of(a)) > len(shape_of(b)) for a, b in pairs)

  n_carry = len(eqn.outvars) - stacked(eqn.outvars, jaxpr.outvars)
  return len(eqn.invars) - n_carry - stacked(eqn.invars, jaxpr.invars), n_carry


def opened(jaxpr: Any) -> tuple[core.Jaxpr, Sequence[jax.typing.ArrayLike]]:
  """(jaxpr, constants) of an open or closed jaxpr."""
  return (jaxpr.jaxpr, jaxpr.consts) if is_closed(jaxpr) else (jaxpr, ())
