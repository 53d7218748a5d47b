"""Everything that the new units of each layer reach: axes that grow, what reads them, outputs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .._complaints import Complaint
from .._errors import Problem
from . import _model, _start, _trace, _units
from ._model import Model
from ._network import Network, Value
from ._refusals import Refusal, Refusals, refuse
from ._request import Mode, Request
from ._start import Axis
from ._units import Labels


@dataclasses.dataclass(frozen=True, eq=False)
class Reach:
  """What one layer's units reach.

  Attributes:
    layer: its path.
    mode: how new weights start.
    units: how many units there are.
    copied: for each new unit the old one that it copies in mode "copy".
    axes: the axes of arrays along which the units stand.
    readers: those of them that read the units.
    outputs: for each output of the forward, its axes along which the units stand; empty where the
      caller named the consumers.
  """

  layer: str
  mode: Mode
  units: int
  copied: np.ndarray
  axes: Mapping[Axis, Labels]
  readers: frozenset[Axis]
  outputs: Sequence[Mapping[int, Labels]]

  @property
  def more(self) -> int:
    """How many units are new."""
    return len(self.copied)


def reached(
  old: Model, requests: Sequence[Request], forward: Callable | None, inputs: Any, key: Any
) -> tuple[list[Reach], Refusals]:
  """Follow the units of every layer; return what they reach, and what is wrong.

  Layers whose units are the same ones, as those that write to one residual stream, come once.

  Args:
    old: the model as it is.
    requests: what grows.
    forward: of the old model, if anyone knows it.
    inputs: of the forward.
    key: says which units mode "copy" copies; None for the first ones.
  """
  refusals = Refusals()
  traced = None
  if forward is not None and inputs is not None and any(r.consumers is None for r in requests):
    traced = functools.cache(lambda: _Traced(old, forward, inputs))
  found = [refusals.tried(_reach, old, r, traced, forward is None, key) for r in requests]
  reaches = [reach for reach in found if reach is not None]
  distinct: list[Reach] = []
  for reach in reaches:
    same = next((k for k, other in enumerate(distinct) if _is_same(other, reach)), None)
    if same is None:
      distinct.append(reach)
    else:
      refusals.tried(_check_same, distinct[same], reach)
      both = f"{distinct[same].layer} and {reach.layer}"
      distinct[same] = dataclasses.replace(distinct[same], layer=both)
  for a, b in itertools.combinations(distinct, 2):
    refusals.tried(_check_apart, a, b)
  for reach in _unheard(distinct):
    refusals.tried(_refuse_unheard, reach)
  return distinct, refusals


def _reach(
  old: Model, request: Request, traced: Callable | None, is_unknown: bool, key: Any
) -> Reach:
  layer = request.layer
  at = _start.axis_of(old, layer, request.axis)
  labels, units = _start.start(old, at, request.of, request.parts)
  outputs: Sequence[Mapping[int, Labels]] = ()
  if request.consumers is not None:
    axes, readers = _start.named(old, layer, at, labels, request.consumers)
  elif traced is None:
    missing = "forward= and inputs=" if is_unknown else "inputs="
    expected = f"consumers, or {missing} to find them by tracing"
    remedy = "Give example inputs, or consumers=[layers that read the units]."
    refuse(layer, expected, "neither", remedy)
  else:
    axes, readers, outputs = traced().follow(layer, at, labels, units)
  order = np.arange(units)
  if request.mode == "copy" and key is not None:
    order = np.asarray(jax.random.permutation(key, units))
  copied = np.resize(order, request.more)
  return Reach(layer, request.mode, units, copied, axes, frozenset(readers), outputs)


class _Traced:
  """The old forward as a network of axes."""

  def __init__(self, old: Model, forward: Callable, inputs: Any) -> None:
    arrays, fill = _model.split_inputs(inputs)

    # Numbers and flags that stand in a tree without an array are the program's own.
    held = {p: x for p, x in old.arrays.items() if hasattr(x, "shape")}

    def run(leaves: Any, given: Any) -> Any:
      known = {**old.arrays, **dict(zip(held, leaves, strict=True))}
      return old.called(forward, list(known.values()), fill(given))

    closed, shapes = jax.make_jaxpr(run, return_shape=True)(list(held.values()), arrays)
    self._leaves = {p: Value(tuple(np.shape(x)), is_weight=True) for p, x in held.items()}
    given = [Value(tuple(x.shape), f"input {k}") for k, x in enumerate(arrays)]
    self._network, results = _trace.network_of(closed, [*self._leaves.values(), *given])
    for value in given:
      self._network.block(value, range(len(value.shape)), f"{value.name} of the forward")
    self._outputs = results[: len(jax.tree.leaves(shapes[0]))]

  def follow(
    self, layer: str, at: Axis, labels: Labels, units: int
  ) -> tuple[dict[Axis, Labels], set[Axis], list[dict[int, Labels]]]:
    """Grown axes, those that read units, and the outputs'."""
    network: Network = self._network
    start = self._leaves[at[0]]
    if not network.reads(start):
      remedy = "Give another forward, or consumers=."
      refuse(layer, "a layer that the forward uses", "one that it does not", remedy)
    try:
      found = network.follow({(start, at[1]): labels}, units)
    except Complaint as complaint:
      raise Refusal([Problem(layer, complaint.expected, complaint.got)], complaint.remedy) from None
    paths = {v: p for p, v in self._leaves.items()}
    readers = network.outgoing(found, paths)
    axes = {(paths[v], k): label for (v, k), label in found.items() if v in paths}
    outputs = [{k: x for (v, k), x in found.items() if v is out} for out in self._outputs]
    return axes, {r for r in readers if r in axes}, outputs


def _is_same(a: Reach, b: Reach) -> bool:
  """Whether two layers have the very same units, so that one cannot grow without the other."""
  return a.axes.keys() == b.axes.keys() and all(
    np.array_equal(labels, b.axes[axis]) for axis, labels in a.axes.items()
  )


def _check_same(a: Reach, b: Reach) -> None:
  if a.more != b.more:
    got = f"{a.more} for {a.layer} and {b.more} for {b.layer}"
    remedy = "Name one of the layers: the other grows with it."
    refuse(b.layer, f"the units of {a.layer}, to which they are added up", got, remedy)
  if a.mode != b.mode:
    expected = f"the mode of {a.layer}, which has the same units, {a.mode!r}"
    refuse(b.layer, expected, repr(b.mode), "Name one of the layers: the other grows with it.")


def _check_apart(a: Reach, b: Reach) -> None:
  """Raise where a position is of a unit of both layers."""
  both = [
    path
    for (path, axis), labels in a.axes.items()
    for other in _of(b, (path, axis))
    if np.any((labels != _units.NONE) & (other != _units.NONE))
  ]
  if both:
    got = f"ones within those of {a.layer}, at {', '.join(dict.fromkeys(both))}"
    remedy = "Grow one layer after the other: the second call takes the result of the first."
    refuse(b.layer, f"units beside those of {a.layer}", got, remedy)


def _unheard(reaches: Sequence[Reach]) -> list[Reach]:
  """Those whose new units no output depends on: the mask freezes zeros on every way there."""
  heard = [r for r in reaches if r.mode != "progressive" or not r.readers or any(r.outputs)]
  left = [r for r in reaches if r not in heard]
  while True:
    makes = {path for r in heard for (path, k) in r.axes if (path, k) not in r.readers}
    more = [r for r in left if any(path in makes for path, _ in r.readers)]
    if not more:
      return left
    heard += more
    left = [r for r in left if r not in more]


def _refuse_unheard(reach: Reach) -> None:
  readers = ", ".join(dict.fromkeys(path for path, _ in sorted(reach.readers)))
  expected = "new units further on that read the new ones, as far as an output"
  got = f'none: {readers} would read them, and mode="progressive" freezes those zeros'
  remedy = 'Grow a consumer in the same call, {layer: units, consumer: units}, or use mode="zero".'
  refuse(reach.layer, expected, got, remedy)


def _of(reach: Reach, axis: Axis) -> Iterator[Labels]:
  if axis in reach.axes:
    yield reach.axes[axis]
