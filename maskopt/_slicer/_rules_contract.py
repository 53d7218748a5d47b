"""Rules for the work itself: matmuls and convolutions, where a sliced output saves FLOPs."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _index as ix
from ._index import Index
from ._region import Region, full
from ._rule import Equation, Piece, out_shape, rebind, rule, shape_of


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
  return Piece([Region(lhs), Region(rhs)], rebind(eqn))


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
  sizes = shape_of(eqn.invars[0]), shape_of(eqn.invars[1])
  ins = [Region(map(ix.canonical, d, n)) for d, n in zip((lhs, rhs), sizes, strict=True)]
  return Piece(ins, rebind(eqn, **changed), Region(map(ix.canonical, got, out_shape(eqn))))


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
