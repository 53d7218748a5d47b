"""Freeze masks that modules carry, and how they agree with one that is given.

A module carries the mask of its parameter `kernel` as the attribute `kernel_freeze_mask`. It stands
on the module and not in the variable's metadata, which the state of another module overwrites.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import nnx
from jax import core

from .. import _masks, _ties, _tree
from .._errors import Problem, fail
from .._masks import Changing, LeafMask, Runtime
from .._packing import Layouts

SUFFIX = "_freeze_mask"


@dataclasses.dataclass(frozen=True)
class StaticMask:
  """A mask as hashable metadata: nnx would make a NumPy array data, which saves no FLOPs.

  Attributes:
    shape: of the mask, which broadcasts to its parameter.
    bits: `np.packbits` of it.
  """

  shape: tuple[int, ...]
  bits: bytes

  @classmethod
  def of(cls, mask: Any) -> StaticMask:
    array = np.asarray(mask, np.bool_)
    return cls(array.shape, np.packbits(array).tobytes())

  @property
  def array(self) -> np.ndarray:
    return _unpacked(self)

  def __repr__(self) -> str:
    return f"StaticMask(freezes {np.count_nonzero(self.array)} of {self.array.size}, {self.shape})"


@functools.lru_cache(maxsize=256)
def _unpacked(mask: StaticMask) -> np.ndarray:
  size = int(np.prod(mask.shape, dtype=np.int64))
  array = np.unpackbits(np.frombuffer(mask.bits, np.uint8), count=size).astype(np.bool_)
  array = array.reshape(mask.shape)
  array.flags.writeable = False  # it is shared by all who ask
  return array


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


def carried(module: Any) -> Iterator[tuple[str, Any, LeafMask]]:
  """(attribute, variable, mask) of every parameter of this very module whose mask it carries."""
  for name, mask in vars(module).items():
    if name.endswith(SUFFIX) and isinstance(mask, (bool, StaticMask)):
      attribute = name.removesuffix(SUFFIX)
      variable = vars(module).get(attribute)
      if isinstance(variable, nnx.Variable):
        yield attribute, variable, mask if isinstance(mask, bool) else mask.array


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
  masks = _by_path(model)
  return _tree.nested(paths, [masks.get(path, False) for path in paths]) if paths else {}


def need_module(model: Any, where: str) -> None:
  if not isinstance(model, nnx.Module):
    problem = Problem("", "an nnx module", type(model).__name__, TypeError)
    fail(where, [problem], "Merge a graphdef and its state with nnx.merge first.")


def _by_path(model: Any) -> dict[str, Any]:
  """The masks carried anywhere in the model, by the path its state has for the variable."""
  names = _ties.names(model)
  found: dict[str, Any] = {}
  for _, module in nnx.iter_graph(model):
    if isinstance(module, nnx.Module):
      for _, variable, mask in carried(module):
        path = names[id(variable)]
        found[path] = _either(found[path], mask) if path in found else mask
  return found


def _either(a: Any, b: Any) -> Any:
  both = np.logical_or(a, b)
  return both if both.ndim else bool(both)


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
  own = _by_path(model)
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
