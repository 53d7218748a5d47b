"""Batch statistics of frozen layers: used as they are, and still.

A frozen unit that is normalised with the statistics of each batch drifts at its output although no
weight moves. So a frozen unit uses the running statistics, whatever mode the network is in, and
these do not move.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import core

from .. import _masks
from .._carrying import StaticMask
from .._packing import Layouts
from . import _carried
from ._units import Units

_WHERE = "maskopt.nnx.freeze_statistics(freeze_mask=...)"
# The name under which a module or a statistic says which of its elements are still.
_STILL = "still"


class StillStat(nnx.BatchStat):
  """A batch statistic whose frozen elements keep their bits; its metadata `still` says which.

  Loading a state (`nnx.update`) sets them all the same. A state from another model brings no
  `still`: then the whole statistic is.
  """

  def set_value(self, value: Any, *, index: Any = ...) -> None:
    """Write where the statistic is not frozen."""
    still, old = self.get_metadata(_STILL, True), self.get_value()
    if still is True:
      return
    if index is not ...:
      value = old.at[index].set(value)
    super().set_value(jnp.where(still.array, old, value))


class StillBatchNorm(nnx.BatchNorm):
  """Batch normalisation whose frozen units use the running statistics in every mode.

  Attributes:
    still: which units are frozen: True, or a static mask.
  """

  still: StaticMask | bool

  def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Any:
    """Normalise: frozen units by the running statistics, the others as `nnx.BatchNorm` does."""
    # Before the others are normalised, which moves their statistics.
    inferred = super().__call__(x, use_running_average=True, mask=mask)
    if use_running_average is None:
      use_running_average = self.use_running_average
    if isinstance(self.still, bool) or use_running_average:
      return inferred
    still, old = self.still.array, (self.mean[...], self.var[...])
    live = super().__call__(x, use_running_average=use_running_average, mask=mask)
    for stat, before in zip((self.mean, self.var), old, strict=True):
      stat[...] = jnp.where(still, before, stat[...])
    shape = [1] * live.ndim
    shape[self.axis] = self.num_features
    return jnp.where(still.reshape(shape), inferred, live)


class Inferring(nnx.Module):
  """A wholly frozen layer of another kind that asks its own `use_running_average` for its mode."""

  @property
  def use_running_average(self) -> bool:
    """True, whatever `model.train()` says; that is kept for when the layer thaws."""
    return True

  @use_running_average.setter
  def use_running_average(self, value: bool) -> None:
    vars(self)["use_running_average"] = value


# The class that a layer was given, by the class that holds it still.
_mixed_kinds: dict[type, type] = {StillBatchNorm: nnx.BatchNorm}


@functools.cache
def _mixed(kind: type, held: type) -> type:
  """A layer's class with `held` where its own methods call on the library's."""
  if kind is nnx.BatchNorm:
    return held
  bases = (kind, held) if issubclass(held, nnx.BatchNorm) else (held, kind)
  names = {
    "__module__": kind.__module__,
    "__qualname__": kind.__qualname__,
    "__doc__": kind.__doc__,
  }
  return type(kind)(kind.__name__, bases, names)


def _kind(module: nnx.Module) -> type:
  """The class that a layer was given."""
  return _mixed_kinds.get(type(module), type(module))


def _held(module: nnx.Module, held: type | None) -> None:
  """Change the class of a layer in place, for several modules may share it; the state stays."""
  kind = _kind(module)
  new = kind if held is None else _mixed(kind, held)
  if new is not kind:
    _mixed_kinds[new] = kind
  module.__class__ = new


def _calls_on(kind: type) -> bool:
  """Whether each `__call__` that a subclass of `nnx.BatchNorm` brings calls `super()`."""
  own = [c.__dict__["__call__"] for c in kind.__mro__ if "__call__" in c.__dict__]
  code = [getattr(f, "__code__", None) for f in own[: own.index(nnx.BatchNorm.__call__)]]
  return all(c is not None and "__class__" in c.co_freevars for c in code)


def freeze_statistics(model: nnx.Module, freeze_mask: Any = None) -> nnx.Module:
  """Hold the batch statistics of frozen layers still, and normalise their units by these.

    statistic[i] keeps its bits if unit i is frozen
    y[..., i] = normalise(x[..., i], running statistics) if unit i is frozen, in every mode

  What `trainable = False` means for a Keras layer: `model.train()` and `use_running_average=False`
  do not undo it. A unit of a normalisation layer is frozen if all its parameters (scale and bias)
  are; a layer without parameters is frozen if all parameters of the smallest module around it are.
  Subclasses of `nnx.BatchNorm` that normalise by `super().__call__` are held as it is. Batch
  statistics of other layers keep their bits too; such a layer uses them if all of it is frozen and
  its attribute `use_running_average` says how. Of any other a warning says that it may not.

  Args:
    model: the network; changed in place, and again by each call, so a mask that thaws a layer sets
      its statistics free.
    freeze_mask: a static freeze mask over `nnx.state(model, nnx.Param)`; None takes the masks that
      modules carry.
  Returns:
    The same model; its `nnx.BatchNorm` layers are still such, its state has the same paths.
  Raises:
    ValueError: the mask does not fit the model, or is runtime data; TypeError: it is not boolean.
  Warns:
    UserWarning: statistics are still, but how their layer uses them is its own; names the layers.
  Example:
    >>> import jax.numpy as jnp, maskopt
    >>> from flax import nnx
    >>> norm = maskopt.nnx.freeze_statistics(nnx.BatchNorm(1, rngs=nnx.Rngs(0)), True)
    >>> norm.train()
    >>> _ = norm(jnp.array([[3.0], [5.0]]))
    >>> norm.mean[...].tolist()
    [0.0]
  """
  _carried.need_module(model, "maskopt.nnx.freeze_statistics(model)")
  frozen = _units(model, freeze_mask)
  replaced: dict[int, nnx.BatchStat] = {}
  loose: list[str] = []
  for path, module in list(nnx.iter_graph(model)):
    if isinstance(module, nnx.Module):
      name = "/".join(map(str, path))
      if isinstance(module, nnx.BatchNorm) and _calls_on(_kind(module)):
        _still_norm(module, frozen.of(name, (module.num_features,)))
      elif not _still_others(module, frozen, name, replaced):
        loose.append(f"{name or 'the root'} ({_kind(module).__name__})")
  if loose:
    warnings.warn(
      f"`{_WHERE}`: at {', '.join(loose)}, the statistics of frozen units are still, but how the "
      "layer uses them is its own. Put it in inference mode, or derive it from nnx.BatchNorm and "
      "normalise by super().__call__.",
      stacklevel=2,
    )
  return model


def _still_norm(module: Any, still: StaticMask | bool) -> None:
  _held(module, None if still is False else StillBatchNorm)
  if still is not False:
    module.still = still
  elif hasattr(module, _STILL):
    delattr(module, _STILL)


def _still_others(
  module: nnx.Module, frozen: Units, path: str, replaced: dict[int, nnx.BatchStat]
) -> bool:
  """Make the statistics of this very module still; returns whether it must use them if frozen."""
  stats = {k: v for k, v in vars(module).items() if isinstance(v, nnx.BatchStat)}
  still = {name: frozen.of(path, np.shape(stat)) for name, stat in stats.items()}
  for name, stat in stats.items():
    if id(stat) not in replaced:
      new = _statistic(stat, still[name])
      replaced[id(stat)] = replaced[id(new)] = new
    setattr(module, name, replaced[id(stat)])
  wholly = bool(still) and all(x is True for x in still.values())
  # A subclass of nnx.BatchNorm that does all by itself may ask for its mode in any way.
  asks = "use_running_average" in vars(module) and not isinstance(module, nnx.BatchNorm)
  if stats:
    _held(module, Inferring if wholly and asks else None)
  return (wholly and asks) or all(x is False for x in still.values())


def _statistic(stat: nnx.BatchStat, still: StaticMask | bool) -> nnx.BatchStat:
  """The statistic as one that is still where said, or as an ordinary one."""
  metadata: dict[str, Any] = {k: v for k, v in stat.get_metadata().items() if k != _STILL}
  if still is not False:
    metadata[_STILL] = still
    return StillStat(stat.get_value(), **metadata)
  return nnx.BatchStat(stat.get_value(), **metadata) if isinstance(stat, StillStat) else stat


def _units(model: Any, freeze_mask: Any) -> Units:
  params = nnx.state(model, nnx.Param)
  if isinstance(freeze_mask, Layouts):
    freeze_mask = _as_static(nnx.as_pure(freeze_mask).freeze_mask)
  return Units(_carried.agreed(model, params, freeze_mask, nnx.Param, _WHERE), params, _WHERE)


def _as_static(freeze_mask: Any) -> Any:
  """Bool arrays as NumPy has them, unless they are being traced."""
  flat = _masks.flatten(freeze_mask)
  return flat.unflatten(
    [x if _masks.is_bool(x) or isinstance(x, core.Tracer) else np.asarray(x) for x in flat.leaves]
  )
