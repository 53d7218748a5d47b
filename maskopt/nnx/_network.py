"""What of a network trains: layer by layer, and as a state."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
from flax import nnx

from .. import _layers, _masks, _ties, _tree
from .._complaints import Complaint
from .._errors import Problem, fail
from .._masks import LeafMask, Runtime
from .._packing import Layouts
from . import _carried


@dataclasses.dataclass(frozen=True)
class Layer:
  """A layer of a network and whether it trains.

  Attributes:
    name: its path, as rules and errors write it; empty for a network that is one layer.
    module: the module, or whatever stands at the path: a function, a parameter.
    trainable: True if all its parameters train, "partial" if some elements do, else False. A layer
      without parameters is trainable, as in Keras, unless the smallest module around it that has
      some is wholly frozen: a mask cannot speak of it alone.
  """

  name: str
  module: Any
  trainable: bool | Literal["partial"]


def layers(model: nnx.Module, freeze_mask: Any = None) -> list[Layer]:
  """List the layers of a network in network order, each with what of it trains.

    trainable = True if count == size, False if count == 0, else "partial"    of its parameters

  Args:
    model: any nnx module. Layers stand in the order in which the network has its attributes
      written, not in the sorted order of its state; a layer that is used twice appears once.
    freeze_mask: a freeze mask over `nnx.state(model, nnx.Param)`; None takes the masks that modules
      carry.
  Returns:
    One `Layer` for each, with `.name`, `.module` and `.trainable`; `build_mask` counts the same
    layers. A runtime mask at a parameter makes its layer "partial". A parameter that layers share
    counts in each of them.
  Raises:
    ValueError: the mask does not fit the model, or the order of its layers is unknown.
    TypeError: a mask leaf is not boolean.
  Example:
    >>> import maskopt
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.relu, nnx.Linear(3, 1, rngs=rngs))
    >>> mask = {"layers": {"0": True, "2": {"kernel": False, "bias": True}}}
    >>> for layer in maskopt.nnx.layers(model, mask):
    ...   print(layer.name, layer.trainable)
    layers/0 False
    layers/1 True
    layers/2 partial
  """
  where = "maskopt.nnx.layers(freeze_mask=...)"
  _carried.need_module(model, "maskopt.nnx.layers(model)")
  try:
    names = _layers.layer_paths(model)
  except Complaint as c:
    fail("maskopt.nnx.layers(model)", [Problem("", c.expected, c.got, c.kind)], c.remedy)
  flat, masks = _masks_of(model, freeze_mask, nnx.Param, where)
  shared = _ties.other_names(model)
  trains = {
    name: _trains(mask)
    for path, mask in zip(flat.paths, masks, strict=True)
    for name in (path, *shared.get(path, ()))
  }
  owners = {path: _layers.owner(names, path, model) for path in trains}
  own = [[trains[path] for path, k in owners.items() if k == layer] for layer in range(len(names))]
  return [
    Layer(name, _at(model, name), _trainable(parameters or _around(name, trains)))
    for name, parameters in zip(names, own, strict=True)
  ]


def _around(name: str, trains: dict[str, tuple[bool, bool]]) -> list[tuple[bool, bool]]:
  """What stands for a layer without parameters: whether anything trains in the module around it."""
  inside = ([x for p, x in trains.items() if _tree.covers(a, p)] for a in _tree.ancestors(name))
  some = any(some for some, _ in next(filter(None, inside), [(True, True)]))
  return [(some, some)]


def _trainable(parameters: list[tuple[bool, bool]]) -> bool | Literal["partial"]:
  """What a layer says of itself, of (some elements train, all do) of its parameters."""
  if all(every for _, every in parameters):
    return True
  return "partial" if any(some for some, _ in parameters) else False


def trainable_state(model: nnx.Module, freeze_mask: Any = None) -> nnx.State:
  """Return the state of the parameters of which something trains.

    nnx.update(model, trainable_state(model, mask)) changes nothing

  What to save, average or send of a network that is partly frozen; put it back with `nnx.update`.
  As in `nnx.state`, the variables are the model's own: copy the state to keep it as it is. For the
  trainable values alone of a partly frozen parameter, `maskopt.pack` the state.

  Args:
    model: any nnx module.
    freeze_mask: a freeze mask over `nnx.state(model, nnx.Param)`; None takes the masks that modules
      carry.
  Returns:
    An `nnx.State` with the whole variable wherever an element trains, and no entry for a parameter
    that is wholly frozen.
  Raises:
    ValueError: the mask does not fit the model; TypeError: a mask leaf is not boolean.
  Example:
    >>> import maskopt
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> list(maskopt.nnx.trainable_state(model, {"kernel": True, "bias": False}))
    ['bias']
  """
  where = "maskopt.nnx.trainable_state(freeze_mask=...)"
  _carried.need_module(model, "maskopt.nnx.trainable_state(model)")
  flat, masks = _masks_of(model, freeze_mask, nnx.Param, where)
  some = {p for p, mask in zip(flat.paths, masks, strict=True) if _trains(mask)[0]}
  return nnx.state(model, lambda path, x: isinstance(x, nnx.Param) and _name(path) in some)


def _masks_of(
  model: Any, freeze_mask: Any, wrt: Any, where: str
) -> tuple[_tree.Flat, list[LeafMask]]:
  params = nnx.state(model, wrt)
  mask = _carried.agreed(model, params, freeze_mask, wrt, where)
  if isinstance(mask, Layouts):
    mask = mask.freeze_mask
  flat = _tree.flatten(params)
  return flat, _masks.resolve(mask, flat, where)


def _name(path: Any) -> str:
  return "/".join(map(str, path))


def _trains(mask: LeafMask) -> tuple[bool, bool]:
  """(some elements train, all do)."""
  if mask is None:
    return False, True
  if isinstance(mask, Runtime) and mask.count is not None:
    return mask.count > 0, False
  if isinstance(mask, Runtime):
    return True, False
  frozen = np.asarray(mask)
  return not frozen.all(), not frozen.any()


def _at(model: Any, name: str) -> Any:
  """What stands at a path of a module."""
  node = model
  for part in name.split("/") if name else []:
    if isinstance(node, dict):
      node = node[part]
    elif isinstance(node, (list, tuple, nnx.List)):
      node = node[int(part)]
    else:
      node = getattr(node, part)
  return node
