"""Packed leaves: the trainable values of one leaf, standing where the leaf stood."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _provenance
from ._layout import Frozen, Index, Layout
from ._provenance import Record


@jax.tree_util.register_pytree_with_keys_class
class Packed:
  """The trainable values of one leaf, standing where the leaf stood.

  It is a pytree with one leaf, so packed gradients accumulate, scale and `pmean` like arrays. As an
  update it is final: `parameter + packed` writes in place on the trainable elements, and only the
  update that made it knows where these are, so one that was transformed afterwards, or has crossed
  a `jit` boundary, is refused.

  Attributes:
    values: array of the layout's packed shape; None where everything is frozen.
    layout: the leaf's layout.
    sets: as an update, whether the values replace the parameter's own.
    index: the arrays the layout needs, in an update only; not part of the pytree.
  """

  # NumPy must leave `array + packed` to us.
  __array_ufunc__ = None

  def __init__(self, values: Any, layout: Layout, sets: bool = False, index: Index | None = None):
    self.values = values
    self.layout = layout
    self.sets = sets
    self.index = index

  def tree_flatten_with_keys(self):
    return [(jax.tree_util.GetAttrKey("values"), self.values)], (self.layout, self.sets)

  def tree_flatten(self):
    return [self.values], (self.layout, self.sets)

  @classmethod
  def tree_unflatten(cls, aux, children):
    return cls(children[0], *aux)

  def __repr__(self) -> str:
    return f"Packed({self.layout.kind} of {self.layout.shape}, values={self.values!r})"

  @property
  def record(self) -> Record:
    """What `apply_updates` needs of an update; raises if something came between."""
    if self.index is None and not isinstance(self.layout, Frozen):
      raise ValueError(
        "`parameter + packed update`: expected the update as maskopt.selective_transform returned "
        "it, got one that a later transform changed or that crossed a jit boundary. Put that "
        "transform inside selective_transform, and call update and apply_updates in one jit."
      )
    return Record(self.layout, self.index, self.values, self.sets)

  def __radd__(self, p: Any) -> Any:
    """Return the parameter with these values added or set, every other bit its own."""
    return applied(p, self.record)


def is_packed(x: Any) -> bool:
  """Whether x is a packed leaf."""
  return isinstance(x, Packed)


def applied(p: Any, record: Record) -> Any:
  """The parameter after its update: read and written at the trainable elements only."""
  layout, index = record.layout, record.index
  if isinstance(layout, Frozen):
    return p
  p = jnp.asarray(p)
  if record.sets:
    return layout.put(record.values, p, index)
  return layout.add(record.values, p, index)


def dense(record: Record, dtype: Any) -> Any:
  """The full-shaped update whose frozen elements are -0.0, remembered as its packed values."""
  layout = record.layout
  zeros = jnp.full(layout.shape, -0.0 if jnp.issubdtype(dtype, np.inexact) else 0, dtype)
  return _provenance.made_of.remember(layout.put(record.values, zeros, record.index), record)
