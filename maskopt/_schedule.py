"""Masks that change with the step: which holds when, and a transform that changes its own."""

from __future__ import annotations

import bisect
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import optax

from . import _copies, _masks, _multiplier, _stacks, _stages, _tree
from ._errors import Problem, describe, fail
from ._masks import Changing, Runtime
from ._packed import is_packed
from ._stacks import ScheduledState

Mode = Literal["static", "runtime"]
Order = Literal["up", "down", "random"]

_WHERE = "maskopt.unfreeze_schedule(...)"


class Schedule(Changing):
  """A mask for every step: `unfreeze_schedule` makes one.

  Attributes:
    mode: "static" or "runtime".
    starts: the first step of each stage; empty for a function of the step.
    period: after how many steps it begins again; None if it does not.
  """

  def __init__(
    self,
    stages: Sequence[Any] | Callable[[Any], Any],
    starts: Sequence[int],
    mode: Mode,
    *,
    period: int | None = None,
    ends: Callable[[Any], dict[str, float]] | None = None,
  ):
    self._stages = stages
    self._ends = ends
    self.starts = tuple(starts)
    self.mode: Mode = mode
    self.period = period

  def __repr__(self) -> str:
    again = "" if self.period is None else f", period={self.period}"
    shown = ", ".join(map(str, self.starts[:6])) + (", ..." if len(self.starts) > 6 else "")
    return f"Schedule(starts=({shown}), mode={self.mode!r}{again})"

  def stage(self, step: int) -> int:
    """The number of the stage that holds at a step."""
    step = int(step) if self.period is None else int(step) % self.period
    return bisect.bisect_right(self.starts, step) - 1

  def changes(self, step: int) -> bool:
    """Whether the mask at a step is another than at the step before."""
    return step > 0 and self.stage(step) != self.stage(step - 1)

  def at(self, step: int) -> Any:
    """The freeze mask that holds at a step: any form of mask, a function of the parameters too."""
    if callable(self._stages):
      return self._stages(step)
    return self._stages[self.stage(step)]

  def __call__(self, params: Any) -> Any:
    """The mask of step 0: what a static schedule is when it is given as a freeze mask."""
    if self.mode == "static" and len(self.starts) > 1:
      warnings.warn(
        "maskopt.unfreeze_schedule(mode='static'): given as a freeze mask it is the mask of step 0 "
        "and never changes. Give schedule.at(step), anew where schedule.changes(step), and migrate "
        "the state; or make it mode='runtime'.",
        stacklevel=2,
      )
    return _masks.evaluate(self.at(0), params)

  def scale_by_cosine(self) -> optax.GradientTransformationExtraArgs:
    """Return the learning rates of FreezeOut, to be chained after the optimizer.

    new_update = (1 + cos(pi t / t_i)) / 2 * update        until t_i, where layer i freezes
    """
    if self._ends is None:
      problem = Problem("", "a schedule with freeze_out=", repr(self))
      fail("Schedule.scale_by_cosine()", [problem], "Give the optimizer a learning-rate schedule.")
    ends = self._ends

    def init(params: Any) -> Any:
      del params
      return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
      del extra
      flat = _tree.flatten(updates, is_leaf=is_packed)
      end_of = ends(updates if params is None else params)

      def factor(path: str) -> Any:
        done = jnp.minimum(state.count.astype(jnp.float32) / end_of[path], 1.0)
        return (1 + jnp.cos(jnp.pi * done)) / 2

      pairs = zip(flat.paths, flat.leaves, strict=True)
      leaves = [u if u is None else _multiplier.scaled(u, factor(path), path) for path, u in pairs]
      return flat.unflatten(leaves), optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)

  def running(self, make: Callable[[Any], Any]) -> optax.GradientTransformationExtraArgs:
    """The transform that `make` makes of a mask, with the mask of its own step count.

    The coming update puts the coming mask in place, before all else: an array that is read first
    and then replaced would be copied at every step. `mask_of(state)` looks ahead.
    """
    first = make(lambda params: self._first(params)[0])

    def init(params: Any) -> ScheduledState:
      # Where only the structure is asked for, a leaf stands for whatever the masks are.
      asked = _tree.is_placeholder(params)
      masks = 0 if asked else self._first(_tree.parameters(_copies.trained(params)))[1]
      return ScheduledState(_stacks.clock(self.starts, self.period), masks, first.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
      turn = state.turn()
      out, inner = first.update(updates, state.inner_state, params, freeze_mask=turn, **extra)
      first_entry = jnp.arange(len(turn.clock)) == 0
      state = state._replace(clock=turn.clock + first_entry.astype(jnp.int32), inner_state=inner)
      if callable(self._stages):
        state = self._asked(state, updates if params is None else _copies.trained(params))
      return out, state

    return optax.GradientTransformationExtraArgs(init, update)

  def _first(self, params: Any) -> tuple[Any, dict[str, Any]]:
    """The mask of step 0 with runtime leaves, and their masks in all stages."""
    flat = _tree.flatten(params)
    if callable(self._stages):
      masks = _masks.resolve(self._stages(jnp.zeros((), jnp.int32)), params, _WHERE)
      return _tree.nested(flat.paths, masks), _kept(flat, masks)
    stages = [_masks.resolve(stage, params, _WHERE) for stage in self._stages]
    leaves, kept = [], {}
    for path, leaf, *masks in zip(flat.paths, flat.leaves, *stages, strict=True):
      if masks[0] is None:
        mask, stack = None, None
      else:
        mask, stack = _stacks.stacked(masks, np.shape(leaf), path, _WHERE)
      leaves.append(mask)
      if stack is not None:
        kept[path] = jnp.asarray(stack)
    return _tree.nested(flat.paths, leaves), kept

  def _asked(self, state: ScheduledState, shaped: Any) -> ScheduledState:
    """The state with the mask that a function of the step gives the coming update."""
    assert callable(self._stages)
    flat = _tree.flatten(shaped, is_leaf=is_packed)
    kept = _kept(flat, _masks.resolve(self._stages(state.step), flat, _WHERE))
    differ = [jnp.any(kept[path] != mask) for path, mask in state.masks.items()]
    changed = jnp.any(jnp.stack(differ)) if differ else jnp.asarray(False)
    return state.at(state.step, -changed.astype(jnp.int32))._replace(masks=kept)


def _kept(flat: _tree.Flat, masks: Sequence[Any]) -> dict[str, Any]:
  """The runtime masks of one step, as a stack of one."""
  found = zip(flat.paths, masks, strict=True)
  return {path: m.mask[None] for path, m in found if isinstance(m, Runtime)}


def unfreeze_schedule(
  masks: Any = None,
  *,
  mode: Mode = "static",
  layers: Any = None,
  top_first: int | None = None,
  freeze_out: int | None = None,
  t0: float = 0.5,
  rotate: int | None = None,
  order: Order = "up",
  train: int = 1,
  always: Sequence[int] = (),
  seed: int = 0,
) -> Schedule:
  """Return a freeze mask that changes with the step.

    mask(step) = masks[the last boundary <= step]

  One of four forms says when: `masks`, `top_first`, `freeze_out` or `rotate`; the last three go by
  layers in network order.

  Static: each stage is analysed and compiled by itself and pays for what it trains. Once a stage
  begins, build the transform anew and migrate; every stage is one trace:

    for step, batch in enumerate(batches):
      if step == 0 or schedule.changes(step):
        tx = maskopt.selective_transform(optimizer, freeze_mask=schedule.at(step))
        grads = jax.grad(loss)(params, batch)
        state = maskopt.migrate(state, params, to=tx, grads=grads) if step else tx.init(params)
        train = jax.jit(functools.partial(train_step, tx))
      params, state = train(params, state, batch)

  To resume, build the transform with `schedule.at(step)` and restore into `tx.init(params)`.

  Runtime: give the schedule itself as `freeze_mask`. The transform counts its updates and changes
  the mask in the graph: one trace for all stages. A leaf that trains equally many elements in every
  stage has packed state, any other pays in full. Its state holds all it takes to resume: for each
  stage, 4 bytes for each trainable element of a packed leaf (for each row of one that trains whole
  rows), the mask itself of any other. What a change of the mask takes XLA sets aside at every step:
  under most optimizers that is no more than the update takes, and 0.4 MB.

  Args:
    masks: dict or list of pairs, step -> freeze mask, beginning at step 0; or, at runtime, a
      function of the traced step whose `maskopt.runtime` leaves change.
    mode: "static" or "runtime".
    layers: for the forms by layers, the layers in network order: their names, or what has them
      (the parameters if they are numbered, an nnx or Equinox module).
    top_first: train the last layer, and one more below it every so many steps (ULMFiT).
    freeze_out: total steps T; layer i of 0..L freezes at t_i T, t_i = (t0 + (1 - t0) i / L)^3.
      Chain `schedule.scale_by_cosine()` after the optimizer for the learning rates (FreezeOut).
    t0: when the first layer freezes, before the cube.
    rotate: train one block of layers at a time and go on every so many steps, for ever (BAdam); in
      random order it is LISA.
    order: "up" from the first layer, "down" from the last, "random" anew in each of 64 rounds.
    train: layers in a block of `rotate`.
    always: numbers of layers that `rotate` always trains, LISA's embedding and head: [0, -1].
    seed: of the random order.
  Returns:
    A `Schedule`: `at(step)`, `stage(step)`, `changes(step)`; usable as `freeze_mask`, where a
    static one is the mask of step 0, and warns.
  Raises:
    ValueError: no form or several, boundaries that do not ascend from 0, numbers out of range.
    TypeError: a function of the step in static mode.
  References:
    ULMFiT, arXiv 1801.06146; FreezeOut, 1706.04983; BAdam, 2404.02827; LISA, 2403.17919.
  Example:
    >>> import maskopt
    >>> schedule = maskopt.unfreeze_schedule({0: {"a": True, "b": False}, 100: False})
    >>> [schedule.changes(step) for step in (0, 99, 100)]
    [False, False, True]
    >>> schedule.at(99)
    {'a': True, 'b': False}
  """
  forms = {"masks": masks, "top_first": top_first, "freeze_out": freeze_out, "rotate": rotate}
  _check(forms, mode, order, t0)
  if callable(masks):
    return Schedule(masks, (), mode)
  if masks is not None:
    starts, stages = _pairs(masks)
    return Schedule(stages, starts, mode)
  names = _stages.names_of(layers, _WHERE)
  if top_first is not None:
    made = _stages.top_first(names, top_first, _WHERE)
  elif freeze_out is not None:
    made = _stages.freeze_out(names, freeze_out, t0, _WHERE)
  else:
    assert rotate is not None
    made = _stages.rotate(names, rotate, order, train, always, seed, _WHERE)
  ends = None if made.ends is None else functools.partial(_ends, tuple(names), made.ends)
  return Schedule(made.masks, made.starts, mode, period=made.period, ends=ends)


def _ends(names: Sequence[str], ends: Sequence[float], params: Any) -> dict[str, float]:
  return {path: ends[k] for path, k in _stages.owners(names, params, _WHERE).items()}


def _check(forms: dict[str, Any], mode: Any, order: Any, t0: Any) -> None:
  given = [name for name, value in forms.items() if value is not None]
  problems = []
  if len(given) != 1:
    problems.append(Problem("", f"one of {', '.join(forms)}", ", ".join(given) or "none"))
  problems += [
    Problem("", f"{name}= of at least 1 step", repr(forms[name]))
    for name in given
    if name != "masks" and (not isinstance(forms[name], int) or forms[name] < 1)
  ]
  if mode not in ("static", "runtime"):
    problems.append(Problem("", 'mode="static" or "runtime"', repr(mode)))
  elif mode == "static" and callable(forms["masks"]):
    got = "a function of the step, which knows no boundaries"
    problems.append(Problem("", "boundaries and masks in static mode", got, TypeError))
  if order not in ("up", "down", "random"):
    problems.append(Problem("", 'order="up", "down" or "random"', repr(order)))
  if not 0 < t0 <= 1:
    problems.append(Problem("", "t0 between 0 and 1", repr(t0)))
  if problems:
    fail(_WHERE, problems, "See its docstring for the four forms.")


def _pairs(masks: Any) -> tuple[list[int], list[Any]]:
  """Boundaries in order, and the mask of each."""
  remedy = "Give {0: mask, 1000: mask} or [(0, mask), (1000, mask)]."
  try:
    pairs = list(masks.items() if isinstance(masks, Mapping) else ((s, m) for s, m in masks))
  except (TypeError, ValueError):
    fail(_WHERE, [Problem("", "steps and masks", describe(masks), TypeError)], remedy)
  steps = [s for s, _ in pairs]
  wrong = [s for s in steps if not isinstance(s, (int, np.integer)) or isinstance(s, bool)]
  if wrong:
    fail(_WHERE, [Problem("", "int steps", repr(wrong[0]), TypeError)], remedy)
  if isinstance(masks, Mapping):
    pairs.sort(key=lambda pair: pair[0])
    steps = sorted(steps)
  if not steps or steps[0] != 0 or any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
    fail(_WHERE, [Problem("", "steps that ascend from 0", str(steps))], remedy)
  return [int(s) for s in steps], [m for _, m in pairs]
