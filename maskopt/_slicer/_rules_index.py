"""Rules for reads and writes at positions that are data: gather, scatter and dynamic slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from . import _index as ix
from ._index import Index, Points
from ._region import Region, full
from ._rule import Equation, Piece, bind, is_literal, out_shape, rebind, rule, shape_of

Mode = lax.GatherScatterMode


@rule("gather")
def gather(eqn: Equation, r: Region) -> Piece | None:
  """Batches of positions pass to the indices; whole window dimensions pass to the operand."""
  dn, shape = eqn.params["dimension_numbers"], shape_of(eqn.invars[0])
  sizes = list(eqn.params["slice_sizes"])
  operand: list[Index] = [None] * len(shape)
  got = list(r)
  aside = dn.collapsed_slice_dims + dn.operand_batching_dims
  windows = [d for d in range(len(shape)) if d not in aside]
  for d, out_dim in zip(windows, dn.offset_dims, strict=True):
    if d in dn.start_index_map:  # the window moves with the data
      got[out_dim] = None
    elif r[out_dim] is not None:
      operand[d], sizes[d] = r[out_dim], len(r[out_dim])
  batch = [got[d] for d in range(len(r)) if d not in dn.offset_dims]
  _share_batches(operand, batch, dn.operand_batching_dims, dn.start_indices_batching_dims)
  if Region(got).is_full:
    return None
  indices = Region([*batch, None])
  return Piece([Region(operand), indices], rebind(eqn, slice_sizes=tuple(sizes)), Region(got))


def _share_batches(
  operand: list[Index], batch: list[Index], dims: Sequence[int], of_indices: Sequence[int]
) -> None:
  """A batching dimension of the operand runs along one of the indices: it is cut alike."""
  for d, i in zip(dims, of_indices, strict=True):
    operand[d] = batch[i]


@rule("scatter-add", "scatter_add", "scatter", "scatter_mul", "scatter-mul", "scatter_min",
      "scatter-min", "scatter_max", "scatter-max")  # fmt: skip
def scatter(eqn: Equation, r: Region) -> Piece | None:
  """Wanted rows are renumbered and updates to other rows dropped; window columns pass through."""
  dn, shape = eqn.params["dimension_numbers"], out_shape(eqn)
  index_rank, updates_shape = len(shape_of(eqn.invars[1])), shape_of(eqn.invars[2])
  updates: list[Index] = [None] * len(updates_shape)
  got = list(r)
  aside = dn.inserted_window_dims + dn.operand_batching_dims
  windows = [d for d in range(len(shape)) if d not in aside]
  for d, u in zip(windows, dn.update_window_dims, strict=True):
    if d in dn.scatter_dims_to_operand_dims or updates_shape[u] != shape[d]:
      got[d] = None
    updates[u] = got[d]
  batch: list[Index] = [None] * (index_rank - 1)
  for d, i in zip(dn.operand_batching_dims, dn.scatter_indices_batching_dims, strict=True):
    batch[i] = got[d]
  scattered = [u for u in range(len(updates)) if u not in dn.update_window_dims]
  for u, index in zip(scattered, batch, strict=True):
    updates[u] = index
  rows = [d for d in dn.inserted_window_dims if got[d] is not None]
  clips = eqn.params["mode"] == Mode.CLIP
  if Region(got).is_full or any(d not in dn.scatter_dims_to_operand_dims for d in rows):
    return None
  changed: dict[str, Any] = {}
  if rows:  # dropped updates all land on one position out of bounds, in any order
    changed = dict(mode=Mode.FILL_OR_DROP, unique_indices=False, indices_are_sorted=False)

  def emit(x: Any, indices: Any, values: Any) -> Any:
    if rows and clips:
      indices = _clipped(indices, _last_starts(eqn))
    for d in rows:
      indices = _renumber(indices, dn.scatter_dims_to_operand_dims.index(d), got[d], shape[d])
    return bind(eqn, x, indices, values, **changed)

  return Piece([Region(got), Region([*batch, None]), Region(updates)], emit, Region(got))


def _last_starts(eqn: Equation) -> list[int]:
  """The last position of every column of a scatter's indices at which its window fits."""
  dn, shape, updates = eqn.params["dimension_numbers"], out_shape(eqn), shape_of(eqn.invars[2])
  aside = dn.inserted_window_dims + dn.operand_batching_dims
  windows = [d for d in range(len(shape)) if d not in aside]
  sizes = dict(zip(windows, (updates[u] for u in dn.update_window_dims), strict=True))
  return [shape[d] - sizes.get(d, 1) for d in dn.scatter_dims_to_operand_dims]


def _clipped(indices: Any, last: list[int]) -> Any:
  """Indices moved inside, each column up to its last position, if its dtype reaches that far."""
  most = np.minimum(last, np.iinfo(indices.dtype).max).astype(indices.dtype)
  most = lax.broadcast_in_dim(most, indices.shape, (indices.ndim - 1,))
  return lax.min(lax.max(indices, lax.full_like(indices, 0)), most)


def _signed(indices: Any) -> Any:
  """Indices in a dtype that holds sizes and negative numbers: a byte holds neither."""
  wide = np.dtype(np.int64 if indices.dtype.itemsize == 8 else np.int32)
  return indices if indices.dtype == wide else lax.convert_element_type(indices, wide)


def _renumber(indices: Any, column: int, wanted: Index, size: int) -> Any:
  """Replace row numbers in one column of the indices by positions in `wanted`.

  new[i] = position of indices[i] in wanted, or len(wanted) (out of bounds) where it is not in it
  """
  assert wanted is not None
  indices = _signed(indices)
  last = indices.ndim - 1
  rows = lax.index_in_dim(indices, column, last, keepdims=True)
  none = jax.lax.full_like(rows, len(wanted))
  if isinstance(wanted, range):
    start, step = (np.array(n, rows.dtype) for n in (wanted.start, wanted.step))
    shifted = lax.sub(rows, lax.full_like(rows, start))
    inside = (shifted >= 0) & (rows < wanted.stop)
    if wanted.step > 1:
      inside = inside & (lax.rem(shifted, lax.full_like(rows, step)) == 0)
    new = lax.select(inside, lax.div(shifted, lax.full_like(rows, step)), none)
  else:
    inside = (rows >= 0) & (rows < size)
    new = lax.select(inside, _lookup(rows, wanted, size), none)
  parts = [lax.slice_in_dim(indices, k, k + 1, axis=last) for k in range(indices.shape[last])]
  parts[column] = new
  return lax.concatenate(parts, last) if len(parts) > 1 else new


def _lookup(rows: Any, wanted: Points, size: int) -> Any:
  """Position in `wanted` of every row; the program builds the table, no constant holds it."""
  table = np.full((), len(wanted), rows.dtype)
  numbers = lax.ScatterDimensionNumbers((), (0,), (0,))
  table = lax.scatter(
    lax.broadcast(table, (size,)),
    wanted.starts,
    lax.iota(rows.dtype, len(wanted)),
    numbers,
    indices_are_sorted=True,
    unique_indices=True,
    mode=Mode.PROMISE_IN_BOUNDS,
  )
  read = lax.GatherDimensionNumbers(offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,))
  return lax.reshape(lax.gather(table, rows, read, (1,), mode=Mode.CLIP), rows.shape)


def _static_start(v: Any) -> int | None:
  return int(v.val) if is_literal(v) else None


@rule("dynamic_slice")
def dynamic_slice(eqn: Equation, r: Region) -> Piece | None:
  """Dimensions taken whole pass through, as do those whose start is known when tracing."""
  shape, sizes = shape_of(eqn.invars[0]), list(eqn.params["slice_sizes"])
  starts = list(eqn.invars[1 : 1 + len(shape)])
  operand: list[Index] = [None] * len(shape)
  got = list(r)
  for d, (n, m) in enumerate(zip(shape, sizes, strict=True)):
    start = 0 if n == m else _static_start(starts[d])
    if start is None:
      got[d] = None
    elif r[d] is not None or n != m:
      start = min(max(start, 0), n - m)
      operand[d] = ix.canonical(ix.moved(r[d], m, 1, start), n)
      sizes[d] = ix.count(r[d], m)
  if Region(got).is_full:
    return None
  scalars = [full(0)] * (len(eqn.invars) - 1)
  return Piece([Region(operand), *scalars], _clamped_slice(shape, eqn, sizes), Region(got))


def _clamped_slice(shape: tuple[int, ...], eqn: Equation, sizes: list[int]) -> Any:
  """The slice of what was read; a start that was used up in choosing the region is now 0."""
  kept = [d for d, m in enumerate(eqn.params["slice_sizes"]) if m != shape[d]]
  moving = [d for d in kept if not is_literal(eqn.invars[1 + d])]

  def emit(x: Any, *starts: Any) -> Any:
    if not moving:
      return x
    zero = np.zeros((), np.int32)
    fresh = [
      s if d in moving else (zero if not hasattr(s, "dtype") else np.zeros((), s.dtype))
      for d, s in enumerate(starts)
    ]
    return bind(eqn, x, *fresh, slice_sizes=tuple(sizes))

  return emit


@rule("dynamic_update_slice")
def dynamic_update_slice(eqn: Equation, r: Region) -> Piece | None:
  """Updated dimensions written whole pass through; others do where the demand misses the update."""
  shape, update_shape = shape_of(eqn.invars[0]), shape_of(eqn.invars[1])
  update: list[Index] = [None] * len(shape)
  got = list(r)
  scalars: list[Region | None] = [full(0)] * (len(eqn.invars) - 2)
  inside = True  # the demand lies wholly within the update
  for d, (n, m) in enumerate(zip(shape, update_shape, strict=True)):
    if n == m:
      update[d] = r[d]
      continue
    got[d] = None
    start = _static_start(eqn.invars[2 + d])
    if start is None or r[d] is None:
      inside = False
      continue
    start = min(max(start, 0), n - m)
    overlap = ix.within(r[d], n, start, start + m)
    if ix.count(overlap, n) == 0:  # the update misses the demand
      return Piece([r, None, *[None] * len(scalars)], lambda x, *_: x)
    inside = inside and ix.count(overlap, n) == ix.count(r[d], n)
    update[d] = ix.canonical(ix.moved(overlap, n, 1, -start), m) if inside else None
  if inside:
    return Piece([None, Region(update), *[None] * len(scalars)], lambda _, y, *__: y)
  if Region(got).is_full:
    return None
  read = Region(u if n == m else None for u, n, m in zip(update, shape, update_shape, strict=True))
  return Piece([Region(got), read, *scalars], rebind(eqn), Region(got))
