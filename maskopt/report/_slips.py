"""The classic slip: a unit's kernel is frozen and its bias is not, or the reverse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .. import _tree
from .._layout import Index, Layout
from . import _elements
from ._show import listed
from ._units import Units

# What stands beside a bias, and shares its units.
_KERNELS = ("kernel", "weight", "scale", "w")
_BIASES = ("bias", "b")
_UNITS_SHOWN = 8


class Slip(NamedTuple):
  """Units of which one parameter is frozen while another one trains.

  Attributes:
    frozen: path of the parameter whose units are wholly frozen.
    trains: path of its sibling, of which these units train.
    units: their indices in order; of several dimensions, tuples. A sequence, made as it is read.
    of: how many units the layer has.
  """

  frozen: str
  trains: str
  units: Units
  of: int

  def __str__(self) -> str:
    every = "the only unit" if self.of == 1 else f"all {self.of:,} units"
    which = every if len(self.units) == self.of else _named(self.units)
    return f"{self.frozen} is frozen and {self.trains.rpartition('/')[2]} trains: {which}"


def _named(units: Units) -> str:
  if len(units) <= _UNITS_SHOWN:
    return f"unit{'s' if len(units) > 1 else ''} {listed(units, _UNITS_SHOWN)}"
  return f"{len(units):,} units: {listed(units, _UNITS_SHOWN)}"


def find(items: list[tuple[str, Layout, Index]]) -> Iterator[Slip]:
  """Compare each bias with the kernel beside it, unit by unit."""
  by_path = {path: (layout, index) for path, layout, index in items}
  for path, layout, index in items:
    parent, _, name = path.rpartition("/")
    if name not in _BIASES or layout.size == 0:
      continue
    for kernel in _KERNELS:
      sibling = _tree.join(parent, kernel)
      if sibling in by_path:
        yield from _compared(sibling, *by_path[sibling], path, layout, index)


def _compared(
  kernel_path: str, kernel: Layout, kernel_index: Index, path: str, bias: Layout, index: Index
) -> Iterator[Slip]:
  choices = list(_unit_axes(kernel.shape, bias.shape, path_is_weight=_is_weight(kernel_path)))
  if not choices:
    return
  wide = _wide_axes(bias.shape)
  shape = _at(bias.shape, wide)
  bias_units = _elements.frozen_units(bias, index, wide)
  kernels = [_elements.frozen_units(kernel, kernel_index, axes) for axes in choices]
  # A square weight does not say which of its axes counts units: no alarm if the other one agrees.
  if any(np.all(units == bias_units) and units.any() for units in kernels[1:]):
    return
  for frozen, trains, which in (
    (kernel_path, path, kernels[0] & ~bias_units),
    (path, kernel_path, bias_units & ~kernels[0]),
  ):
    if which.any():
      yield Slip(frozen, trains, Units(which, shape), math.prod(shape))


def _is_weight(path: str) -> bool:
  return path.rpartition("/")[2] == "weight"


def _wide_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
  """The axes of a bias that count units: Equinox keeps a 1 for each spatial dimension."""
  return tuple(a for a, n in enumerate(shape) if n > 1) or tuple(range(len(shape)))[:1]


def _unit_axes(
  kernel: tuple[int, ...], bias: tuple[int, ...], *, path_is_weight: bool
) -> Iterator[tuple[int, ...]]:
  """Axes of the kernel that the bias runs along: Flax puts units last, Equinox puts them first."""
  units = tuple(bias[a] for a in _wide_axes(bias))
  k, n = len(units), len(kernel)
  last, first = tuple(range(n - k, n)), tuple(range(k))
  fits = [axes for axes in dict.fromkeys((last, first)) if k <= n and _at(kernel, axes) == units]
  if path_is_weight:
    yield from reversed(fits)
  else:
    yield from fits[:1]


def _at(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(shape[a] for a in axes)
