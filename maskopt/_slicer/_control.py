"""Equations that hold jaxprs: calls, loops and branches are sliced inside.

An inner jaxpr is analysed for the regions wanted of its outputs. A loop carry is one array per
iteration, so its demand is one region, grown until an iteration asks no more of the previous one
than the next one asks of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from jax import lax
from jax.extend import core

from . import _index as ix, _region as rg
from ._index import Index
from ._region import Demand, Region, full
from ._rule import (
  Blocks,
  Equation,
  Picks,
  Step,
  has_side_effects,
  opened,
  scan_parts,
  shape_of,
  whole,
)
from ._sampled import GATHERED
from ._shard_map import shard_map

Demands: TypeAlias = tuple[Demand, ...]
Planner: TypeAlias = Callable[[core.Jaxpr, Demands], Any]  # the analysis, handed in by it
CallRule: TypeAlias = Callable[[Equation, Demands, Planner], Step | None]

# A scan's carry wanted beyond this share is kept whole (the weight gradients of an LSTM, 24 steps:
# 0.87 of the time at 10%, 1.07 at a quarter, 1.13 at half).
SLICE_CARRY_BELOW = 0.2
# A jit of fewer equations is written out: calling it costs more to trace than it repeats.
MAX_INLINE = 16


def _paired(demands: Demands, blocks: list[list[Any]]) -> list[Blocks]:
  return [list(zip(d, b, strict=True)) for d, b in zip(demands, blocks, strict=True)]


def call(eqn: Equation, outs: Demands, planner: Planner) -> Step:
  """A jaxpr evaluated once: written out if it is short, else a jit of its own.

  Equal layers, sliced alike, share a plan and so are traced and compiled once.
  """
  jaxpr, consts = opened(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")))
  plan = planner(jaxpr, outs)

  def sliced(operands: list[list[Any]], picks: Picks) -> list[list[Any]]:
    return plan.emit(consts, _paired(plan.ins, operands), picks)

  sliced.__name__ = eqn.params.get("name", eqn.primitive.name)
  if len(plan.steps) > MAX_INLINE:
    if plan.compiled is None or consts:  # a shared jaxpr may close over other constants
      plan.compiled = jax.jit(sliced, inline=bool(eqn.params.get("inline")))
    emit = plan.compiled
  else:
    emit = sliced
  return Step(eqn, plan.ins, lambda ops, picks: _paired(outs, emit(ops, picks)), plans=[plan])


def jit(eqn: Equation, outs: Demands, planner: Planner) -> Step:
  """A call; arguments and results laid out by hand keep their layout where they are whole."""
  step = call(eqn, outs, planner)
  layouts = [list(eqn.params.get(name, ())) for name in ("in_shardings", "out_shardings")]
  if not any(isinstance(s, jax.sharding.Sharding) for side in layouts for s in side):
    return step
  inner = step.run

  def run(operands: list[list[Any]], picks: Picks) -> list[Blocks]:
    read = _paired(tuple(step.ins), operands)
    placed = [[x for _, x in _placed(b, s)] for b, s in zip(read, layouts[0], strict=True)]
    return [_placed(b, s) for b, s in zip(inner(placed, picks), layouts[1], strict=True)]

  return step._replace(run=run)


def _placed(blocks: Blocks, sharding: Any) -> Blocks:
  """Constrain a whole value; a part of one is left to the compiler."""
  if not isinstance(sharding, jax.sharding.Sharding):
    return blocks
  place = lax.with_sharding_constraint
  return [(r, place(x, sharding) if r.is_full else x) for r, x in blocks]


def remat(eqn: Equation, outs: Demands, planner: Planner) -> Step:
  """A checkpointed block, recomputed in the backward pass behind the barrier JAX puts there."""
  step = call(eqn, outs, planner)
  prevent = eqn.params.get("prevent_cse")
  prevent = any(prevent) if isinstance(prevent, (tuple, list)) else bool(prevent)
  if not (eqn.params.get("differentiated") and prevent):
    return step
  inner = step.run
  return step._replace(run=lambda ops, picks: inner(_held_back(ops), picks))


def _held_back(operands: list[list[Any]]) -> list[list[Any]]:
  """Operands behind a barrier; those that vary over other axes of a shard_map have their own.

  In JAX 0.10 a barrier makes all it holds vary over every axis that any of them does.
  """
  flat, treedef = jax.tree.flatten(operands)
  varies = [getattr(jax.typeof(x), "mat", None) for x in flat]
  out = list(flat)
  for axes in dict.fromkeys(varies):
    members = [k for k, a in enumerate(varies) if a == axes]
    for k, x in zip(members, lax.optimization_barrier([flat[k] for k in members]), strict=True):
      out[k] = x
  return treedef.unflatten(out)


def cond(eqn: Equation, outs: Demands, planner: Planner) -> Step | None:
  """Every branch computes the same regions; an operand is read as any branch needs it.

  None for branches of which each is for a platform, and may not exist on another.
  """
  if eqn.params.get("branches_platforms") is not None:
    return None
  branches = [opened(b) for b in eqn.params["branches"]]
  plans = [planner(jaxpr, outs) for jaxpr, _ in branches]
  reads: list[Demand] = []
  for k, v in enumerate(eqn.invars[1:]):
    reads.append(rg.join_all((r for p in plans for r in p.ins[k]), shape_of(v)))

  def run(operands: list[list[Any]], picks: Picks) -> list[Blocks]:
    def branch(plan: Any, consts: Any) -> Callable[..., Any]:
      return lambda operands: plan.emit(consts, _paired(tuple(reads), operands), picks)

    functions = [branch(p, consts) for p, (_, consts) in zip(plans, branches, strict=True)]
    return _paired(outs, lax.switch(operands[0][0], functions, operands[1:]))

  return Step(eqn, [whole(eqn.invars[0]), *reads], run, plans=plans)


def _grow(carry: Demands, more: Demands, shapes: list[tuple[int, ...]]) -> Demands:
  pairs = zip(carry, more, shapes, strict=True)
  return tuple(rg.one((*old, *new), shape) for old, new, shape in pairs)


def _widened(carry: Demands, shapes: list[tuple[int, ...]]) -> Demands:
  """Carries of which much is wanted, whole: a loop gathers their operands at every turn."""

  def widened(demand: Demand, shape: tuple[int, ...]) -> Demand:
    regions = all(isinstance(r, Region) for r in demand)
    much = regions and rg.share(demand, shape) > SLICE_CARRY_BELOW
    return (full(len(shape)),) if much else demand

  return tuple(map(widened, carry, shapes))


def scan(eqn: Equation, outs: Demands, planner: Planner) -> Step:
  """Stacked outputs are wanted alike in every iteration; unwanted carries are dropped."""
  p = eqn.params
  jaxpr, consts = opened(p["jaxpr"])
  first, n_carry = scan_parts(eqn, jaxpr)
  split = first + n_carry
  shapes = [shape_of(v) for v in jaxpr.invars]
  carry = _widened(tuple(map(rg.one, outs[:n_carry], shapes[first:split])), shapes[first:split])
  stacked_shapes = [shape_of(v) for v in eqn.outvars[n_carry:]]
  wanted = [
    rg.without_picks(d, len(s)) for d, s in zip(outs[n_carry:], stacked_shapes, strict=True)
  ]
  turns = None if any(outs[:n_carry]) or has_side_effects(eqn) else _turns(eqn, wanted)
  stacked = tuple(
    rg.join_all((Region(r[1:]) for r in d), s[1:])
    for d, s in zip(wanted, stacked_shapes, strict=True)
  )
  while True:
    plan = planner(jaxpr, carry + stacked)
    grown = _grow(carry, plan.ins[first:split], shapes[first:split])
    grown = _widened(grown, shapes[first:split])
    if grown == carry:
      break
    carry = grown
  inner = [
    rg.without_picks(d, len(s)) for d, s in zip(plan.ins[split:], shapes[split:], strict=True)
  ]
  reads = plan.ins[:first] + carry + tuple(inner)
  rows, got = ([tuple(Region((turns, *r)) for r in d) for d in ds] for ds in (inner, stacked))

  def run(operands: list[list[Any]], picks: Picks) -> list[Blocks]:
    constants = operands[:first]

    def body(state: Any, xs: Any) -> Any:
      blocks = plan.emit(consts, _paired(reads, [*constants, *state, *xs]), picks)
      return blocks[:n_carry], blocks[n_carry:]

    final, ys = lax.scan(
      body, operands[first:split], operands[split:], ix.count(turns, p["length"]), p["reverse"],
      p["unroll"], _split_transpose=p.get("_split_transpose", False),
    )  # fmt: skip
    return _paired((*carry, *got), [*final, *ys])

  stopped = GATHERED if wanted != list(outs[n_carry:]) else None
  return Step(eqn, [*plan.ins[:first], *carry, *rows], run, stopped, [plan])


def _turns(eqn: Equation, stacked: Sequence[Demand]) -> Index:
  """The iterations up to the last that a stacked output wants: the lowest layer that trains."""
  length = eqn.params["length"]
  used: Index = range(0)
  for r in itertools.chain(*stacked):
    used = ix.union(used, r[0], length)
  if used is None or not len(used):
    return None
  ends = ix.positions(used, length)
  kept = range(int(ends[0]), length) if eqn.params["reverse"] else range(int(ends[-1]) + 1)
  return ix.canonical(kept, length)


def while_(eqn: Equation, outs: Demands, planner: Planner) -> Step:
  """The carry holds what the condition reads, what is wanted at the end and what that needs."""
  p = eqn.params
  test, test_consts = opened(p["cond_jaxpr"])
  body, body_consts = opened(p["body_jaxpr"])
  n_test, n_body = p["cond_nconsts"], p["body_nconsts"]
  shapes = [shape_of(v) for v in body.invars[n_body:]]
  test_plan = planner(test, ((full(0),),))
  carry = _grow(outs, test_plan.ins[n_test:], shapes)
  while True:
    plan = planner(body, carry)
    grown = _grow(carry, plan.ins[n_body:], shapes)
    if grown == carry:
      break
    carry = grown
  reads, test_reads = plan.ins[:n_body] + carry, test_plan.ins[:n_test] + carry

  def run(operands: list[list[Any]], picks: Picks) -> list[Blocks]:
    of_test, of_body = operands[:n_test], operands[n_test : n_test + n_body]

    def go_on(state: Any) -> Any:
      return test_plan.emit(test_consts, _paired(test_reads, [*of_test, *state]), picks)[0][0]

    def advance(state: Any) -> Any:
      return plan.emit(body_consts, _paired(reads, [*of_body, *state]), picks)

    final = lax.while_loop(go_on, advance, operands[n_test + n_body :])
    return _paired(carry, final)

  ins = [*test_plan.ins[:n_test], *plan.ins[:n_body], *carry]
  return Step(eqn, ins, run, plans=[test_plan, plan])


CALLS: dict[str, CallRule] = {
  "jit": jit,
  "pjit": jit,
  "closed_call": call,
  "core_call": call,
  "call": call,
  "checkpoint": remat,
  "remat2": remat,
  "remat": remat,
  "cond": cond,
  "scan": scan,
  "shard_map": shard_map,
  "while": while_,
}
