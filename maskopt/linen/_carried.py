"""Freeze masks that linen modules carry, and how a train state's mask agrees with them.

A linen module makes its parts when it is called, so its masks are known once it has been traced:
`freeze_mask` does that with example inputs, and a train state looks while the loss is being traced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import core

from .. import _freeze, _masks, _tree
from .._carrying import SUFFIX, StaticMask, either
from .._errors import Problem, fail
from .._packing import Layouts
from ..nnx._carried import contradiction
from ._masked import Masked

_WHERE = "maskopt.linen.TrainState.create(freeze_mask=...)"


def freeze_mask(model: nn.Module, *inputs: Any, **options: Any) -> dict[str, Any]:
  """Collect the freeze masks that the modules of a network carry.

    mask[path/kernel] = the `kernel_freeze_mask` of the module at path, else False

  Args:
    model: any linen module; masked layers may stand anywhere in it.
    *inputs: example inputs, concrete or `jax.ShapeDtypeStruct`s; nothing is computed.
    **options: keyword arguments of the model's call.
  Returns:
    A freeze mask over `model.init(...)["params"]` as nested dicts of bools and NumPy bools, to be
    given to `maskopt.linen.TrainState.create` or combined with others by `maskopt.union`. A layer
    that is used twice is frozen where any of its masks says so.
  Raises:
    TypeError: model is no linen module.
  Example:
    >>> import jax.numpy as jnp, maskopt
    >>> from flax import linen as nn
    >>> model = nn.Sequential([maskopt.linen.MaskedDense(2, bias_freeze_mask=True), nn.Dense(1)])
    >>> maskopt.linen.freeze_mask(model, jnp.ones((1, 3)))["layers_0"]
    {'bias': True, 'kernel': False}
  """
  if not isinstance(model, nn.Module):
    problem = Problem("", "a linen module", type(model).__name__, TypeError)
    fail("maskopt.linen.freeze_mask(model)", [problem], "Give the module, then example inputs.")
  found: dict[str, Any] = {}

  def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    for path, mask in _carried(context.module):
      found[path] = either(found[path], mask) if path in found else mask
    return call(*args, **kwargs)

  def init() -> Any:
    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
    with nn.intercept_methods(note):
      return model.lazy_init(rngs, *inputs, **options)

  paths = _tree.flatten(jax.eval_shape(init).get("params", {})).paths
  return _tree.nested(paths, [found.get(path, False) for path in paths]) if paths else {}


def _carried(module: nn.Module) -> Iterator[tuple[str, Any]]:
  """(path, mask) of every parameter of this very module whose mask it carries."""
  for name, mask in vars(module).items() if isinstance(module, Masked) else ():
    if name.endswith(SUFFIX) and mask is not False:
      path = _tree.join("/".join(module.path), name.removesuffix(SUFFIX))
      yield path, mask.array if isinstance(mask, StaticMask) else mask


@dataclasses.dataclass(frozen=True)
class Checked:
  """`apply_fn` that raises where a module freezes what the optimizer trains.

  Hashable, and equal if function and mask are, for it is a static part of a train state.

  Attributes:
    apply_fn: as it was given.
    trained: for each parameter its shape, and its mask as the optimizer has it.
  """

  apply_fn: Callable[..., Any]
  trained: tuple[tuple[str, tuple[int, ...], StaticMask | bool], ...]

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    known = {path: (shape, mask) for path, shape, mask in self.trained}

    def check(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
      own = [(path, mask) for path, mask in _carried(context.module) if path in known]
      problems = [
        Problem(path, f"{what} frozen, as the module's own mask says", "a mask that trains some")
        for path, mask in own
        if (what := _trains(mask, *known[path]))
      ]
      if problems:
        remedy = (
          "Give freeze_mask=maskopt.linen.freeze_mask(model, *inputs), or its maskopt.union with "
          "your own."
        )
        fail(_WHERE, problems, remedy)
      return call(*args, **kwargs)

    with nn.intercept_methods(check):
      return self.apply_fn(*args, **kwargs)


def _trains(own: Any, shape: tuple[int, ...], mask: StaticMask | bool) -> str:
  other = mask.array if isinstance(mask, StaticMask) else mask
  return contradiction(own, other, shape)


def checked(apply_fn: Any, params: Any, freeze_mask: Any, opt_state: Any) -> Any:
  """`apply_fn` as `Checked`, if it is a module's and it is known now what the optimizer trains."""
  if not isinstance(getattr(apply_fn, "__self__", None), nn.Module):
    return apply_fn
  if freeze_mask is None:
    freeze_mask = _held(opt_state)
  if freeze_mask is None or isinstance(freeze_mask, Layouts):
    return apply_fn
  flat = _tree.flatten(params)
  masks = _masks.resolve(freeze_mask, flat if not callable(freeze_mask) else params, _WHERE)
  trained = tuple(
    (path, tuple(np.shape(leaf)), mask if isinstance(mask, bool) else StaticMask.of(mask))
    for path, leaf, mask in zip(flat.paths, flat.leaves, masks, strict=True)
    if isinstance(mask, (bool, np.ndarray))  # what a runtime mask trains may change
  )
  return Checked(apply_fn, trained)


def _held(opt_state: Any) -> Any:
  """The mask that the state of one of our transforms holds; False for any other optimizer's."""
  try:
    layouts = _freeze.mask_of(opt_state)
  except ValueError:
    return False
  if any(isinstance(x, core.Tracer) for x in jax.tree.leaves(layouts)):
    return None
  return jax.tree.map(lambda x: x if isinstance(x, bool) else np.asarray(x), layouts.freeze_mask)
