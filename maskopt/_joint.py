"""One leaf in several parts, each laid out by itself: what several optimizers share."""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import _layout
from ._layout import Frozen, Full, Index, Layout
from ._packing import Layouts, Static


@jax.tree_util.register_pytree_node_class
class Parts(tuple):
  """The values of one leaf in several parts; a pytree."""

  __slots__ = ()

  @property
  def dtype(self) -> Any:
    """The widest dtype among the parts."""
    return functools.reduce(jnp.promote_types, (jnp.result_type(x) for x in self))

  def tree_flatten(self):
    return tuple(self), None

  @classmethod
  def tree_unflatten(cls, aux, children):
    del aux
    return cls(children)


@dataclasses.dataclass(frozen=True)
class Joint(Layout):
  """Disjoint parts of one leaf; the values are `Parts` with one entry for each.

    put((v, w), x) = put_w(w, put_v(v, x))

  Part k keeps its arrays in `index[str(k)]`. The entries are never joined in one array: each stays
  as its own optimizer stores it.
  """

  parts: tuple[Layout, ...] = ()

  @property
  def packed_shape(self) -> tuple[int, ...]:
    return (sum(math.prod(part.packed_shape or (0,)) for part in self.parts),)

  @property
  def count(self) -> int | None:
    counts = [part.count for part in self.parts]
    return None if None in counts else sum(n or 0 for n in counts)

  def take(self, x: Any, index: Index) -> Any:
    return Parts(part.take(x, index[str(k)]) for k, part in enumerate(self.parts))

  def put(self, values: Any, x: Any, index: Index) -> Any:
    for k, part in enumerate(self.parts):
      x = part.put(values[k], x, index[str(k)])
    return x

  def add(self, values: Any, x: Any, index: Index) -> Any:
    for k, part in enumerate(self.parts):
      x = part.add(values[k], x, index[str(k)])
    return x


def joint(parts: Sequence[Layout]) -> Layout:
  """The layout of disjoint parts; a lone part is its own."""
  if len(parts) == 1:
    return parts[0]
  known = all(part.digest for part in parts)
  few = all(part.blocks for part in parts)
  return Joint(
    parts[0].shape,
    parts[0].dtype,
    _layout.digest(*(part.digest for part in parts)) if known else "",
    tuple(block for part in parts for block in part.blocks) if few else (),
    tuple(parts),
  )


def joint_index(index: Sequence[Index]) -> Index:
  """The arrays of `joint(parts)`; none for no part."""
  if not index:
    return {}
  return index[0] if len(index) == 1 else {str(k): i for k, i in enumerate(index)}


@jax.tree_util.register_pytree_with_keys_class
class Joined(Layouts):
  """The layouts of everything that any member trains; no element may train in two of them.

  A leaf that the members leave nothing of is Full, for its gradient needs no parts; `parted` tells
  how they share it.
  """

  def __init__(self, members: Sequence[Layouts]):
    self.members = tuple(members)
    if not all(isinstance(m, Layouts) for m in self.members):
      return  # JAX puts placeholders in a tree's place
    static = _static([m.static for m in self.members])
    index = [
      {} if isinstance(layout, Full) else joint_index([i for _, i in self._shares(k)])
      for k, layout in enumerate(static.layouts)
    ]
    super().__init__(static, index)

  def _shares(self, k: int) -> list[tuple[Layout, Index]]:
    """How those members that train some of leaf k store it."""
    shares = [(m.static.layouts[k], m.index[k]) for m in self.members]
    return [(layout, index) for layout, index in shares if layout is not None and trains(layout)]

  def tree_flatten_with_keys(self) -> Any:
    return [(jax.tree_util.SequenceKey(i), m) for i, m in enumerate(self.members)], None

  def tree_flatten(self) -> Any:
    return self.members, None

  @classmethod
  def tree_unflatten(cls, aux, children):
    del aux
    return cls(children)

  def parted(self) -> Layouts:
    """The same mask with every leaf as its members store it, whole leaves too."""
    layouts, index = list(self.static.layouts), list(self.index)
    for k in range(len(layouts)):
      shares = self._shares(k)
      if shares:
        layouts[k] = joint([layout for layout, _ in shares])
        index[k] = joint_index([i for _, i in shares])
    return Layouts(Static.of(self.static.paths, layouts), index)


# The last union whose first member a mask was, for as long as that mask lives: eager updates ask at
# every step, of the same masks.
_unions: weakref.WeakKeyDictionary[Static, tuple[list[str], Static]] = weakref.WeakKeyDictionary()


def _static(members: Sequence[Static]) -> Static:
  names = [m.digest for m in members]
  known = _unions.get(members[0])
  if known is None or known[0] != names:
    layouts = [_union(found) for found in zip(*(m.layouts for m in members), strict=True)]
    known = _unions[members[0]] = names, Static.of(members[0].paths, layouts)
  return known[1]


def _union(found: Sequence[Layout | None]) -> Layout | None:
  """What together the members train of one leaf, as a gradient should deliver it."""
  parts = [layout for layout in found if layout is not None and trains(layout)]
  if not parts:
    return found[0]
  whole = joint(parts)
  # Parts that leave nothing out need the plain gradient, which each of them can read.
  return Full(whole.shape, whole.dtype) if whole.count == whole.size else whole


def trains(layout: Layout | None) -> bool:
  """Whether a leaf has packed values at all."""
  return layout is not None and not isinstance(layout, Frozen)
