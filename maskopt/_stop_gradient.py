"""Gradients that stop at frozen elements, for a loop without an optimizer to wrap."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from . import _masks, _tree
from ._masks import FreezeMask, Runtime
from ._packing import Layouts


def stop_gradient(params: chex.ArrayTree, freeze_mask: FreezeMask) -> chex.ArrayTree:
  """Stop the gradient of frozen elements, inside a loss.

    value[i] = params[i],    d value[i] / d params[i] = 0 if freeze_mask[i] else 1

  For a loop without an optimizer to wrap. Under an optimizer it is not freezing: weight decay and
  momentum still move what has no gradient. Only wholly frozen leaves save backward FLOPs.

  Args:
    params: the parameters.
    freeze_mask: a freeze mask over them.
  Returns:
    The same parameters, bit for bit.
  Raises:
    ValueError: the mask does not fit; TypeError: a mask leaf is not boolean.
  Example:
    >>> import jax, jax.numpy as jnp, numpy as np, maskopt
    >>> loss = lambda w: (maskopt.stop_gradient(w, np.array([True, False])) ** 2).sum()
    >>> jax.grad(loss)(jnp.array([1.0, 1.0])).tolist()
    [0.0, 2.0]
  """
  where = "maskopt.stop_gradient(freeze_mask=...)"
  flat = _tree.flatten(params)
  if isinstance(freeze_mask, Layouts):
    freeze_mask = freeze_mask.freeze_mask
  masks = _masks.resolve(freeze_mask, params, where)
  return flat.unflatten(
    [_stopped(leaf, mask) for leaf, mask in zip(flat.leaves, masks, strict=True)]
  )


def _stopped(leaf: Any, mask: _masks.LeafMask) -> Any:
  if mask is None or mask is False:
    return leaf
  still = jax.lax.stop_gradient(leaf)
  if mask is True:
    return still
  return _held(mask.mask if isinstance(mask, Runtime) else mask, leaf)


@jax.custom_jvp
def _held(frozen: Any, x: Any) -> Any:
  # No select of the values: on XLA:CPU it quiets the NaNs of bfloat16.
  del frozen
  return x


@_held.defjvp
def _held_jvp(primals: Any, tangents: Any) -> Any:
  frozen, x = primals
  return x, jnp.where(frozen, jnp.zeros_like(x), tangents[1])
