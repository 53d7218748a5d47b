"""Whether an optimizer treats a leaf as more than a bag of numbers.

Adam does not: packed into 1-D, its trainable elements follow the same trajectory. Muon and
adafactor see the rank, clip_by_block_rms the number of elements. The answer is read from the
optimizer's own program: traced on a matrix, on the same numbers as a vector, and on a longer
vector, it is one program exactly if neither rank nor size matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core as jex


def sees_rank(optimizer: optax.GradientTransformationExtraArgs) -> bool:
  """Whether a matrix trains otherwise than the vector of its elements."""
  return _program(optimizer, (128, 128)) != _program(optimizer, (16_384,))


def sees_size(optimizer: optax.GradientTransformationExtraArgs) -> bool:
  """Whether a leaf trains otherwise when zeros are appended to it."""
  return _program(optimizer, (16_384,)) != _program(optimizer, (32_768,))


def _program(optimizer: optax.GradientTransformationExtraArgs, shape: tuple[int, ...]) -> Any:
  """The optimizer's program on one leaf, shapes left out; unlike any other if it is unknown."""
  leaf = {"leaf": jax.ShapeDtypeStruct(shape, jnp.float32)}

  def step(params: Any, grads: Any) -> Any:
    return optimizer.update(grads, optimizer.init(params), params)

  try:
    # Optax promotes; whether the caller allows that is not asked here.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
      closed = jax.make_jaxpr(step)(leaf, leaf)
  except Exception:  # noqa: BLE001 - it needs arguments we do not have: nothing can be promised
    return object()
  return list(_lines(closed.jaxpr))


def _lines(jaxpr: jex.Jaxpr) -> Iterator[Any]:
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "reshape":  # a dot product of matrices flattens them first
      continue
    literals = tuple(repr(v.val) for v in eqn.invars if isinstance(v, jex.Literal))
    yield eqn.primitive.name, literals, _reduces(eqn)
    for value in eqn.params.values():
      for inner in value if isinstance(value, (tuple, list)) else [value]:
        if isinstance(inner, jex.ClosedJaxpr):
          yield from _lines(inner.jaxpr)
        elif isinstance(inner, jex.Jaxpr):
          yield from _lines(inner)


def _reduces(eqn: Any) -> str:
  """How an equation folds its operand: not at all, whole, or along some dimensions."""
  axes = eqn.params.get("axes", eqn.params.get("dimension_numbers"))
  if axes is None or eqn.primitive.name in ("transpose", "broadcast_in_dim"):
    return ""
  return "whole" if np.ndim(eqn.outvars[0].aval) == 0 else str(axes)
