"""One view of what is operated on: an nnx module, linen variables, or a bare tree of parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from .. import _calls, _ties, _tree
from .._errors import describe
from . import _attributes, _carried
from ._placement import Placement
from ._refusals import refuse


class Model:
  """Arrays by their paths, and the way back.

  Attributes:
    source: what was given; nothing here ever changes it.
    flat: its paths and leaves, holes included.
    arrays: every array by its path, statistics and counts too.
    params: the paths of parameters among them.
  """

  def __init__(self, source: Any) -> None:
    self.source = source
    self._graph: Any = None
    state = source
    if isinstance(source, nnx.Module):
      self._graph, state = nnx.split(source)
    self.flat = _tree.flatten(state)
    self._live = [k for k, x in enumerate(self.flat.leaves) if not _tree.is_hole(x)]
    self.arrays = {self.flat.paths[k]: self.flat.leaves[k] for k in self._live}
    self.params = self._parameter_paths()

  @property
  def is_module(self) -> bool:
    """Whether this is an nnx module."""
    return self._graph is not None

  @property
  def is_variables(self) -> bool:
    """Whether this is what linen's `init` returns."""
    return is_variables(self.source)

  def _parameter_paths(self) -> frozenset[str]:
    if self.is_module:
      return frozenset(_tree.flatten(nnx.state(self.source, nnx.Param)).paths)
    if self.is_variables:
      return frozenset(p for p in self.arrays if _tree.covers("params", p))
    return frozenset(self.arrays)

  def inside(self, path: str) -> str:
    """The path within the network: linen variables have their collection in front of it."""
    return path.partition("/")[2] if self.is_variables else path

  def name(self, layer: str) -> str:
    """The path that the state has for a layer: a shared one goes by any of its names."""
    for alias, path in _ties.aliases(self.source):
      if _tree.covers(layer, alias):
        return path[: len(path) - len(alias[len(layer) :])]
    return layer

  def below(self, layer: str) -> list[str]:
    """The paths of the arrays that a layer holds."""
    layer = self.name(layer)
    return [p for p in self.arrays if _tree.covers(layer, self.inside(p)) or p == layer]

  def rebuilt(
    self, arrays: Mapping[str, Any], placements: Mapping[str, Placement] | None = None
  ) -> Any:
    """The same model with other arrays at some paths; modules get the sizes that go with them.

    Args:
      arrays: the new ones.
      placements: where old elements stand in parameters that have other shapes now.
    """
    leaves = list(self.flat.leaves)
    for k in self._live:
      leaves[k] = arrays.get(self.flat.paths[k], leaves[k])
    tree = self.flat.unflatten(leaves)
    if not self.is_module:
      return tree
    module = nnx.merge(self._graph, tree)
    _attributes.refit(module)
    if placements is not None:
      shapes = {p: np.shape(x) for p, x in self.arrays.items()}
      _carried.refit(module, shapes, placements)
    return module

  def called(self, forward: Callable, arrays: Sequence[Any], inputs: Sequence[Any]) -> Any:
    """The outputs of the forward with these arrays, and what it left behind in a module."""
    leaves = list(self.flat.leaves)
    for k, x in zip(self._live, arrays, strict=True):
      leaves[k] = x
    tree = self.flat.unflatten(leaves)
    if not self.is_module:
      return forward(tree, *inputs), None
    module = nnx.merge(self._graph, tree)
    return forward(module, *inputs), nnx.state(module)


def is_variables(tree: Any) -> bool:
  """Whether a tree is what linen's `init` returns."""
  return (
    isinstance(tree, Mapping)
    and not isinstance(tree, nnx.State)
    and isinstance(tree.get("params"), Mapping)
  )


def parameters(source: Any) -> Any:
  """What an optimizer trains of a model: what freeze masks and optimizer states speak of."""
  if isinstance(source, nnx.Module):
    return _tree.parameters(source)
  if is_variables(source):
    return source["params"]
  flat = _tree.flatten(source)
  # What an Equinox module holds beside arrays, functions for instance, is none of an optimizer's.
  odd = [_tree.is_hole(x) and not _tree.is_opaque(x) for x in flat.leaves]
  pairs = zip(odd, flat.leaves, strict=True)
  return flat.unflatten([None if o else x for o, x in pairs]) if any(odd) else source


def check_layer(model: Model, layer: Any) -> list[str]:
  """Return the arrays of a layer; raises a `Refusal` if there are none."""
  if not isinstance(layer, str):
    remedy = 'Write it as rules do: "encoder/dense".'
    refuse("", "the path of a layer", describe(layer), remedy, TypeError)
  found = model.below(layer)
  if not found:
    known = dict.fromkeys(model.inside(p).rpartition("/")[0] or p for p in model.arrays)
    remedy = f"The layers are {', '.join(list(known)[:16])}{', ...' if len(known) > 16 else ''}."
    refuse(layer, "a layer with parameters", "none of that path", remedy)
  return found


def forward_of(model: Model, forward: Any) -> Callable | None:
  """The forward as a function of the model and its inputs; None if nobody said what it is."""
  if _calls.is_linen(forward):
    return functools.partial(_applied, forward)
  if forward is None and callable(model.source):
    return _call
  return forward


def _call(module: Any, *inputs: Any) -> Any:
  return module(*inputs)


def _applied(module: Any, tree: Any, *inputs: Any) -> Any:
  keywords: dict[str, Any] = {}
  if isinstance(module, functools.partial):
    module, inputs, keywords = module.func, (*module.args, *inputs), module.keywords
  return module.apply(tree if is_variables(tree) else {"params": tree}, *inputs, **keywords)


def split_inputs(inputs: Any) -> tuple[list[Any], Callable[[Sequence[Any]], tuple[Any, ...]]]:
  """The arrays among example inputs, and how other arrays take their places; flags stay flags."""
  given = inputs if isinstance(inputs, tuple) else (inputs,)
  leaves, treedef = jax.tree.flatten(given)
  places = [k for k, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")]

  def filled(arrays: Sequence[Any]) -> tuple[Any, ...]:
    new = list(leaves)
    for k, x in zip(places, arrays, strict=True):
      new[k] = x
    return treedef.unflatten(new)

  return [leaves[k] for k in places], filled
