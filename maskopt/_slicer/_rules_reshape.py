"""Reshapes: a demand survives a merge or a split of dimensions where it is still a product.

(tokens, heads * width) <-> (tokens, heads, width)     columns of whole heads stay a product;
scattered columns become the smallest product that covers them, and the rest is cut off after.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jax import lax

from .._sharded import spec_of
from . import _index as ix
from ._index import Index
from ._region import Region, block_shape, volume
from ._rule import Equation, Piece, out_shape, rule, shape_of
from ._take import take

MAX_GROUP = 1 << 24  # demands across merged dimensions larger than this are computed whole


class Group(NamedTuple):
  """Consecutive dimensions of the two shapes that hold the same elements."""

  ins: list[int]
  outs: list[int]


def groups(a: tuple[int, ...], b: tuple[int, ...]) -> list[Group]:
  """Match the dimensions of two shapes of equal size; dimensions of size 1 belong to no group."""
  left = [d for d, n in enumerate(a) if n != 1]
  right = [d for d, n in enumerate(b) if n != 1]
  found, i, j = [], 0, 0
  while i < len(left):
    start_i, start_j = i, j
    p, q = a[left[i]], b[right[j]]
    i, j = i + 1, j + 1
    while p != q:
      if p < q:
        p, i = p * a[left[i]], i + 1
      else:
        q, j = q * b[right[j]], j + 1
    found.append(Group(left[start_i:i], right[start_j:j]))
  return found


class Mapped(NamedTuple):
  """Where a demand on one group's output dimensions lies among its input dimensions.

  `wanted` and `read` are flat positions in the group; they differ where the product is larger.
  """

  ins: list[Index]
  read: np.ndarray
  wanted: np.ndarray


def _flat(wanted: list[Index], sizes: list[int]) -> np.ndarray:
  """Sorted flat positions of a product of index sets."""
  flat = np.zeros(1, np.int64)
  for index, n in zip(wanted, sizes, strict=True):
    flat = (flat[:, None] * n + ix.positions(index, n)).ravel()
  return flat


def _map_group(wanted: list[Index], outs: list[int], ins: list[int]) -> Mapped:
  flat = _flat(wanted, outs)
  parts: list[Index] = []
  stride = math.prod(ins)
  for n in ins:
    stride //= n
    used = np.zeros(n, bool)
    used[flat // stride % n] = True
    parts.append(ix.canonical(ix.from_positions(np.flatnonzero(used)), n))
  return Mapped(parts, _flat(parts, ins), flat)


@rule("reshape", "squeeze", "expand_dims")
def reshape(eqn: Equation, r: Region) -> Piece | None:
  shape, b = shape_of(eqn.invars[0]), out_shape(eqn)
  if 0 in shape or any(spec_of(v.aval) for v in (*eqn.invars, *eqn.outvars)):
    return None
  # A reshape may permute the dimensions first.
  permuted = eqn.params.get("dimensions") if eqn.primitive.name == "reshape" else None
  order = tuple(range(len(shape))) if permuted is None else tuple(permuted)
  piece = _regrouped(tuple(shape[d] for d in order), b, r)
  if permuted is None or piece is None:
    return piece
  (read,), emit, *_ = piece
  assert isinstance(read, Region)
  unpermuted = Region(read[order.index(d)] for d in range(len(shape)))
  return Piece([unpermuted], lambda x: emit(lax.transpose(x, order)))


def _regrouped(a: tuple[int, ...], b: tuple[int, ...], r: Region) -> Piece | None:
  """The piece of a reshape from a to b in row-major order."""
  ins: list[Index] = [None] * len(a)
  middle: list[int] = []  # one dimension per group: where products are cut back to the demand
  cuts: list[tuple[int, np.ndarray, np.ndarray]] = []
  for group in groups(a, b):
    wanted = [r[d] for d in group.outs]
    sizes = [a[d] for d in group.ins]
    if all(w is None for w in wanted):
      middle.append(math.prod(sizes))
    elif len(wanted) == len(sizes) == 1:
      ins[group.ins[0]] = wanted[0]
      middle.append(ix.count(wanted[0], sizes[0]))
    elif math.prod(sizes) > MAX_GROUP:
      return None
    else:
      mapped = _map_group(wanted, [b[d] for d in group.outs], sizes)
      for d, part in zip(group.ins, mapped.ins, strict=True):
        ins[d] = part
      if len(mapped.read) != len(mapped.wanted):
        cuts.append((len(middle), mapped.read, mapped.wanted))
      middle.append(len(mapped.read))
  read, shape = Region(ins), block_shape(r, b)
  if cuts and volume(read, a) == math.prod(a):
    return None

  def emit(x: Any) -> Any:
    if cuts:
      x = lax.reshape(x, middle)
      for axis, have, want in cuts:
        x = _take_axis(x, axis, have, want)
    return lax.reshape(x, shape)

  return Piece([read], emit)


def _take_axis(x: Any, axis: int, have: np.ndarray, want: np.ndarray) -> Any:
  def along(positions: np.ndarray) -> Region:
    return Region(ix.from_positions(positions) if d == axis else None for d in range(x.ndim))

  return take(x, along(have), along(want))
