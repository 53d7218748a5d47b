"""Rules for equations with several outputs that are not calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from jax import lax

from . import _index as ix, _region as rg
from ._region import Demand, Region
from ._rule import Blocks, Equation, Picks, Step, bind, shape_of

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


def unstack(eqn: Equation, outs: tuple[Demand, ...]) -> Step:
  """Every output is a region of the operand, without the dimension that it was cut along."""
  axis = eqn.params["axis"]
  read = [Region((*r[:axis], range(k, k + 1), *r[axis:])) for k, d in enumerate(outs) for r in d]
  shape = shape_of(eqn.invars[0])
  read = [Region(map(ix.canonical, r, shape)) for r in read]

  def run(operands: list[list[Any]], picks: Picks) -> list[Blocks]:
    del picks
    blocks = iter(operands[0])
    return [[(r, lax.squeeze(next(blocks), (axis,))) for r in regions] for regions in outs]

  return Step(eqn, [tuple(read)], run)


def ordered(axis_of: Callable[[Equation], int]) -> MultiRule:
  """Sorted along one axis, several operands together or values with their places: others pass."""

  def rule(eqn: Equation, outs: tuple[Demand, ...]) -> Step | None:
    axis, shape = axis_of(eqn), shape_of(eqn.outvars[0])
    wide = (
      Region(None if k == axis else d for k, d in enumerate(r)) for regions in outs for r in regions
    )
    got = rg.one(wide, shape)[0]
    if got.is_full:
      return None

    def run(operands: list[list[Any]], picks: Picks) -> list[Blocks]:
      del picks
      results = bind(eqn, *[blocks[0] for blocks in operands])
      return [[(got, x)] for x in results]

    return Step(eqn, [(got,)] * len(eqn.invars), run)

  return rule


def _top_axis(eqn: Equation) -> int:
  rank = len(shape_of(eqn.outvars[0]))
  return eqn.params.get("axis", -1) % rank


MULTI: dict[str, MultiRule] = {
  "optimization_barrier": optimization_barrier,
  "split": split,
  "unstack": unstack,
  "sort": ordered(lambda eqn: eqn.params["dimension"]),
  "top_k": ordered(_top_axis),
}
for _name in ("psum", "psum_invariant", "psum2", "pmax", "pmin", "ppermute", "pvary", "pbroadcast",
              "pcast"):  # fmt: skip
  MULTI[_name] = collective
