"""Paths of a tree, whatever its containers.

A path is the string that rules, reports and errors share: `dense/kernel`. Two trees belong together
when their paths do, so a plain dict can describe a FrozenDict, an `nnx.State` or a module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from flax.core import meta

# Containers that hold one value under a name of their own, which no path should show.
_BOXES = (nnx.Variable, meta.AxisMetadata)


def is_hole(x: Any) -> bool:
  """Whether a leaf holds no parameter: None, an `optax.MaskedNode`, an activation function."""
  return not (hasattr(x, "shape") and hasattr(x, "dtype")) and not isinstance(
    x, (bool, int, float, complex, np.generic)
  )


def is_opaque(x: Any) -> bool:
  """Whether x marks a place without a parameter that JAX would drop from the tree."""
  return x is None or isinstance(x, optax.MaskedNode)


def is_placeholder(params: Any) -> bool:
  """Whether `init` is asked for a state's structure only, as by `optax.tree_map_params`."""
  return not isinstance(params, (Mapping, list, tuple)) and not flatten(params).leaves


@dataclasses.dataclass(frozen=True)
class Flat:
  """A tree as parallel paths and leaves; holes are leaves too, so positions never shift."""

  paths: tuple[str, ...]
  leaves: list[Any]
  treedef: Any  # a PyTreeDef

  def unflatten(self, leaves: Sequence[Any]) -> Any:
    return self.treedef.unflatten(leaves)


def parameters(tree: Any) -> Any:
  """The tree of parameters that a module holds; any other tree is its own."""
  return nnx.state(tree, nnx.Param) if isinstance(tree, nnx.Module) else tree


def flatten(tree: Any, is_leaf: Callable[[Any], bool] = lambda _: False) -> Flat:
  """Flatten any tree or module to `Flat`; `is_leaf` adds further leaves to the holes."""
  tree = parameters(tree)

  def stop(x: Any) -> bool:
    return is_opaque(x) or is_leaf(x)

  leaves, treedef = jax.tree.flatten(tree, is_leaf=stop)
  return Flat(tuple(_paths(tree, stop)), leaves, treedef)


def _paths(tree: Any, stop: Callable[[Any], bool]) -> Iterator[str]:
  def stop_at_box(x: Any) -> bool:
    return stop(x) or isinstance(x, _BOXES)

  for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop_at_box)[0]:
    if isinstance(node, _BOXES) and not stop(node):
      for inner in _paths_of_box(node, stop):
        yield join(path_of(keys), inner)
    else:
      yield path_of(keys)


def _paths_of_box(box: Any, stop: Callable[[Any], bool]) -> Iterator[str]:
  """Paths below a box without the name of the attribute that holds its value."""
  for keys, node in jax.tree_util.tree_flatten_with_path(box, is_leaf=stop)[0]:
    del node
    yield path_of(keys[1:])


def path_of(keys: Sequence[Any]) -> str:
  return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def join(*parts: str) -> str:
  return "/".join(part for part in parts if part)


def covers(prefix: str, path: str) -> bool:
  """Whether `prefix` names `path` or a subtree that holds it."""
  return prefix == path or not prefix or path.startswith(prefix + "/")


def ancestors(path: str) -> Iterator[str]:
  """The path, then each subtree that holds it, up to the whole tree."""
  while path:
    yield path
    path = path.rpartition("/")[0]
  yield ""


def nested(paths: Sequence[str], leaves: Sequence[Any]) -> Any:
  """Nested dicts that hold each leaf at its path."""
  if list(paths) == [""]:
    return leaves[0]
  tree: dict[str, Any] = {}
  for path, leaf in zip(paths, leaves, strict=True):
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree
