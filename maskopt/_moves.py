"""How values move between one array and its packed form: read, written, added to what is there.

  read(x)[k] = x[at[k]]        put(x, v)[i] = v[k] if i == at[k] else x[i]
  add(x, v)[i] = x[i] + v[k] if i == at[k] and v[k] != 0 else x[i]

What is not addressed keeps its bits. The arrays that say where (`index`) are arguments and never
constants of the program: a captured index array costs seconds of compile time. Every movement is a
`jit` of its own, so that leaves of one shape are traced and lowered once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives

from . import _sharded
from ._bits import added, bits, from_bits

Index = dict[str, Any]
Combine = Callable[[Any, Any], Any]  # (what is there, what comes) -> what will be there

_HINTS: dict[str, Any] = {"unique_indices": True, "indices_are_sorted": True}
# What rounds in a scatter as `added` does.
_SCATTERED = frozenset(map(np.dtype, ("float32", "float64", "complex64", "complex128")))


class Move(Protocol):
  """Where the values of an array are; hashable, without the arrays of `index`."""

  def read(self, index: Index, x: Any) -> Any:
    """The values."""
    ...

  def write(self, combine: Combine, index: Index, x: Any, values: Any) -> Any:
    """The array with `combine(old, value)` where its values are."""
    ...

  def linear(self, adds: bool, index: Index, x: Any, values: Any) -> Any:
    """`write` of plain sums or of the values, in operations that JAX differentiates."""
    ...


@functools.partial(jax.jit, static_argnums=0)
def read(move: Move, index: Index, x: Any) -> Any:
  """The values of an array; reading keeps bits in every dtype."""
  return move.read(index, _gathered(move, x))


@functools.partial(jax.jit, static_argnums=0)
def put(move: Move, index: Index, x: Any, values: Any) -> Any:
  """The array with its values replaced."""
  old, values = _gathered(move, x), _gathered(move, values)
  return _sharded.like(_written(move, False, index, old, values.astype(x.dtype)), x)


@functools.partial(jax.jit, static_argnums=0)
def add(move: Move, index: Index, x: Any, values: Any) -> Any:
  """The array with something added to its values, as `added` does."""
  old, values = _gathered(move, x), _gathered(move, values)
  adds = values.dtype == x.dtype and x.dtype in _SCATTERED
  if not adds:
    values = added(move.read(index, old), values)
  return _sharded.like(_written(move, adds, index, old, values), x)


def _gathered(move: Move, x: Any) -> Any:
  """What an Explicit mesh shards can be selected element by element, but not indexed."""
  return x if isinstance(move, Whole) else _sharded.unsharded(x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _written(move: Move, adds: bool, index: Index, x: Any, values: Any) -> Any:
  index, x, values = _varying_alike((index, x, values))
  if x.dtype != jnp.bfloat16:
    return move.write(added if adds else _replaced, index, x, values)
  # XLA:CPU computes a bfloat16 scatter, update or select in float32 and quiets every NaN on the
  # way, the untouched ones too; the view costs a copy, for it never writes through a bitcast in
  # place. The barriers keep XLA from joining the move with what makes the values and with the view
  # back into floats: in one kernel, jaxlib 0.12 takes untouched elements through float32 as well.
  moved = move.write(_replaced, index, bits(x), lax.optimization_barrier(bits(values)))
  return from_bits(lax.optimization_barrier(moved), x.dtype)


@_written.defjvp
def _written_jvp(move: Move, adds: bool, primals: Any, tangents: Any) -> Any:
  # Moving data is linear; neither an integer view nor a loop has a transpose.
  (index, x, values), (_, dx, dvalues) = primals, tangents
  return _written(move, adds, index, x, values), move.linear(adds, index, dx, dvalues)


def _varying_alike(arrays: Any) -> Any:
  """The arrays, save that inside `shard_map` all vary where one does, as loops and scatters ask."""
  leaves, treedef = jax.tree.flatten(arrays)

  def odd(leaves: list[Any]) -> tuple[list[Any], Any]:
    each = [jnp.any(a != a) for a in leaves]
    return each, functools.reduce(jnp.logical_or, each)

  *own, joint = jax.make_jaxpr(odd)(leaves).out_avals  # traced apart: nothing of it stays behind
  if all(o == joint for o in own):
    return arrays
  # A select between an array and itself has the type that all have together; XLA removes it.
  some = odd(leaves)[1]
  pairs = zip(leaves, own, strict=True)
  return treedef.unflatten([a if o == joint else lax.select(some, a, a) for a, o in pairs])


def _replaced(old: Any, new: Any) -> Any:
  del old
  return new


@dataclasses.dataclass(frozen=True)
class Run:
  """A contiguous block; `index["start"]` holds its first index in each dimension.

  The start is data on purpose: with a constant one XLA:CPU fuses the update into a loop over the
  whole leaf (64 x 64: 2.1 ms and not 0.02).
  """

  block: tuple[int, ...]

  def read(self, index: Index, x: Any) -> Any:
    return _slice(x, _starts(index, x.ndim), self.block)

  def write(self, combine: Combine, index: Index, x: Any, values: Any) -> Any:
    return _update(combine, x, _starts(index, x.ndim), values)

  def linear(self, adds: bool, index: Index, x: Any, values: Any) -> Any:
    return self.write(lax.add if adds else _replaced, index, x, values)


def _starts(index: Index, rank: int) -> list[Any]:
  return [lax.index_in_dim(index["start"], d, keepdims=False) for d in range(rank)]


def _slice(x: Any, start: Sequence[Any], sizes: Sequence[int]) -> Any:
  return lax.dynamic_slice(x, start, sizes, allow_negative_indices=False)


def _update(combine: Combine, x: Any, start: Sequence[Any], values: Any) -> Any:
  new = combine(_slice(x, start, values.shape), values)
  return lax.dynamic_update_slice(x, new, start, allow_negative_indices=False)


@dataclasses.dataclass(frozen=True)
class Product:
  """A product of index sets, in the rank of the array.

  `index["dims"]` holds the chosen positions of each dimension that is not whole.
  """

  block: tuple[int, ...]

  def _chosen(self, x: Any) -> list[int]:
    return [d for d, (n, b) in enumerate(zip(x.shape, self.block, strict=True)) if b != n]

  def _rows(self, index: Index, x: Any) -> tuple[Any, Any]:
    """Flat positions up to the last chosen dimension, and the array with these in one."""
    chosen = self._chosen(x)
    leading = x.shape[: chosen[-1] + 1]
    rows = _flat(leading, dict(zip(chosen, index["dims"], strict=True)))
    # Positions along an inner dimension would come out first, and everything after it transposed.
    return rows, x.reshape(math.prod(leading), -1)

  def read(self, index: Index, x: Any) -> Any:
    rows, runs = self._rows(index, x)
    return _gather(runs, rows, "promise_in_bounds").reshape(self.block)

  def write(self, combine: Combine, index: Index, x: Any, values: Any) -> Any:
    def in_turns(x: Any, values: Any, index: Index) -> Any:
      return _in_turns(combine, self._chosen(x), index["dims"], x, values)

    def scattered(x: Any, values: Any, index: Index) -> Any:
      return self._scatter(_scatter_of(combine), index, x, values)

    if _sharded.has_devices(jax.typeof(x)):  # every turn would gather what is cut along its way
      return scattered(x, values, index)
    return lax.platform_dependent(x, values, index, cpu=in_turns, default=scattered)

  def linear(self, adds: bool, index: Index, x: Any, values: Any) -> Any:
    return self._scatter(lax.scatter_add if adds else lax.scatter, index, x, values)

  def _scatter(self, scatter: Callable, index: Index, x: Any, values: Any) -> Any:
    rows, runs = self._rows(index, x)
    values = values.reshape(rows.shape[0], -1)
    return _scatter(scatter, runs, rows, values, "promise_in_bounds").reshape(x.shape)


def _flat(shape: Sequence[int], chosen: dict[int, Any]) -> Any:
  """Flat positions of a product, sorted; the one position of no dimensions."""
  along = [chosen[d] if d in chosen else lax.iota(jnp.int32, n) for d, n in enumerate(shape)]
  flat = along[0] if along else jnp.zeros(1, jnp.int32)
  for inner, n in zip(along[1:], shape[1:], strict=True):
    sizes = (flat.shape[0], inner.shape[0])
    outer = lax.broadcast_in_dim(lax.mul(flat, jnp.int32(n)), sizes, (0,))
    flat = lax.add(outer, lax.broadcast_in_dim(inner, sizes, (1,))).reshape(-1)
  return flat


# How many values a turn moves, in a leaf that stays in the cache as a whole and in a larger one.
# Few of them stay in the cache even where rows are a power of two apart: columns of 8192 x 8192
# take 24 ms and not 64. Many make loops that XLA:CPU compiles once for all equal leaves, in 3 ms a
# leaf; a scatter, or a loop over less than 1 KiB a turn, is compiled anew for each in 7 to 12.
_CACHED = 2**20
_MANY, _FEW = 128, 8


def _in_turns(combine: Combine, chosen: list[int], dims: Any, x: Any, values: Any) -> Any:
  """Write a product tile by tile; on a CPU as fast as a scatter, or twice as fast.

  The array is seen as (outer, size, inner) around the last chosen dimension. A turn moves one of
  its positions, in as many outer rows as make a tile if these are whole.
  """
  last, at, shape = chosen[-1], dims[-1], x.shape
  inner = math.prod(shape[last + 1 :])
  rest = (inner,) if inner > 1 else ()  # a dimension of 1 would get a memory layout of its own
  x = x.reshape(math.prod(shape[:last]), shape[last], *rest)
  values = values.reshape(-1, at.shape[0], *rest)
  picked = _flat(shape[:last], dict(zip(chosen[:-1], dims[:-1], strict=True)))
  tile = 1
  if len(chosen) == 1:
    most = max((_MANY if x.size <= _CACHED else _FEW) // inner, 1)
    tile = max(d for d in range(1, most + 1) if values.shape[0] % d == 0)
  zero = jnp.int32(0)
  along = [zero] * len(rest)

  def turn(row: Any, k: Any, x: Any) -> Any:
    outer = row if len(chosen) == 1 else _slice(picked, [row], [1])[0]
    new = _slice(values, [row, k, *along], (tile, 1, *rest))
    return _update(combine, x, [outer, _slice(at, [k], [1])[0], *along], new)

  def next_tile(carry: Any) -> Any:
    row, k, x = carry
    over = k == at.shape[0] - 1
    return jnp.where(over, row + tile, row), jnp.where(over, zero, k + 1), turn(row, k, x)

  if values.shape[0] == tile:  # one counter less to compile and to run
    begin, end = (zero, x), at.shape[0]
    x = lax.while_loop(lambda c: c[0] < end, lambda c: (c[0] + 1, turn(zero, *c)), begin)[-1]
  else:
    begin, end = (zero, zero, x), values.shape[0]
    x = lax.while_loop(lambda c: c[0] < end, next_tile, begin)[-1]
  return x.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Points:
  """Single elements, at sorted flat positions `index["flat"]`; the values are 1-D.

  Unless they are all inside, positions past the end read zero and write nothing.
  """

  inside: bool

  def read(self, index: Index, x: Any) -> Any:
    mode = "promise_in_bounds" if self.inside else "fill"
    return _gather(x.reshape(-1), index["flat"], mode)

  def write(self, combine: Combine, index: Index, x: Any, values: Any) -> Any:
    return self._scatter(_scatter_of(combine), index, x, values)

  def linear(self, adds: bool, index: Index, x: Any, values: Any) -> Any:
    return self._scatter(lax.scatter_add if adds else lax.scatter, index, x, values)

  def _scatter(self, scatter: Callable, index: Index, x: Any, values: Any) -> Any:
    mode = "promise_in_bounds" if self.inside else "drop"
    return _scatter(scatter, x.reshape(-1), index["flat"], values, mode).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Whole:
  """The whole array, with zeros where `index["frozen"]`, a mask that broadcasts to it."""

  def _frozen(self, index: Index, x: Any) -> Any:
    frozen = index["frozen"]
    sharded = _sharded.spec_of(jax.typeof(x)) is not None
    return _sharded.like(jnp.broadcast_to(frozen, x.shape), x) if sharded else frozen

  def read(self, index: Index, x: Any) -> Any:
    # A select and never a product: 0 * inf is NaN.
    return jnp.where(self._frozen(index, x), jnp.zeros_like(x), x)

  def write(self, combine: Combine, index: Index, x: Any, values: Any) -> Any:
    x = _sharded.like(x, values)  # either may be zeros that nobody placed
    values = _sharded.like(values, x)
    return jnp.where(self._frozen(index, x), x, combine(x, values))

  def linear(self, adds: bool, index: Index, x: Any, values: Any) -> Any:
    return self.write(lax.add if adds else _replaced, index, x, values)


def _gather(x: Any, at: Any, mode: str) -> Any:
  """Positions along the first dimension; jnp would wrap negative ones, one more kernel a leaf."""
  numbers = lax.GatherDimensionNumbers(tuple(range(1, x.ndim)), (0,), (0,))
  sizes = (1, *x.shape[1:])
  return lax.gather(x, _column(at), numbers, sizes, mode=mode, fill_value=0, **_HINTS)


def _column(at: Any) -> Any:
  return lax.expand_dims(at, (1,))


def _scatter(scatter: Callable, x: Any, at: Any, values: Any, mode: str) -> Any:
  """Write along the first dimension, as the given scatter does."""
  rest = tuple(range(1, x.ndim))
  numbers = lax.ScatterDimensionNumbers(rest, (0,), (0,))
  return scatter(x, _column(at), values, numbers, mode=mode, **_HINTS)


def _scatter_of(combine: Combine) -> Callable:
  """`lax.scatter` with a function of its own, in one pass over memory.

  Reading, adding and writing are two passes over scattered memory, and `lax.scatter_add` needs one
  more array, of where nothing is added: 61 ms for Adam on 6.7M of 64M elements, and not 50.
  """
  if combine is _replaced:
    return lax.scatter

  def scatter(x: Any, at: Any, values: Any, numbers: Any, *, mode: Any, **hints: Any) -> Any:
    scalar = jax.ShapeDtypeStruct((), x.dtype)
    closed = jax.make_jaxpr(combine)(scalar, scalar)
    return primitives.scatter_p.bind(
      x,
      at,
      values,
      dimension_numbers=numbers,
      mode=lax.GatherScatterMode.from_any(mode),
      update_jaxpr=closed.jaxpr,
      update_consts=tuple(closed.consts),
      **hints,
    )

  return scatter
