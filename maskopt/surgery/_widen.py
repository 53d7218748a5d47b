"""Arrays with more units along their axes: one layer's after the other's, copies last."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .._complaints import Complaint
from . import _initial, _placement, _units
from ._model import Model
from ._placement import Placement
from ._reach import Reach
from ._refusals import Refusals, refuse
from ._start import Axis
from ._units import GrownAxis, Labels


@dataclasses.dataclass(frozen=True)
class Part:
  """How the units of one layer grow along an axis, as the parts before leave it."""

  reach: Reach
  grown: GrownAxis
  reads: bool

  @property
  def copies(self) -> bool:
    """Whether new positions are copies of old ones."""
    return self.reach.mode == "copy"

  @property
  def silent(self) -> bool:
    """Whether weights from the new units to old ones are zero."""
    return self.reads and self.reach.mode in ("zero", "progressive")


Parts = tuple[Part, ...]


def axes(reaches: Iterable[Reach], refusals: Refusals) -> dict[Axis, Parts]:
  """The axes that grow, and by what.

  Args:
    reaches: of all layers.
    refusals: takes the axes on which units stand apart.
  """
  found: dict[Axis, Parts] = {}
  # Copies come last, so that they are copies of what the others add, too.
  for reach in sorted(reaches, key=lambda r: r.mode == "copy"):
    for axis, labels in reach.axes.items():
      part = refusals.tried(_part, reach, axis, labels, found.get(axis, ()))
      if part is not None:
        found[axis] = (*found.get(axis, ()), part)
  return found


def _part(reach: Reach, axis: Axis, labels: Labels, before: Parts) -> Part:
  for part in before:
    labels = part.grown.spread(labels, _units.NONE)
  try:
    grown = _units.grown(labels, reach.units, reach.copied)
  except Complaint as complaint:
    c = complaint
  else:
    return Part(reach, grown, axis in reach.readers)
  refuse(axis[0], c.expected, c.got, f"Name the consumers of {reach.layer}: consumers=[...].")


def outputs(reaches: Sequence[Reach], refusals: Refusals) -> list[dict[int, np.ndarray]] | None:
  """For each output and axis that grows, where the old entries stand; None if nobody traced."""
  count = max((len(r.outputs) for r in reaches), default=0)
  named = [
    dataclasses.replace(
      r, axes={(str(n), k): x for n, out in enumerate(r.outputs) for k, x in out.items()}
    )
    for r in reaches
  ]
  found = {axis: kept(parts) for axis, parts in axes(named, refusals).items()}
  kept_of = [{k: x for (path, k), x in found.items() if path == str(n)} for n in range(count)]
  return kept_of or None


def kept(parts: Parts) -> np.ndarray:
  """Where the old positions stand in the end."""
  places = np.arange(parts[0].grown.before)
  for part in parts:
    places = part.grown.kept[places]
  return places


def _new(parts: Parts, which: Callable[[Part], bool]) -> np.ndarray:
  """The positions that chosen parts have added, on the axis as the parts leave it."""
  flags = np.zeros(parts[0].grown.before, bool)
  for part in parts:
    flags = part.grown.spread(flags, which(part))
  return flags


def arrays(
  old: Model, found: Mapping[Axis, Parts], init: Any, key: Any, where: str
) -> tuple[dict[str, Any], dict[str, Placement]]:
  """The grown arrays, and for each parameter where its old elements stand."""
  new: dict[str, Any] = {}
  placements: dict[str, Placement] = {}
  for path, leaf in old.arrays.items():
    own = {k: parts for (p, k), parts in found.items() if p == path}
    if path in old.params:
      placements[old.inside(path)] = _placed(old.inside(path), len(np.shape(leaf)), own)
    if own:
      values = _widened(path, _placement.host(leaf), own, init, key, where)
      new[path] = _placement.like(values, leaf)
  return new, placements


def _placed(path: str, rank: int, own: Mapping[int, Parts]) -> Placement:
  """Where a leaf's old elements stand, and which new ones hold still: zeros to old units."""
  places = [kept(own[k]) if k in own else None for k in range(rank)]
  still = {
    k: np.flatnonzero(_new(parts, lambda p: p.reads and p.reach.mode == "progressive"))
    for k, parts in own.items()
  }
  if not any(len(x) for x in still.values()):
    return Placement(path, tuple(places))
  return Placement(path, tuple(places), still=tuple(still.get(k) for k in range(rank)))


def _widened(
  path: str, values: np.ndarray, own: Mapping[int, Parts], init: Any, key: Any, where: str
) -> np.ndarray:
  first = {k: tuple(p for p in parts if not p.copies) for k, parts in own.items()}
  first = {k: parts for k, parts in first.items() if parts}
  if first:
    shape = tuple(first[k][-1].grown.size if k in first else n for k, n in enumerate(values.shape))
    new = _initial.fresh(path, shape, values.dtype, key, init, where)
    to_old = _along(shape, first, lambda p: p.silent) & ~_along(shape, first, lambda p: not p.reads)
    new = np.where(to_old, np.zeros_like(new), new)
    places = tuple(kept(first[k]) if k in first else None for k in range(len(shape)))
    values = Placement(path, places).into(new, values)
  for axis, parts in own.items():
    for part in parts:
      values = _copied(values, axis, part) if part.copies else values
  return values


def _along(
  shape: tuple[int, ...], own: Mapping[int, Parts], which: Callable[[Part], bool]
) -> np.ndarray:
  """The elements that chosen parts have added, along any axis."""
  found = np.zeros((1,) * len(shape), bool)
  for k, parts in own.items():
    found = found | _new(parts, which).reshape([-1 if d == k else 1 for d in range(len(shape))])
  return found


def _copied(values: np.ndarray, axis: int, part: Part) -> np.ndarray:
  """Each new position copies its source; what reads a unit and its copies is spread over them."""
  values = values.take(part.grown.source, axis)
  if not part.reads:
    return values
  share = part.grown.share.reshape([-1 if k == axis else 1 for k in range(values.ndim)])
  exact = np.float64 if values.dtype.itemsize > 4 else np.float32
  parts = (values.astype(exact) / share.astype(exact)).astype(values.dtype)
  return np.where(share == 1, values, parts)
