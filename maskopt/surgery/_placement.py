"""Where the elements of an old leaf stand in a new one; values, masks and moments follow from it.

new[kept[0][i], kept[1][j], ...] = old[taken[0][i], taken[1][j], ...]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from .. import _tree
from ..report import _parts

Positions = tuple[np.ndarray | None, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
  """One leaf's origin.

  Attributes:
    path: of the old leaf, among the parameters.
    kept: for each axis the positions in the new leaf; None where they are as they were.
    taken: for each axis the positions in the old leaf; None for all of them.
    fresh: bools that broadcast to the new leaf: elements that are new wherever they stand.
    still: for each axis new positions that are frozen like old ones; None for no such ones.
  """

  path: str
  kept: Positions
  taken: Positions | None = None
  fresh: Any = False
  still: Positions | None = None

  def old_part(self, old: np.ndarray) -> np.ndarray:
    """The elements of the old leaf that go over."""
    if self.taken is None or all(t is None for t in self.taken):
      return old
    return old[_grid(self.taken, old.shape)]

  def into(self, new: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A copy of the new leaf with values at the places of the old elements, but fresh ones."""
    new = np.array(new)
    if not np.any(self.fresh):
      new[_grid(self.kept, new.shape)] = values
      return new
    placed = np.array(new)
    placed[_grid(self.kept, new.shape)] = values
    # np.where moves bits, NaN payloads too.
    return np.where(self.fresh, new, placed)

  def frozen(self, shape: tuple[int, ...]) -> Any:
    """The freeze mask of the new leaf, as small as its structure: old elements are frozen."""
    mask: Any = ~np.asarray(self.fresh, bool)
    for axis, kept in enumerate(self.kept):
      if kept is not None and len(kept) < shape[axis]:
        old = np.zeros(shape[axis], bool)
        old[kept] = True
        if self.still is not None and self.still[axis] is not None:
          old[self.still[axis]] = True
        if not old.all():
          mask = mask & old.reshape([-1 if k == axis else 1 for k in range(len(shape))])
    return bool(mask.all()) if mask.all() or not mask.any() else np.asarray(mask)


def whole(path: str, rank: int, fresh: Any = False) -> Placement:
  """The placement of a leaf that stays where it is."""
  return Placement(path, (None,) * rank, None, fresh)


def _grid(positions: Positions, shape: tuple[int, ...]) -> Any:
  if all(p is None for p in positions):
    return ...
  return np.ix_(*(np.arange(n) if p is None else p for p, n in zip(positions, shape, strict=True)))


def mask(params: Any, placements: Mapping[str, Placement]) -> Any:
  """The mask "old frozen, new trainable" over new parameters; what has no placement is new."""
  flat = _tree.flatten(params)
  leaves = [
    (leaf if _tree.is_opaque(leaf) else None)
    if _tree.is_hole(leaf)
    else placements[path].frozen(np.shape(leaf))
    if path in placements
    else False
    for path, leaf in zip(flat.paths, flat.leaves, strict=True)
  ]
  return flat.unflatten(leaves)


def host(x: Any) -> np.ndarray:
  """The array on the host, where moving it keeps the bits of every dtype."""
  return np.asarray(jax.random.key_data(x) if _parts.is_key(x) else x)


def like(array: np.ndarray, old: Any) -> Any:
  """The array in the form of the one it replaces: NumPy's own, or on the same devices."""
  if isinstance(old, np.ndarray):
    return array
  sharding = getattr(old, "sharding", None)
  if not isinstance(sharding, NamedSharding):
    return jnp.asarray(array)
  try:
    sharding.shard_shape(array.shape)
  except ValueError:  # the new size does not divide: every device gets the whole
    sharding = NamedSharding(sharding.mesh, PartitionSpec())
  return jax.device_put(array, sharding)
