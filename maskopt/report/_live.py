"""Frozen units whose output still moves: they feed, or are, normalisation with live statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx

from .. import _layers, _tree


def live_statistics(source: Any, frozen: Mapping[str, int]) -> tuple[str, ...]:
  """Paths of the BatchNorm layers that follow the batch although units there are frozen.

  Frozen are units of the layer itself or of the one before it. A layer in inference mode, or held
  by `maskopt.nnx.freeze_statistics`, does not follow.

  Args:
    source: what was asked about; only an nnx module tells of its layers.
    frozen: frozen elements of each parameter, by path.
  """
  if not isinstance(source, nnx.Module):
    return ()
  live = {
    "/".join(map(str, path))
    for path, module in nnx.iter_modules(source)
    if isinstance(module, nnx.BatchNorm)
    and not module.use_running_average
    and not hasattr(module, "still")
  }
  before, found = "", []
  for layer in _layers.layer_paths(source, None) if live else ():
    near = [n for path, n in frozen.items() if _covered((before, layer), path)]
    if layer in live and any(near):
      found.append(layer)
    before = layer
  return tuple(found)


def _covered(layers: tuple[str, ...], path: str) -> bool:
  return any(layer and _tree.covers(layer, path) for layer in layers)
