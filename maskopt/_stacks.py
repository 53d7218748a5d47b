"""A runtime schedule's state: what each leaf's layout needs in every stage, stacked, and the step.

A packed leaf keeps positions and not masks. To find positions in a mask takes 16 bytes an element
of the leaf, and XLA sets them aside at every step, at a boundary or not: fresh pages for all that
the step itself keeps there. A row of positions is only read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from . import _remask
from ._errors import Problem, fail
from ._freeze import mask_of
from ._layout import Elements, Index
from ._masks import Runtime
from ._packing import Layouts
from ._remask import Turn

_INT32 = 2**31 - 1


class ScheduledState(NamedTuple):
  """State of a transform whose mask is a runtime schedule.

  Attributes:
    clock: int32 of shape (2 + stages,): `step`, `placed`, the first step of every stage but the
      first, and after how many steps all begins again (2**31 - 1 for never). One array, for a step
      of 300 microseconds feels each array that goes through it.
    masks: for each leaf that changes, what its layout needs in each stage: `stacked`; for a
      function of the step only the coming mask.
    inner_state: the state of the transform.
  """

  clock: Any
  masks: Any
  inner_state: Any

  @property
  def step(self) -> Any:
    """Updates so far."""
    return self.clock[0]

  @property
  def placed(self) -> Any:
    """The stage whose mask `inner_state` works with; -1 if the coming update is to have another."""
    return self.clock[1]

  def at(self, step: Any, placed: Any) -> ScheduledState:
    """The same state after so many updates, with the mask of a stage in place."""
    return self._replace(clock=self.clock.at[:2].set(jnp.stack([step, placed])))

  def turn(self) -> Turn:
    """The mask of the coming update, if it is not in place."""
    return Turn(
      self.clock,
      due=lambda clock: _stage(clock) != clock[1],
      done=lambda clock: clock.at[1].set(_stage(clock)),
      layouts=lambda layouts, clock: placed(layouts, self.masks, _stage(clock)),
    )

  def joined(self) -> Layouts:
    """The freeze mask of the coming update; `mask_of` finds it."""
    pure = nnx.as_pure(self)  # in an nnx optimizer the arrays are variables
    return _remask.turned(mask_of(pure.inner_state), pure.turn(), "maskopt.mask_of(state)")


def _stage(clock: Any) -> Any:
  """The stage of the coming update."""
  # rem and not %: counts are not negative, and each kernel before the step is felt.
  step = lax.rem(clock[0], clock[-1])
  return jnp.sum(step >= clock[2:-1], dtype=jnp.int32)


def clock(starts: Sequence[int], period: int | None) -> Any:
  """The clock of a schedule at its step 0; the last entry is its period, 2**31 - 1 for none."""
  return jnp.asarray([0, 0, *starts[1:], _INT32 if period is None else period], jnp.int32)


def stacked(masks: Sequence[Any], shape: tuple[int, ...], path: str, where: str) -> tuple[Any, Any]:
  """One leaf's mask at step 0, and what its layout needs in each stage; None if it never changes.

  Returns:
    A mask, and for a leaf that trains equally many elements in every stage int32 positions of shape
    (stages, 1.., k, ..1), else bool masks of shape (stages, ...). The ones stand for dimensions
    along which whole runs train, so a row mask costs its rows.
  """
  if any(isinstance(m, Runtime) for m in masks):
    problem = Problem(path, "bools or NumPy arrays in every stage", "a runtime mask")
    fail(where, [problem], "Leave maskopt.runtime to the schedule.")
  if all(np.array_equal(m, masks[0]) for m in masks):
    return masks[0], None
  common = np.broadcast_shapes(*(np.shape(m) for m in masks))
  common = (1,) * (len(shape) - len(common)) + common
  if math.prod(common) == 1 and math.prod(shape) > 1:  # one element on a larger leaf is refused
    widest = int(np.argmax(shape))
    common = tuple(n if d == widest else 1 for d, n in enumerate(shape))
  stages = [np.broadcast_to(m, common) for m in masks]
  times = math.prod(shape) // max(math.prod(common), 1)
  counts = {int(np.count_nonzero(~m)) * times for m in stages}
  if len(counts) > 1 or math.prod(shape) > _INT32:
    return Runtime(jnp.asarray(stages[0])), np.stack(stages)
  return Runtime(jnp.asarray(stages[0]), counts.pop()), _positions(stages, shape)


def _positions(stages: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
  """Sorted positions over the dimensions that the masks tell apart, one row for each stage."""
  told = [d for d, n in enumerate(stages[0].shape) if n > 1] or [0]
  first, last = told[0], told[-1] + 1
  core = [np.broadcast_to(m, m.shape[:first] + shape[first:last] + m.shape[last:]) for m in stages]
  if np.count_nonzero(~core[0]) == 1:
    # One position among ones would not say which dimension it counts.
    core, first, last = [np.broadcast_to(m, shape) for m in stages], 0, len(shape)
  rows = np.stack([np.flatnonzero(~m) for m in core]).astype(np.int32)
  return rows.reshape(len(stages), *(1,) * first, -1, *(1,) * (len(shape) - last))


def placed(layouts: Layouts, stacks: Mapping[str, Any], stage: Any) -> Layouts:
  """The same layouts under the masks of one stage."""
  index = [
    _row(layout, stacks[path], stage) if path in stacks else old
    for path, layout, old in zip(
      layouts.static.paths, layouts.static.layouts, layouts.index, strict=True
    )
  ]
  return Layouts(layouts.static, index)


def _row(layout: Any, stack: Any, stage: Any) -> Index:
  row = lax.dynamic_index_in_dim(stack, stage, keepdims=False)
  if not isinstance(layout, Elements):
    return {"frozen": row}
  if row.dtype == jnp.bool_:
    return {"flat": _remask.searched(row, layout)}
  return {"flat": _remask.spread(row, layout.shape)}
