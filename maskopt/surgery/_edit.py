"""Changing what a model is made of, while every old leaf remembers where it stood."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from .. import _tree
from .._errors import Problem, fail
from . import _placement
from ._model import Model
from ._placement import Placement
from ._result import State, Surgery, result


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
  """A leaf on its way through an edit, with the path it had."""

  path: str
  value: Any


class Edit:
  """A copy of a model to be taken apart; its arrays are the old ones.

  Attributes:
    model: the old model.
    tree: the copy: a module, or a tree of `Leaf`s.
  """

  def __init__(self, source: Any) -> None:
    self.model = Model(source)
    if self.model.is_module:
      self.tree = nnx.clone(source)
      self._known = _variables(self.tree)
      return
    flat = self.model.flat
    self.tree = flat.unflatten([Leaf(p, x) for p, x in zip(flat.paths, flat.leaves, strict=True)])

  def finish(self, tree: Any, state: State, where: str, report: Any = None) -> Surgery:
    """The result whose model is what the copy has become."""
    new, origins = self._unwrapped(tree)
    placements: dict[str, Placement] = {}
    made = Model(new)
    for path in made.params:
      if path in origins:
        old = self.model.inside(origins[path])
        placements[made.inside(path)] = _placement.whole(old, len(np.shape(made.arrays[path])))
    return result(self.model.source, new, placements, state, where, report)

  def _unwrapped(self, tree: Any) -> tuple[Any, dict[str, str]]:
    """The new model, and for each of its old arrays the path it had."""
    if isinstance(tree, nnx.Module):
      now = _variables(tree)
      old = {id_: path for id_, path in self._known.items() if id_ in now}
      return tree, {now[id_]: path for id_, path in old.items()}
    origins: dict[str, str] = {}
    found, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)
    leaves = []
    for keys, leaf in found:
      if isinstance(leaf, Leaf):
        origins[_tree.path_of(keys)] = leaf.path
        leaf = leaf.value
      leaves.append(leaf)
    return treedef.unflatten(leaves), origins


def _is_leaf(x: Any) -> bool:
  return isinstance(x, Leaf) or _tree.is_opaque(x)


def _variables(module: Any) -> dict[int, str]:
  """Paths of a module's variables by identity."""
  return {
    id(x): "/".join(map(str, parts))
    for parts, x in nnx.iter_graph(module)
    if isinstance(x, nnx.Variable)
  }


_FOREIGN = (
  "Parts of a dict, a list, a tuple or an nnx module can be exchanged. Of another, an Equinox one, "
  "build the new module (eqx.tree_at) and let maskopt.surgery.transplant bring weights and state."
)


def get(node: Any, path: str, where: str) -> Any:
  """The part of a tree or module at a path; raises if there is none."""
  done: list[str] = []
  for name in path.split("/") if path else ():
    names = _names(node)
    if name not in names:
      remedy = "It has no parts." if isinstance(node, Leaf) else _FOREIGN
      remedy = f"The parts there are {', '.join(names[:16])}." if names else remedy
      fail(where, [Problem(_tree.join(*done, name), "a part of the model", "none")], remedy)
    node = _child(node, name)
    done.append(name)
  return node


def changed(node: Any, path: str, change: Callable[[Any], Any]) -> Any:
  """The tree or module with `change(part)` in place of the part at a path, which exists."""
  if not path:
    return change(node)
  name, _, rest = path.partition("/")
  return with_child(node, name, changed(_child(node, name), rest, change))


def _names(node: Any) -> list[str]:
  if isinstance(node, Mapping):
    return [str(k) for k in node]
  if isinstance(node, (list, tuple, nnx.List)):
    return [str(k) for k in range(len(node))]
  return [k for k in vars(node) if not k.startswith("_")] if isinstance(node, nnx.Module) else []


def _child(node: Any, name: str) -> Any:
  if isinstance(node, Mapping):
    return next(v for k, v in node.items() if str(k) == name)
  if isinstance(node, (list, tuple, nnx.List)):
    return node[int(name)]
  return getattr(node, name)


def with_child(node: Any, name: str, child: Any) -> Any:
  """The node with another child; modules are changed in place, for they are our copy."""
  if isinstance(node, Mapping):
    key = next((k for k in node if str(k) == name), name)
    return rebuilt(node, {**node, key: child})
  if isinstance(node, (list, tuple)):
    return rebuilt(node, [child if k == int(name) else x for k, x in enumerate(node)])
  if isinstance(node, nnx.List):
    node[int(name)] = child
  else:
    setattr(node, name, child)
  return node


def rebuilt(node: Any, children: Any) -> Any:
  """A container of the same kind with other children."""
  if hasattr(node, "_fields"):
    return type(node)(*children)
  return children if type(node) in (dict, list) else type(node)(children)


def sequence(module: Any) -> Any:
  """The list of layers of an nnx module that is a sequence; None of any other."""
  if isinstance(module, nnx.Sequential):
    return module.layers
  return module if isinstance(module, nnx.List) else None
