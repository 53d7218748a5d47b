"""Values of one leaf from one layout to another: what both store moves over, the rest is given."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax

from . import _choice, _fresh
from ._bits import bits, from_bits
from ._fresh import Constant
from ._layout import Block, Dense, Elements, Frozen, Full, Index, Layout, Slice

Carry = Callable[[Any, Any], Any]

_WHOLE = (Full, Dense)  # values of the leaf's own shape
_SINGLE = (Slice, Block)  # one product of index sets
_CHUNK = 2**14


def carrier(old: Layout, old_index: Index, new: Layout, new_index: Index) -> Carry:
  """Return `carry(before, after)`, the new layout's values; `after` may be a `Constant`.

    carry(before, after)[k] = before[j] if new trains k-th what old trains j-th else after[k]

  Moved values keep their bits. Positions are compared here, once for all the values of a leaf: on
  the host where they are known, in the graph where they are traced.
  """
  if isinstance(old, Frozen) or isinstance(new, Frozen):
    return lambda before, after: after
  if old == new and (old.digest or isinstance(old, Full)):
    return lambda before, after: before
  if isinstance(old, _WHOLE) and isinstance(new, _WHOLE):
    frozen = [i["frozen"] for i in (old_index, new_index) if i]
    return functools.partial(_selected, functools.reduce(jnp.logical_or, frozen))
  if isinstance(old, _WHOLE):
    return functools.partial(_taken, old, old_index, new, new_index)
  if isinstance(new, _WHOLE):
    return functools.partial(_put, old, old_index, new, new_index)
  if isinstance(old, _SINGLE) and isinstance(new, _SINGLE):
    return _between_products(old, new)
  if isinstance(old, (Elements, *_SINGLE)) and isinstance(new, (Elements, *_SINGLE)):
    return _between_positions(positions(old, old_index), positions(new, new_index))
  return functools.partial(_through_leaf, old, old_index, new, new_index)


def _selected(frozen: Any, before: Any, after: Any) -> Any:
  return jnp.where(frozen, _fresh.operand(after), before)


def _taken(old: Layout, old_index: Index, new: Layout, new_index: Index, *values: Any) -> Any:
  before, after = values
  found = new.take(before, new_index)
  if isinstance(old, Full):
    return found
  frozen = jnp.broadcast_to(old_index["frozen"], old.shape).astype(jnp.uint8)
  return jnp.where(new.take(frozen, new_index) == 0, found, _fresh.operand(after))


def _put(old: Layout, old_index: Index, new: Layout, new_index: Index, *values: Any) -> Any:
  before, after = values
  found = _written(old, old_index, before, after)
  if isinstance(new, Full):
    return found
  return jnp.where(new_index["frozen"], _fresh.operand(after), found)


def _written(layout: Layout, index: Index, values: Any, x: Any) -> Any:
  """`layout.put(values, x, index)`; on a constant in one pass."""
  if isinstance(x, Constant):
    return _on_constant(layout, x.shape, index, values, x.value)
  return layout.put(values, x, index)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _on_constant(
  layout: Layout, shape: tuple[int, ...], index: Index, values: Any, value: Any
) -> Any:
  return layout.put(values, jnp.full(shape, value), index)


def _between_products(old: Layout, new: Layout) -> Carry:
  """Two products meet in a product, which is a block of either's values."""
  pairs = [
    np.intersect1d(np.asarray(a), np.asarray(b), assume_unique=True, return_indices=True)[1:]
    for a, b in zip(old.blocks[0], new.blocks[0], strict=True)
  ]
  if any(len(i) == 0 for i, _ in pairs):
    return lambda before, after: after
  (take, here), (put, there) = (
    _choice.block([pair[k] for pair in pairs], layout.packed_shape or (), old.dtype)
    for k, layout in enumerate((old, new))
  )

  def carry(before: Any, after: Any) -> Any:
    found = before if take.shape == take.packed_shape else take.take(before, here)
    return found if put.shape == put.packed_shape else _written(put, there, found, after)

  return carry


def positions(layout: Layout, index: Index) -> Any:
  """Flat positions in the leaf, sorted, of packed values; NumPy unless they are traced."""
  if isinstance(layout, Elements):
    flat = index["flat"]
    return flat if isinstance(flat, core.Tracer) else np.asarray(flat)
  sets = np.ix_(*(np.asarray(s) for s in layout.blocks[0]))
  return np.ravel_multi_index(sets, layout.shape).reshape(-1)


def _between_positions(old: Any, new: Any) -> Carry:
  """Match sorted positions; one that is not among the old finds a neighbour, and differs."""
  if old.shape[0] == 0 or new.shape[0] == 0:
    return lambda before, after: after
  if not isinstance(old, np.ndarray) or not isinstance(new, np.ndarray):
    return functools.partial(_in_chunks, old, new)
  slot = np.minimum(np.searchsorted(old, new), old.shape[0] - 1)
  stays = old[slot] == new
  slot = slot.astype(np.int32)

  def carry(before: Any, after: Any) -> Any:
    moved = _read(before.reshape(-1), slot)
    rest = after.value if isinstance(after, Constant) else after.reshape(-1)
    return jnp.where(stays, moved, rest).reshape(after.shape)

  return carry


def _read(values: Any, slot: Any) -> Any:
  return values.at[slot].get(mode="promise_in_bounds", indices_are_sorted=True)


def _in_chunks(old: Any, new: Any, before: Any, after: Any) -> Any:
  """The same for positions that are traced, chunk by chunk into the values that are given.

  What XLA needs for the rare step that changes a mask it sets aside at every step; so here it is
  some chunks, and not several arrays as long as the values.
  """
  if after.dtype == jnp.bfloat16:  # XLA:CPU would write it as float32, and quiet every NaN
    before, after = bits(before), bits(_fresh.whole(after))
    return from_bits(_in_chunks(old, new, before, after), jnp.bfloat16)
  size = min(new.shape[0], _CHUNK)
  before = before.reshape(-1)

  def carried(k: Any, values: Any) -> Any:
    # The last chunk may overlap the one before: what is carried twice is the same.
    start = (jnp.minimum(k * size, new.shape[0] - size),)
    at = lax.dynamic_slice(new, start, (size,))
    slot = jnp.minimum(jnp.searchsorted(old, at), old.shape[0] - 1).astype(jnp.int32)
    rest = lax.dynamic_slice(values, start, (size,))
    found = jnp.where(_read(old, slot) == at, _read(before, slot), rest)
    return lax.dynamic_update_slice(values, found, start)

  chunks = -(-new.shape[0] // size)
  values = _fresh.whole(after).reshape(-1)
  return lax.fori_loop(0, chunks, carried, values).reshape(after.shape)


def _through_leaf(old: Layout, old_index: Index, new: Layout, new_index: Index, *v: Any) -> Any:
  """For layouts that know no positions: write into a leaf of zeros and read it."""
  before, after = v
  ones = old.put(jnp.ones_like(before), jnp.zeros(old.shape, before.dtype), old_index)
  found = old.put(before, jnp.zeros(old.shape, before.dtype), old_index)
  known = new.take(ones, new_index) != 0
  return jnp.where(known, new.take(found, new_index), _fresh.operand(after))


def frozen(layout: Layout, index: Index) -> Any:
  """What a layout freezes, as bools of the leaf's shape."""
  ones = jnp.ones(layout.shape, jnp.uint8)
  return layout.put(layout.take(ones, index), jnp.zeros_like(ones), index) == 0


def stacked(carry: Carry, layout: Layout, before: Any, after: Any) -> Any:
  """Carry values that stand in stacks, as L-BFGS keeps them: leading dimensions are mapped over."""
  shape = layout.packed_shape or ()
  extra = np.ndim(after) - len(shape)
  after = _fresh.whole(after) if extra else after
  for _ in range(extra):
    carry = jax.vmap(carry)
  return carry(before, after)


def is_per_element(layout: Layout, value: Any) -> bool:
  """Whether a leaf of the state has an entry for each packed value, or a stack of them."""
  shape = layout.packed_shape
  if shape is None:
    return False
  tail = np.shape(value)[max(np.ndim(value) - len(shape), 0) :]
  return tail == shape and math.prod(np.shape(value)) % max(math.prod(shape), 1) == 0
