"""What a layout says of single elements and of units, on the host and without a dense mask.

  frozen[i] = no packed value stands for i        unit j frozen = all elements of unit j are frozen

Everything here reads the layouts that the transforms work with, so a report cannot disagree with
what trains.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import core

from .. import _choice, _packing, _tree
from .._errors import Problem, fail
from .._joint import Joined, Joint
from .._layout import Block, Dense, Elements, Frozen, Full, Index, Layout, Slice
from .._packing import Layouts
from ._parts import refuse_traced


def analysed(freeze_mask: Any, params: Any, where: str) -> Layouts:
  """The layouts of a mask that can be read now; a traced one cannot."""
  refuse_traced(_tree.flatten(params).leaves, where)
  layouts = as_stored(_packing.layouts_of(freeze_mask, params, where))
  if any(isinstance(x, core.Tracer) for x in jax.tree.leaves(layouts)):
    problem = Problem("", "a freeze mask at hand", "a traced one", TypeError)
    fail(where, [problem], "Call it outside jit, on what jit returns.")
  return layouts


def as_stored(layouts: Layouts) -> Layouts:
  """The layouts as optimizers store them: a leaf that several share is in parts."""
  return layouts.parted() if isinstance(layouts, Joined) else layouts


def parts(layout: Layout, index: Index) -> list[tuple[Layout, Index]]:
  """The parts of a leaf that several optimizers share; any other is its own."""
  if not isinstance(layout, Joint):
    return [(layout, index)]
  return [(part, index[str(k)]) for k, part in enumerate(layout.parts)]


def trained_along(layout: Layout, index: Index) -> list[np.ndarray] | None:
  """Per dimension, which positions train, if the trainable set is their product; else None.

  A dimension of which all do has one element, whatever its size.
  """
  if isinstance(layout, Slice):
    starts = np.asarray(index["start"])
    chosen = [slice(s, s + b) for s, b in zip(starts, layout.block, strict=True)]
  elif isinstance(layout, Block):
    picked = iter(index["dims"])
    chosen = [
      np.asarray(next(picked)) if b != n else slice(None)
      for b, n in zip(layout.block, layout.shape, strict=True)
    ]
  else:
    return None
  along = []
  for n, b, where in zip(layout.shape, layout.block, chosen, strict=True):
    trains = np.zeros(n if b != n else 1, bool)
    trains[where if b != n else 0] = True
    along.append(trains)
  return along


def _product(along: Sequence[np.ndarray]) -> np.ndarray:
  """The product of bools along each dimension, one element where it does not depend on it."""
  product = np.ones((1,) * len(along), bool)
  for axis, trains in enumerate(along):
    product = product & np.expand_dims(trains, [k for k in range(len(along)) if k != axis])
  return product


def flat_positions(layout: Elements, index: Index) -> np.ndarray:
  """Sorted flat positions of the trainable elements; padding lies past the end and is left out."""
  flat = np.asarray(index["flat"])
  return flat[flat < layout.size]


def dense_mask(index: Index) -> np.ndarray:
  """A Dense layout's mask as it broadcasts."""
  return np.asarray(index["frozen"])


def frozen_count(layout: Layout, index: Index) -> int:
  """How many elements are frozen, counting what only a runtime mask knows."""
  if layout.count is not None:
    return layout.size - layout.count
  if isinstance(layout, Joint):
    return layout.size - sum(part.size - frozen_count(part, i) for part, i in parts(layout, index))
  mask = dense_mask(index)
  return int(np.count_nonzero(mask)) * (layout.size // max(mask.size, 1))


def frozen_mask(layout: Layout, index: Index) -> np.ndarray:
  """Bools of the leaf's shape, at most one byte an element; True = frozen."""
  if isinstance(layout, (Frozen, Full)):
    return np.broadcast_to(np.bool_(isinstance(layout, Frozen)), layout.shape)
  if isinstance(layout, Joint):
    return np.logical_and.reduce([frozen_mask(*part) for part in parts(layout, index)])
  along = trained_along(layout, index)
  if along is not None:
    return np.broadcast_to(~_product(along), layout.shape)
  if isinstance(layout, Elements):
    mask = np.ones(layout.size, bool)
    mask[flat_positions(layout, index)] = False
    return mask.reshape(layout.shape)
  return np.broadcast_to(dense_mask(index), layout.shape)


def frozen_units(layout: Layout, index: Index, axes: Sequence[int]) -> np.ndarray:
  """Which units are wholly frozen, a unit being one position along `axes`.

  Returns:
    Bools that broadcast to the shape the leaf has along `axes`, and of its rank. Costs what the
    layout holds and not the leaf: one byte where all units are alike.
  """
  if isinstance(layout, (Frozen, Full)):
    return np.full((1,) * len(axes), isinstance(layout, Frozen))
  if isinstance(layout, Joint):
    # One after another, for they have different shapes.
    return functools.reduce(
      np.logical_and, [frozen_units(*part, axes) for part in parts(layout, index)]
    )
  along = trained_along(layout, index)
  if along is not None:
    return ~_product([along[a] for a in axes])
  if isinstance(layout, Elements):
    units = np.ones(tuple(layout.shape[a] for a in axes), bool)
    positions = np.unravel_index(flat_positions(layout, index), layout.shape)
    units[tuple(positions[a] for a in axes)] = False
    return units
  mask = dense_mask(index)
  mask = mask.reshape((1,) * (len(layout.shape) - mask.ndim) + mask.shape)
  others = tuple(a for a in range(mask.ndim) if a not in axes)
  return np.logical_and.reduce(mask, axis=others)


def packed_bytes(layout: Layout) -> int:
  """Bytes of one copy of the packed values, of all parts together."""
  held = layout.packed_shape
  return 0 if held is None else math.prod(held) * item_bytes(layout)


def least_bytes(layout: Layout, held: int) -> int:
  """What `prefer="memory"` holds of a leaf with a static mask, in place of `held` bytes."""
  index = _choice.index_for_memory(layout) if isinstance(layout, Dense) else None
  if index is None:
    return held
  return min(held, 2 * (layout.count or 0) * item_bytes(layout) + index)


def item_bytes(layout: Layout) -> int:
  """Bytes of one value as JAX holds it: without `jax_enable_x64` float64 becomes float32."""
  return jax.dtypes.canonicalize_dtype(layout.dtype).itemsize


def index_bytes(index: Index) -> int:
  """Bytes of the arrays a layout needs at run time."""
  return sum(int(x.nbytes) for x in jax.tree.leaves(index))
