"""What a freeze mask is: bools over the parameters, True = frozen.

A leaf is a bool for the whole parameter or a bool array that broadcasts to it, so structure stays
in the shape: `(out,)` freezes units of an `(in, out)` kernel and costs `out` bytes, however large
`in` is.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeGuard

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from . import _traced, _tree
from ._complaints import Complaint, check_takes
from ._errors import Problem, describe, fail, show
from ._traced import Traced

FreezeMask = chex.ArrayTree | Callable[[Any], chex.ArrayTree]

_BUILD = "Build the mask with maskopt.build_mask."
_OF_PATH = "A function of (path, leaf) is a rule: maskopt.build_mask(params, [(function, True)])."
_COUNT = "a count of trainable elements"
_REMEDIES = {
  "a freeze mask": _BUILD,
  "a multiplier": "Build the tree with maskopt.build_multipliers.",
  "a label": "Give each parameter or subtree a label, or labels that broadcast to it.",
}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["mask"], meta_fields=["count"])
@dataclasses.dataclass(frozen=True)
class Runtime:
  """A mask leaf that is data: it may change from step to step without recompiling.

  Attributes:
    mask: bool `jax.Array` that broadcasts to the parameter; True = frozen.
    count: number of trainable elements if it never changes, else None.
  """

  mask: jax.Array
  count: int | None = None


class Changing(abc.ABC):
  """A mask of the step. At runtime it makes a transform that counts steps and swaps its own mask.

  `maskopt.unfreeze_schedule` returns one; here is what a transform must know of it.
  """

  mode: Literal["static", "runtime"]

  @abc.abstractmethod
  def __call__(self, params: Any) -> Any:
    """The mask of step 0."""

  @abc.abstractmethod
  def running(self, make: Callable[[Any], Any]) -> Any:
    """The transform that `make(freeze_mask)` returns, under the mask of its own step count."""


# What one leaf's mask is after `resolve`: a bool, a NumPy or runtime mask of the parameter's rank,
# or None where there is no parameter.
LeafMask = bool | np.ndarray | Runtime | None


def is_function(freeze_mask: Any) -> TypeGuard[Callable[[Any], Any]]:
  """Whether the mask is a function of the parameters, and not a callable module of masks."""
  return (
    callable(freeze_mask)
    and not isinstance(freeze_mask, nnx.Module)
    and jax.tree_util.all_leaves([freeze_mask])
  )


def is_bool(mask: Any) -> bool:
  return isinstance(mask, (bool, np.bool_))


def _is_leaf(x: Any) -> bool:
  return isinstance(x, Runtime)


def flatten(freeze_mask: Any) -> _tree.Flat:
  """Flatten a mask, keeping `Runtime` leaves whole."""
  return _tree.flatten(freeze_mask, is_leaf=_is_leaf)


def evaluate(freeze_mask: FreezeMask, params: Any) -> Any:
  """The mask itself, calling it with the parameters if it is a function of them."""
  if not is_function(freeze_mask):
    return freeze_mask
  try:
    check_takes(freeze_mask, ("params",), _OF_PATH)
  except Complaint as c:
    fail(
      "maskopt: a freeze mask that is a function",
      [Problem("", c.expected, c.got, c.kind)],
      c.remedy,
    )
  return freeze_mask(_tree.parameters(params))


def resolve(freeze_mask: FreezeMask, params: Any, where: str) -> list[LeafMask]:
  """Return one mask per parameter leaf, in the order of `_tree.flatten(params)`.

  Args:
    freeze_mask: any form of freeze mask.
    params: the parameters, concrete or abstract, or their `Flat`.
    where: the call that errors name, as `maskopt.f(freeze_mask=...)`.
  Raises:
    TypeError: a mask leaf is not boolean.
    ValueError: a path is missing, unknown, or its mask does not broadcast; all are listed.
  """
  flat = params if isinstance(params, _tree.Flat) else _tree.flatten(params)
  return align(flatten(evaluate(freeze_mask, params)), flat, _checked, where, "a freeze mask")


def align(
  entries: _tree.Flat, flat: _tree.Flat, checked: Callable, where: str, what: str
) -> list[Any]:
  """Bring each entry to the parameters its path names or covers; None at holes.

  `checked(entry, leaf, path, own, problems)` returns what one parameter gets; `own` says that the
  entry stands at the parameter itself and not at a subtree that holds it.
  """
  found = dict(zip(entries.paths, entries.leaves, strict=True))
  problems: list[Problem] = []
  result: list[Any] = []
  for path, leaf in zip(flat.paths, flat.leaves, strict=True):
    name = next((a for a in _tree.ancestors(path) if a in found), None)
    if _tree.is_hole(leaf):
      result.append(None)
    elif name is None:
      result.append(None)
      problems.append(Problem(path, what, "none"))
    else:
      result.append(checked(found[name], leaf, path, name == path, problems))
  problems += _strangers(entries.paths, flat)
  if problems:
    fail(where, problems, _remedy(problems, flat, what))
  return result


def _checked(mask: Any, leaf: Any, path: str, own: bool, problems: list[Problem]) -> LeafMask:
  """One leaf's mask brought to the rank of its parameter; complaints go to `problems`."""
  if is_bool(mask):
    return bool(mask)
  shape = np.shape(leaf)
  array = mask.mask if isinstance(mask, Runtime) else mask
  if not isinstance(array, (np.ndarray, jax.Array)) or array.dtype != np.bool_:
    got = describe(array)
    problems.append(Problem(path, f"bool broadcastable to {shape}", got, TypeError))
    return None
  size = math.prod(shape)
  if isinstance(array, Tracer) and array.ndim == 0 and (size > 1 or not own):
    problems.append(Traced(path, f"bool broadcastable to {shape}", _traced.told(array)))
    return None
  if not own:
    problems.append(Problem(path, "a bool, for the mask is given to a subtree", describe(array)))
    return None
  if not broadcasts(array.shape, shape) or (array.size == 1 and size > 1):
    got = describe(array) + misfit(array.shape, shape, "bool")
    problems.append(Problem(path, f"bool broadcastable to {shape}", got))
    return None
  array = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
  if isinstance(array, np.ndarray):
    return array if size else bool(array.all())  # of no elements there is no structure
  count = mask.count if isinstance(mask, Runtime) else None
  if count is not None and not 0 <= count <= size:
    problems.append(Problem(path, f"{_COUNT} in [0, {size}]", str(count)))
    return None
  return Runtime(array, count)


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
  """Whether an array of one shape broadcasts to the other, and to no larger one."""
  return len(shape) <= len(to) and all(
    n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False)
  )


def misfit(shape: tuple[int, ...], to: tuple[int, ...], kind: str) -> str:
  """Why an array of one shape is no mask of a leaf of the other, where that can be said."""
  if math.prod(shape) == 1:
    return f" (one element on a larger leaf: write a {kind})"
  if 0 < len(shape) < len(to) and shape == to[: len(shape)]:
    wanted = shape + (1,) * (len(to) - len(shape))
    return f" (NumPy aligns the last axes: give it the shape {wanted})"
  return ""


def _strangers(mask_paths: tuple[str, ...], flat: _tree.Flat) -> Iterator[Problem]:
  """Mask paths that name no parameter; below a hole nothing can be asked."""
  known = {a for path in flat.paths for a in _tree.ancestors(path)}
  holes = {p for p, leaf in zip(flat.paths, flat.leaves, strict=True) if _tree.is_hole(leaf)}
  for path in mask_paths:
    if not path and not flat.paths:
      continue  # one value for a tree without parameters
    if path not in known and not any(a in holes for a in _tree.ancestors(path)):
      yield Problem(path, "a parameter", "none of that path")


def _remedy(problems: list[Problem], flat: _tree.Flat, what: str) -> str:
  build = _REMEDIES[what]
  if all(isinstance(p, Traced) for p in problems):
    return _traced.REMEDY
  if all(p.expected.startswith("one of the labels") for p in problems):
    return "Write one of them, or give an optimizer for the label (None freezes)."
  if all(p.expected.startswith(_COUNT) for p in problems):
    return "Give maskopt.runtime the count of trainable elements."
  if what == "a freeze mask" and any(p.got.startswith("str ") for p in problems):
    return f"{build} Labels of several optimizers are for maskopt.partition."
  known = set(flat.paths)
  if any(p.expected == "a parameter" and known & set(_tree.ancestors(p.path)) for p in problems):
    return "A list or dict is a tree of its own: write np.array([...]) for the elements of a leaf."
  if all(p.expected in ("a parameter", what) for p in problems):
    shown = ", ".join(show(p) for p in flat.paths[:8]) + (", ..." if len(flat.paths) > 8 else "")
    return f"The parameters are {shown}. {build}" if shown else "The tree has no parameters."
  return build


def check_trainable(flat: _tree.Flat, masks: list[LeafMask], where: str) -> None:
  """Raise if an integer leaf or linen's statistics train, or one array stands at two paths."""
  problems, shared, seen = [], [], {}
  for path, leaf, mask in zip(flat.paths, flat.leaves, masks, strict=True):
    if mask is None:
      continue
    if not jnp.issubdtype(dtype_of(leaf), jnp.inexact) and not _all_frozen(mask):
      got = f"{dtype_of(leaf)}, of which some would train"
      problems.append(Problem(path, "a float or complex parameter", got, TypeError))
    if isinstance(leaf, (jax.Array, np.ndarray)):
      other = seen.setdefault(id(leaf), path)
      if other != path:
        shared.append(Problem(path, "an array of its own", f"the one that is at {show(other)}"))
  remedies = ["Freeze what is not float or complex, integer leaves say."] * bool(problems)
  statistics = [
    Problem(path, "statistics that are frozen", "some that would train")
    for path, mask in zip(flat.paths, masks, strict=True)
    if mask is not None and path.startswith("batch_stats/") and not _all_frozen(mask)
  ]
  if statistics and any(path.startswith("params/") for path in flat.paths):
    problems += statistics
    remedies.append("Give variables['params'], or freeze batch_stats, which the forward pass sets.")
  remedies += ["Keep a shared array at one path, or copy it: jnp.array(x)."] * bool(shared)
  if remedies:
    fail(where, problems + shared, " ".join(remedies))


def dtype_of(leaf: Any) -> Any:
  """The dtype a leaf has as a JAX array; Python numbers take JAX's defaults."""
  return leaf.dtype if hasattr(leaf, "dtype") else jax.dtypes.canonicalize_dtype(type(leaf))


def _all_frozen(mask: LeafMask) -> bool:
  return not isinstance(mask, Runtime) and bool(np.all(mask))


def check_bools(flat: _tree.Flat, where: str, remedy: str) -> None:
  """Raise unless all leaves of a mask are bools, boolean arrays or runtime masks."""
  problems = [
    Problem(path, "a bool or a boolean array", describe(x), TypeError)
    for path, x in zip(flat.paths, flat.leaves, strict=True)
    if not (x is None or is_bool(x) or isinstance(x, Runtime))
    and getattr(x, "dtype", None) != np.bool_
  ]
  if problems:
    fail(where, problems, remedy)


def runtime(freeze_mask: chex.ArrayTree, count: Any = None) -> chex.ArrayTree:
  """Mark masks as runtime data, so that they may change without recompiling.

    update[i] = 0 if mask_now[i] else update[i]        one compilation for every mask

  Args:
    freeze_mask: a bool array or a tree of them; NumPy arrays become `jax.Array`s, bools stay
      static.
    count: how many elements of each leaf train, if that never changes: an int, or a tree of ints
      like `freeze_mask`. With it the optimizer state is packed (`count` values and 4 bytes of
      index each); without it the state has the parameter's shape.
  Returns:
    The same tree with runtime leaves, to be given as `freeze_mask`.
  Raises:
    ValueError: `count` names another leaf than the mask. Whether it is the number of elements that
      train is seen where the mask meets its parameters.
    TypeError: a mask is not boolean, a count no int, or traced; lists every one.
  Example:
    >>> import jax.numpy as jnp, maskopt
    >>> maskopt.runtime(jnp.array([True, False, True]), count=1).count
    1
  """
  flat = flatten(freeze_mask)
  check_bools(flat, "maskopt.runtime(freeze_mask=...)", _BUILD)
  counts = _counts(flat.paths, count)
  return flat.unflatten([_runtime_leaf(x, k) for x, k in zip(flat.leaves, counts, strict=True)])


def _counts(paths: tuple[str, ...], count: Any) -> list[int | None]:
  """The count of each leaf, from one for all or from a tree of them."""
  if count is None or jax.tree_util.all_leaves([count]):
    found = dict.fromkeys(paths, count)
  else:
    tree = _tree.flatten(count)
    found = dict(zip(tree.paths, tree.leaves, strict=True))
  problems = [Problem(p, "a count", "none") for p in paths if p not in found]
  problems += [Problem(p, "a mask", "a count alone") for p in found if p not in paths]
  for path, k in found.items():
    if _traced.is_traced(k):
      problems.append(Traced(path, "an int", _traced.told(k), TypeError))
    elif k is not None and (is_bool(k) or not isinstance(k, (int, np.integer))):
      problems.append(Problem(path, "an int", describe(k), TypeError))
  if problems:
    traced = all(isinstance(p, Traced) for p in problems)
    remedy = "Give the number of trainable elements, one for all leaves or a tree like the mask."
    fail("maskopt.runtime(count=...)", problems, _traced.REMEDY if traced else remedy)
  return [found[p] for p in paths]


def _runtime_leaf(mask: Any, count: int | None) -> Any:
  if mask is None or is_bool(mask):
    return mask
  return Runtime(jnp.asarray(mask.mask if isinstance(mask, Runtime) else mask), count)
