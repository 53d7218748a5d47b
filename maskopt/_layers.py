"""The layers of a network in network order, which is never the sorted order of its parameters.

A layer is named by its path. What counts as one:

- a module that holds no module of its own, with parameters or without (`Dropout`);
- a ready-made module of Flax or Equinox, whatever is inside (`LSTMCell`, `MultiHeadAttention`), but
  for those that only chain others (`Sequential`, `MLP`, `RNN`);
- an element of a sequence of layers, so that the `relu` in `Sequential(Linear, relu)` counts;
- a parameter that stands beside modules in the module that holds it (a class token).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn, nnx

from . import _calls, _tree
from ._complaints import Complaint, listing

_REMEDY = (
  "Give the network order: layers=[names], layers=the nnx or Equinox module, or "
  "layers=(linen_module, *example_inputs)."
)
# What nnx keeps about a module in the module starts with this.
_LIBRARY = "_pytree__"
_NUMBERED = re.compile(r"(.*?)[_.\-]?(\d+)", re.DOTALL)


def layer_paths(source: Any, layers: Any = None) -> list[str]:
  """Return the path of every layer in network order.

  Args:
    source: the parameters, or the module that holds them.
    layers: what knows the order if `source` does not: an nnx or Equinox module, a list of layer
      names (names without parameters count), or a tuple of a linen module and example inputs.
  Returns:
    Paths as `module_path` writes them, so without the collection of linen variables.
  Raises:
    Complaint: the order is unknown, or `layers` leaves parameters out.
  """
  if layers is None:
    return list(_walk(source, _Names(source), root=True))
  if isinstance(layers, (nn.Module, functools.partial)):
    got = f"a linen module {type(getattr(layers, 'func', layers)).__name__} without inputs"
    raise Complaint("a linen module with example inputs", got, _REMEDY, TypeError)
  if isinstance(layers, tuple) and layers and _calls.is_linen(layers[0]):
    return _complete(_calls.call_order(layers[0], *layers[1:]), source)
  if _is_module(layers):
    return list(_walk(layers, _Names(layers), root=True))
  if isinstance(layers, (list, tuple)) and layers and all(isinstance(n, str) for n in layers):
    return _complete(_distinct(list(layers)), source)
  got = f"{type(layers).__name__} {layers!r}"[:80]
  raise Complaint("layer names or a module", got, _REMEDY, TypeError)


def module_path(path: str, source: Any) -> str:
  """The path within the network: linen variables have their collection in front of it."""
  return path.partition("/")[2] if _is_variables(source) else path


def owner(layers: Sequence[str], path: str, source: Any) -> int | None:
  """The position of the layer that holds the parameter at `path`, the innermost if they nest."""
  inside = module_path(path, source)
  found = [k for k, name in enumerate(layers) if _tree.covers(name, inside)]
  found = found or [k for k, name in enumerate(layers) if _tree.covers(name, path)]
  return max(found, key=lambda k: len(layers[k]), default=None)


def numbered(layers: Sequence[str]) -> str:
  """The layers as errors list them."""
  return listing([f"{k} {name or 'the whole tree'}" for k, name in enumerate(layers)])


def _is_variables(source: Any) -> bool:
  """Whether the tree is what linen's `init` returns."""
  return (
    isinstance(source, Mapping)
    and not isinstance(source, nnx.State)
    and isinstance(source.get("params"), Mapping)
  )


def _distinct(names: list[str]) -> list[str]:
  twice = sorted({n for n in names if names.count(n) > 1})
  if twice:
    remedy = "Name each layer once, in network order."
    raise Complaint("each layer once", listing(twice) + " more than once", remedy)
  return names


def _complete(layers: list[str], source: Any) -> list[str]:
  """Check that every parameter has a layer; with one left out, -2 would count wrongly."""
  flat = _tree.flatten(source)
  paths = [p for p, x in zip(flat.paths, flat.leaves, strict=True) if not _tree.is_hole(x)]
  left = [p for p in paths if owner(layers, p, source) is None]
  if left:
    got = f"none for {listing(left)} (the layers are {numbered(layers)})"
    remedy = "Name every layer that holds parameters, in network order."
    raise Complaint("a layer for every parameter", got, remedy)
  return layers


class _Names:
  """Paths of shared nnx modules and variables: the state has each once, under one of its names."""

  def __init__(self, root: Any) -> None:
    graph = nnx.iter_graph(root) if isinstance(root, nnx.Module) else ()
    kinds = (nnx.Module, nnx.Variable)
    self._known = {id(x): "/".join(map(str, parts)) for parts, x in graph if isinstance(x, kinds)}
    self._seen: set[int] = set()

  def of(self, node: Any, path: str) -> str:
    return self._known.get(id(node), path)

  def is_new(self, node: Any) -> bool:
    if id(node) not in self._known:
      return True
    known = id(node) in self._seen
    self._seen.add(id(node))
    return not known


def _walk(node: Any, names: _Names, path: str = "", root: bool = False) -> Iterator[str]:
  """The layers inside a node, as written."""
  if not names.is_new(node):
    return
  path = names.of(node, path)
  if isinstance(node, (list, tuple, nnx.List)) and not _is_named_tuple_of_arrays(node):
    for name, child in _children(node):
      inside = _tree.join(path, name)
      if _holds_module(child):
        yield from _walk(child, names, inside)
      else:
        yield inside
  elif _is_module(node):
    children = _children(node)
    # The root is never one layer of the network, if there is anything to count in it.
    is_one = _calls.is_one_layer(type(node)) and not root
    inner = any(_holds_module(x) or (root and _is_subtree(x)) for _, x in children)
    if is_one or not inner:
      yield path
      return
    for name, child in children:
      if _holds_module(child):
        yield from _walk(child, names, _tree.join(path, name))
      elif _holds_parameter(child) and names.is_new(child):
        yield names.of(child, _tree.join(path, name))
  else:
    yield from _siblings(node, path)


def _is_named_tuple_of_arrays(node: Any) -> bool:
  """Whether a tuple's fields are the parts of one layer and not a row of layers."""
  return hasattr(node, "_fields") and not any(_holds_module(x) or _is_subtree(x) for x in node)


def _is_subtree(x: Any) -> bool:
  return isinstance(x, (Mapping, list, tuple)) and _holds_parameter(x)


def _siblings(node: Any, path: str) -> Iterator[str]:
  """The layers of a bare tree: its outermost numbered siblings or its outermost sequence."""
  if _is_variables(node) and not path:
    node = node["params"]
  if not isinstance(node, Mapping) or not node:
    raise Complaint(*_unordered(path, list(getattr(node, "_fields", ()))))
  names = [str(name) for name in node]
  order = _by_number(names)
  if len(names) == 1:
    (child,) = node.values()
    if _is_module(child) or isinstance(child, (Mapping, list, tuple)):
      try:
        yield from list(_walk(child, _Names(None), _tree.join(path, names[0])))
        return
      except Complaint:
        if order is None:
          raise
  if order is None:
    raise Complaint(*_unordered(path, names))
  yield from (_tree.join(path, name) for name in order)


def _unordered(path: str, names: list[str]) -> tuple[str, str, str]:
  where = f" under {path}" if path else ""
  got = f"a bare tree without numbers{where}: {listing(names) or 'a single array'}"
  return "a layer order, which an index needs", got, _REMEDY


def _by_number(names: list[str]) -> list[str] | None:
  """The names by their number if they share a stem: Dense, Dense_1, Dense_2, Dense_10."""
  keys: dict[int, str] = {}
  stems = set()
  for name in names:
    match = _NUMBERED.fullmatch(name)
    stem, number = (match[1], int(match[2])) if match else (name, -1)
    stems.add(stem)
    keys[number] = name
  if len(stems) != 1 or len(keys) != len(names) or set(keys) == {-1}:
    return None
  return [keys[k] for k in sorted(keys)]


def _children(node: Any) -> list[tuple[str, Any]]:
  """The named parts of a module or sequence in the order they were written."""
  if isinstance(node, (list, tuple, nnx.List)):
    names = getattr(node, "_fields", None) or map(str, range(len(node)))
    return list(zip(names, node, strict=True))
  if isinstance(node, nnx.Module):
    return [(name, vars(node)[name]) for name in _attributes(node)]
  fields = [f.name for f in dataclasses.fields(node) if not f.metadata.get("static")]
  return [(name, getattr(node, name)) for name in fields if hasattr(node, name)]


def _attributes(module: nnx.Module) -> list[str]:
  """The attributes of an nnx module that may hold layers, as written.

  `split` and `merge`, so `nnx.jit` too, sort the attributes of the very module they are given; but
  its record of which attributes are data keeps their order.
  """
  kinds = (nnx.Module, nnx.Variable, list, tuple, dict)
  own = [k for k, v in vars(module).items() if isinstance(v, kinds) and not k.startswith(_LIBRARY)]
  written = getattr(module, f"{_LIBRARY}nodes", {})
  if all(name in written for name in own):
    return [name for name in written if name in own]
  # A module with pytree=False has no such record; made afresh it has its bookkeeping in this order.
  if len(own) < 2 or list(vars(module))[:2] == [f"{_LIBRARY}state", f"{_LIBRARY}nodes"]:
    return own
  got = f"a rebuilt {type(module).__name__} (pytree=False), whose attributes are sorted"
  raise Complaint("attributes in the order they were written", got, _REMEDY)


def _is_module(x: Any) -> bool:
  """Whether x is an nnx module or a dataclass that is a tree, such as an Equinox module."""
  if isinstance(x, nnx.Module):
    return True
  if not dataclasses.is_dataclass(x) or isinstance(x, (type, nn.Module, nnx.Variable)):
    return False
  return not jax.tree_util.all_leaves([x])


def _holds_module(x: Any) -> bool:
  if isinstance(x, Mapping) and not isinstance(x, nnx.Module):
    return any(map(_holds_module, x.values()))
  return _is_module(x) or (isinstance(x, (list, tuple)) and any(map(_holds_module, x)))


def _holds_parameter(x: Any) -> bool:
  if isinstance(x, nnx.Variable):
    return isinstance(x, nnx.Param)
  return any(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in jax.tree.leaves(x))
