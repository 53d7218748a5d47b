"""Parts of a network as a network of their own, and networks with more parts at their end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from .. import _layers, _tree
from .._complaints import Complaint
from .._errors import Problem, describe, fail
from . import _edit, _model
from ._edit import Edit, Leaf
from ._refusals import Refusals, refuse, told
from ._result import State, Surgery


def take(
  model: Any,
  which: int | slice | str | Sequence[str],
  *,
  layers: Any = None,
  opt_state: Any = None,
  tx: Any = None,
  to: Any = None,
) -> Surgery:
  """Take a part of a network.

    new = the chosen layers, bit for bit

  Args:
    model: an nnx module, linen variables or parameters, or any tree of dicts and sequences.
    which: the first n layers; a slice of the layers in network order; the path of one part, which
      comes back as it is; or paths of several parts, which stay where they are in the tree. Of an
      nnx module: a path, or numbers of an `nnx.Sequential`'s layers.
    layers: network order of a tree, as in `maskopt.build_mask`.
    opt_state: an optimizer state to be taken along, as in `grow`.
    tx: as in `grow`.
    to: as in `grow`.
  Returns:
    A `Surgery`; everything is old, so the mask freezes everything. Arrays are shared, not copied.
  Raises:
    ValueError: there is no such part, or not so many layers, or their order is unknown.
    TypeError: which is none of these.
  Example:
    >>> import jax.numpy as jnp, maskopt
    >>> params = {"dense_0": {"bias": jnp.ones(2)}, "dense_1": {"bias": jnp.ones(3)}}
    >>> list(maskopt.surgery.take(params, 1).model)
    ['dense_0']
  """
  where = "maskopt.surgery.take(which=...)"
  state = State(opt_state, tx, to)
  state.check(where)
  edit = Edit(model)
  if isinstance(which, str):
    return edit.finish(_part(edit, which, where), state, where)
  if isinstance(which, (int, slice)) and not isinstance(which, bool):
    new = _of_module(edit, which, where) if edit.model.is_module else None
    return edit.finish(
      new or _kept(edit, _numbered(model, which, layers, where), where), state, where
    )
  if not isinstance(which, Sequence) or not all(isinstance(x, str) for x in which) or not which:
    problem = Problem("which", "a number of layers, a slice or paths", describe(which), TypeError)
    fail(where, [problem], 'Write 3, slice(1, 4), "encoder" or ["encoder", "norm"].')
  if edit.model.is_module:
    problem = Problem("which", "one part of an nnx module", f"{len(which)} of them")
    fail(where, [problem], "Take each by itself, or take several from nnx.state(model).")
  refusals = Refusals()
  for name in which:
    refusals.tried(_model.check_layer, edit.model, name)
  refusals.raise_all(where)
  return edit.finish(_kept(edit, list(which), where), state, where)


def _part(edit: Edit, path: str, where: str) -> Any:
  """The part of a module or tree at a path."""
  if not edit.model.is_variables or path.partition("/")[0] in edit.tree:
    part = _edit.get(edit.tree, path, where)
    if edit.model.is_module and not isinstance(part, nnx.Module):
      problem = Problem(path, "a module", type(part).__name__)
      fail(where, [problem], "Take the module that holds it.")
    return part
  _edit.get(edit.tree["params"], path, where)
  found = {}
  for name, collection in edit.tree.items():
    try:
      found[name] = _edit.get(collection, path, where)
    except ValueError:  # a layer without statistics
      continue
  return found


def _of_module(edit: Edit, which: int | slice, where: str) -> Any:
  layers = _edit.sequence(edit.tree)
  if layers is None:
    got = f"a {type(edit.tree).__name__}, whose call is its own"
    remedy = "Take a part by its path, or take layers from nnx.state(model, nnx.Param)."
    fail(where, [Problem("which", "numbers of an nnx.Sequential's layers", got)], remedy)
  chosen = _chosen(list(layers), which, where)
  return nnx.Sequential(*chosen) if isinstance(edit.tree, nnx.Sequential) else nnx.List(chosen)


def _chosen(names: list[Any], which: int | slice, where: str) -> list[Any]:
  """The layers that a count or slice takes; at least one."""
  if isinstance(which, slice):
    found = names[which]
  else:
    found = names[:which] if 0 < which <= len(names) else []
  if not found:
    problem = Problem("which", f"some of {len(names)} layers", str(which))
    fail(where, [problem], "Count layers from 1: take(model, 2) takes the first two.")
  return found


def _numbered(model: Any, which: int | slice, layers: Any, where: str) -> list[str]:
  try:
    names = _layers.layer_paths(model, layers)
  except Complaint as complaint:
    c = complaint
  else:
    return _chosen(names, which, where)
  fail(where, [Problem("which", c.expected, c.got, c.kind)], c.remedy)


def _kept(edit: Edit, names: list[str], where: str) -> Any:
  """The tree without leaves that no name covers, and without containers that this empties."""
  model = edit.model

  def kept(leaf: Leaf) -> bool:
    return any(_tree.covers(n, model.inside(leaf.path)) or n == leaf.path for n in names)

  return told(where, _pruned, edit.tree, kept)


def _pruned(node: Any, kept: Any) -> Any:
  """The node with only the leaves that are kept; None if none is."""
  if isinstance(node, Leaf):
    return node if kept(node) else None
  if isinstance(node, Mapping):
    inside = {k: _pruned(v, kept) for k, v in node.items()}
    inside = {k: v for k, v in inside.items() if v is not None}
    return _edit.rebuilt(node, inside) if inside else None
  if isinstance(node, (list, tuple)) and not hasattr(node, "_fields"):
    found = [x for x in (_pruned(v, kept) for v in node) if x is not None]
    return _edit.rebuilt(node, found) if found else None
  # Another container cannot lose a part: it stays, or goes, whole.
  inside = [x for x in jax.tree.leaves(node, is_leaf=_is_leaf) if isinstance(x, Leaf)]
  stays = {kept(x) for x in inside if hasattr(x.value, "shape")}
  if len(stays) == 2:
    left = next(x.path for x in inside if hasattr(x.value, "shape") and not kept(x))
    got = f"a {type(node).__name__}, which cannot lose {left}"
    remedy = "Take a part of it by its path, or transplant into a smaller one."
    refuse(_tree.join(*left.split("/")[:-1]), "a dict, list or tuple of parts", got, remedy)
  return node if True in stays else None


def _is_leaf(x: Any) -> bool:
  return isinstance(x, Leaf)


def append(
  model: Any, *layers: Any, opt_state: Any = None, tx: Any = None, to: Any = None
) -> Surgery:
  """Put layers after the last one.

    new(x) = layers(old(x))

  Args:
    model: an nnx module, linen variables or parameters, or a dict or sequence of layers.
    layers: of an nnx module, modules or functions: an `nnx.Sequential` gets them as further layers,
      any other module becomes the first of an `nnx.Sequential`. Of a dict, dicts of new names. Of a
      list or tuple, its further elements.
    opt_state: an optimizer state to be taken along, as in `grow`.
    tx: as in `grow`.
    to: as in `grow`.
  Returns:
    A `Surgery`: old parameters are frozen in the mask, those of the new layers train.
  Raises:
    ValueError: nothing to append, or a name that is taken.
    TypeError: a layer is of no kind that the model's container holds.
  Example:
    >>> import jax.numpy as jnp, maskopt
    >>> params = [{"bias": jnp.ones(2)}]
    >>> maskopt.surgery.append(params, {"bias": jnp.ones(3)}).freeze_mask
    [{'bias': True}, {'bias': False}]
  """
  where = "maskopt.surgery.append(layers)"
  state = State(opt_state, tx, to)
  state.check(where)
  if not layers:
    fail(where, [Problem("", "a layer, or several", "none")], "Give the layers after the model.")
  edit = Edit(model)
  if edit.model.is_module:
    return edit.finish(_longer_module(edit.tree, layers, where), state, where)
  if isinstance(edit.tree, (list, tuple)):
    return edit.finish(_edit.rebuilt(edit.tree, [*edit.tree, *layers]), state, where)
  return edit.finish(_merged(edit, layers, where), state, where)


def _longer_module(module: Any, layers: tuple[Any, ...], where: str) -> Any:
  problems = [
    Problem(f"layers[{k}]", "an nnx module or a function", describe(x), TypeError)
    for k, x in enumerate(layers)
    if not callable(x)
  ]
  if problems:
    fail(where, problems, "Give nnx.Linear(...), say, or nnx.relu.")
  old = list(module.layers) if isinstance(module, nnx.Sequential) else [module]
  return nnx.Sequential(*old, *layers)


def _merged(edit: Edit, layers: tuple[Any, ...], where: str) -> Any:
  """The dict with new names, each in its collection of linen variables."""
  tree, problems = edit.tree, []
  for k, layer in enumerate(layers):
    if not isinstance(layer, Mapping) or not isinstance(tree, Mapping):
      got = (
        describe(layer) if isinstance(tree, Mapping) else f"a {type(tree).__name__} to append to"
      )
      problems.append(Problem(f"layers[{k}]", "a dict of new layers", got, TypeError))
      continue
    parts = layer if _model.is_variables(layer) else {"params": layer}
    for name, new in parts.items() if edit.model.is_variables else [("", layer)]:
      old = tree.get(name, {}) if name else tree
      taken = [_tree.join(name, str(x)) for x in new if x in old]
      problems += [Problem(x, "a name that is free", "one that the model has") for x in taken]
      both = _edit.rebuilt(old, {**old, **new})
      tree = _edit.rebuilt(tree, {**tree, name: both}) if name else both
  if problems:
    fail(where, problems, "Give {new_name: parameters}.")
  return tree
