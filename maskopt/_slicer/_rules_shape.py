"""Rules where every output element comes from the element at a known place: no arithmetic on data
of other places. The region moves with the elements.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from .._sharded import spec_of
from . import _index as ix
from ._index import Index
from ._region import Region, block_shape, full
from ._rule import Equation, Piece, out_shape, rebind, rule, shape_of

ELEMENTWISE = """
  abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
  clz complex conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp
  exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le lgamma log
  log1p logistic lt max min mul name ne neg nextafter not one_minus_square or polygamma
  population_count pow real reduce_precision regularized_incomplete_beta rem round rsqrt select_n
  shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient
  sub tan tanh xor zeta
""".split()
UNARY_SHARDING = ("sharding_constraint", "reshard", "mesh_cast", "layout_constraint")


@rule(*ELEMENTWISE)
def elementwise(eqn: Equation, r: Region) -> Piece | None:
  """out[r] = f(x[r], y[r], ...); scalars and dimensions of size 1 that stretch are read whole."""
  shape, ins = out_shape(eqn), []
  for v in eqn.invars:
    sizes = shape_of(v)
    if sizes == shape:
      ins.append(r)
    elif not sizes:
      ins.append(full(0))
    elif len(sizes) == len(shape):
      ins.append(Region(d if m == n else None for d, m, n in zip(r, sizes, shape, strict=True)))
    else:
      return None
  return Piece(ins, rebind(eqn))


@rule(*UNARY_SHARDING)
def placement(eqn: Equation, r: Region) -> Piece | None:
  """A constraint names how the whole array is laid out; a part keeps it where no dim is cut."""
  sharding = eqn.params.get("sharding", eqn.params.get("dst_sharding"))
  spec = getattr(sharding, "spec", None)
  if spec is None or any(s is not None and d is not None for s, d in zip(spec, r, strict=False)):
    return None
  return Piece([r], rebind(eqn))


@rule("transpose")
def transpose(eqn: Equation, r: Region) -> Piece:
  permutation, shape = eqn.params["permutation"], out_shape(eqn)
  ins: list[Index] = [None] * len(r)
  for out_dim, in_dim in enumerate(permutation):
    ins[in_dim] = r[out_dim]
  block = block_shape(r, shape)
  alone = [d for d, n in enumerate(block) if n == 1]
  if all(shape[d] == 1 for d in alone) or spec_of(eqn.outvars[0].aval):
    return Piece([Region(ins)], rebind(eqn))
  # A dimension cut down to one position moves by a reshape: XLA:CPU copies for a transpose of it.
  moving = [in_dim for d, in_dim in enumerate(permutation) if d not in alone]
  sizes = [n for d, n in sorted(zip(permutation, block, strict=True)) if d in moving]
  order = [sorted(moving).index(d) for d in moving]
  return Piece(
    [Region(ins)],
    lambda x: lax.reshape(lax.transpose(lax.reshape(x, sizes), order), block),
  )


@rule("rev")
def rev(eqn: Equation, r: Region) -> Piece:
  shape = shape_of(eqn.invars[0])

  def mirrored(d: Index, n: int) -> Index:
    return None if d is None else ix.from_positions(np.sort(n - 1 - ix.positions(d, n)))

  flipped = eqn.params["dimensions"]
  ins = (
    mirrored(d, n) if k in flipped else d for k, (d, n) in enumerate(zip(r, shape, strict=True))
  )
  return Piece([Region(ins)], rebind(eqn))


@rule("broadcast_in_dim")
def broadcast_in_dim(eqn: Equation, r: Region) -> Piece:
  source, target = shape_of(eqn.invars[0]), out_shape(eqn)
  dims = eqn.params["broadcast_dimensions"]
  ins = Region(r[o] if source[d] == target[o] else None for d, o in enumerate(dims))
  shape, sharding = block_shape(r, target), eqn.params.get("sharding")
  emit = rebind(eqn, shape=shape) if sharding else lambda x: lax.broadcast_in_dim(x, shape, dims)
  return Piece([ins], emit)


@rule("iota")
def iota(eqn: Equation, r: Region) -> Piece | None:
  """Counts from the region's own start, so that no constant is kept; one-hot codes read this."""
  dim, dtype = eqn.params["dimension"], eqn.params["dtype"]
  wanted, shape = r[dim], block_shape(r, out_shape(eqn))
  if spec_of(eqn.outvars[0].aval) or eqn.invars:
    return None

  def emit() -> Any:
    if wanted is None:
      return lax.broadcasted_iota(dtype, shape, dim)
    if isinstance(wanted, range):
      line = lax.iota(dtype, len(wanted)) * np.array(wanted.step, dtype)
      line = line + np.array(wanted.start, dtype)
    else:
      line = lax.convert_element_type(lax.squeeze(wanted.starts, (1,)), dtype)
    return lax.broadcast_in_dim(line, shape, (dim,))

  return Piece([], emit)


@rule("concatenate")
def concatenate(eqn: Equation, r: Region) -> Piece:
  axis, low = eqn.params["dimension"], 0
  ins: list[Region | None] = []
  for v in eqn.invars:
    n = shape_of(v)[axis]
    part = None if r[axis] is None else ix.within(r[axis], 0, low, low + n)
    if part is not None and not len(part):
      ins.append(None)
    else:
      part = None if part is None else ix.canonical(ix.moved(part, n, 1, -low), n)
      ins.append(Region(part if d == axis else other for d, other in enumerate(r)))
    low += n

  def emit(*parts: Any) -> Any:
    present = [x for x in parts if x is not None]
    return present[0] if len(present) == 1 else lax.concatenate(present, axis)

  return Piece(ins, emit)


@rule("stack")
def stack(eqn: Equation, r: Region) -> Piece:
  """Positions along the new dimension choose operands."""
  axis = eqn.params["axis"]
  wanted = set(ix.positions(r[axis], len(eqn.invars)).tolist())
  read = Region(d for k, d in enumerate(r) if k != axis)

  def emit(*parts: Any) -> Any:
    return jnp.stack([x for x in parts if x is not None], axis)

  return Piece([read if k in wanted else None for k in range(len(eqn.invars))], emit)


@rule("slice")
def slice_(eqn: Equation, r: Region) -> Piece:
  """The sliced region is a region of the operand: nothing is left to compute."""
  start = eqn.params["start_indices"]
  step = eqn.params["strides"] or (1,) * len(r)
  ins = (
    ix.canonical(ix.moved(d, m, k, a), n)
    for d, m, k, a, n in zip(r, out_shape(eqn), step, start, shape_of(eqn.invars[0]), strict=True)
  )
  return Piece([Region(ins)], lambda x: x)


@rule("pad")
def pad(eqn: Equation, r: Region) -> Piece | None:
  """Part of a padded array is part of the operand with less padding, or padding alone."""
  ins: list[Index] = []
  config: list[tuple[int, int, int]] = []
  got: list[Index] = []
  for d, (low, high, gap), n, size in zip(
    r, eqn.params["padding_config"], shape_of(eqn.invars[0]), out_shape(eqn), strict=True
  ):
    d = range(size) if d is None and min(low, high) < 0 else d  # crops: less is read
    read, pads = _unpad(d, low, gap, n) if d is not None else (None, None)
    if pads is None:  # the demand lies unevenly across interior padding
      read, pads, d = None, (low, high, gap), None
    ins.append(read)
    config.append(pads)
    got.append(d)
  result = Region(map(ix.canonical, got, out_shape(eqn)))
  shape = block_shape(result, out_shape(eqn))
  if any(d is not None and not len(d) for d in ins):
    return Piece([None, full(0)], lambda _, value: lax.broadcast(value, shape), result)
  read = Region(map(ix.canonical, ins, shape_of(eqn.invars[0])))
  return Piece([read, full(0)], lambda x, value: lax.pad(x, value, config), result)


def _unpad(wanted: Any, low: int, gap: int, n: int) -> tuple[Index, tuple[int, int, int] | None]:
  """(operand positions, remaining padding) for wanted output positions of one padded dimension."""
  at = ix.positions(wanted, 0) - low
  if gap == 0:
    before, after = int((at < 0).sum()), int((at >= n).sum())
    return ix.from_positions(at[before : len(at) - after]), (before, after, 0)
  filled = (at >= 0) & (at <= (n - 1) * (gap + 1)) & (at % (gap + 1) == 0)
  if not filled.any():
    return range(0), (0, 0, 0)
  inside = np.flatnonzero(filled)
  if not filled[inside[0] : inside[-1] + 1].all():
    return None, None
  before, after = int(inside[0]), len(at) - 1 - int(inside[-1])
  return ix.from_positions(at[filled] // (gap + 1)), (before, after, 0)
