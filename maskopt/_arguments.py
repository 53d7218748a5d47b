"""What a transform is given beside gradients: checked, and as its optimizer must see it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from . import _copies, _provenance, _tree
from ._errors import Problem, describe, fail, show
from ._layout import Frozen, Layout, Sets
from ._packed import is_packed
from ._packing import Layouts


def is_transform(x: Any) -> bool:
  """Whether x has the two functions of an Optax transformation, as `optax.MultiSteps` has."""
  return hasattr(x, "init") and hasattr(x, "update")


def check_transform(x: Any, where: str, remedy: str) -> None:
  """Raise unless x is a transformation."""
  if not is_transform(x):
    if isinstance(x, nnx.Optimizer):
      remedy = "Of an nnx optimizer that is its .tx, and the state is its .opt_state."
    fail(where, [Problem("", "an Optax transformation", describe(x), TypeError)], remedy)


def check_prefer(prefer: Any) -> None:
  """Raise unless `selective_transform` knows the preference."""
  if prefer not in ("time", "memory"):
    problem = Problem("", '"time" or "memory"', repr(prefer))
    fail("maskopt.selective_transform(prefer=...)", [problem], "Leave it out for speed.")


def check_master_dtype(dtype: Any) -> None:
  """Raise unless it is None or a dtype of floats, whatever the mask may freeze."""
  if dtype is None:
    return
  try:
    is_float, got = jnp.issubdtype(jnp.dtype(dtype), jnp.floating), str(jnp.dtype(dtype))
  except TypeError:
    is_float, got = False, describe(dtype)
  if not is_float:
    where = "maskopt.selective_transform(master_dtype=...)"
    problem = Problem("", "a float dtype", got, TypeError)
    fail(where, [problem], "Give it jnp.float32, or leave it out.")


def with_extra_args(optimizer: Any) -> optax.GradientTransformationExtraArgs:
  """The optimizer as one that takes, or ignores, every argument of `update`."""
  where = "maskopt.selective_transform(optimizer, ...)"
  check_transform(optimizer, where, "Give it optax.adam(1e-3), say.")
  if isinstance(optimizer, optax.GradientTransformation):
    return optax.with_extra_args_support(optimizer)
  return optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)  # MultiSteps


def need_params(params: Any, where: str, master_dtype: Any, next_mask: Any) -> None:
  """Raise if `update` must read parameters and has none."""
  if params is None and (master_dtype is not None or next_mask is not None):
    expected = "the parameters as update's third argument (master_dtype and freeze_mask= read them)"
    fail(where, [Problem("", expected, "None")], "Call tx.update(grads, state, params).")


def need_positions(grads: Any, where: str) -> None:
  """Refuse packed gradients of an unknown runtime mask beside the next one."""
  flat = _tree.flatten(grads, is_leaf=is_packed)
  problems = [
    Problem(path, "an array, or values packed in this trace", "packed values of an earlier mask")
    for path, g in zip(flat.paths, flat.leaves, strict=True)
    if is_packed(g) and g.values is not None and not g.layout.digest and g.index is None
  ]
  if problems:
    fail(where, problems, "Pack with the next mask, or change the mask with array gradients.")


def warn_of_other_gradients(layouts: Layouts, flat: _tree.Flat, where: str) -> None:
  """Warn of gradients computed with a mask under which nothing trains of what trains here.

  Their zeros would train: nothing moves, and nobody says why.
  """
  paths = [
    path
    for path, g, layout in zip(flat.paths, flat.leaves, layouts.static.layouts, strict=True)
    if layout is not None and not is_packed(g) and _made_apart(g, layout)
  ]
  if paths:
    warnings.warn(
      f"`{where}`: at {', '.join(map(show, paths))}, the gradient was computed with another mask, "
      "which freezes all that trains here, so it is zero. Use one mask throughout: "
      "maskopt.mask_of(state) is the one a state was made for.",
      stacklevel=3,
    )


def _made_apart(gradient: Any, layout: Layout) -> bool:
  """Whether a gradient is known to have been computed for none of the trainable elements."""
  record = _provenance.made_of.recall(gradient)
  if record is None or isinstance(layout, Frozen):
    return False
  if isinstance(record.layout, Frozen):
    return True
  if record.layout.digest == layout.digest:  # one mask
    return False
  pairs = list(itertools.product(record.layout.blocks, layout.blocks))
  return bool(pairs) and not any(_meet(a, b) for a, b in pairs)


def _meet(a: Sets, b: Sets) -> bool:
  """Whether two products of index sets have an element in common."""
  return all(map(_overlap, a, b))


def _overlap(a: range | np.ndarray, b: range | np.ndarray) -> bool:
  """Whether two index sets have a position in common; a range may be as long as a leaf."""
  if isinstance(b, range):
    a, b = b, a
  if isinstance(a, range):
    first, last = a[0], a[-1]
    return (
      bool(b[0] <= last and first <= b[-1])
      if isinstance(b, range)
      else bool(((first <= b) & (b <= last)).any())
    )
  return np.intersect1d(a, b, assume_unique=True).size > 0


def packed_argument(value: Any, layouts: Layouts, params: Any, where: str) -> Any:
  """An extra argument as the inner optimizer must see it; functions see full parameters."""
  if callable(value) and params is not None:

    def on_full(*args: Any, **kwargs: Any) -> Any:
      args = tuple(_unpacked_argument(a, layouts, params, where) for a in args)
      return packed_argument(value(*args, **kwargs), layouts, params, where)

    return on_full
  if _matches(value, layouts, lambda layout: layout.shape):
    return layouts.take(value, where)
  return value


def _unpacked_argument(value: Any, layouts: Layouts, params: Any, where: str) -> Any:
  if not _matches(value, layouts, lambda layout: layout.packed_shape):
    return value
  full = layouts.flat(_copies.trained(params), where)
  return layouts.map(lambda p, layout, index, v: layout.put(v, p, index), full, value)


def _matches(value: Any, layouts: Layouts, shape_of: Callable[[Layout], Any]) -> bool:
  """Whether a tree has the parameters' paths and the given shapes; a lone scalar is no tree."""
  flat = _tree.flatten(value)
  if flat.paths != layouts.static.paths or flat.paths == ("",) and np.shape(value) == ():
    return False
  return all(
    layout is None or (_shape(leaf) == shape_of(layout))
    for leaf, layout in zip(flat.leaves, layouts.static.layouts, strict=True)
  )


def _shape(leaf: Any) -> tuple[int, ...] | None:
  return None if _tree.is_hole(leaf) else np.shape(leaf)
