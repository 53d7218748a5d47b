"""Slicing inside `jax.shard_map`, along the dimensions that no manual axis shards."""

from __future__ import annotations

from typing import Any

import jax

from . import _region as rg
from ._region import Demand, Region
from ._rule import Blocks, Equation, Picks, Step, opened, shape_of


def _unsharded(r: Region, spec: Any) -> Region:
  """The region with sharded dimensions whole; it means the same on a shard and on the array."""
  sharded = [s is not None for s in spec] + [False] * (len(r) - len(spec))
  return Region(None if s else d for d, s in zip(r, sharded, strict=True))


def _round(demand: Demand, spec: Any, shape: tuple[int, ...]) -> Demand:
  return rg.join_all((_unsharded(r, spec) for r in demand), shape)


def shard_map(eqn: Equation, outs: tuple[Demand, ...], planner: Any) -> Step | None:
  """Every shard computes the same regions of its part, so collectives carry only those."""
  p = eqn.params
  axes = p.get("newly_manual_axes", p.get("manual_axes"))  # the name of JAX 0.9 and before is last
  if axes is None or not {"mesh", "in_specs", "out_specs", "check_vma", "jaxpr"} <= p.keys():
    return None
  jaxpr, consts = opened(p["jaxpr"])
  got = tuple(
    _round(d, spec, shape_of(v))
    for d, spec, v in zip(outs, p["out_specs"], eqn.outvars, strict=True)
  )
  plan = planner(jaxpr, got)
  reads = tuple(
    _round(d, spec, shape_of(v))
    for d, spec, v in zip(plan.ins, p["in_specs"], eqn.invars, strict=True)
  )
  ins = [s for s, d in zip(p["in_specs"], reads, strict=True) for _ in d]
  results = [s for s, d in zip(p["out_specs"], got, strict=True) for _ in d]

  def body(*flat: Any) -> list[Any]:
    blocks = iter(flat)
    values = [[(r, next(blocks)) for r in d] for d in reads]
    return [x for out in plan.emit(consts, values, ()) for x in out]

  mapped = jax.shard_map(
    body, mesh=p["mesh"], in_specs=tuple(ins), out_specs=results,
    axis_names=axes, check_vma=p["check_vma"],
  )  # fmt: skip

  def run(operands: list[list[Any]], picks: Picks) -> list[Blocks]:
    del picks  # positions in the whole array mean nothing on a shard
    flat = iter(mapped(*[x for blocks in operands for x in blocks]))
    return [[(r, next(flat)) for r in d] for d in got]

  return Step(eqn, reads, run, plans=[plan])
