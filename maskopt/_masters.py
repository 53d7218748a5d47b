"""Wide copies of narrow trainable values: what the optimizer moves, and the parameter follows.

In bfloat16, 1.0 + 100 x -1e-3 stays 1.0, for each step is below half a unit of the last place. A
master keeps the sum; the parameter is *set* to its rounded value.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import _bits, _tree


def _map(fun: Any, *trees: Any) -> Any:
  """Map over values with the holes (frozen leaves, leaves without a master) as leaves."""
  return jax.tree.map(fun, *trees, is_leaf=_tree.is_opaque)


def create(values: Any, dtype: Any) -> Any:
  """Masters of the floats narrower than dtype, MaskedNode elsewhere; None without dtype."""
  if dtype is None:
    return None

  def wide(v: Any) -> Any:
    if _tree.is_hole(v) or not jnp.issubdtype(jnp.result_type(v), jnp.floating):
      return optax.MaskedNode()
    narrower = jnp.finfo(jnp.result_type(v)).bits < jnp.finfo(dtype).bits
    return v.astype(dtype) if narrower else optax.MaskedNode()

  return _map(wide, values)


def follow(masters: Any, values: Any) -> Any:
  """The masters, begun anew wherever somebody else has changed the parameter."""

  def followed(m: Any, v: Any) -> Any:
    if _tree.is_hole(m):
      return m
    same = _bits.bits(m.astype(v.dtype)) == _bits.bits(v)
    return jnp.where(same, m, v.astype(m.dtype))

  return None if masters is None else _map(followed, masters, values)


def restart(masters: Any, values: Any) -> Any:
  """Masters of other values, where there were masters."""
  return (
    None
    if masters is None
    else _map(lambda m, v: m if _tree.is_hole(m) else v.astype(m.dtype), masters, values)
  )


def over(masters: Any, values: Any) -> Any:
  """The values the optimizer sees: the master where there is one."""
  return (
    values if masters is None else _map(lambda m, v: v if _tree.is_hole(m) else m, masters, values)
  )


def like(masters: Any, grads: Any) -> Any:
  """The gradients in their masters' dtype."""

  def cast(m: Any, g: Any) -> Any:
    return g if _tree.is_hole(m) or _tree.is_hole(g) else g.astype(m.dtype)

  return grads if masters is None else _map(cast, masters, grads)


def step(masters: Any, updates: Any, values: Any) -> tuple[Any, Any]:
  """The new masters, and for each the value to set with its difference to the parameter's own."""
  if masters is None:
    return None, _map(lambda u: None, updates)

  def moved(m: Any, u: Any) -> Any:
    return m if _tree.is_hole(m) or _tree.is_hole(u) else _bits.added(m, u)

  def target(m: Any, v: Any) -> Any:
    if _tree.is_hole(m):
      return None
    rounded = m.astype(v.dtype)
    # An infinity minus itself would be NaN.
    moved = jnp.where(rounded == v, 0, rounded.astype(m.dtype) - v.astype(m.dtype))
    return rounded, moved

  masters = _map(moved, masters, updates)
  return masters, _map(target, masters, values)
