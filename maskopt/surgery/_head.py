"""Another last layer on the same body."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from .. import _layers, _tree
from .._complaints import Complaint
from .._errors import Problem, describe, fail
from . import _edit, _initial, _model, _placement, _start, _units
from ._edit import Edit
from ._model import Model
from ._placement import Placement
from ._refusals import told
from ._result import State, Surgery, result

_WHERE = "maskopt.surgery.replace_head(head=...)"


def replace_head(
  model: Any,
  head: Any,
  *,
  layer: str | None = None,
  layers: Any = None,
  init: Any = None,
  key: Any = None,
  opt_state: Any = None,
  tx: Any = None,
  to: Any = None,
) -> Surgery:
  """Replace the last layer.

    new(x) = head(body(x)),    old(x) = old_head(body(x))

  Args:
    model: an nnx module, linen variables or parameters, or any tree of parameters.
    head: how many outputs a freshly initialised head of the same kind has; or the head itself: an
      nnx module, or the parameters of the layer.
    layer: path of the head; by default the last layer with parameters in network order.
    layers: network order of a tree, as in `maskopt.build_mask`.
    init: initializer `(key, shape, dtype)` of new weights, or rules [(glob, initializer)]; by
      default variance 1 / fan-in.
    key: random key; by default `jax.random.key(0)`.
    opt_state: an optimizer state to be taken along, as in `grow`.
    tx: as in `grow`.
    to: as in `grow`.
  Returns:
    A `Surgery`: the body is frozen in the mask and keeps its bits, the head trains.
  Raises:
    ValueError: no such layer, its order is unknown, or no outputs.
    TypeError: head is none of these.
  Example:
    >>> import jax.numpy as jnp, maskopt
    >>> params = {"dense_0": {"bias": jnp.ones(2)}, "dense_1": {"bias": jnp.ones(3)}}
    >>> new = maskopt.surgery.replace_head(params, 5)
    >>> new.model["dense_1"]["bias"].shape, new.freeze_mask
    ((5,), {'dense_0': {'bias': True}, 'dense_1': {'bias': False}})
  """
  state = State(opt_state, tx, to)
  state.check(_WHERE)
  _initial.check(init, _WHERE)
  old = Model(model)
  path = _last(old, layers) if layer is None else layer
  told(_WHERE, _model.check_layer, old, path)
  if isinstance(head, (int, np.integer)) and not isinstance(head, bool):
    key = jax.random.key(0) if key is None else key
    return _resized(old, path, int(head), init, key, state)
  edit = Edit(model)
  is_head = isinstance(head, nnx.Module) if old.is_module else bool(_tree.flatten(head).leaves)
  if not is_head or _tree.flatten(head).paths == ("",):
    problem = Problem("head", "a number of outputs, or a layer", describe(head), TypeError)
    fail(_WHERE, [problem], "Give 10, nnx.Linear(...), or the new layer's parameters.")
  root = "params/" if old.is_variables and not _tree.covers("params", path) else ""
  return edit.finish(_edit.changed(edit.tree, root + path, lambda _: head), state, _WHERE)


def _last(old: Model, layers: Any) -> str:
  """The last layer that has parameters."""
  try:
    names = _layers.layer_paths(old.source, layers)
  except Complaint as complaint:
    c = complaint
  else:
    return [n for n in names if old.below(n)][-1]
  fail(
    _WHERE, [Problem("layer", c.expected, c.got, c.kind)], "Name the head: layer=... " + c.remedy
  )


def _resized(old: Model, layer: str, outputs: int, init: Any, key: Any, state: State) -> Surgery:
  """A head of the same kind with another number of outputs, all of it new."""
  if outputs < 1:
    fail(_WHERE, [Problem("head", "at least one output", str(outputs))], "Give 10, say.")
  path, axis = told(_WHERE, _start.axis_of, old, layer, None)
  if path.endswith("embedding"):
    axis = len(np.shape(old.arrays[path])) - 1
  labels = _units.labels_of(np.shape(old.arrays[path])[axis], 1)
  wide, _ = told(_WHERE, _start.named, old, layer, (path, axis), labels, [])
  arrays: dict[str, Any] = {}
  for p in old.below(layer):
    leaf = old.arrays[p]
    shape = [outputs if (p, k) in wide else n for k, n in enumerate(np.shape(leaf))]
    new = _initial.fresh(p, tuple(shape), leaf.dtype, key, init, _WHERE)
    arrays[p] = _placement.like(new, leaf)
  placements: dict[str, Placement] = {}
  for p in old.params - set(arrays):
    placements[old.inside(p)] = _placement.whole(old.inside(p), len(np.shape(old.arrays[p])))
  return result(old.source, old.rebuilt(arrays, placements), placements, state, _WHERE)
