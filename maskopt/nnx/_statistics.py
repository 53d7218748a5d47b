"""Batch statistics of frozen layers: used as they are, and still.

A frozen unit that is normalised with the statistics of each batch drifts at its output although no
weight moves. So a frozen unit uses the running statistics, whatever mode the network is in, and
these do not move.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import core

from .. import _masks
from .._packing import Layouts
from . import _carried
from ._carried import StaticMask
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


def freeze_statistics(model: nnx.Module, freeze_mask: Any = None) -> nnx.Module:
  """Hold the batch statistics of frozen layers still, and normalise their units by these.

    statistic[i] keeps its bits if unit i is frozen
    y[..., i] = normalise(x[..., i], running statistics) if unit i is frozen, in every mode

  What `trainable = False` means for a Keras layer: `model.train()` and `use_running_average=False`
  do not undo it. A unit of a normalisation layer is frozen if all its parameters (scale and bias)
  are; a layer without parameters is frozen if all parameters of the smallest module around it are.
  Batch statistics of other layers are held still too, but how they are used is theirs: put those
  layers in inference mode.

  Args:
    model: the network; changed in place, and again by each call, so a mask that thaws a layer sets
      its statistics free.
    freeze_mask: a static freeze mask over `nnx.state(model, nnx.Param)`; None takes the masks that
      modules carry.
  Returns:
    The same model; its `nnx.BatchNorm` layers are still such, its state has the same paths.
  Raises:
    ValueError: the mask does not fit the model, or is runtime data; TypeError: it is not boolean.
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
  for path, module in list(nnx.iter_graph(model)):
    if isinstance(module, nnx.Module):
      name = "/".join(map(str, path))
      if type(module) in (nnx.BatchNorm, StillBatchNorm):
        _still_norm(module, frozen.of(name, (module.num_features,)))  # type: ignore[attr-defined]
      else:
        _still_others(module, frozen, name, replaced)
  return model


def _still_norm(module: Any, still: StaticMask | bool) -> None:
  # In place, for several modules may share this one; both classes have the same state.
  if still is False:
    module.__class__ = nnx.BatchNorm
    if hasattr(module, _STILL):
      delattr(module, _STILL)
  else:
    module.__class__ = StillBatchNorm
    module.still = still


def _still_others(
  module: nnx.Module, frozen: Units, path: str, replaced: dict[int, nnx.BatchStat]
) -> None:
  """Make the statistics of this very module still where its units are frozen."""
  for name, stat in list(vars(module).items()):
    if isinstance(stat, nnx.BatchStat):
      if id(stat) not in replaced:
        new = _statistic(stat, frozen.of(path, np.shape(stat)))
        replaced[id(stat)] = replaced[id(new)] = new
      setattr(module, name, replaced[id(stat)])


def _statistic(stat: nnx.BatchStat, still: StaticMask | bool) -> nnx.BatchStat:
  """The statistic as one that is still where said, or as an ordinary one."""
  metadata: dict[str, Any] = {k: v for k, v in stat.get_metadata().items() if k != _STILL}
  if still is not False:
    return StillStat(stat.get_value(), **metadata, **{_STILL: still})  # type: ignore[arg-type]
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
