"""Count the matmul and convolution FLOPs that a program really does.

  FLOPs(dot_general) = 2 * batch * rows * columns * summed        scan bodies count length times

The compiler's own cost analysis counts a loop body once and hides what it removed, so the count is
taken from the jaxpr, after dropping every equation that no output needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.extend import core

from ._rule import Equation, has_side_effects, is_closed, is_literal, opened, scan_parts, shape_of


def count_flops(jaxpr: Any, wanted: Sequence[bool] | None = None) -> int:
  """FLOPs of matmuls and convolutions in a jaxpr, per device, after dead-code elimination.

  Args:
    jaxpr: an open or closed jaxpr.
    wanted: which outputs are used; all by default.
  Returns:
    An exact int. A `while` body counts once and of a `cond` the most expensive branch does; inside
    `shard_map` the count is that of one shard. A convolution counts every tap of every output, also
    where it meets a zero of padding or dilation.
  """
  jaxpr, _ = opened(jaxpr)
  return _live(jaxpr, wanted or [True] * len(jaxpr.outvars))[0]


def _live(jaxpr: core.Jaxpr, wanted: Sequence[bool]) -> tuple[int, list[bool]]:
  """(FLOPs, which inputs are needed) for the wanted outputs."""
  needed = {v for v, w in zip(jaxpr.outvars, wanted, strict=True) if w and not is_literal(v)}
  total = 0
  for eqn in reversed(jaxpr.eqns):
    outs = [v in needed for v in eqn.outvars]
    if not any(outs) and not has_side_effects(eqn):
      continue
    flops, reads = _equation(eqn, outs)
    total += flops
    needed.update(v for v, r in zip(eqn.invars, reads, strict=True) if r and not is_literal(v))
  return total, [v in needed for v in jaxpr.invars]


def _equation(eqn: Equation, outs: list[bool]) -> tuple[int, list[bool]]:
  name, p = eqn.primitive.name, eqn.params
  everything = [True] * len(eqn.invars)
  if name == "dot_general":
    return _dot(eqn), everything
  if name == "conv_general_dilated":
    return _conv(eqn), everything
  if name == "ragged_dot_general":
    return _ragged_dot(eqn), everything
  if name == "scan":
    return _scan(eqn, outs)
  if name == "cond":
    counted = [_live(opened(b)[0], outs) for b in p["branches"]]
    reads = [any(column) for column in zip(*(r for _, r in counted), strict=True)]
    return max(f for f, _ in counted), [True, *reads]
  inner = [j for value in p.values() for j in _jaxprs(value)]
  same = len(inner) == 1 and len(opened(inner[0])[0].invars) == len(eqn.invars)
  if same and len(opened(inner[0])[0].outvars) == len(outs):
    return _live(opened(inner[0])[0], outs)
  return sum(count_flops(j) for j in inner), everything


def _jaxprs(value: Any) -> list[Any]:
  if is_closed(value) or isinstance(value, core.Jaxpr):
    return [value]
  return [j for v in value for j in _jaxprs(v)] if isinstance(value, (tuple, list)) else []


def _dot(eqn: Equation) -> int:
  (summed, _), _ = eqn.params["dimension_numbers"]
  lhs = shape_of(eqn.invars[0])
  return 2 * math.prod(shape_of(eqn.outvars[0])) * math.prod(lhs[d] for d in summed)


def _ragged_dot(eqn: Equation) -> int:
  """Every row meets the matrix of its own group only; a dW has one block of out per group."""
  ragged, lhs = eqn.params["ragged_dot_dimension_numbers"], shape_of(eqn.invars[0])
  (summed, _), _ = ragged.dot_dimension_numbers
  out = shape_of(eqn.outvars[0])
  out = out[1:] if ragged.lhs_ragged_dimensions[0] in summed else out
  return 2 * math.prod(out) * math.prod(lhs[d] for d in summed)


def _conv(eqn: Equation) -> int:
  rhs, spec = shape_of(eqn.invars[1]), eqn.params["dimension_numbers"].rhs_spec
  return 2 * math.prod(shape_of(eqn.outvars[0])) * math.prod(rhs[d] for d in spec[1:])


def _scan(eqn: Equation, outs: list[bool]) -> tuple[int, list[bool]]:
  """Length times the body, without the carries that no output and no later iteration needs."""
  jaxpr, _ = opened(eqn.params["jaxpr"])
  first, n_carry = scan_parts(eqn, jaxpr)
  split = first + n_carry
  wanted = list(outs)
  while True:
    flops, reads = _live(jaxpr, wanted)
    grown = [w or r for w, r in zip(wanted, reads[first:split], strict=False)]
    grown += wanted[n_carry:]
    if grown == wanted:
      return eqn.params["length"] * flops, reads[:first] + wanted[:n_carry] + reads[split:]
    wanted = grown
