"""Which axis of which parameter holds a layer's units, and, without a trace, who reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from .. import _sides, _tree
from .._errors import Problem
from . import _model, _units
from ._model import Model
from ._refusals import Refusals, refuse
from ._units import Labels

Axis = tuple[str, int]

# A cell's kernel that reads its own hidden state tells how many units the cell has, whatever gates
# lie side by side in the others.
_RECURRENT = ("hi/kernel", "dense_h/kernel", "hn/kernel", "h/kernel", "weight_hh")
_KERNELS = ("kernel", "weight", "embedding", "w")
_HEADS = ("query", "key", "value")


def axis_of(model: Model, layer: str, axis: int | None) -> Axis:
  """Return the parameter and axis along which a layer's units stand.

  Raises:
    Refusal: no such layer, or several parameters that may be meant.
  """
  below = [p for p in _model.check_layer(model, layer) if p in model.params]
  layer = model.name(layer)
  shapes = {p: tuple(np.shape(model.arrays[p])) for p in below}
  path = _main(layer, shapes, model)
  if path is None:
    wide = [p for p in below if len(shapes[p]) > 1] or below
    got = f"{len(wide)} that may be meant ({', '.join(wide[:6])})"
    refuse(layer, "one kernel", got, "Give the path of the kernel, and axis=.")
  rank = len(shapes[path])
  if axis is None:
    axis = _usual_axis(path, rank, layer, model)
  if not -rank <= axis < rank:
    remedy = "Leave axis out for the axis of the layer's outputs."
    refuse(path, f"an axis of shape {shapes[path]}", f"axis={axis}", remedy)
  return path, axis % rank


def _main(layer: str, shapes: dict[str, tuple[int, ...]], model: Model) -> str | None:
  """The parameter that makes the units."""
  own = [p for p in shapes if model.inside(p) == layer or p == layer]
  if own:
    return own[0]
  for names in (_RECURRENT, ("query/kernel",)):
    found = [p for n in names for p in shapes if _ends(p, n)]
    if found:  # of one cell, one attention
      depth = 1 + found[0].endswith("/kernel")
      owners = {tuple(p.split("/")[:-depth]) for p in found}
      return found[0] if len(owners) == 1 else None
  named = [p for p in shapes if model.inside(p) in [_tree.join(layer, n) for n in _KERNELS]]
  wide = [p for p, shape in shapes.items() if len(shape) > 1]
  found = named or wide or list(shapes)
  return found[0] if len(found) == 1 else None


def _ends(path: str, *names: str) -> bool:
  """Whether the last parts of a path are those of a name."""
  return any(path == n or path.endswith("/" + n) for n in names)


def _usual_axis(path: str, rank: int, layer: str, model: Model) -> int:
  name = path.rpartition("/")[2]
  is_cell = _ends(path, *_RECURRENT) and model.inside(path) != layer
  if name == "weight_hh":
    return 1
  if _is_embedding(model.source, path):
    return 0
  if name == "embedding" or is_cell:
    return 0
  if _ends(path, "query/kernel") and rank == 3:
    return 1
  side = _sides.sides(model.source).get(path.rpartition("/")[0], _sides.Side())
  return 0 if side.out_first else side.axis_of(rank) - rank


def _is_embedding(source: Any, path: str) -> bool:
  """Whether a leaf belongs to an Equinox embedding, of which tokens come first."""

  def is_one(x: Any) -> bool:
    return any(c.__module__ == "equinox.nn._embedding" for c in type(x).__mro__)

  found = jax.tree_util.tree_flatten_with_path(source, is_leaf=is_one)[0]
  return any(is_one(x) and _tree.covers(_tree.path_of(keys), path) for keys, x in found)


def start(model: Model, at: Axis, of: int | None, parts: int) -> tuple[Labels, int]:
  """The labels of the axis that holds the units, and how many units there are."""
  path, axis = at
  size = np.shape(model.arrays[path])[axis]
  units = size // max(parts, 1) if of is None else of
  if parts < 1 or units < 1 or size % (units * parts):
    expected = f"an axis of {parts} x {units} x (width of a unit)"
    refuse(path, expected, f"{size} positions", "Give of= (units) and parts=.")
  return _units.labels_of(size, units, parts), units


def named(
  model: Model, layer: str, at: Axis, labels: Labels, consumers: Sequence[Any]
) -> tuple[dict[Axis, Labels], set[Axis]]:
  """Return the axes that grow, and which of them read the units, as the caller names them.

  Raises:
    Refusal: a consumer does not exist or has no axis that fits the units.
  """
  found, readers = _own(model, layer, at, labels)
  refusals = Refusals()
  problems: list[Problem] = []
  for consumer in consumers:
    name, axis = consumer if isinstance(consumer, tuple) else (consumer, None)
    below = refusals.tried(_model.check_layer, model, name)
    if below is None:
      continue
    fitting = _reading(model, below, axis, labels)
    if not fitting:
      shapes = ", ".join(f"{p} {tuple(np.shape(model.arrays[p]))}" for p in below[:4])
      expected = f"a parameter with an input axis of a multiple of {len(labels)}"
      problems.append(Problem(name, expected, shapes))
    for path, k, reads in fitting:
      found[path, k] = np.tile(labels, np.shape(model.arrays[path])[k] // len(labels))
      readers |= {(path, k)} if reads else set()
  if problems:
    refusals.add(problems, "Give (path, axis) where the axis is another, or example inputs.")
  refusals.refuse_all()
  return found, readers


def _own(
  model: Model, layer: str, at: Axis, labels: Labels
) -> tuple[dict[Axis, Labels], set[Axis]]:
  """The layer's own axes: its kernel's, its bias', and the other projections of an attention."""
  path, axis = at
  if _ends(path, *_RECURRENT):
    expected = "example inputs, for gates are found by tracing"
    refuse(layer, expected, "consumers only", "Give inputs=, and forward= of trees.")
  found, readers = {at: labels}, set()
  kernels = [path]
  if _ends(path, "query/kernel"):
    root = path[: -len("query/kernel")]
    kernels = [f"{root}{name}/kernel" for name in _HEADS]
    found |= {(k, axis): labels for k in kernels if k in model.arrays}
    if f"{root}out/kernel" in model.arrays:
      found[f"{root}out/kernel", 0] = labels
      readers.add((f"{root}out/kernel", 0))
  for kernel in kernels:
    bias = _tree.join(kernel.rpartition("/")[0], "bias")
    shape = np.shape(model.arrays[kernel])
    # One axis for each of the layer's outputs; Equinox has axes of size 1 for pixels, too.
    beside = (shape[axis:], (shape[axis], *[1] * (len(shape) - 2)), shape[axis : axis + 1])
    if kernel != bias and bias in model.arrays and np.shape(model.arrays[bias]) in beside:
      found[bias, 0] = labels
  return found, readers


def _reading(
  model: Model, below: list[str], axis: int | None, labels: Labels
) -> list[tuple[str, int, bool]]:
  """(path, axis, whether it reads units) of a consumer's arrays that fit."""
  shapes = {p: np.shape(model.arrays[p]) for p in below}
  kernels = [p for p in below if len(shapes[p]) > 1 and not p.endswith("bias")]
  if not kernels:  # a normalisation: scale, bias and statistics stand beside the units
    return [(p, 0, False) for p in below if shapes[p] == (len(labels),)]
  found = []
  for path in kernels:
    rank = len(shapes[path])
    parent = path.rpartition("/")[0].rpartition("/")[2]
    usual = 0 if rank == 3 and parent in (*_HEADS, "out") else rank - 2
    if len(kernels) > 1 and parent == "out":
      continue  # of an attention, which reads through the other three
    k = usual if axis is None else axis % rank
    if shapes[path][k] % len(labels) == 0:
      found.append((path, k, True))
  return found
