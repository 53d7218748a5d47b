"""Flax's train state, with the update written in place on the trainable elements."""

from __future__ import annotations

from typing import Any

import jax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from .. import _freeze
from .._choice import Prefer
from . import _carried


class TrainState(train_state.TrainState):
  """`flax.training.train_state.TrainState` with a freeze mask.

    params[i] keeps its bits if freeze_mask[i]        the others follow `tx` on them alone

  A drop-in: `create` takes a freeze mask, `apply_gradients` writes in place on the trainable
  elements where the state is donated to `jit`. Gradients may be packed ones of `maskopt.grad`.

  Attributes:
    step: number of updates.
    apply_fn: as in Flax; `maskopt.linen.freeze_statistics(model.apply, mask)` keeps the batch
      statistics of frozen layers still.
    params: the parameters.
    tx: the transformation, on the trainable elements if there is a mask.
    opt_state: its state; `maskopt.mask_of(state.opt_state)` is the mask.

  Example:
    >>> import jax.numpy as jnp, numpy as np, optax, maskopt
    >>> from flax import linen as nn
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    >>> state = maskopt.linen.TrainState.create(
    ...   apply_fn=nn.Dense(2).apply, params=params, tx=optax.adamw(0.5),
    ...   freeze_mask={"kernel": True, "bias": np.array([True, False])},
    ... )
    >>> state = state.apply_gradients(grads=params)
    >>> state.params["bias"].round(2).tolist(), int(state.step)
    ([1.0, 0.5], 1)
  """

  @classmethod
  def create(  # pyright: ignore[reportIncompatibleMethodOverride]  # Flax's takes these as **kwargs
    cls,
    *,
    apply_fn: Any,
    params: Any,
    tx: Any,
    freeze_mask: Any = None,
    prefer: Prefer = "time",
    master_dtype: Any = None,
    **kwargs: Any,
  ) -> TrainState:
    """Create a state at step 0.

    Args:
      apply_fn: usually `model.apply`.
      params: the parameters, in dicts or FrozenDicts.
      tx: any Optax transformation.
      freeze_mask: a freeze mask over params; True = frozen. None leaves `tx` as it is, which may be
        one of maskopt's own. The masks that modules carry: `maskopt.linen.freeze_mask`.
      prefer: as in `maskopt.selective_transform`.
      master_dtype: as in `maskopt.selective_transform`.
      **kwargs: further fields of a subclass.
    Returns:
      The state. Its `apply_fn` raises a ValueError, when it is traced, where a masked layer of the
      model freezes what the optimizer trains.
    Raises:
      ValueError: the mask does not fit the parameters; TypeError: it is not boolean.
    """
    if freeze_mask is not None:
      tx = _freeze.selective_transform(
        tx, freeze_mask=freeze_mask, prefer=prefer, master_dtype=master_dtype
      )
    state = super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)
    # fp8 statistics stand beside the parameters that the optimizer has.
    trained = params["params"] if OVERWRITE_WITH_GRADIENT in params else params
    return state.replace(apply_fn=_carried.checked(apply_fn, trained, freeze_mask, state.opt_state))

  def apply_gradients(self, *, grads: Any, **kwargs: Any) -> TrainState:
    """Return the state after one update.

    Args:
      grads: gradients like `params`, full-shaped or packed.
      **kwargs: fields to replace, `batch_stats=` for instance.
    Returns:
      A new state, `step` increased by one.
    Raises:
      ValueError: the gradients have other paths or shapes than the parameters.
    """
    # fp8 statistics travel as gradients that replace their parameters.
    overwrites = not isinstance(grads, jax.Array) and OVERWRITE_WITH_GRADIENT in grads
    given, old = (grads["params"], self.params["params"]) if overwrites else (grads, self.params)
    updates, opt_state = self.tx.update(given, self.opt_state, old)
    # In the trace of tx.update, so that packed values are added where they belong.
    params: Any = _freeze.apply_updates(old, updates)  # pyright: ignore[reportArgumentType]  # Optax's tree type is wider
    if overwrites:
      params = {"params": params, OVERWRITE_WITH_GRADIENT: grads[OVERWRITE_WITH_GRADIENT]}
    return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)
