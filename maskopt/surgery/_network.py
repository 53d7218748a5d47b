"""Where the units of a layer go: axes as nodes, and edges along which units keep their identity.

  labels[node'] = move(labels[node])        for every edge, in both directions

Following them from one axis of one kernel finds every axis that must grow with it: biases and
statistics, rows of consumers, other gates of a cell, whatever is added to the same stream.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .._complaints import Complaint
from . import _units
from ._units import Labels

_FOLLOW = "Name the consumers: consumers=[layers that read the units]."


@dataclasses.dataclass(eq=False)
class Value:
  """One array of the traced program.

  Attributes:
    shape: its shape.
    name: what errors call it; empty for what the program computes.
    is_weight: whether it follows from parameters and constants alone.
  """

  shape: tuple[int, ...]
  name: str = ""
  is_weight: bool = False


Node = tuple[Value, int]
Move = Callable[[Labels], Iterator[tuple[Node, Labels]]]


class Network:
  """The axes of a program, how units pass between them, and where they cannot pass."""

  def __init__(self) -> None:
    # What the program is doing where relations are being told; errors name it.
    self.place = ""
    self._moves: dict[Node, list[Move]] = {}
    self._blocks: dict[Node, str] = {}
    self._flows: list[tuple[Node, Node]] = []
    self._contractions: list[tuple[Node, Node]] = []
    self._units = 0

  def move(self, node: Node, move: Move) -> None:
    self._moves.setdefault(node, []).append(move)

  def flow(self, source: Node, target: Node) -> None:
    """Note that an axis of a result comes from an axis of an operand."""
    self._flows.append((source, target))

  def same(self, a: Node, b: Node) -> None:
    """Two axes with the same units at the same positions, of which `b` is the later one."""
    self.move(a, lambda labels: iter([(b, labels)]))
    self.move(b, lambda labels: iter([(a, labels)]))
    self.flow(a, b)

  def window(self, whole: Node, part: Node, start: int) -> None:
    """The axis `part` is `whole[start : start + n]`."""
    n, size = part[0].shape[part[1]], whole[0].shape[whole[1]]

    def inwards(labels: Labels) -> Iterator[tuple[Node, Labels]]:
      yield part, _units.whole_runs(labels[start : start + n], self._units)

    def outwards(labels: Labels) -> Iterator[tuple[Node, Labels]]:
      wide = np.full(size, _units.NONE)
      wide[start : start + n] = labels
      yield whole, wide

    self.move(whole, inwards)
    self.move(part, outwards)

  def block(self, value: Value, axes: Sequence[int], reason: str) -> None:
    """Say that no unit may be added along these axes."""
    for axis in axes:
      self._blocks.setdefault((value, axis), reason + self.place)

  def contract(self, a: Node, b: Node) -> None:
    """Two axes whose products are summed up."""
    self.move(a, lambda labels: iter([(b, labels)]))
    self.move(b, lambda labels: iter([(a, labels)]))
    self._contractions.append((a, b))

  def reshape(self, source: Value, target: Value) -> None:
    """Axes merged and split in groups of equal size."""
    for ins, outs in _groups(source.shape, target.shape):
      if len(ins) == len(outs) == 1:
        self.same((source, ins[0]), (target, outs[0]))
        continue
      for one, here, other, there in ((source, ins, target, outs), (target, outs, source, ins)):
        for place, axis in enumerate(here):
          self.move((one, axis), _regrouped(one, here, place, other, there, self.place))
      for a in ins:
        for b in outs:
          self.flow((source, a), (target, b))

  def follow(self, start: dict[Node, Labels], units: int) -> dict[Node, Labels]:
    """Return the labels of every axis that the units reach.

    Raises:
      Complaint: units reach an axis that cannot grow, or arrive in two orders.
    """
    self._units = units
    found: dict[Node, Labels] = {}
    waiting = list(start.items())
    while waiting:
      node, labels = waiting.pop()
      known = found.get(node)
      merged = _units.joined(known, labels)
      if (merged == _units.NONE).all() or (known is not None and np.array_equal(known, merged)):
        continue
      if node in self._blocks:
        value, axis = node
        got = f"{self._blocks[node]}, along axis {axis} of shape {value.shape}"
        raise Complaint("consumers that the trace can follow", got, _FOLLOW)
      found[node] = merged
      for move in self._moves.get(node, ()):
        waiting += move(merged)
    return found

  def reads(self, value: Value) -> bool:
    """Whether the program does anything with a value."""
    return any(node[0] is value for node in (*self._moves, *self._blocks))

  def outgoing(self, found: dict[Node, Labels], leaves: dict[Value, str]) -> set[tuple[str, int]]:
    """The (path, axis) of parameters that read the units: contracted with what is computed."""
    origin: dict[Node, frozenset[tuple[str, int]]] = {
      (value, axis): frozenset([(path, axis)])
      for value, path in leaves.items()
      for axis in range(len(value.shape))
    }
    for source, target in self._flows:
      if target[0].is_weight and source in origin:
        origin[target] = origin.get(target, frozenset()) | origin[source]
    readers: set[tuple[str, int]] = set()
    for a, b in self._contractions:
      if a in found:
        reader = a if a[0].is_weight and not b[0].is_weight else b
        readers |= origin.get(reader, frozenset()) if reader[0].is_weight else set()
    return readers


def _regrouped(
  one: Value, here: Sequence[int], place: int, other: Value, there: Sequence[int], where: str
) -> Move:
  """The move of one axis of a group of axes to the group it is reshaped to."""

  def move(labels: Labels) -> Iterator[tuple[Node, Labels]]:
    flat = _units.flattened(labels, [one.shape[k] for k in here], place)
    axis, found = _units.split(flat, [other.shape[k] for k in there], where)
    yield (other, there[axis]), found

  return move


def _groups(a: Sequence[int], b: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
  """Smallest groups of neighbouring axes with equal products; axes of size 1 join a neighbour."""
  if not math.prod(a):
    return
  i = j = 0
  groups: list[tuple[list[int], list[int]]] = []
  while i < len(a) and j < len(b):
    ins, outs = [i], [j]
    m, n = a[i], b[j]
    i, j = i + 1, j + 1
    while m != n:
      if m < n:
        m, ins, i = m * a[i], [*ins, i], i + 1
      else:
        n, outs, j = n * b[j], [*outs, j], j + 1
    groups.append((ins, outs))
  if groups:
    groups[-1][0].extend(range(i, len(a)))
    groups[-1][1].extend(range(j, len(b)))
  yield from groups
