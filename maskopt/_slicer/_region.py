"""Which elements of an array are wanted: products of per-dimension index sets, and lists of them.

  Region((i0, ..., ik)) = i0 x ... x ik            None = the whole dimension
  demand on a variable  = a tuple of regions whose union covers what its readers ask

Products survive transposes, contractions and elementwise operations, which is why structured
masks (rows, units, heads, blocks) save work and scattered ones need a sampled product.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from . import _index as ix
from ._index import Index

MAX_REGIONS = 8  # every region of a variable repeats its equation; more are joined into one
WHOLE_SHARE = 0.9  # a variable demanded beyond this share is computed whole and sliced by readers


class Region(tuple[Index, ...]):
  """One index per dimension; a tuple subclass, so it is a leaf for `jax.tree`."""

  __slots__ = ()

  @property
  def is_full(self) -> bool:
    return all(d is None for d in self)


class Pick(NamedTuple):
  """Single elements that are data: a place in a demand for what no region can say.

  Args:
    key: which of the program's index arrays names them.
    size: how many there are.
    moves: (shape, permutation) of every transpose between that output and here.
  """

  key: int
  size: int
  moves: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()

  @property
  def is_full(self) -> bool:
    return False


Shape: TypeAlias = Sequence[int]
Wanted: TypeAlias = Region | Pick
Demand: TypeAlias = tuple[Any, ...]  # of Wanted; most rules only ever meet regions


def region(shape: Shape, *dims: object) -> Region:
  """The region of an array of that shape given by slices, ranges, integers, bools or None."""
  dims = dims + (None,) * (len(shape) - len(dims))
  return Region(ix.make_index(d, n) for d, n in zip(dims, shape, strict=True))  # pyright: ignore


@functools.lru_cache(maxsize=64)
def full(rank: int) -> Region:
  return Region((None,) * rank)


def canonical(r: Iterable[Index], shape: Shape) -> Region:
  return Region(map(ix.canonical, r, shape))


def block_shape(r: Region, shape: Shape) -> tuple[int, ...]:
  return tuple(map(ix.count, r, shape))


def volume(r: Region, shape: Shape) -> int:
  return math.prod(map(ix.count, r, shape))


def covers(outer: Region, inner: Region) -> bool:
  return all(map(ix.contains, outer, inner))


def hull(a: Region, b: Region, shape: Shape) -> Region:
  """The smallest region that covers both."""
  return Region(map(ix.union, a, b, shape))


def join(demand: Demand, new: Wanted, shape: Shape) -> Demand:
  """Add to a demand; a pick of something wanted whole is read from that."""
  picks = tuple(p for p in demand if isinstance(p, Pick))
  regions = tuple(r for r in demand if isinstance(r, Region)) if picks else demand
  if isinstance(new, Region):
    regions = _join(regions, new, shape)
  elif new not in picks:
    picks = (*picks, new)
  return regions if regions and regions[0].is_full else (*regions, *picks)


def _join(regions: tuple[Region, ...], new: Region, shape: Shape) -> tuple[Region, ...]:
  """Two regions become one where their hull wastes nothing."""
  if any(o is new or covers(o, new) for o in regions):
    return regions
  if new.is_full or not regions:
    return (new,)
  left = list(regions)
  merged = True
  while merged:
    merged = False
    for k, other in enumerate(left):
      together = hull(other, new, shape)
      if volume(together, shape) <= volume(other, shape) + volume(new, shape):
        new, merged = together, True
        del left[k]
        break
  left.append(new)
  if len(left) > MAX_REGIONS:
    left = [functools.reduce(lambda a, b: hull(a, b, shape), left)]
  if sum(volume(o, shape) for o in left) > WHOLE_SHARE * math.prod(shape):
    return (full(len(shape)),)
  return tuple(left)


def join_all(wanted: Iterable[Wanted], shape: Shape) -> Demand:
  return functools.reduce(lambda old, r: join(old, r, shape), wanted, ())


def one(wanted: Iterable[Wanted], shape: Shape) -> Demand:
  """A demand of at most one region: a loop carry is one array."""
  wanted = tuple(wanted)
  regions = [r for r in wanted if isinstance(r, Region)]
  merged = [functools.reduce(lambda a, b: hull(a, b, shape), regions)] if regions else []
  return join_all((*merged, *(p for p in wanted if isinstance(p, Pick))), shape)


def without_picks(demand: Demand, rank: int) -> Demand:
  """The demand with picks widened to the whole, for equations that cannot pass them on."""
  return (full(rank),) if any(isinstance(p, Pick) for p in demand) else demand


def share(regions: Demand, shape: Shape) -> float:
  """Wanted elements over all elements (regions may overlap: an upper bound)."""
  return sum(volume(r, shape) for r in regions) / max(math.prod(shape), 1)
