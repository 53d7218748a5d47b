"""Set algebra of freeze masks; structure stays in the shapes, so a row mask stays a row mask."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from . import _tree
from ._errors import Problem, describe, fail, show
from ._masks import (
  Changing,
  FreezeMask,
  Runtime,
  check_bools,
  evaluate,
  flatten,
  is_bool,
  is_function,
)
from ._packing import Layouts


def union(a: FreezeMask, b: FreezeMask) -> FreezeMask:
  """Freeze what either mask freezes.

    union(a, b)[i] = a[i] | b[i]

  Args:
    a: a freeze mask; prefix trees, other containers and functions of the parameters are accepted.
    b: another one over the same parameters.
  Returns:
    A freeze mask in the containers of the finer one. Broadcastable leaves stay broadcastable (two
    row masks make a row mask); a runtime leaf makes a runtime leaf without a count.
  Raises:
    ValueError: the masks name different parameters, or leaves that do not broadcast together.
    TypeError: a leaf is not boolean; lists every one.
  Example:
    >>> import numpy as np, maskopt
    >>> maskopt.union({"w": np.array([True, False])}, {"w": False})
    {'w': array([ True, False])}
  """
  return _combined(_or, "union", a, b)


def intersection(a: FreezeMask, b: FreezeMask) -> FreezeMask:
  """Freeze what both masks freeze.

    intersection(a, b)[i] = a[i] & b[i]

  Args:
    a: a freeze mask; prefix trees, other containers and functions of the parameters are accepted.
    b: another one over the same parameters.
  Returns:
    A freeze mask in the containers of the finer one; see `union`.
  Raises:
    ValueError: the masks name different parameters, or leaves that do not broadcast together.
    TypeError: a leaf is not boolean; lists every one.
  Example:
    >>> import numpy as np, maskopt
    >>> maskopt.intersection({"w": np.array([True, False])}, True)
    {'w': array([ True, False])}
  """
  return _combined(_and, "intersection", a, b)


def invert(a: FreezeMask) -> FreezeMask:
  """Freeze what the mask trains, and train what it freezes.

    invert(a)[i] = not a[i]

  Args:
    a: a freeze mask, or a function of the parameters that returns one.
  Returns:
    A freeze mask of the same structure and the same leaf shapes; a runtime leaf loses its count.
  Raises:
    TypeError: a leaf is not boolean; lists every one.
  Example:
    >>> import maskopt
    >>> maskopt.invert({"bias": False, "kernel": True})
    {'bias': True, 'kernel': False}
  """
  where = "maskopt.invert(a)"
  _refuse_changing(where, a=a)
  if is_function(a):
    return functools.partial(_inverted_later, a)
  flat = _bools(a, where)
  return flat.unflatten([_not(x) for x in flat.leaves])


def _inverted_later(a: Callable[..., Any], params: Any) -> Any:
  return invert(a(params))


def _refuse_changing(where: str, **masks: Any) -> None:
  """Raise for a mask of the step, of which only step 0 would remain."""
  problems = [
    Problem(name, "a mask that stays as it is", describe(mask), TypeError)
    for name, mask in masks.items()
    if isinstance(mask, Changing)
  ]
  if problems:
    fail(where, problems, "Combine the masks of its stages, and make the schedule of those.")


def _bools(mask: Any, where: str) -> _tree.Flat:
  """The mask, all of whose leaves are bools, boolean arrays or runtime masks."""
  if isinstance(mask, Layouts):  # as a tree it has index arrays for leaves, and none where whole
    problem = Problem("", "a tree of bools", "what maskopt.mask_of returns", TypeError)
    fail(where, [problem], "Combine the masks it was made of, or give its attribute freeze_mask.")
  flat = flatten(mask)
  check_bools(flat, where, "Write True where frozen; an array of numbers becomes one by x != 0.")
  return flat


def _not(x: Any) -> Any:
  if x is None or is_bool(x):
    return x if x is None else not x
  return Runtime(~x.mask) if isinstance(x, Runtime) else ~x


def _or(x: Any, y: Any) -> Any:
  if is_bool(x) or is_bool(y):
    first, second = (x, y) if is_bool(x) else (y, x)
    return True if first else second
  return _elementwise(np.logical_or, jnp.logical_or, x, y)


def _and(x: Any, y: Any) -> Any:
  if is_bool(x) or is_bool(y):
    first, second = (x, y) if is_bool(x) else (y, x)
    return second if first else False
  return _elementwise(np.logical_and, jnp.logical_and, x, y)


def _elementwise(static: Callable, traced: Callable, x: Any, y: Any) -> Any:
  if isinstance(x, Runtime) or isinstance(y, Runtime):
    return Runtime(traced(*(v.mask if isinstance(v, Runtime) else v for v in (x, y))))
  return (static if isinstance(x, np.ndarray) and isinstance(y, np.ndarray) else traced)(x, y)


def _combined_later(op: Callable, name: str, a: Any, b: Any, params: Any) -> Any:
  return _combined(op, name, evaluate(a, params), evaluate(b, params))


def _combined(op: Callable, name: str, a: Any, b: Any) -> Any:
  where = f"maskopt.{name}(a, b)"
  _refuse_changing(where, a=a, b=b)
  if is_function(a) or is_function(b):
    return functools.partial(_combined_later, op, name, a, b)
  flat_a, flat_b = _bools(a, where), _bools(b, where)
  by_a, by_b = (dict(zip(f.paths, f.leaves, strict=True)) for f in (flat_a, flat_b))
  inner = _subtrees(flat_a.paths) | _subtrees(flat_b.paths)
  paths = [p for p in dict.fromkeys(flat_a.paths + flat_b.paths) if p not in inner]
  problems: list[Problem] = []
  leaves = {p: _combined_leaf(op, p, by_a, by_b, problems) for p in paths}
  if problems:
    fail(where, problems, "Give both masks over the same parameters.")
  for flat in (flat_a, flat_b):
    if set(flat.paths) == set(leaves):
      return flat.unflatten([leaves[p] for p in flat.paths])
  return _tree.nested(list(leaves), list(leaves.values()))


def _subtrees(paths: tuple[str, ...]) -> set[str]:
  return {a for path in paths for a in _tree.ancestors(path) if a != path}


def _combined_leaf(op: Callable, path: str, by_a: dict, by_b: dict, problems: list) -> Any:
  found = []
  for entries in (by_a, by_b):
    name = next((p for p in _tree.ancestors(path) if p in entries), None)
    if name is None:
      problems.append(Problem(path, "a freeze mask in both", "one in only one of them"))
      return None
    if name != path and not is_bool(entries[name]):
      expected = f"a bool at {show(name)}, for the mask is given to a subtree"
      problems.append(Problem(path, expected, describe(entries[name])))
      return None
    found.append(entries[name])
  x, y = found
  if x is None or y is None:
    return None
  try:
    return op(x, y)
  except (ValueError, TypeError):
    problems.append(Problem(path, "bools that broadcast together", f"{describe(x)}, {describe(y)}"))
    return None
