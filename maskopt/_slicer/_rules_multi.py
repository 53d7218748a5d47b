"""Rules for equations with several outputs that are not calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from jax import lax

from . import _index as ix, _region as rg
from ._region import Demand, Region
from ._rule import Blocks, Equation, Picks, Step, bind, rebind, shape_of

MultiRule: TypeAlias = Callable[[Equation, tuple[Demand, ...]], Step | None]


def optimization_barrier(eqn: Equation, outs: tuple[Demand, ...]) -> Step:
  """out[r] = barrier(in)[r]: what is wanted passes, and stands behind the barrier together."""

  def run(operands: list[list[Any]], picks: Picks) -> list[Blocks]:
    del picks
    blocks = lax.optimization_barrier(operands)
    return [list(zip(d, b, strict=True)) for d, b in zip(outs, blocks, strict=True)]

  return Step(eqn, outs, run)


def split(eqn: Equation, outs: tuple[Demand, ...]) -> Step:
  """Every part is a region of the operand: nothing is left to compute."""
  axis, low = eqn.params["axis"], 0
  size = shape_of(eqn.invars[0])[axis]
  read: list[Region] = []
  for n, regions in zip(eqn.params["sizes"], outs, strict=True):
    for r in regions:
      part = ix.canonical(ix.moved(r[axis], int(n), 1, low), size)
      read.append(Region(part if d == axis else other for d, other in enumerate(r)))
    low += int(n)

  def run(operands: list[list[Any]], picks: Picks) -> list[Blocks]:
    del picks
    blocks = iter(operands[0])
    return [[(r, next(blocks)) for r in regions] for regions in outs]

  return Step(eqn, [tuple(read)], run)


def collective(eqn: Equation, outs: tuple[Demand, ...]) -> Step | None:
  """Psum and its kin work element by element on every operand: less is sent."""
  axes = eqn.params.get("axes", eqn.params.get("axis_name", ()))
  axes = axes if isinstance(axes, tuple) else (axes,)
  if any(isinstance(a, int) for a in axes):  # a positional axis is a reduction
    return None

  def run(operands: list[list[Any]], picks: Picks) -> list[Blocks]:
    del picks
    if not eqn.primitive.multiple_results:
      return [[(r, bind(eqn, x)) for r, x in zip(outs[0], operands[0], strict=True)]]
    flat = iter(bind(eqn, *[x for blocks in operands for x in blocks]))
    return [[(r, next(flat)) for r in regions] for regions in outs]

  return Step(eqn, outs, run)


def batched(core_ranks: Callable[[Equation], list[int]]) -> MultiRule:
  """Outputs share leading dimensions with the operands; the last `core_ranks` are mixed."""

  def rule(eqn: Equation, outs: tuple[Demand, ...]) -> Step | None:
    ranks = core_ranks(eqn)
    lead = len(shape_of(eqn.outvars[0])) - ranks[0]
    batch = rg.one(
      (Region(r[:lead]) for regions in outs for r in regions), shape_of(eqn.outvars[0])[:lead]
    )[0]
    if batch.is_full:
      return None
    ins = [(Region([*batch, *[None] * (len(shape_of(v)) - lead)]),) for v in eqn.invars]
    gots = [Region([*batch, *[None] * n]) for n in ranks]
    emit = rebind(eqn)

    def run(operands: list[list[Any]], picks: Picks) -> list[Blocks]:
      del picks
      results = emit(*[blocks[0] for blocks in operands])
      return [[(got, x)] for got, x in zip(gots, results, strict=True)]

    return Step(eqn, ins, run)

  return rule


def sort(eqn: Equation, outs: tuple[Demand, ...]) -> Step | None:
  """Several operands sorted together: dimensions other than the sorted one pass."""
  shape, dim = shape_of(eqn.outvars[0]), eqn.params["dimension"]
  wide = (
    Region(None if k == dim else d for k, d in enumerate(r)) for regions in outs for r in regions
  )
  got = rg.one(wide, shape)[0]
  if got.is_full:
    return None

  def run(operands: list[list[Any]], picks: Picks) -> list[Blocks]:
    del picks
    results = bind(eqn, *[blocks[0] for blocks in operands])
    return [[(got, x)] for x in results]

  return Step(eqn, [(got,)] * len(eqn.invars), run)


MULTI: dict[str, MultiRule] = {
  "optimization_barrier": optimization_barrier,
  "split": split,
  "sort": sort,
  "top_k": batched(lambda eqn: [1, 1]),
}
for _name in ("psum", "psum_invariant", "psum2", "pmax", "pmin", "ppermute", "pvary", "pbroadcast",
              "pcast"):  # fmt: skip
  MULTI[_name] = collective
