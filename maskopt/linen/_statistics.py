"""Batch statistics of frozen linen layers: used as they are, and still."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from .. import _tree
from .._carrying import StaticMask
from ..nnx._units import Units

_LIBRARY = inspect.unwrap(nn.BatchNorm.__call__)
_WHERE = "maskopt.linen.freeze_statistics(freeze_mask=...)"


def freeze_statistics(apply_fn: Callable[..., Any], freeze_mask: Any) -> Callable[..., Any]:
  """Return `apply_fn` with the batch statistics of frozen layers held still.

    statistic[i] keeps its bits if unit i is frozen
    y[..., i] = normalise(x[..., i], running statistics) if unit i is frozen, in every mode

  A unit of a `nn.BatchNorm` is frozen if all its parameters (scale and bias) are; a layer without
  parameters is frozen if all parameters of the smallest module around it are. A network that is
  called with `train=True` throughout needs no other change, and neither does one that gives
  `use_running_average` at the call. Subclasses that normalise by `super().__call__` are held as it
  is. Batch statistics of other modules keep their bits too, but how such a module uses them is its
  own, of which a warning tells: call it in inference mode.

  Args:
    apply_fn: `model.apply`, or a function like it: variables first.
    freeze_mask: a static freeze mask over `variables["params"]`; True = frozen.
  Returns:
    A function of the same arguments; updated batch statistics come back as from `apply_fn`.
  Raises:
    ValueError: when called: the mask does not fit the parameters, or is runtime data; TypeError: it
      is not boolean.
  Warns:
    UserWarning: when called: a module of another kind moved statistics of frozen units.
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
      result = apply_fn(variables, *args, **kwargs)
    return still.restored(result, variables)

  return applied


class _Still:
  """What takes the place of each call of a `nn.BatchNorm`."""

  def __init__(self, units: Units):
    self._units = units
    self._infers = False  # a layer within this interceptor's own call is left alone
    self._held: set[str] = set()

  def intercept(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    norm = context.module
    if self._infers or not _is_of_library(context):
      return call(*args, **kwargs)
    if norm.is_initializing() or not norm.has_variable("batch_stats", "mean"):
      return call(*args, **kwargs)
    path = "/".join(norm.path)
    still = self._units.of(path, norm.get_variable("batch_stats", "mean").shape)
    self._held.add(path)
    if still is False:
      return call(*args, **kwargs)
    inferred = self._inferred(norm, *args, **kwargs)
    if not isinstance(still, StaticMask):
      return inferred
    return _by_unit(still.array, norm, inferred, lambda: call(*args, **kwargs))

  def _inferred(self, norm: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The layer in inference mode: a pure call of an unbound copy, which moves no statistics."""
    del args, kwargs  # the mode, which is decided, and a mask of what statistics are taken over
    names = {f.name for f in dataclasses.fields(nn.BatchNorm) if f.init} - {"parent", "name"}
    fields: dict[str, Any] = {name: getattr(norm, name) for name in names}
    fields["use_running_average"] = True
    copy = nn.BatchNorm(**fields, parent=None)
    self._infers = True
    try:
      return copy.apply(norm.variables, x)
    finally:
      self._infers = False

  def restored(self, result: Any, variables: Any) -> Any:
    """What `apply_fn` returned, with the statistics of other modules still too."""
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
      return result
    changed, before = result[1].get("batch_stats"), variables.get("batch_stats")
    if changed is None or before is None:
      return result
    flat, old = _tree.flatten(changed), _tree.flatten(before)
    known: dict[str, Any] = dict(zip(old.paths, old.leaves, strict=True))
    leaves, moved = [], []
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
      owner = path.rpartition("/")[0]
      was = known.get(path, leaf)
      loose = owner not in self._held and leaf is not was
      still = self._units.of(owner, np.shape(leaf)) if loose else False
      if still is not False:
        moved.append(path)
        leaf = was if still is True else jnp.where(still.array, was, leaf)
      leaves.append(leaf)
    if not moved:
      return result
    warnings.warn(
      f"`{_WHERE}`: at {', '.join(moved)}, the statistics of frozen units are still, but how their "
      "module uses them is its own. Call it in inference mode, or derive it from nn.BatchNorm and "
      "normalise by super().__call__.",
      stacklevel=3,
    )
    return result[0], _with(result[1], flat.unflatten(leaves))


def _is_of_library(context: Any) -> bool:
  """Whether a call is that of `nn.BatchNorm` itself, by a subclass or not."""
  method = getattr(context.orig_method, "func", context.orig_method)
  return isinstance(context.module, nn.BatchNorm) and method is _LIBRARY


def _with(changed: Any, batch_stats: Any) -> Any:
  """The same collections with other batch statistics, in the same kind of mapping."""
  if hasattr(changed, "copy") and not isinstance(changed, dict):
    return changed.copy({"batch_stats": batch_stats})
  return {**changed, "batch_stats": batch_stats}


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
