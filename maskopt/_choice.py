"""Which layout a leaf gets: the structure of its mask, and what was measured on each platform."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from . import _layout
from ._layout import Block, Dense, Elements, Frozen, Full, Index, Layout, Sets, Slice
from ._masks import Runtime

Prefer = Literal["time", "memory", "values"]


@dataclasses.dataclass(frozen=True)
class Limits:
  """Largest trainable share at which a layout is faster than Dense for one Adam step.

  `run_bytes` parts rows from columns: a block whose contiguous runs are shorter moves like columns.
  Below `small` elements only a contiguous block pays: what else there is takes XLA:CPU 3 to 10 ms
  to compile (and, if no other leaf trains as many elements, all the rest of the leaf's step anew in
  50), which takes some hundred steps to come back from leaves of this size, and more from smaller.
  """

  slice: float
  rows: float
  columns: float
  elements: float
  run_bytes: int = 64
  small: int = 2**18


# CPU as benchmarks/step.py measures it; GPU is guessed and TPU taken from the compiler's own
# estimates, for want of a machine.
_LIMITS = {
  "cpu": Limits(slice=0.6, rows=0.25, columns=0.15, elements=0.15),
  "gpu": Limits(slice=0.6, rows=0.6, columns=0.4, elements=0.3),
  "tpu": Limits(slice=0.6, rows=0.4, columns=0.0, elements=0.0),
}
# Adam in float32 holds 8 bytes an element; packed values add 4 of index, so memory ties here.
_MEMORY_TIE = 2 / 3
_INT32 = 2**31 - 1


def platform_of(leaves: list[Any]) -> str:
  """The platform the parameters live on, or JAX's default while they are abstract."""
  for x in leaves:
    if isinstance(x, jax.Array) and not isinstance(x, Tracer):
      return next(iter(x.devices())).platform
  return jax.default_backend()


def choose(
  mask: bool | np.ndarray | Runtime,
  leaf: Any,
  dtype: Any,
  *,
  platform: str,
  prefer: Prefer,
  keep_rank: bool,
) -> tuple[Layout, Index]:
  """Return the leaf's layout and the arrays it needs at run time.

  Args:
    mask: from `_masks.resolve`, so of the leaf's rank.
    leaf: anything with the parameter's shape.
    dtype: the parameter's dtype.
    platform: "cpu", "gpu", "tpu"; others are treated as "gpu".
    prefer: "memory" packs whenever that is smaller, faster or not; "values" whenever it can.
    keep_rank: keep every product of index sets a Block, for an optimizer that sees leaf shapes.
  """
  shape = tuple(np.shape(leaf))
  extended = jnp.issubdtype(dtype, jax.dtypes.extended)  # PRNG keys, which are always frozen
  name = "uint32" if extended else np.dtype(dtype).name
  if isinstance(mask, Runtime):
    return _runtime(mask, shape, name)
  if isinstance(mask, bool):
    return (Frozen if mask else Full)(shape, name), {}
  trainable = ~mask
  dims = index_sets(trainable, shape)
  if dims is not None and all(len(d) == n for d, n in zip(dims, shape, strict=True)):
    return Full(shape, name), {}
  if not trainable.any():
    return Frozen(shape, name), {}
  limits = _LIMITS.get(platform, _LIMITS["gpu"])
  share = np.count_nonzero(trainable) / trainable.size
  if dims is not None:
    packed = block(dims, shape, name)
    pays = packed[0].size >= limits.small or isinstance(packed[0], Slice)
    limit = _block_limit(packed[0], limits)
    if limit is not None and ((pays and share <= limit) or prefer != "time" or keep_rank):
      return packed
  # All layouts of one mask share their digest, and so their gradients.
  if dims is not None:
    digest, blocks = _digest(dims), (dims,)
  else:
    digest = _layout.digest(trainable.shape, np.packbits(trainable).tobytes())
    blocks = blocks_of(trainable, shape)
  if _elements_pay(share, math.prod(shape), limits, prefer):
    flat = np.flatnonzero(np.broadcast_to(trainable, shape)).astype(np.int32)
    return Elements(shape, name, digest, blocks, len(flat)), {"flat": flat}
  count = round(share * math.prod(shape))
  return Dense(shape, name, digest, blocks, count), {"frozen": mask}


def index_sets(trainable: np.ndarray, shape: tuple[int, ...]) -> Sets | None:
  """The per-dimension index sets whose product the trainable elements are, or None.

  A set is a product exactly if its size is the product of the sizes of its projections. Works on
  the mask as it broadcasts, so a row mask of a huge leaf costs its rows.
  """
  projections = [
    trainable.any(axis=tuple(k for k in range(trainable.ndim) if k != d))
    for d in range(trainable.ndim)
  ]
  if np.count_nonzero(trainable) != math.prod(int(np.count_nonzero(p)) for p in projections):
    return None
  return tuple(_along(p, n) for p, n in zip(projections, shape, strict=True))


def _along(projection: Any, n: int) -> range | np.ndarray:
  """The chosen positions of one dimension, of size n."""
  # A dimension may be far larger than all that its mask says of it.
  return range(n) if projection.all() else as_range(np.flatnonzero(projection))


def blocks_of(trainable: np.ndarray, shape: tuple[int, ...], most: int = 4) -> tuple[Sets, ...]:
  """Disjoint products whose union the trainable elements are; empty if there are more than `most`.

  Positions along the first dimension that train the same things belong together, and so on inward.
  """
  if trainable.ndim == 0:
    return ((),) if trainable else ()
  rows = np.packbits(trainable.reshape(trainable.shape[0], -1), axis=1)
  alike: dict[bytes, list[int]] = {}
  for k, row in enumerate(rows):
    alike.setdefault(row.tobytes(), []).append(k)
    if len(alike) > most + 1:  # one kind of row may train nothing
      return ()
  found: list[Sets] = []
  for members in alike.values():
    if not trainable[members[0]].any():
      continue
    inner = blocks_of(trainable[members[0]], shape[1:], most)
    chosen = range(shape[0]) if trainable.shape[0] == 1 else as_range(np.array(members))
    found += [(chosen, *rest) for rest in inner]
    if not inner or len(found) > most:
      return ()
  return tuple(found)


def as_range(positions: range | np.ndarray) -> range | np.ndarray:
  """Sorted positions as a range, if they are contiguous."""
  if len(positions) == 0 or positions[-1] - positions[0] + 1 != len(positions):
    return positions
  return range(int(positions[0]), int(positions[-1]) + 1)


def block(
  dims: Sequence[range | np.ndarray], shape: tuple[int, ...], name: str
) -> tuple[Slice | Block, Index]:
  """The layout of a product of index sets, sorted, one for each dimension."""
  sizes = tuple(len(d) for d in dims)
  sets = tuple(as_range(d) for d in dims)
  if all(isinstance(d, range) for d in sets):
    start = np.array([d[0] for d in sets], np.int32)
    return Slice(shape, name, _digest(sets), (sets,), sizes), {"start": start}
  picked = tuple(np.asarray(d, np.int32) for d, n in zip(sets, shape, strict=True) if len(d) != n)
  return Block(shape, name, _digest(sets), (sets,), sizes), {"dims": picked}


def _digest(sets: Sets) -> str:
  return _layout.digest(
    *(s if isinstance(s, range) else s.astype(np.int64).tobytes() for s in sets)
  )


def _block_limit(layout: Slice | Block, limits: Limits) -> float | None:
  """The largest share that pays; None where positions would not fit 32 bits."""
  if isinstance(layout, Slice):
    return limits.slice
  leading = max(d for d, n in enumerate(layout.shape) if layout.packed_shape[d] != n) + 1
  if math.prod(layout.shape[:leading]) > _INT32:
    return None
  run = math.prod(layout.shape[leading:]) * jnp.dtype(layout.dtype).itemsize
  return limits.rows if run >= limits.run_bytes else limits.columns


def densest_elements() -> float:
  """The largest share at which scattered elements are packed to be fast, on JAX's default."""
  return _LIMITS.get(jax.default_backend(), _LIMITS["gpu"]).elements


def index_for_memory(layout: Layout) -> int | None:
  """Bytes of the index with which `prefer="memory"` packs a Dense leaf; None if it does not."""
  limits = _LIMITS["cpu"]  # no limit counts, save that of 32 bits
  if len(layout.blocks) == 1:
    packed, index = block(layout.blocks[0], layout.shape, layout.dtype)
    fits = _block_limit(packed, limits) is not None
    return sum(x.nbytes for x in jax.tree.leaves(index)) if fits else None
  count = layout.count or 0
  pays = _elements_pay(count / max(layout.size, 1), layout.size, limits, "memory")
  return 4 * count if pays else None


def _elements_pay(share: float, size: int, limits: Limits, prefer: Prefer) -> bool:
  if size > _INT32:
    return False
  if prefer == "time":
    return size >= limits.small and share <= limits.elements
  return prefer == "values" or share <= _MEMORY_TIE


def _runtime(mask: Runtime, shape: tuple[int, ...], name: str) -> tuple[Layout, Index]:
  if mask.count is None:
    return Dense(shape, name), {"frozen": mask.mask}
  layout = Elements(shape, name, length=mask.count)
  return layout, {"flat": positions(mask.mask, shape, mask.count)}


def positions(frozen: jax.Array, shape: tuple[int, ...], count: int) -> jax.Array:
  """Flat positions of the trainable elements, sorted; unused slots lie past the end, unique too."""
  size = math.prod(shape)
  flat = jnp.broadcast_to(~frozen, shape).reshape(-1)
  found = jnp.nonzero(flat, size=count, fill_value=size)[0].astype(jnp.int32)
  used = jnp.arange(count, dtype=jnp.int32)
  return jnp.where(found < size, found, size + used)
