"""What every operation returns, and the optimizer state that it takes along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from .._errors import Problem, describe, fail
from . import _model, _moments, _placement
from ._placement import Placement


class Surgery(NamedTuple):
  """What an operation returns; the model it was given is as it was.

  Arrays that did not change are those of the old model: donating one takes it from both. The counts
  of an optimizer go on, so under an Adam that has run for long new elements start with updates
  longer than the learning rate; `to=` without `opt_state=` starts all of them anew.

  Attributes:
    model: the new module, variables or parameters, in the containers of the old.
    freeze_mask: old elements frozen, new ones trainable, over the new model's parameters: those of
      a module or, of linen variables, what stands under `params`.
    opt_state: the optimizer state for the new parameters: moments of old elements have the bits
      they had, those of new ones are as the transform's `init` makes them. Given an `nnx.Optimizer`
      or a `TrainState`, the next one. None if neither a state nor `to` was given.
    tx: the transform that `opt_state` belongs to: what `to` is or returns, or the old one.
    report: what was done to each leaf, of operations that follow or match leaves; it prints itself.
  """

  model: Any
  freeze_mask: Any
  opt_state: Any = None
  tx: Any = None
  report: Any = None


class State(NamedTuple):
  """The optimizer state an operation takes along.

  Attributes:
    opt_state: the state over the old parameters, or what holds one and its transform: an
      `nnx.Optimizer`, a `TrainState`.
    tx: the transform it belongs to.
    to: the transform over the new parameters, or a function of their mask; None for `tx`. Of a
      holder, a function of model and mask that returns the next holder.
  """

  opt_state: Any
  tx: Any
  to: Any

  @property
  def is_held(self) -> bool:
    """Whether the state comes in an optimizer or a train state."""
    return _holds(self.opt_state)

  def check(self, where: str) -> None:
    """Raise unless state and transform come together."""
    if self.is_held:
      kind = type(self.opt_state).__name__
      remedy = f"Write to=lambda model, freeze_mask: {kind}(...), without tx."
      expected = f"a function of (model, freeze_mask) that returns the next {kind}"
      if self.to is None or hasattr(self.to, "init") or not callable(self.to):
        got = "none" if self.to is None else describe(self.to)
        fail(where, [Problem("to", expected, got, TypeError)], remedy)
      if self.tx is not None:
        got = f"one beside that of the {kind}"
        fail(where, [Problem("tx", "no transform", got)], remedy)
    elif (self.opt_state is None) != (self.tx is None):
      missing = "opt_state" if self.opt_state is None else "tx"
      problem = Problem(missing, "an optimizer state and its transform", "only one of them")
      fail(where, [problem], "Give opt_state=... and tx=..., or neither.")
    elif self.to is not None and not (hasattr(self.to, "init") or callable(self.to)):
      problem = Problem(
        "to", "a transform, or a function of the mask", describe(self.to), TypeError
      )
      fail(where, [problem], _moments.NEXT)

  def after(
    self, old: Any, new: Any, freeze_mask: Any, placements: Mapping[str, Placement], where: str
  ) -> tuple[Any, Any]:
    """The state for the new model and its transform; None without an old one or a new one."""
    params = _model.parameters(old), _model.parameters(new)
    if self.is_held:
      held, following = self.opt_state, self.to(new, freeze_mask)
      if not _holds(following):
        problem = Problem("to", f"the next {type(held).__name__}", describe(following), TypeError)
        fail(where, [problem], "Let to= return it.")
      state = held.opt_state, held.tx, following.tx
      moved = _moments.moved(*state, *params, placements, where)
      return _handed_on(held, following, moved), following.tx
    to = self.tx if self.to is None else self.to
    if to is not None and not hasattr(to, "init"):
      to = to(freeze_mask)
      if not hasattr(to, "init"):
        problem = Problem("to", "a function that returns a transform", describe(to), TypeError)
        fail(where, [problem], _moments.NEXT)
    if self.opt_state is not None:
      return _moments.moved(self.opt_state, self.tx, to, *params, placements, where), to
    return (None if to is None else _moments.started(to, params[1], where)), to


def _holds(x: Any) -> bool:
  return hasattr(x, "opt_state") and hasattr(x, "tx")


def _handed_on(held: Any, following: Any, opt_state: Any) -> Any:
  """The next holder with a state, and the old one's count of steps."""
  if not isinstance(following, nnx.Optimizer):
    return following.replace(opt_state=opt_state, step=held.step)
  following.step[...] = held.step[...]

  def hand_on(box: Any, value: Any) -> None:
    if isinstance(box, nnx.Variable):
      box.set_value(value)

  jax.tree.map(
    hand_on, following.opt_state, opt_state, is_leaf=lambda x: isinstance(x, nnx.Variable)
  )
  return following


def result(
  old: Any,
  new: Any,
  placements: Mapping[str, Placement],
  state: State,
  where: str,
  report: Any = None,
) -> Surgery:
  """The result of an operation whose old elements stand where the placements say.

  Paths in placements are those of parameters, so without linen's collection.
  """
  freeze_mask = _placement.mask(_model.parameters(new), placements)
  opt_state, tx = state.after(old, new, freeze_mask, placements, where)
  return Surgery(new, freeze_mask, opt_state, tx, report)
