"""What every operation returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from . import _model, _moments, _placement
from ._placement import Placement


class Surgery(NamedTuple):
  """What an operation returns; the model it was given is as it was.

  Arrays that did not change are those of the old model: donating one takes it from both. The counts
  of an optimizer go on, so under an Adam that has run for long new elements start with updates
  longer than the learning rate; `opt_state=None` and `tx.init` start all of them anew.

  Attributes:
    model: the new module, variables or parameters, in the containers of the old.
    freeze_mask: old elements frozen, new ones trainable, over the new model's parameters: those of
      a module or, of linen variables, what stands under `params`.
    opt_state: the optimizer state for the new parameters, if one was given: moments of old
      elements have the bits they had, those of new ones are as the transform's `init` makes them.
    report: what was done to each leaf, of operations that follow or match leaves; it prints itself.
  """

  model: Any
  freeze_mask: Any
  opt_state: Any = None
  report: Any = None


class State(NamedTuple):
  """The optimizer state an operation takes along.

  Attributes:
    opt_state: the state over the old parameters.
    tx: the transform it belongs to.
    to: the transform over the new parameters, or a function of their mask; None for `tx`.
  """

  opt_state: Any
  tx: Any
  to: Any

  def check(self, where: str) -> None:
    """Raise unless state and transform come together."""
    _moments.check(self.opt_state, self.tx, where)


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
  old_params, new_params = _model.parameters(old), _model.parameters(new)
  freeze_mask = _placement.mask(new_params, placements)
  opt_state = _moments.moved(*state, old_params, new_params, freeze_mask, placements, where)
  return Surgery(new, freeze_mask, opt_state, report)
