"""How one leaf's trainable values are stored: take them, put them back, add to them.

  take(x)[k] = x[trainable[k]]        put(v, x)[i] = v[k] if i == trainable[k] else x[i]

Everything else is built on these. They only move data, so what is not addressed keeps its bits. The
arrays a layout needs at run time (`index`) are arguments and never constants of the program.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from . import _moves
from ._bits import added
from ._moves import Index as Index, Move

# One product: for each dimension the chosen positions; a range where they are contiguous.
Sets = tuple[range | np.ndarray, ...]


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

  @property
  def _move(self) -> Move:
    raise NotImplementedError  # Frozen and Full move nothing, and override what asks for it

  def take(self, x: Any, index: Index) -> Any:
    return _moves.read(self._move, index, x)

  def put(self, values: Any, x: Any, index: Index) -> Any:
    return _moves.put(self._move, index, x, values)

  def add(self, values: Any, x: Any, index: Index) -> Any:
    """Add to the trainable elements as `added` does, every other bit its own."""
    return _moves.add(self._move, index, x, values)


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

  add = put


class Full(Layout):
  """Everything trains: the values are the leaf."""

  def take(self, x: Any, index: Index) -> Any:
    del index
    return x

  def put(self, values: Any, x: Any, index: Index) -> Any:
    del index
    return values.astype(jnp.result_type(x))

  def add(self, values: Any, x: Any, index: Index) -> Any:
    del index
    return added(x, values)


@dataclasses.dataclass(frozen=True)
class Slice(Layout):
  """A contiguous block: the values keep the leaf's rank. See `_moves.Run`."""

  in_order = True
  block: tuple[int, ...] = ()

  @property
  def kind(self) -> str:
    return "Block"

  @property
  def packed_shape(self) -> tuple[int, ...]:
    return self.block

  @property
  def _move(self) -> Move:
    return _moves.Run(self.block)


@dataclasses.dataclass(frozen=True)
class Block(Layout):
  """A product of index sets: the values keep the leaf's rank. See `_moves.Product`."""

  in_order = True
  block: tuple[int, ...] = ()

  @property
  def packed_shape(self) -> tuple[int, ...]:
    return self.block

  @property
  def _move(self) -> Move:
    return _moves.Product(self.block)


@dataclasses.dataclass(frozen=True)
class Elements(Layout):
  """Scattered elements: 1-D values. See `_moves.Points`.

  A runtime mask may train fewer elements than `length`.
  """

  in_order = True
  length: int = 0

  @property
  def packed_shape(self) -> tuple[int, ...]:
    return (self.length,)

  @property
  def _move(self) -> Move:
    # Only a static mask promises that every position exists.
    return _moves.Points(inside=bool(self.digest))


@dataclasses.dataclass(frozen=True)
class Dense(Layout):
  """The whole leaf with zeros where frozen. See `_moves.Whole`."""

  trains: int | None = None

  @property
  def count(self) -> int | None:
    return self.trains

  @property
  def _move(self) -> Move:
    return _moves.Whole()


def digest(*parts: Any) -> str:
  """A short name for index arrays, equal exactly if they are."""
  h = hashlib.blake2b(digest_size=16)
  for part in parts:
    h.update(part if isinstance(part, bytes) else repr(part).encode())
  return h.hexdigest()
