"""Masks that nnx modules carry, after their parameters have grown: old elements keep their mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from .. import _carrying, _ties
from ._placement import Placement


def refit(module: Any, shapes: Mapping[str, Any], placements: Mapping[str, Placement]) -> None:
  """Give every mask that a module carries the shape of its parameter; new elements train.

  Args:
    module: the new module, changed in place.
    shapes: of the old parameters.
    placements: where their elements stand in the new ones; what has none is new.
  """
  names = _ties.names(module)
  for _, node in nnx.iter_graph(module):
    if isinstance(node, nnx.Module):
      for attribute, variable, mask in list(_carrying.carried(node)):
        path = names[id(variable)]
        if path not in placements or tuple(shapes[path]) != variable.shape:
          wide = _grown(mask, shapes[path], variable.shape, placements.get(path))
          setattr(node, attribute + _carrying.SUFFIX, wide)


def _grown(mask: Any, old: Any, new: Any, placement: Placement | None) -> Any:
  values = np.zeros(new, bool)
  if placement is not None:
    values = Placement("", placement.kept).into(values, np.broadcast_to(mask, old))
  if not values.any():
    return False
  for axis in range(values.ndim):
    first = values.take([0], axis)
    values = first if np.array_equal(np.broadcast_to(first, values.shape), values) else values
  return _carrying.StaticMask.of(values)
