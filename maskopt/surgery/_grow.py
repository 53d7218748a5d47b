"""More units in a layer, and more of everything that goes with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from .._complaints import Complaint
from .._errors import Problem, fail, show
from ..report._show import Shown, Table, shape as shown
from . import _initial, _model, _placement, _preserved, _start, _trace, _units
from ._model import Model
from ._network import Network, Node, Value
from ._placement import Placement
from ._result import State, Surgery, result
from ._start import Axis
from ._units import GrownAxis, Labels

_WHERE = "maskopt.surgery.grow(layer=...)"
Mode = Literal["zero", "init", "copy"]


@dataclasses.dataclass(frozen=True, repr=False)
class Growth(Shown):
  """What `grow` did; it prints itself.

  Attributes:
    layer: the layer that has more units.
    units: how many there were, and how many there are.
    leaves: (path, old shape, new shape, whether it makes or reads units) of each array that grew.
    difference: the largest change of an old output, relative to the largest output; None if nothing
      was computed. 0.0 says that every old output has its bits.
  """

  layer: str
  units: tuple[int, int]
  leaves: tuple[tuple[str, tuple[int, ...], tuple[int, ...], str], ...]
  difference: float | None

  def _table(self) -> Table:
    told = "not compared" if self.difference is None else f"changed by {self.difference:.2g}"
    told = "bit-equal" if self.difference == 0 else told
    return Table(
      f"{show(self.layer)} grew from {self.units[0]} to {self.units[1]} units; old outputs {told}",
      ("path", "before", "after", "units"),
      [(p, shown(a), shown(b), role) for p, a, b, role in self.leaves],
      [""] * len(self.leaves),
    )


def grow(
  model: Any,
  layer: str,
  units: int,
  *,
  inputs: Any = None,
  forward: Any = None,
  new_forward: Any = None,
  consumers: Sequence[Any] | None = None,
  mode: Mode = "zero",
  init: Any = None,
  key: Any = None,
  axis: int | None = None,
  of: int | None = None,
  parts: int = 1,
  opt_state: Any = None,
  tx: Any = None,
  to: Any = None,
) -> Surgery:
  """Add units to a layer, and whatever has to grow with them.

    old(x) = new(x)        for the old outputs, with mode "zero" or "copy"

  The forward is traced with the example inputs, and the units are followed through it: to the bias,
  statistics and scales beside them, the rows of the layers that read them (through flattening,
  pooling, concatenation, scans), the other gates of a cell, the projections of an attention, and
  every layer that writes to the same residual stream. Units are the last axis of a kernel, the
  hidden units of a recurrent cell, the heads of an attention, the tokens of an embedding. New ones
  come after the old; where several runs of units lie on one axis (gates side by side, pixels times
  channels), after each run.

  Args:
    model: an nnx module, linen variables or parameters, or any tree of parameters.
    layer: path of the layer, or of its kernel.
    units: how many to add.
    inputs: example inputs of the forward, a tuple where it takes several; arrays, or
      `jax.ShapeDtypeStruct`s, with which nothing is compared.
    forward: `f(model, *inputs)`; a linen module, or `functools.partial(module, train=False)`; by
      default an nnx module's own call. It should compute as in evaluation.
    new_forward: the forward of the grown model where `forward` knows the old size: the new linen
      module. Without it, a linen model's outputs are not compared.
    consumers: paths of the layers that read the units, or (path, axis) pairs, in place of a trace.
      Normalisations between them count as consumers too. None are needed for an output layer: [].
    mode: "zero": weights from the new units to old ones are zero. "copy": new units are copies of
      old ones, which share their outgoing weights (Net2Net). "init": everything new is initialised.
    init: initializer `(key, shape, dtype)` of new weights, or rules [(glob, initializer)]; by
      default variance 1 / fan-in.
    key: random key; by default `jax.random.key(0)`. In mode "copy" it also says which units are
      copied; by default the first ones.
    axis: the axis of the kernel, where it is another.
    of: how many units the axis holds, where each takes several positions (heads of a fused axis).
    parts: how many such groups of units lie side by side on the axis (3 for query, key, value).
    opt_state: an optimizer state over the old parameters, to be taken along.
    tx: its transform.
    to: the transform over the new parameters, or a function of the new freeze mask that returns it;
      by default `tx`.
  Returns:
    A `Surgery`: the new model, the mask "old frozen, new trainable", the state, and a `Growth`.
    Old weights keep their bits but for those that mode "copy" divides. Old outputs are bit-equal
    where sums have the same order; else they differ by rounding, as the `Growth` says.
  Raises:
    ValueError: no such layer; no units to add; consumers that cannot be followed; old outputs that
      change in mode "zero" or "copy" (a normalisation over the units); a state of other parameters.
  Example:
    >>> import jax.numpy as jnp, maskopt
    >>> params = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.ones((3, 1))}}
    >>> def forward(p, x):
    ...   return jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]
    >>> grown = maskopt.surgery.grow(params, "a", 2, inputs=jnp.ones((1, 2)), forward=forward)
    >>> grown.model["a"]["kernel"].shape, grown.model["b"]["kernel"].shape
    ((2, 5), (5, 1))
    >>> grown.freeze_mask["b"]["kernel"].ravel().tolist()
    [True, True, True, False, False]
  """
  _start.check_units(units, mode, _WHERE)
  _initial.check(init, _WHERE)
  state = State(opt_state, tx, to)
  state.check(_WHERE)
  old = Model(model)
  at = _start.axis_of(old, layer, axis, _WHERE)
  labels, before = _start.start(old, at, of, parts, _WHERE)
  forward = _model.forward_of(old, forward)
  outputs: list[dict[int, Labels]] | None = None
  if consumers is not None:
    found, readers = _start.named(old, layer, at, labels, consumers, _WHERE)
  else:
    found, readers, outputs = _traced(old, layer, at, labels, before, forward, inputs)
  copied = _copied(before, int(units), mode, key)
  axes = _grown_axes(found, before, copied, layer)
  arrays, placements = _arrays(old, axes, readers, mode, init, key)
  new = old.rebuilt(arrays)
  difference = None
  if inputs is not None and forward is not None:
    kept = None if outputs is None else _kept(outputs, before, copied, layer)
    difference = _preserved.difference(old, new, forward, new_forward, inputs, kept, _WHERE)
  if mode != "init" and difference is not None:
    _preserved.check(difference, old, mode, layer, _WHERE)
  growth = Growth(
    layer, (before, before + int(units)), _told(old, arrays, axes, readers), difference
  )
  return result(model, new, placements, state, _WHERE, growth)


def _traced(
  old: Model, layer: str, at: Axis, labels: Labels, units: int, forward: Any, inputs: Any
) -> tuple[dict[Axis, Labels], set[Axis], list[dict[int, Labels]]]:
  """Follow the units through the forward: grown axes, those that read units, and the outputs'."""
  if forward is None or inputs is None:
    missing = "inputs=" if forward is not None else "forward= and inputs="
    problem = Problem(layer, f"consumers, or {missing} to find them by tracing", "neither")
    fail(_WHERE, [problem], "Give example inputs, or consumers=[layers that read the units].")
  arrays, fill = _model.split_inputs(inputs)

  def run(leaves: Any, given: Any) -> Any:
    return old.called(forward, leaves, fill(given))

  closed, shapes = jax.make_jaxpr(run, return_shape=True)(list(old.arrays.values()), arrays)
  leaves = {p: Value(tuple(np.shape(x)), is_weight=True) for p, x in old.arrays.items()}
  given = [Value(tuple(x.shape), f"input {k}") for k, x in enumerate(arrays)]
  network, results = _trace.network_of(closed, [*leaves.values(), *given])
  for value in given:
    network.block(value, range(len(value.shape)), f"{value.name} of the forward")
  if not network.reads(leaves[at[0]]):
    problem = Problem(layer, "a layer that the forward uses", "one that it does not")
    fail(_WHERE, [problem], "Give another forward, or consumers=.")
  found = _followed(network, (leaves[at[0]], at[1]), labels, units, layer)
  readers = network.outgoing(found, {v: p for p, v in leaves.items()})
  paths = {v: p for p, v in leaves.items()}
  axes = {(paths[v], k): label for (v, k), label in found.items() if v in paths}
  count = len(jax.tree.leaves(shapes[0]))
  outputs = [{k: x for (v, k), x in found.items() if v is out} for out in results[:count]]
  return axes, {r for r in readers if r in axes}, outputs


def _followed(
  network: Network, node: Node, labels: Labels, units: int, layer: str
) -> dict[Node, Labels]:
  try:
    return network.follow({node: labels}, units)
  except Complaint as complaint:
    c = complaint
  fail(_WHERE, [Problem(layer, c.expected, c.got)], c.remedy)


def _copied(units: int, more: int, mode: str, key: Any) -> np.ndarray:
  """The old unit that each new one copies."""
  order = np.arange(units)
  if mode == "copy" and key is not None:
    order = np.asarray(jax.random.permutation(key, units))
  return np.resize(order, more)


def _grown_axes(
  found: dict[Axis, Labels], units: int, copied: np.ndarray, layer: str
) -> dict[Axis, GrownAxis]:
  axes, problems = {}, []
  for (path, axis), labels in found.items():
    try:
      axes[path, axis] = _units.grown(labels, units, copied)
    except Complaint as c:
      problems.append(Problem(path, c.expected, c.got))
  if problems:
    fail(_WHERE, problems, f"Name the consumers of {layer}: consumers=[...].")
  return axes


def _kept(
  outputs: list[dict[int, Labels]], units: int, copied: np.ndarray, layer: str
) -> list[dict[int, np.ndarray]]:
  """For each output and axis that grows, where the old entries stand."""
  named = {(f"output {n}", k): x for n, out in enumerate(outputs) for k, x in out.items()}
  axes = _grown_axes(named, units, copied, layer)
  return [{k: axes[f"output {n}", k].kept for k in out} for n, out in enumerate(outputs)]


def _arrays(
  old: Model, axes: dict[Axis, GrownAxis], readers: set[Axis], mode: str, init: Any, key: Any
) -> tuple[dict[str, Any], dict[str, Placement]]:
  """The grown arrays, and for each parameter where its old elements stand."""
  key = jax.random.key(0) if key is None else key
  arrays: dict[str, Any] = {}
  placements: dict[str, Placement] = {}
  for path, leaf in old.arrays.items():
    own = {k: x for (p, k), x in axes.items() if p == path}
    rank = len(np.shape(leaf))
    placement = Placement(path, tuple(own[k].kept if k in own else None for k in range(rank)))
    if path in old.params:
      name = old.inside(path)
      placements[name] = dataclasses.replace(placement, path=name)
    if own:
      reading = {k for k in own if (path, k) in readers}
      values = _placement.host(leaf)
      new = (
        _copies(values, own, reading)
        if mode == "copy"
        else placement.into(_news(path, values, own, reading, mode, init, key), values)
      )
      arrays[path] = _placement.like(new, leaf)
  return arrays, placements


def _copies(values: np.ndarray, own: dict[int, GrownAxis], reading: set[int]) -> np.ndarray:
  """Each new position copies its source; what reads a unit and its copies is spread over them."""
  for axis, grown in own.items():
    values = values.take(grown.source, axis)
    if axis in reading:
      share = grown.share.reshape([-1 if k == axis else 1 for k in range(values.ndim)])
      exact = np.float64 if values.dtype.itemsize > 4 else np.float32
      parts = (values.astype(exact) / share.astype(exact)).astype(values.dtype)
      values = np.where(share == 1, values, parts)
  return values


def _news(
  path: str,
  values: np.ndarray,
  own: dict[int, GrownAxis],
  reading: set[int],
  mode: str,
  init: Any,
  key: Any,
) -> np.ndarray:
  """Fresh values of the grown shape; in mode "zero" those that lead from new units to old are 0."""
  shape = tuple(own[k].size if k in own else n for k, n in enumerate(values.shape))
  new = _initial.fresh(path, shape, values.dtype, key, init, _WHERE)
  if mode != "zero" or not reading:
    return new

  def along(axes: Any) -> np.ndarray:
    found = np.zeros((1,) * len(shape), bool)
    for k in axes:
      found = found | own[k].is_new.reshape([-1 if d == k else 1 for d in range(len(shape))])
    return found

  return np.where(along(reading) & ~along(set(own) - reading), np.zeros_like(new), new)


def _told(
  old: Model, arrays: dict[str, Any], axes: dict[Axis, GrownAxis], readers: set[Axis]
) -> tuple[tuple[str, tuple[int, ...], tuple[int, ...], str], ...]:
  rows = []
  for path, new in arrays.items():
    own = [(path, k) for p, k in axes if p == path]
    roles = ["makes"] * any(a not in readers for a in own) + ["reads"] * any(
      a in readers for a in own
    )
    rows.append((path, tuple(np.shape(old.arrays[path])), tuple(new.shape), " and ".join(roles)))
  return tuple(rows)
