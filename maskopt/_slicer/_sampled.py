"""Scattered elements: a gradient that is a matmul is sampled at them, never built.

  sampled[k] = sum_m x[m, i_k] dy[m, j_k]        instead of  (x^T dy)[i_k, j_k]

A pick stands in a demand where a region would, and passes through whatever moves or scales single
elements (transposes, reshapes, casts, sums of terms, jit, remat, a scan's carry) to the matmul. If
too many are picked for that, and several devices share the sum, each gathers from its own part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from .._sharded import unsharded
from ._parts import pick_shared
from ._region import Pick, full
from ._rule import Equation, Piece, out_shape, rebind, shape_of
from ._sums import Sum, shared_sum

GATHERED: Final = "scattered elements are gathered from the whole"  # where no product is sampled
CHUNK: Final = 512  # products in flight: their operands stay in cache
# Densities below which sampling wins on CPU, by summed length (2048 and 256 rows were measured:
# 0.92 and 0.59 of the dense time at 1%, 1.6 and 1.4 at 3%; see benchmarks/slicer.py). Accelerators
# gather slowly and multiply fast: they take the dense product.
SAMPLE_BELOW: Final = ((512, 0.015), (math.inf, 0.01))


class Sampled(NamedTuple):
  """A demand for single elements of an output.

  Args:
    indices: int32 of shape (n,), sorted unique positions in the flattened output; may be traced.
  """

  indices: jax.Array


def locate(pick: Pick, indices: jax.Array) -> jax.Array:
  """Flat positions in the variable that the pick is asked of, in the order of the output's."""
  for shape, permutation in pick.moves:
    places = dict(zip(permutation, jnp.unravel_index(indices, shape), strict=True))
    source = [n for _, n in sorted(zip(permutation, shape, strict=True))]
    indices = jnp.zeros_like(indices)
    for d, n in enumerate(source):
      indices = indices * n + places[d].astype(indices.dtype)
  return indices


def read(block: Any, pick: Pick, picks: Sequence[jax.Array]) -> jax.Array:
  """The picked elements of a whole array."""
  where = locate(pick, picks[pick.key])
  return jnp.ravel(unsharded(block)).at[where].get(mode="promise_in_bounds", unique_indices=True)


def _transpose(eqn: Equation, pick: Pick) -> Piece:
  move = out_shape(eqn), tuple(eqn.params["permutation"])
  return Piece([pick._replace(moves=(*pick.moves, move))], lambda x: x)


def _reshape(eqn: Equation, pick: Pick) -> Piece | None:
  return None if eqn.params.get("dimensions") is not None else Piece([pick], lambda x: x)


def _squeeze(eqn: Equation, pick: Pick) -> Piece:
  return Piece([pick], lambda x: x)


def _reshard(eqn: Equation, pick: Pick) -> Piece:
  """Picks are never taken of a sharded array: what is left of it is the mesh of the result."""
  whole = NamedSharding(eqn.params["dst_sharding"].mesh, PartitionSpec(None))
  return Piece([pick], rebind(eqn, dst_sharding=whole))


def _elementwise(eqn: Equation, pick: Pick) -> Piece | None:
  """Same-shaped operands are picked alike; scalars are read whole."""
  shape = out_shape(eqn)
  if any(shape_of(v) not in ((), shape) for v in eqn.invars):
    return None
  # A cast names a sharding of the array's rank; picks are never taken of a sharded one.
  changed = {"sharding": None} if "sharding" in eqn.params else {}
  ins = [pick if shape_of(v) == shape else full(0) for v in eqn.invars]
  return Piece(ins, rebind(eqn, **changed))


def _broadcast(eqn: Equation, pick: Pick) -> Piece | None:
  if shape_of(eqn.invars[0]):
    return None
  return Piece([full(0)], lambda x: lax.broadcast(x, (pick.size,)))


def _dot_general(eqn: Equation, pick: Pick) -> Piece | None:
  (lhs_sum, rhs_sum), (batch, _) = eqn.params["dimension_numbers"]
  lhs = shape_of(eqn.invars[0])
  summed = math.prod(lhs[d] for d in lhs_sum)
  if batch or not _is_worth_it(pick.size, math.prod(out_shape(eqn)), summed):
    return _shared(eqn, pick)
  aval: Any = eqn.outvars[0].aval

  def read(shape: Sequence[int], where: Any, x: Any, y: Any, *, part: bool = False) -> Any:
    del part
    width = math.prod(shape[len(lhs) - len(lhs_sum) :])
    left, right = _rows(x, lhs_sum), _rows(y, rhs_sum)
    return _products(left, right, where // width, where % width, aval.dtype)

  total = shared_sum(eqn)
  if total is not None:
    return _picked(eqn, pick, total._replace(read=read))

  def emit(picks: Sequence[jax.Array], x: Any, y: Any) -> Any:
    return read(out_shape(eqn), locate(pick, picks[pick.key]), x, y)

  return Piece([full(len(shape_of(v))) for v in eqn.invars], emit, needs_picks=True)


def _shared(eqn: Equation, pick: Pick) -> Piece | None:
  """A sum that devices share: each gathers from its own part."""
  total = shared_sum(eqn)
  return None if total is None else _picked(eqn, pick, total)


def _reduce_sum(eqn: Equation, pick: Pick) -> Piece | None:
  """A dimension of one element is no sum: broadcasting gives back what it added."""
  shape = shape_of(eqn.invars[0])
  single = all(shape[d] == 1 for d in eqn.params["axes"])
  return Piece([pick], lambda x: x) if single else _shared(eqn, pick)


def _picked(eqn: Equation, pick: Pick, total: Sum) -> Piece:
  def emit(picks: Sequence[jax.Array], *operands: Any) -> Any:
    return pick_shared(total, out_shape(eqn), locate(pick, picks[pick.key]), *operands)

  return Piece([full(len(shape_of(v))) for v in eqn.invars], emit, needs_picks=True)


def _scatter_add(eqn: Equation, pick: Pick) -> Piece | None:
  """What is added is gathered as a shared sum; the operand, mostly zeros, is picked by itself."""
  total = shared_sum(eqn)
  if total is None:
    return None
  added = _picked(eqn, pick, total)

  def emit(picks: Sequence[jax.Array], x: Any, *operands: Any) -> Any:
    return x + added.emit(picks, *operands)

  return Piece([pick, *added.ins[1:]], emit, needs_picks=True)


def _is_worth_it(n: int, size: int, summed: int) -> bool:
  limit = next(density for length, density in SAMPLE_BELOW if summed <= length)
  return jax.default_backend() == "cpu" and n < limit * size


def _rows(x: jax.Array, summed: Sequence[int]) -> jax.Array:
  """X as (free, summed): a picked column of x^T dy is then one contiguous row."""
  free = [d for d in range(x.ndim) if d not in summed]
  return lax.reshape(
    lax.transpose(x, (*free, *summed)),
    (math.prod(x.shape[d] for d in free), math.prod(x.shape[d] for d in summed)),
  )


def _products(left: jax.Array, right: jax.Array, i: jax.Array, j: jax.Array, dtype: Any) -> Any:
  """sum_m left[i, m] right[j, m], chunk by chunk; half precision is summed in float32."""
  n = i.shape[0]
  chunks = max(1, -(-n // CHUNK))
  size = min(n, CHUNK)
  padded = [jnp.pad(k, (0, chunks * size - n)).reshape(chunks, size) for k in (i, j)]
  narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
  wide = jnp.float32 if narrow else dtype

  def chunk(at: Any) -> Any:
    a, b = (m.at[k].get(mode="promise_in_bounds") for m, k in zip((left, right), at, strict=True))
    return jnp.sum(a.astype(wide) * b.astype(wide), axis=-1)

  return lax.map(chunk, tuple(padded)).reshape(-1)[:n].astype(dtype)


PickRule = Callable[[Equation, Pick], Piece | None]
PICKED: dict[str, PickRule] = {
  "transpose": _transpose,
  "reshape": _reshape,
  "squeeze": _squeeze,
  "expand_dims": _squeeze,
  "broadcast_in_dim": _broadcast,
  "dot_general": _dot_general,
  "conv_general_dilated": _shared,
  "reshard": _reshard,
  "reduce_sum": _reduce_sum,
  "scatter-add": _scatter_add,
  "scatter_add": _scatter_add,
}
for _name in ("add_any", "add", "sub", "mul", "div", "neg", "convert_element_type", "copy",
              "reduce_precision", "name"):  # fmt: skip
  PICKED[_name] = _elementwise
# Equations that hand demands on unread, so that a pick passes as a region does.
TRANSPARENT: Final = frozenset(
  "jit pjit closed_call core_call call checkpoint remat2 remat cond scan shard_map "
  "optimization_barrier psum psum_invariant pvary".split()
)
