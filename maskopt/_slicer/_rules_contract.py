"""Rules for the work itself: matmuls and convolutions, where a sliced output saves FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, Final

import jax
import numpy as np
from jax import lax

from . import _index as ix
from ._index import Index
from ._region import Region, full, volume
from ._rule import Equation, Piece, bind, out_shape, rebind, rule, shape_of

LARGE_PRODUCT: Final = 2**21  # multiplications, about 0.1 ms
_PAIR = (tuple, NoneType)  # precisions that can be exchanged with the operands


@rule("dot_general")
def dot_general(eqn: Equation, r: Region) -> Piece:
  """out[b, i, j] = sum_k x[b, i, k] y[b, j, k]: b, i, j are passed on, k is read whole."""
  (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
  lhs: list[Index] = [None] * len(shape_of(eqn.invars[0]))
  rhs: list[Index] = [None] * len(shape_of(eqn.invars[1]))
  wanted = iter(r)
  for a, b in zip(lhs_batch, rhs_batch, strict=True):
    lhs[a] = rhs[b] = next(wanted)
  for dims, batch, summed in ((lhs, lhs_batch, lhs_sum), (rhs, rhs_batch, rhs_sum)):
    for d in range(len(dims)):
      if d not in batch and d not in summed:
        dims[d] = next(wanted)
  ins = [Region(lhs), Region(rhs)]
  return Piece(ins, _narrow_first(eqn) if _is_narrow_gradient(eqn, *ins) else rebind(eqn))


def _is_narrow_gradient(eqn: Equation, lhs: Region, rhs: Region) -> bool:
  """Whether this is part of a weight gradient, x^T dy, as XLA:CPU multiplies it slowly.

  Of two operands summed over their leading dimensions it makes a library call only if the first one
  is gathered, for a gather may write its columns as rows. It also undoes a product followed by a
  transpose. 512 x 51 of 512 x 512, summed over 256: 0.17 ms and not 0.25 on four idle cores, 0.18
  and not 0.55 on busy ones. The other way takes 3 ms longer to compile, so a small product keeps
  its order.
  """
  p = eqn.params
  (lhs_sum, rhs_sum), (batch, _) = p["dimension_numbers"]
  leads = all(sorted(summed) == list(range(len(summed))) for summed in (lhs_sum, rhs_sum))
  plain = not batch and p.get("out_sharding") is None and isinstance(p["precision"], _PAIR)
  free = all(len(r) > len(lhs_sum) for r in (lhs, rhs))
  if (lhs.is_full and rhs.is_full) or not (leads and plain and free):
    return False
  shapes = [shape_of(v) for v in eqn.invars]
  summed = math.prod(shapes[0][d] for d in lhs_sum)
  products = volume(lhs, shapes[0]) * volume(rhs, shapes[1]) // max(summed, 1)
  return products >= LARGE_PRODUCT and jax.default_backend() == "cpu"


def _narrow_first(eqn: Equation) -> Callable[..., Any]:
  """The product with the smaller operand first, kept from being turned around again."""
  (lhs_sum, rhs_sum), batch = eqn.params["dimension_numbers"]
  precision = eqn.params["precision"]
  turned = {
    "dimension_numbers": ((rhs_sum, lhs_sum), batch),
    "precision": precision and precision[::-1],
  }

  def emit(x: Any, y: Any) -> Any:
    if x.size <= y.size:
      return lax.optimization_barrier(bind(eqn, x, y))
    out = lax.optimization_barrier(bind(eqn, y, x, **turned))
    first = y.ndim - len(rhs_sum)
    return lax.transpose(out, (*range(first, out.ndim), *range(first)))

  return emit


@rule("ragged_dot_general")
def ragged_dot(eqn: Equation, r: Region) -> Piece | None:
  """Rows in groups, each with a matrix of its own: dimensions that no group cuts are passed on.

  out[i, j] = sum_k x[i, k] y[group(i), k, j]; its dW has the groups in front: out[g, k, j].
  """
  ragged = eqn.params["ragged_dot_dimension_numbers"]
  (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = ragged.dot_dimension_numbers
  lhs: list[Index] = [None] * len(shape_of(eqn.invars[0]))
  rhs: list[Index] = [None] * len(shape_of(eqn.invars[1]))
  grouped = ragged.lhs_ragged_dimensions[0]
  if grouped in lhs_batch:
    return None
  out = (1 if grouped in lhs_sum else 0) + len(lhs_batch)
  got: list[Index] = [None] * out
  fixed = (*lhs_batch, *lhs_sum), (*rhs_batch, *rhs_sum, *ragged.rhs_group_dimensions)
  for side, skipped, whole in ((lhs, fixed[0], grouped), (rhs, fixed[1], -1)):
    for d in range(len(side)):
      if d not in skipped:
        side[d] = None if d == whole else r[out]
        got.append(side[d])
        out += 1
  if Region(got).is_full:
    return None
  rest = [full(len(shape_of(v))) for v in eqn.invars[2:]]
  return Piece([Region(lhs), Region(rhs), *rest], rebind(eqn), Region(got))


@rule("conv_general_dilated")
def conv(eqn: Equation, r: Region) -> Piece | None:
  """Output batch, output channels (whole groups where there are some) and output positions.

  The gradient of a kernel is a convolution whose output positions are the kernel's taps.
  """
  dims = eqn.params["dimension_numbers"]
  lhs: list[Index] = [None] * len(r)
  rhs: list[Index] = [None] * len(r)
  got: list[Index] = [None] * len(r)
  changed: dict[str, Any] = {}
  batch, channels = dims.out_spec[:2]
  got[batch] = r[batch]
  lhs[dims.lhs_spec[0]] = r[batch]
  if eqn.params["feature_group_count"] == eqn.params["batch_group_count"] == 1:
    got[channels] = rhs[dims.rhs_spec[0]] = r[channels]
  else:
    changed |= _grouped_channels(eqn, r, lhs, rhs, got)
  changed |= _positions(eqn, r, got)
  if Region(got).is_full:
    return None
  turned = r[channels] is not None and _is_kernel_gradient(eqn, changed)
  if turned:
    changed |= _turned(eqn, changed, got)
  padded, spec = (rhs, dims.rhs_spec) if turned else (lhs, dims.lhs_spec)
  cropped = _crop(eqn, changed, padded, spec[2:], eqn.invars[turned])
  if cropped is None:
    return None
  changed |= cropped
  sizes = shape_of(eqn.invars[0]), shape_of(eqn.invars[1])
  ins = [Region(map(ix.canonical, d, n)) for d, n in zip((lhs, rhs), sizes, strict=True)]
  emit = rebind(eqn, **changed)

  def exchanged(x: Any, y: Any) -> Any:
    return lax.rev(emit(y, x), dims.out_spec[2:])

  result = Region(map(ix.canonical, got, out_shape(eqn)))
  return Piece(ins, exchanged if turned else emit, result)


def _crop(
  eqn: Equation, changed: dict[str, Any], read: list[Index], spatial: Sequence[int], v: Any
) -> dict[str, Any] | None:
  """Read less of the image instead of padding it by less than nothing; None if nothing is left.

  XLA:CPU reads memory that is not its own for a padding like (-1, 1).
  """
  p = {**eqn.params, **changed}
  padding = [list(q) for q in p["padding"]]
  for d, pads, gap in zip(spatial, padding, p["lhs_dilation"], strict=True):
    cut = [-(min(n, 0) // gap) for n in pads]
    if any(cut):
      kept = range(cut[0], shape_of(v)[d] - cut[1])
      if not kept:
        return None
      read[d] = kept
      pads[:] = [a + k * gap for a, k in zip(pads, cut, strict=True)]
  return {"padding": tuple(map(tuple, padding))}


def _is_kernel_gradient(eqn: Equation, changed: dict[str, Any]) -> bool:
  """Whether a plain convolution slides a window as large as the image over few positions.

  XLA:CPU has no library call for it if its output channels are few, and it has with the operands
  exchanged: 6 channels of 64 for an 8 x 24 x 24 image take 0.43 ms and not 1.0.
  """
  p, dims = {**eqn.params, **changed}, eqn.params["dimension_numbers"]
  steps = (*p["window_strides"], *p["lhs_dilation"], *p["rhs_dilation"])
  grouped = p["feature_group_count"] != 1 or p["batch_group_count"] != 1
  image, window = (
    math.prod(shape_of(v)[d] for d in spec[2:])
    for v, spec in zip(eqn.invars, (dims.lhs_spec, dims.rhs_spec), strict=True)
  )
  plain = all(n == 1 for n in steps) and not grouped and isinstance(p["precision"], _PAIR)
  return plain and 1 < image <= window and jax.default_backend() == "cpu"


def _turned(eqn: Equation, changed: dict[str, Any], got: list[Index]) -> dict[str, Any]:
  """Parameters of the convolution with its operands exchanged: positions come from last to first.

  out[t] = sum_p x[t + p - low] y[p] = sum_q y[q - t + low] x[q]
  """
  p, dims = {**eqn.params, **changed}, eqn.params["dimension_numbers"]
  batch, channels, *spatial = dims.out_spec
  padding = []
  for k, d in enumerate(spatial):
    last = ix.count(got[d], out_shape(eqn)[d]) - 1
    image = shape_of(eqn.invars[0])[dims.lhs_spec[2 + k]]
    window = shape_of(eqn.invars[1])[dims.rhs_spec[2 + k]]
    low = last - p["padding"][k][0]
    padding.append((low, last + image - window - low))
  numbers = lax.ConvDimensionNumbers(dims.rhs_spec, dims.lhs_spec, (channels, batch, *spatial))
  precision = p["precision"] and p["precision"][::-1]
  return {"padding": tuple(padding), "dimension_numbers": numbers, "precision": precision}


def _grouped_channels(
  eqn: Equation, r: Region, lhs: list[Index], rhs: list[Index], got: list[Index]
) -> dict[str, Any]:
  """Drop whole groups, and within the kept ones the channels that none of them wants.

  Feature groups split the input channels; batch groups (the gradient of a grouped kernel) split
  the input batch, of which each group contributes its own part to the output batch.
  """
  dims = eqn.params["dimension_numbers"]
  name = "feature_group_count" if eqn.params["feature_group_count"] > 1 else "batch_group_count"
  n = eqn.params[name]
  batch, channels = dims.out_spec[:2]
  split = dims.lhs_spec[1] if name == "feature_group_count" else dims.lhs_spec[0]
  size = out_shape(eqn)[channels] // n
  wanted = ix.positions(r[channels], size * n)
  groups, local = np.unique(wanted // size), np.unique(wanted % size)
  kept = (groups[:, None] * size + local).ravel()
  per = shape_of(eqn.invars[0])[split] // n
  inner = r[batch] if name == "batch_group_count" else None
  lhs[split] = ix.from_positions((groups[:, None] * per + ix.positions(inner, per)).ravel())
  got[channels] = rhs[dims.rhs_spec[0]] = ix.from_positions(kept)
  return {name: len(groups)}


def _positions(eqn: Equation, r: Region, got: list[Index]) -> dict[str, Any]:
  """Compute a range of output positions by moving the padding and widening the stride.

  Position o reads the window that starts at o * stride - low, so positions start + step * k are
  those of a convolution of stride step * stride with low - start * stride padding.
  """
  p, dims = eqn.params, eqn.params["dimension_numbers"]
  strides, padding = list(p["window_strides"]), [tuple(q) for q in p["padding"]]
  for k, out_dim in enumerate(dims.out_spec[2:]):
    wanted = ix.cover(r[out_dim])
    if wanted is None or not len(wanted) or len(wanted) == out_shape(eqn)[out_dim]:
      continue
    assert isinstance(wanted, range)
    taps = shape_of(eqn.invars[1])[dims.rhs_spec[2 + k]]
    size = shape_of(eqn.invars[0])[dims.lhs_spec[2 + k]]
    if not taps or not size:
      continue
    window = (taps - 1) * p["rhs_dilation"][k] + 1
    length = (size - 1) * p["lhs_dilation"][k] + 1
    low = padding[k][0] - wanted.start * strides[k]
    strides[k] *= wanted.step
    padding[k] = (low, (len(wanted) - 1) * strides[k] + window - length - low)
    got[out_dim] = wanted
  return {"window_strides": tuple(strides), "padding": tuple(padding)}
