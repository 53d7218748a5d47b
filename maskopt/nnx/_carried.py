"""How the freeze masks that modules carry are made, and how they agree with one that is given."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx
from jax import core

from .. import _carrying, _masks, _ties, _tree
from .._carrying import StaticMask
from .._errors import Problem, fail
from .._masks import Changing, LeafMask, Runtime
from .._packing import Layouts


def hashable(freeze_mask: Any) -> Any:
  """A NumPy mask as `StaticMask`; anything else as it is, for `static` to judge."""
  is_array = isinstance(freeze_mask, np.ndarray) and freeze_mask.dtype == np.bool_
  return StaticMask.of(freeze_mask) if is_array else freeze_mask


def static(freeze_mask: Any, param: Any, name: str, where: str) -> StaticMask | bool:
  """The mask of one parameter as a module carries it.

  Raises:
    TypeError: the mask is runtime data, or not boolean; ValueError: it does not broadcast.
  """
  if isinstance(freeze_mask, StaticMask):
    freeze_mask = freeze_mask.array
  shape = tuple(np.shape(param))
  leaf = _tree.Flat((name,), [np.empty(shape, np.bool_)], None)
  if isinstance(freeze_mask, Runtime) or not (
    _masks.is_bool(freeze_mask) or isinstance(freeze_mask, np.ndarray)
  ):
    problem = Problem(name, f"a bool or NumPy bools for {shape}", _kind(freeze_mask), TypeError)
    fail(where, [problem], "A layer's own mask is part of the program: give it np.asarray(mask).")
  (mask,) = _masks.resolve({name: freeze_mask}, leaf, where)
  return mask if isinstance(mask, bool) else StaticMask.of(mask)


def _kind(value: Any) -> str:
  return f"{type(value).__name__} {value!r}"[:60]


def freeze_mask(model: nnx.Module) -> dict[str, Any]:
  """Collect the freeze masks that the modules of a network carry.

    mask[path/kernel] = the `kernel_freeze_mask` of the module at path, else False

  Args:
    model: any nnx module; masked layers may stand anywhere in it.
  Returns:
    A freeze mask over `nnx.state(model, nnx.Param)` as nested dicts of bools and NumPy bools, to be
    combined with others by `maskopt.union`. A shared variable appears once, frozen where any of the
    modules that share it freezes it.
  Raises:
    TypeError: model is no nnx module.
  Example:
    >>> import numpy as np, maskopt
    >>> from flax import nnx
    >>> layer = maskopt.nnx.MaskedLinear(2, 3, bias_freeze_mask=True, rngs=nnx.Rngs(0))
    >>> maskopt.nnx.freeze_mask(layer)
    {'bias': True, 'kernel': False}
  """
  need_module(model, "maskopt.nnx.freeze_mask(model)")
  paths = _tree.flatten(nnx.state(model, nnx.Param)).paths
  masks = _carrying.by_path(model)
  return _tree.nested(paths, [masks.get(path, False) for path in paths]) if paths else {}


def need_module(model: Any, where: str) -> None:
  if not isinstance(model, nnx.Module):
    problem = Problem("", "an nnx module", type(model).__name__, TypeError)
    fail(where, [problem], "Merge a graphdef and its state with nnx.merge first.")


def agreed(model: Any, params: Any, given: Any, wrt: Any, where: str) -> Any:
  """The mask to work with: the given one, or what the modules carry; both must agree.

  Args:
    model: what holds the parameters.
    params: its state of the kinds `wrt`.
    given: a freeze mask over params, `Layouts`, or None; of a schedule, step 0 is checked.
    wrt: the filter that chose them.
    where: the call that errors name.
  Raises:
    ValueError: the mask does not fit, or trains what a module freezes; names every path.
  """
  if isinstance(given, Layouts):
    return nnx.as_pure(given)
  flat = _tree.flatten(params)
  own = _carrying.by_path(model)
  if given is None:
    return _tree.nested(flat.paths, [own.get(path, False) for path in flat.paths])
  now = _ties.renamed(_masks.evaluate(given, params), model, flat.paths, where)
  _check_wrt(now, flat, model, wrt, where)
  masks = _masks.resolve(now, flat, where)
  problems = [
    Problem(path, f"{what} frozen, as the module's own mask says", "a mask that trains some")
    for path, leaf, mask in zip(flat.paths, flat.leaves, masks, strict=True)
    if path in own and (what := contradiction(own[path], mask, np.shape(leaf)))
  ]
  if problems:
    remedy = "Combine both: maskopt.union(maskopt.nnx.freeze_mask(model), freeze_mask)."
    fail(where, problems, remedy)
  return given if isinstance(given, Changing) else now


def contradiction(own: Any, mask: LeafMask, shape: tuple[int, ...]) -> str:
  """What the module freezes and the mask trains, in words."""
  other = mask.mask if isinstance(mask, Runtime) else mask
  if other is None or isinstance(other, core.Tracer):
    return ""
  trained = np.count_nonzero(np.broadcast_to(own & ~np.asarray(other, np.bool_), shape))
  return f"{trained:,} elements" if trained else ""


def _check_wrt(given: Any, flat: _tree.Flat, model: Any, wrt: Any, where: str) -> None:
  """A mask over variables of another kind than `wrt` selects: say which kinds they are."""
  if not isinstance(model, nnx.Module):
    return
  known = {a for path in flat.paths for a in _tree.ancestors(path)}
  kinds = _ties.kinds(model)
  problems = [
    Problem(path, f"a variable that wrt={_ties.show_filter(wrt)} selects", f"a {kinds[path]}")
    for path in _masks.flatten(given).paths
    if path not in known and path in kinds
  ]
  if problems:
    fail(where, problems, "Build the mask over nnx.state(model, wrt), with the same filter.")
