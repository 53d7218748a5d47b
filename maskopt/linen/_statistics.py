"""Batch statistics of frozen linen layers: used as they are, and still."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ..nnx._carried import StaticMask
from ..nnx._units import Units

_WHERE = "maskopt.linen.freeze_statistics(freeze_mask=...)"


def freeze_statistics(apply_fn: Callable[..., Any], freeze_mask: Any) -> Callable[..., Any]:
  """Return `apply_fn` with the batch statistics of frozen layers held still.

    statistic[i] keeps its bits if unit i is frozen
    y[..., i] = normalise(x[..., i], running statistics) if unit i is frozen, in every mode

  A unit of a `nn.BatchNorm` is frozen if all its parameters (scale and bias) are; a layer without
  parameters is frozen if all parameters of the smallest module around it are. A network that is
  called with `train=True` throughout needs no other change.

  Args:
    apply_fn: `model.apply`, or a function like it: variables first.
    freeze_mask: a static freeze mask over `variables["params"]`; True = frozen.
  Returns:
    A function of the same arguments; updated batch statistics come back as from `apply_fn`.
  Raises:
    ValueError: when called: the mask does not fit the parameters, or is runtime data; TypeError: it
      is not boolean.
  Example:
    >>> import jax, jax.numpy as jnp, maskopt
    >>> from flax import linen as nn
    >>> model, x = nn.BatchNorm(use_running_average=False), jnp.array([[3.0], [5.0]])
    >>> variables = model.init(jax.random.key(0), x)
    >>> apply = maskopt.linen.freeze_statistics(model.apply, True)
    >>> _, changed = apply(variables, x, mutable=["batch_stats"])
    >>> changed["batch_stats"]["mean"].tolist()
    [0.0]
  """

  @functools.wraps(apply_fn, updated=())
  def applied(variables: Any, *args: Any, **kwargs: Any) -> Any:
    still = _Still(Units(freeze_mask, variables["params"], _WHERE))
    with nn.intercept_methods(still.intercept):
      return apply_fn(variables, *args, **kwargs)

  return applied


class _Still:
  """What takes the place of each call of a `nn.BatchNorm`."""

  def __init__(self, units: Units):
    self._units = units
    self._infers = False  # a layer within this interceptor's own call is left alone

  def intercept(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    norm = context.module
    if self._infers or type(norm) is not nn.BatchNorm or context.method_name != "__call__":
      return call(*args, **kwargs)
    if norm.is_initializing() or not norm.has_variable("batch_stats", "mean"):
      return call(*args, **kwargs)
    still = self._units.of("/".join(norm.path), norm.get_variable("batch_stats", "mean").shape)
    if still is False:
      return call(*args, **kwargs)
    inferred = self._inferred(norm, *args, **kwargs)
    if not isinstance(still, StaticMask):
      return inferred
    return _by_unit(still.array, norm, inferred, lambda: call(*args, **kwargs))

  def _inferred(self, norm: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The layer in inference mode: a pure call of an unbound copy, which moves no statistics."""
    del args, kwargs  # the mode, which is decided, and a mask of what statistics are taken over
    copy = norm.clone(parent=None, name=None, use_running_average=True)
    self._infers = True
    try:
      return copy.apply(norm.variables, x)
    finally:
      self._infers = False


def _by_unit(still: np.ndarray, norm: Any, inferred: Any, call: Callable[[], Any]) -> Any:
  """Frozen units inferred, the others as the layer has them; statistics move for these alone."""
  mean, var = (norm.get_variable("batch_stats", name) for name in ("mean", "var"))
  live = call()
  if norm.is_mutable_collection("batch_stats"):
    for name, before in (("mean", mean), ("var", var)):
      now = norm.get_variable("batch_stats", name)
      norm.put_variable("batch_stats", name, jnp.where(still, before, now))
  shape = [1] * live.ndim
  shape[norm.axis] = mean.size
  return jnp.where(still.reshape(shape), inferred, live)
