"""What a caller of `grow` asks for, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from .._errors import Problem, describe, fail
from ._refusals import Refusal, Refusals

Mode = Literal["zero", "progressive", "init", "copy"]
_MODES = ("zero", "progressive", "init", "copy")
_SEVERAL = "Write grow(model, {layer: units, other_layer: units}, ...)."


@dataclasses.dataclass(frozen=True)
class Request:
  """One layer's growth.

  Attributes:
    layer: its path.
    more: how many units to add.
    mode: how new weights start.
    consumers: those that the caller names; None to find them by tracing.
    axis: of the kernel; None for the usual one.
    of: how many units the axis holds; None for one a position.
    parts: how many groups of units lie side by side on the axis.
  """

  layer: str
  more: int
  mode: Mode
  consumers: Sequence[Any] | None
  axis: int | None
  of: int | None
  parts: int


def read(layer: Any, units: Any, where: str, *, mode: Any, **others: Any) -> list[Request]:
  """Return a request for each layer.

  Args:
    layer: a path, or layers and how many units to add to each.
    units: how many, of a path.
    where: the call that errors name.
    mode: how new weights start; of several layers a dict by layer says it of each.
    **others: consumers, axis, of and parts, of one layer or in a dict by layer.
  Raises:
    ValueError: no units to add, an unknown mode, or settings for a layer that does not grow.
    TypeError: units are no numbers.
  """
  wanted = _layers(layer, units, where)
  refusals = Refusals()
  for name, more in wanted.items():
    refusals.tried(_check_units, name, more)
  modes = refusals.tried(_each, "mode", mode, wanted, "zero", True) or {}
  for name, value in modes.items() if isinstance(mode, Mapping) else [("mode", mode)]:
    refusals.tried(_check_mode, name, value)
  defaults = {"consumers": None, "axis": None, "of": None, "parts": 1}
  each = {k: refusals.tried(_each, k, others[k], wanted, d, False) for k, d in defaults.items()}
  refusals.raise_all(where)
  return [
    Request(
      name,
      int(more),
      modes[name],
      *(values[name] for values in each.values() if values is not None),
    )
    for name, more in wanted.items()
  ]


def _layers(layer: Any, units: Any, where: str) -> dict[Any, Any]:
  if not isinstance(layer, (Mapping, str)):
    problem = Problem("layer", "the path of a layer, or a dict", describe(layer), TypeError)
    fail(where, [problem], f'Write paths as rules do: "encoder/dense". {_SEVERAL}')
  if isinstance(layer, str):
    return {layer: units}
  if units is not None:
    problem = Problem("units", "nothing: each layer brings its number", describe(units), TypeError)
    fail(where, [problem], _SEVERAL)
  if not layer:
    fail(where, [Problem("layer", "a layer that grows, or several", "none")], _SEVERAL)
  return dict(layer)


def _check_units(layer: Any, units: Any) -> None:
  if not isinstance(layer, str):
    problem = Problem("layer", "the path of a layer", describe(layer), TypeError)
    raise Refusal([problem], 'Write it as rules do: "encoder/dense".')
  if isinstance(units, bool) or not isinstance(units, (int, np.integer)):
    problem = Problem(layer, "a number of units", describe(units), TypeError)
    raise Refusal([problem], "Write an int, or {layer: int, other_layer: int}.")
  if units < 1:
    remedy = "Growing only adds units; freeze those that should rest."
    raise Refusal([Problem(layer, "one unit more, or several", str(units))], remedy)


def _check_mode(path: str, mode: Any) -> None:
  if mode not in _MODES:
    problem = Problem(path, '"zero", "progressive", "init" or "copy"', repr(mode))
    raise Refusal([problem], '"zero", "progressive" and "copy" keep what the model computes.')


def _each(
  name: str, value: Any, layers: Mapping[Any, Any], default: Any, for_all: bool
) -> dict[Any, Any]:
  """A setting by layer; a single value is that of the one layer, or of all if it may be."""
  if isinstance(value, Mapping):
    unknown = [Problem(f"{name}[{k!r}]", "a layer that grows", "none") for k in value]
    unknown = [p for p, k in zip(unknown, value, strict=True) if k not in layers]
    if unknown:
      raise Refusal(unknown, f"The layers that grow are {', '.join(map(str, layers))}.")
    return {k: value.get(k, default) for k in layers}
  if value is not default and value != default and len(layers) > 1 and not for_all:
    problem = Problem(name, "a dict by layer, for several grow", describe(value))
    raise Refusal([problem], f"Write {name}={{layer: value}}; layers left out keep the default.")
  return dict.fromkeys(layers, value)
