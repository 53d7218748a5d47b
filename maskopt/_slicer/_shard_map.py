"""Slicing inside `jax.shard_map`, along the dimensions that no manual axis shards.

Single elements are picked inside of what no axis shards: their positions are the same there.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec

from . import _region as rg
from ._region import Demand, Pick, Region, Wanted
from ._rule import Blocks, Equation, Picks, Step, opened, shape_of
from ._sampled import GATHERED


def _unsharded(r: Region, spec: Any) -> Region:
  """The region with sharded dimensions whole; it means the same on a shard and on the array."""
  sharded = [s is not None for s in spec] + [False] * (len(r) - len(spec))
  return Region(None if s else d for d, s in zip(r, sharded, strict=True))


def _is_sharded(spec: Any) -> bool:
  return any(s is not None for s in spec)


def _round(demand: Demand, spec: Any, shape: tuple[int, ...]) -> Demand:
  if _is_sharded(spec):
    demand = rg.without_picks(demand, len(shape))
  whole = (r if isinstance(r, Pick) else _unsharded(r, spec) for r in demand)
  return rg.join_all(whole, shape)


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
  ins = [_spec(r, s) for s, d in zip(p["in_specs"], reads, strict=True) for r in d]
  results = [_spec(r, s) for s, d in zip(p["out_specs"], got, strict=True) for r in d]
  stopped = GATHERED if any(map(_has_picks, outs)) and not any(map(_has_picks, got)) else None

  def body(picks: dict[int, Any], *flat: Any) -> list[Any]:
    blocks = iter(flat)
    values = [[(r, next(blocks)) for r in d] for d in reads]
    return [x for out in plan.emit(consts, values, picks) for x in out]

  mapped = jax.shard_map(
    body, mesh=p["mesh"], in_specs=(PartitionSpec(), *ins), out_specs=results,
    axis_names=axes, check_vma=p["check_vma"],
  )  # fmt: skip

  def run(operands: list[list[Any]], picks: Picks) -> list[Blocks]:
    used = {r.key: picks[r.key] for d in got for r in d if isinstance(r, Pick)}
    flat = iter(mapped(used, *[x for blocks in operands for x in blocks]))
    return [[(r, next(flat)) for r in d] for d in got]

  return Step(eqn, reads, run, stopped, [plan])


def _spec(wanted: Wanted, spec: Any) -> Any:
  return PartitionSpec() if isinstance(wanted, Pick) else spec


def _has_picks(demand: Demand) -> bool:
  return any(isinstance(r, Pick) for r in demand)
