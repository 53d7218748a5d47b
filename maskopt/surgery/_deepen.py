"""One more layer that at first does nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from .. import _tree
from .._errors import Problem, describe, fail
from . import _edit, _model, _preserved, _start
from ._edit import Edit
from ._model import Model
from ._refusals import told
from ._result import State, Surgery

_WHERE = "maskopt.surgery.deepen(layer=...)"
_NUMBERED = re.compile(r"(.*?)(\d+)", re.DOTALL)
_CONVOLUTIONS = (nnx.Conv,)


def deepen(
  model: Any,
  layer: str,
  *,
  name: str | None = None,
  activation: Callable[[Any], Any] | None = None,
  inputs: Any = None,
  forward: Any = None,
  new_forward: Any = None,
  opt_state: Any = None,
  tx: Any = None,
  to: Any = None,
) -> Surgery:
  """Put an identity layer after a layer.

    new(x) = old(x),    new_layer(h) = I h + 0

  The new layer is dense, or a convolution after a convolution (a kernel whose middle pixel is I,
  for padding "SAME").

  Args:
    model: an nnx module, linen variables or parameters, or a tree of dicts and sequences.
    layer: path of the layer that it follows.
    name: of the new layer beside the old one, in a dict; by default the next number, and siblings
      of that number and above move up by one. The forward of a tree, and the new linen module, are
      the caller's. An nnx module needs no name: a layer of an `nnx.Sequential` gets a neighbour,
      any other becomes an `nnx.Sequential` of itself and the new one.
    activation: of an nnx module, a function between the two; it must leave its own outputs alone,
      as relu does, if the old one still follows.
    inputs: example inputs; with them old and new outputs are compared.
    forward: as in `grow`.
    new_forward: as in `grow`.
    opt_state: an optimizer state to be taken along, as in `grow`.
    tx: as in `grow`.
    to: as in `grow`.
  Returns:
    A `Surgery`: old parameters are frozen in the mask, the new layer trains.
  Raises:
    ValueError: no such layer, a name that is taken or missing, or outputs that change.
  Example:
    >>> import jax.numpy as jnp, maskopt
    >>> params = {"dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    >>> maskopt.surgery.deepen(params, "dense_0").model["dense_1"]["kernel"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
  """
  state = State(opt_state, tx, to)
  state.check(_WHERE)
  edit = Edit(model)
  old = edit.model
  told(_WHERE, _model.check_layer, old, layer)
  if activation is not None and not (old.is_module and callable(activation)):
    got = describe(activation) if old.is_module else "a tree, whose forward is yours"
    fail(_WHERE, [Problem("activation", "a function, of an nnx module", got)], "Leave it out.")
  if old.is_module:
    tree = _in_module(edit, layer, activation)
  else:
    tree = _in_tree(edit, layer, name, _identity(old, layer))
  done = edit.finish(tree, state, _WHERE)
  forward = _model.forward_of(old, forward)
  if inputs is not None and forward is not None:
    change = _preserved.difference(
      *(old, done.model, forward, new_forward, inputs, None, layer), _WHERE
    )
    if change is not None:
      _preserved.check(change, old, "identity", layer, _WHERE)
  return done


def _kernel(old: Model, layer: str) -> Any:
  """The kernel whose last axis is the layer's output."""
  below = old.below(layer)
  outs = [p for p in below if p.endswith("out/kernel")]
  path = outs[0] if len(outs) == 1 else told(_WHERE, _start.axis_of, old, layer, None)[0]
  leaf = old.arrays[path]
  if np.ndim(leaf) < 2:
    fail(_WHERE, [Problem(path, "a kernel", describe(leaf))], "Name a layer with a kernel.")
  return leaf


def _width(old: Model, layer: str) -> int:
  """The size of a layer's outputs: of a cell, its hidden units."""
  path, axis = told(_WHERE, _start.axis_of, old, layer, None)
  cell = axis == 0 and not path.endswith("embedding")
  leaf = old.arrays[path] if cell else _kernel(old, layer)
  return int(np.shape(leaf)[0 if cell else -1])


def _identity(old: Model, layer: str) -> dict[str, Any]:
  """Parameters of a layer that does nothing."""
  width, leaf = _width(old, layer), _kernel(old, layer)
  shape = np.shape(leaf)
  is_conv = len(shape) > 2 and not any(p.endswith("out/kernel") for p in old.below(layer))
  pixels = shape[:-2] if is_conv else ()
  kernel = np.zeros((*pixels, width, width), leaf.dtype)
  kernel[tuple((n - 1) // 2 for n in pixels)] = np.eye(width, dtype=leaf.dtype)
  return {"kernel": jnp.asarray(kernel), "bias": jnp.zeros((width,), leaf.dtype)}


def _in_module(edit: Edit, layer: str, activation: Callable | None) -> Any:
  module = _edit.get(edit.tree, layer, _WHERE)
  if not callable(module) or isinstance(module, nnx.RNNCellBase):
    got = f"a {type(module).__name__}, which returns more than that"
    problem = Problem(layer, "a module whose output the new layer can take", got)
    fail(_WHERE, [problem], "Name the module that holds it (nnx.RNN of a cell).")
  between = [] if activation is None else [activation]
  new = [*between, _layer(module, _identity(edit.model, layer))]
  parent, _, place = layer.rpartition("/")
  holder = _edit.get(edit.tree, parent.removesuffix("layers").rstrip("/"), _WHERE)
  if isinstance(holder, nnx.Sequential) and place.isdigit():
    at = int(place) + 1
    old = list(holder.layers)
    longer = nnx.Sequential(*old[:at], *new, *old[at:])
    path = parent.removesuffix("layers").rstrip("/")
    return _edit.changed(edit.tree, path, lambda _: longer)
  return _edit.changed(edit.tree, layer, lambda old: nnx.Sequential(old, *new))


def _layer(module: Any, identity: Mapping[str, Any]) -> Any:
  """An nnx layer with these parameters."""
  kernel, bias = identity["kernel"], identity["bias"]
  width, rngs = kernel.shape[-1], nnx.Rngs(0)
  if isinstance(module, _CONVOLUTIONS):
    layer: Any = nnx.Conv(width, width, kernel.shape[:-2], param_dtype=kernel.dtype, rngs=rngs)
  else:
    layer = nnx.Linear(width, width, param_dtype=kernel.dtype, rngs=rngs)
  layer.kernel[...], layer.bias[...] = kernel, bias
  return layer


def _in_tree(edit: Edit, layer: str, name: str | None, new: Any) -> Any:
  """The tree with a layer beside another."""
  root = "params" if edit.model.is_variables and not _tree.covers("params", layer) else ""
  parent, _, old = _tree.join(root, layer).rpartition("/")
  holder = _edit.get(edit.tree, parent, _WHERE)
  if isinstance(holder, (list, tuple)):
    at = int(old) + 1
    longer = _edit.rebuilt(holder, [*holder[:at], new, *holder[at:]])
  else:
    longer = _edit.rebuilt(holder, _named(dict(holder), old, name, new))
  return _edit.changed(edit.tree, parent, lambda _: longer)


def _named(siblings: dict[str, Any], layer: str, name: str | None, new: Any) -> dict[str, Any]:
  """The siblings with the new layer; later numbers of the same stem move up to make room."""
  if name is not None:
    if name in siblings:
      problem = Problem(name, "a name that is free", "one that the model has")
      fail(_WHERE, [problem], "Leave name out to move numbers up.")
    return {**siblings, name: new}
  match = _NUMBERED.fullmatch(layer)
  if match is None:
    problem = Problem(layer, "a numbered layer, or a name for the new one", "neither")
    fail(_WHERE, [problem], 'Give name="...".')
  stem, number = match[1], int(match[2])
  moved: dict[str, Any] = {}
  for key, value in siblings.items():
    other = _NUMBERED.fullmatch(key)
    later = other is not None and other[1] == stem and int(other[2]) > number
    moved[f"{stem}{int(other[2]) + 1}" if other is not None and later else key] = value
    if key == layer:
      moved[f"{stem}{number + 1}"] = new
  return moved
