"""How one leaf's trainable values are stored: take them, put them back.

  take(x)[k] = x[trainable[k]]        put(v, x)[i] = v[k] if i == trainable[k] else x[i]

Everything else is built on these two. Both only move data, so what is not addressed keeps its bits.
The arrays a layout needs at run time (`index`) are arguments and never constants of the program: a
captured index array costs seconds of compile time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._bits import added, bits, from_bits

Index = dict[str, Any]
# One product: for each dimension the chosen positions; a range where they are contiguous.
Sets = tuple[range | np.ndarray, ...]

_HINTS: dict[str, Any] = {"unique_indices": True, "indices_are_sorted": True}
# What a scatter adds as `added` does.
_SCATTERED = frozenset(map(np.dtype, ("float32", "float64", "complex64", "complex128")))


@dataclasses.dataclass(frozen=True)
class Layout:
  """One leaf's layout; hashable and equal exactly if it stores the same elements the same way.

  Attributes:
    shape: the parameter's shape.
    dtype: the parameter's dtype, by name.
    digest: of the trainable elements, however they are stored; empty where they are all or none, or
      where they are data.
    blocks: products of index sets that together are the trainable elements, if these are few and
      known while tracing; it follows from the digest, so it does not count in comparisons.
  """

  shape: tuple[int, ...]
  dtype: str
  digest: str = ""
  blocks: tuple[Sets, ...] = dataclasses.field(default=(), compare=False, repr=False)

  # Whether the values are the trainable elements alone, in the order of the leaf.
  in_order: ClassVar[bool] = False

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  def stores_like(self, other: Layout) -> bool:
    """Whether values of the other layout are those of this one, in another shape perhaps."""
    alike = self.digest and self.digest == other.digest and self.in_order and other.in_order
    return self == other or bool(alike)

  @property
  def packed_shape(self) -> tuple[int, ...] | None:
    """Shape of the packed values; None if there are none."""
    return self.shape

  @property
  def count(self) -> int | None:
    """How many elements train; None if only a runtime mask knows."""
    return 0 if self.packed_shape is None else math.prod(self.packed_shape)

  @property
  def kind(self) -> str:
    return type(self).__name__

  def take(self, x: Any, index: Index) -> Any:
    raise NotImplementedError

  def put(self, values: Any, x: Any, index: Index) -> Any:
    raise NotImplementedError

  def add(self, values: Any, x: Any, index: Index) -> Any:
    """Add to the trainable elements as `added` does, every other bit its own."""
    return self.put(added(self.take(x, index), values), x, index)


class Frozen(Layout):
  """Nothing trains: no values, and the parameter itself comes back."""

  @property
  def packed_shape(self) -> None:
    return None

  def take(self, x: Any, index: Index) -> None:
    del x, index

  def put(self, values: Any, x: Any, index: Index) -> Any:
    del values, index
    return x


class Full(Layout):
  """Everything trains: the values are the leaf."""

  def take(self, x: Any, index: Index) -> Any:
    del index
    return x

  def put(self, values: Any, x: Any, index: Index) -> Any:
    del index
    return values.astype(jnp.result_type(x))


@dataclasses.dataclass(frozen=True)
class Slice(Layout):
  """A contiguous block: the values keep the leaf's rank.

  `index["start"]` holds the first index of each dimension. It is data on purpose: with a constant
  start XLA:CPU fuses the update into a loop over the whole leaf (64 x 64: 2.1 ms and not 0.02).
  """

  in_order = True
  block: tuple[int, ...] = ()

  @property
  def kind(self) -> str:
    return "Block"

  @property
  def packed_shape(self) -> tuple[int, ...]:
    return self.block

  def take(self, x: Any, index: Index) -> Any:
    return _move(_slice_out, self.block, index["start"], x)

  def put(self, values: Any, x: Any, index: Index) -> Any:
    return _move(_slice_in, None, index["start"], x, values)


def _slice_out(block: tuple[int, ...], start: Any, x: Any) -> Any:
  return lax.dynamic_slice(x, _starts(start, x.ndim), block, allow_negative_indices=False)


def _slice_in(_: None, start: Any, x: Any, values: Any) -> Any:
  starts = _starts(start, x.ndim)
  return lax.dynamic_update_slice(x, values, starts, allow_negative_indices=False)


def _starts(start: Any, rank: int) -> list[Any]:
  return [lax.index_in_dim(start, d, keepdims=False) for d in range(rank)]


@dataclasses.dataclass(frozen=True)
class Block(Layout):
  """A product of per-dimension index sets: the values keep the leaf's rank.

  `index["dims"]` holds the chosen positions of each dimension that is not whole. The flat positions
  are built in the graph, over the dimensions up to the last chosen one; what follows moves whole.
  """

  in_order = True
  block: tuple[int, ...] = ()

  @property
  def packed_shape(self) -> tuple[int, ...]:
    return self.block

  @property
  def _chosen(self) -> tuple[int, ...]:
    return tuple(d for d, (n, b) in enumerate(zip(self.shape, self.block, strict=True)) if b != n)

  def _rows(self, index: Index) -> tuple[Any, int]:
    """Flat positions over the leading dimensions, and how many dimensions these are."""
    leading = self._chosen[-1] + 1
    chosen = dict(zip(self._chosen, index["dims"], strict=True))
    # lax and not jnp: a tree of 200 leaves traces this some thousand times.
    flat = None
    for d, n in enumerate(self.shape[:leading]):
      along = chosen[d] if d in chosen else lax.iota(jnp.int32, n)
      flat = along if flat is None else _outer_sum(flat, along, n)
    return flat, leading

  def take(self, x: Any, index: Index) -> Any:
    rows, leading = self._rows(index)
    return _move(_rows_out, (leading, self.block), rows, x)

  def put(self, values: Any, x: Any, index: Index) -> Any:
    rows, leading = self._rows(index)
    return _move(_rows_in, (leading, self.block), rows, x, values)

  def add(self, values: Any, x: Any, index: Index) -> Any:
    rows, leading = self._rows(index)
    single = math.prod(self.shape[leading:]) == 1
    return (
      _add_at(rows, values, x) if single and _adds(values, x) else super().add(values, x, index)
    )


def _outer_sum(outer: Any, inner: Any, n: int) -> Any:
  """Flat positions over one more dimension, of size n."""
  shape = (outer.shape[0], inner.shape[0])
  outer = lax.broadcast_in_dim(lax.mul(outer, jnp.int32(n)), shape, (0,))
  return lax.add(outer, lax.broadcast_in_dim(inner, shape, (1,))).reshape(-1)


def _rows_out(static: tuple[int, tuple[int, ...]], rows: Any, x: Any) -> Any:
  leading, block = static
  runs = x.reshape(math.prod(x.shape[:leading]), -1)
  return _gather(runs, rows, "promise_in_bounds").reshape(block)


def _rows_in(static: tuple[int, tuple[int, ...]], rows: Any, x: Any, values: Any) -> Any:
  leading, _ = static
  runs = x.reshape(math.prod(x.shape[:leading]), -1)
  values = values.reshape(rows.shape[0], -1)
  return _scatter(lax.scatter, runs, rows, values, "promise_in_bounds").reshape(x.shape)


def _gather(runs: Any, rows: Any, mode: str) -> Any:
  """`runs[rows]`, bare: jnp's indexing would wrap negative positions, one more kernel a leaf."""
  numbers = lax.GatherDimensionNumbers((1,), (0,), (0,))
  sizes = (1, runs.shape[1])
  return lax.gather(runs, _column(rows), numbers, sizes, mode=mode, fill_value=0, **_HINTS)


def _column(rows: Any) -> Any:
  return lax.expand_dims(rows, (1,))


def _scatter(scatter: Callable, runs: Any, rows: Any, values: Any, mode: str, **hints: Any) -> Any:
  """`runs[rows] = values`, or `+=`, as the given `lax` scatter has it."""
  numbers = lax.ScatterDimensionNumbers((1,), (0,), (0,))
  return scatter(runs, _column(rows), values, numbers, mode=mode, **(_HINTS | hints))


@dataclasses.dataclass(frozen=True)
class Elements(Layout):
  """Scattered elements: 1-D values at sorted flat positions, `index["flat"]`.

  Positions past the end (a runtime mask that trains fewer than `length`) read zero and write none.
  """

  in_order = True
  length: int = 0

  @property
  def packed_shape(self) -> tuple[int, ...]:
    return (self.length,)

  @property
  def _modes(self) -> tuple[str, str]:
    # Only a static mask promises that every position exists.
    static = ("promise_in_bounds", "promise_in_bounds")
    return static if self.digest else ("fill", "drop")

  def take(self, x: Any, index: Index) -> Any:
    return _move(_elements_out, self._modes[0], index["flat"], x)

  def put(self, values: Any, x: Any, index: Index) -> Any:
    return _move(_elements_in, self._modes[1], index["flat"], x, values)

  def add(self, values: Any, x: Any, index: Index) -> Any:
    return _add_at(index["flat"], values, x) if _adds(values, x) else super().add(values, x, index)


def _elements_out(mode: str, flat: Any, x: Any) -> Any:
  return _gather(x.reshape(-1, 1), flat, mode).reshape(-1)


def _elements_in(mode: str, flat: Any, x: Any, values: Any) -> Any:
  runs, values = x.reshape(-1, 1), values.reshape(-1, 1)
  return _scatter(lax.scatter, runs, flat, values, mode).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Dense(Layout):
  """The whole leaf with zeros where frozen; `index["frozen"]` is a mask that broadcasts to it."""

  trains: int | None = None

  @property
  def count(self) -> int | None:
    return self.trains

  def take(self, x: Any, index: Index) -> Any:
    # A select and never a product: 0 * inf is NaN.
    return _move(_zeroed, None, index["frozen"], x)

  def put(self, values: Any, x: Any, index: Index) -> Any:
    return _move(_selected, None, index["frozen"], x, values)


def _zeroed(_: None, frozen: Any, x: Any) -> Any:
  return jnp.where(frozen, jnp.zeros_like(x), x)


def _selected(_: None, frozen: Any, x: Any, values: Any) -> Any:
  return jnp.where(frozen, x, values)


def _adds(values: Any, x: Any) -> bool:
  """Whether to scatter-add: it must round as `added` does."""
  dtype = jnp.result_type(x)
  return jnp.result_type(values) == dtype and dtype in _SCATTERED


@jax.custom_jvp
def _add_at(flat: Any, values: Any, x: Any) -> Any:
  """Add at flat positions, at none whose value is zero, in one pass.

  Reading, adding and writing are two passes over scattered memory; this is one, and takes 33 ms for
  6.7M of 64M elements on a CPU instead of 60.
  """
  values = _computed(values, flat).reshape(-1, 1)
  kept = jnp.where(values[:, 0] == 0, math.prod(x.shape), flat)
  runs = x.reshape(-1, 1)
  added = _scatter(lax.scatter_add, runs, kept, values, "drop", indices_are_sorted=False)
  return added.reshape(x.shape)


def _computed(values: Any, flat: Any) -> Any:
  """Many values, once in memory; few as they are.

  XLA:CPU would compute them for the scatter and again for the question which are zero, and keep
  what they are made of for both: 56 ms a step in place of 50, for 6.7M values. It looks through a
  barrier but not through a loop, so here is one that makes no turn: no position is negative.
  """

  def in_memory(values: Any, flat: Any) -> Any:
    negative = jnp.any(flat[:1] < 0)
    return lax.while_loop(lambda c: c[0], lambda c: (c[0], -c[1]), (negative, values))[1]

  if values.size < 2**20:
    return values
  return lax.platform_dependent(values, flat, cpu=in_memory, default=lambda values, _: values)


@_add_at.defjvp
def _add_at_jvp(primals: Any, tangents: Any) -> Any:
  (flat, values, x), (_, dvalues, dx) = primals, tangents
  runs, dvalues = dx.reshape(-1, 1), dvalues.reshape(-1, 1)
  moved = _scatter(lax.scatter_add, runs, flat, dvalues, "drop")
  return _add_at(flat, values, x), moved.reshape(dx.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _moved_bits(move: Callable, static: Any, index: Any, *arrays: Any) -> Any:
  dtype = arrays[0].dtype
  moved = move(static, index, *map(bits, arrays))
  # The barrier keeps XLA from drawing the view through the move and back into floats, as that of
  # jaxlib 0.12 does in a loop.
  return from_bits(lax.optimization_barrier(moved), dtype)


@_moved_bits.defjvp
def _moved_bits_jvp(move: Callable, static: Any, primals: Any, tangents: Any) -> Any:
  # Moving data is linear; an integer view has no derivative, so tangents move as floats.
  index, *arrays = primals
  return _moved_bits(move, static, index, *arrays), move(static, index, *tangents[1:])


def _move(move: Callable, static: Any, index: Any, x: Any, *values: Any) -> Any:
  """Run a movement, on the integer view where writing into x would rewrite all of it.

  XLA:CPU computes a bfloat16 scatter, update or select in float32 and quiets every NaN on the way,
  the untouched ones too. Reads, and every other dtype, keep their bits, and a view of those would
  only cost a copy: XLA:CPU never writes through a bitcast in place.
  """
  x = jnp.asarray(x)
  values = tuple(jnp.asarray(v).astype(x.dtype) for v in values)
  if values and x.dtype == jnp.bfloat16:
    return _moved_bits(move, static, index, x, *values)
  return move(static, index, x, *values)


def digest(*parts: Any) -> str:
  """A short name for index arrays, equal exactly if they are."""
  h = hashlib.blake2b(digest_size=16)
  for part in parts:
    h.update(part if isinstance(part, bytes) else repr(part).encode())
  return h.hexdigest()
