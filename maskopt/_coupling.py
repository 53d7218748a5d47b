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

  for copies, names in _CALLS:

    def step(params: Any, grads: Any, copies: Any = copies, names: Any = names) -> Any:
      extra = {k: v for k, v in _arguments(params, grads).items() if k in names}
      params = copies(params)
      return optimizer.update(grads, optimizer.init(params), params, **extra)

    try:
      # Optax promotes; whether the caller allows that is not asked here.
      with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return list(_lines(jax.make_jaxpr(step)(leaf, leaf).jaxpr))
    except Exception:  # whatever an optimizer raises for want of an argument
      continue
  return object()  # it needs arguments we do not know: nothing can be promised


# How Optax's optimizers want their parameters, and what they ask of `update` by name; some refuse
# what they do not ask for. Lookahead is first, for it says a warning over parameters of one copy.
_CALLS = (
  (optax.LookaheadParams.init_synced, ()),
  (lambda params: params, ()),
  (lambda params: params, ("value", "grad", "value_fn")),
  (lambda params: params, ("obj_fn",)),
  (lambda params: params, ("grad_fn",)),
)


def _arguments(params: Any, grads: Any) -> dict[str, Any]:
  def value(p: Any) -> Any:
    return jnp.sum(p["leaf"])

  return {
    "value": value(params),
    "grad": grads,
    "value_fn": value,
    "obj_fn": value,
    "grad_fn": lambda p, _: p,
  }


# These only move data. A dot product of matrices flattens them first, a norm broadcasts.
_MOVES = frozenset(["reshape", "broadcast_in_dim", "squeeze", "transpose"])
# These too, along the leaves of a history (lbfgs), so their dimensions count the leaf's own.
_INDEXING = frozenset(["gather", "scatter", "dynamic_slice", "dynamic_update_slice"])


def _lines(jaxpr: jex.Jaxpr) -> Iterator[Any]:
  for eqn in jaxpr.eqns:
    # Integers count steps and positions, which no leaf's number depends on.
    literals = [repr(v.val) for v in eqn.invars if isinstance(v, jex.Literal) and _is_float(v)]
    moves = eqn.primitive.name in _MOVES and not literals
    if not moves and any(map(_is_float, (*eqn.invars, *eqn.outvars))):
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
  if axes is None or eqn.primitive.name in _INDEXING | _MOVES:
    return ""
  return "whole" if np.ndim(eqn.outvars[0].aval) == 0 else str(axes)


def _is_float(v: Any) -> bool:
  return jnp.issubdtype(getattr(v.aval, "dtype", np.int32), np.inexact)
