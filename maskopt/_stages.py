"""Which layers train when: the orders of ULMFiT, FreezeOut, BAdam and LISA."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _layers, _tree
from ._complaints import Complaint
from ._errors import Problem, describe, fail, show

# A random order is drawn ahead, for this many rounds over all blocks, and then begins again.
ROUNDS = 64


@dataclasses.dataclass(frozen=True)
class Stages:
  """Masks and the steps at which they begin.

  Attributes:
    masks: one function of the parameters for each stage.
    starts: the first step of each.
    period: after how many steps they begin again; None if they do not.
    ends: for each layer the step at which it freezes, if that is what the stages are made of.
  """

  masks: list[Any]
  starts: list[int]
  period: int | None = None
  ends: list[float] | None = None


def names_of(layers: Any, where: str) -> list[str]:
  """The layers that hold parameters, in network order, from their names or from what has them."""
  if isinstance(layers, (list, tuple)) and layers and all(isinstance(n, str) for n in layers):
    return list(layers)
  if layers is None or isinstance(layers, (str, list, tuple)):
    problem = Problem("", "layers=, the parameters or the names of the layers", describe(layers))
    fail(where, [problem], 'Give layers=params, or layers=["embed", "block", "head"].')
  try:
    names = _layers.layer_paths(layers)
  except Complaint as complaint:
    fail(where, [Problem("", complaint.expected, complaint.got)], complaint.remedy)
  flat = _tree.flatten(layers)
  paths = [p for p, x in zip(flat.paths, flat.leaves, strict=True) if not _tree.is_hole(x)]
  used = {_layers.owner(names, path, layers) for path in paths}
  return [name for k, name in enumerate(names) if k in used]


def owners(names: Sequence[str], params: Any, where: str) -> dict[str, int]:
  """The number of each parameter's layer."""
  flat = _tree.flatten(params)
  paths = [p for p, x in zip(flat.paths, flat.leaves, strict=True) if not _tree.is_hole(x)]
  found = {path: _layers.owner(names, path, params) for path in paths}
  lost = [
    Problem(p, f"one of the layers {', '.join(names)}", "none") for p in paths if found[p] is None
  ]
  empty = [
    Problem(name, "a layer with parameters", "none")
    for k, name in enumerate(names)
    if k not in found.values()
  ]
  if lost or empty:
    fail(where, lost + empty, f"The parameters are {', '.join(map(show, paths[:12]))}.")
  return {path: k for path, k in found.items() if k is not None}


def training(names: Sequence[str], trains: frozenset[int], where: str) -> Any:
  """A freeze mask, as a function of the parameters, that trains some layers."""
  return functools.partial(_mask, tuple(names), trains, where)


def _mask(names: Sequence[str], trains: frozenset[int], where: str, params: Any) -> Any:
  of = owners(names, params, where)
  flat = _tree.flatten(params)
  return _tree.nested(flat.paths, [of[p] not in trains if p in of else None for p in flat.paths])


def top_first(names: Sequence[str], every: int, where: str) -> Stages:
  """The last layer, then one more below it every so many steps."""
  count = len(names)
  sets = [frozenset(range(count - 1 - k, count)) for k in range(count)]
  return Stages([training(names, s, where) for s in sets], [k * every for k in range(count)])


def freeze_out(names: Sequence[str], steps: int, t0: float, where: str) -> Stages:
  """All layers; then each freezes at its own time, the first ones first."""
  last = max(len(names) - 1, 1)
  ends = [steps * (t0 + (1 - t0) * i / last) ** 3 for i in range(len(names))]
  starts = sorted({0, *(int(np.ceil(end)) for end in ends[:-1])})
  sets = [frozenset(i for i, end in enumerate(ends) if end > start) for start in starts]
  return Stages([training(names, s, where) for s in sets], starts, ends=ends)


def rotate(
  names: Sequence[str],
  every: int,
  order: str,
  train: int,
  always: Sequence[int],
  seed: int,
  where: str,
) -> Stages:
  """Blocks of layers in turn, for ever."""
  count = len(names)
  wrong = [k for k in always if not -count <= k < count]
  if wrong:
    problem = Problem("", f"numbers of the {count} layers {', '.join(names)}", str(wrong))
    fail(where, [problem], "Count from 0, or from -1 for the last.")
  fixed = {k % count for k in always}
  rest = [k for k in range(count) if k not in fixed]
  if not 1 <= train <= len(rest):
    problem = Problem("", f"train= from 1 to {len(rest)}, the layers that take turns", str(train))
    fail(where, [problem], "Let fewer layers train always.")
  rng = np.random.default_rng(seed)
  rounds = [
    rng.permutation(rest) if order == "random" else rest[:: -1 if order == "down" else 1]
    for _ in range(ROUNDS if order == "random" else 1)
  ]
  sets = [
    frozenset(fixed | {int(k) for k in turn[i : i + train]})
    for turn in rounds
    for i in range(0, len(rest), train)
  ]
  made = {s: training(names, s, where) for s in sets}
  starts = [k * every for k in range(len(sets))]
  return Stages([made[s] for s in sets], starts, period=len(sets) * every)
