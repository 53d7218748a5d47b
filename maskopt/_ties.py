"""The names of an nnx variable: the one its state has, and those of modules that share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from . import _masks, _tree
from ._errors import Problem, fail


def names(model: Any) -> dict[int, str]:
  """The path that the model's state has for each variable, by the variable's identity."""
  return {
    id(x): "/".join(map(str, parts))
    for parts, x in nnx.iter_graph(model)
    if isinstance(x, nnx.Variable)
  }


def kinds(model: Any) -> dict[str, str]:
  """The type of the variable at each path."""
  return {
    "/".join(map(str, parts)): type(x).__name__
    for parts, x in nnx.iter_graph(model)
    if isinstance(x, nnx.Variable)
  }


def aliases(model: Any) -> list[tuple[str, str]]:
  """(other path, path that the state has) of every variable that is shared."""
  if not isinstance(model, nnx.Module):
    return []
  variables = list(names(model).values())
  found = []
  for group in nnx.find_duplicates(model):
    first, *others = ("/".join(map(str, parts)) for parts in group)
    below = [path for path in variables if _tree.covers(first, path)]
    found += [(other + path[len(first) :], path) for other in others for path in below]
  return found


def other_names(model: Any) -> dict[str, tuple[str, ...]]:
  """The further paths of each variable that has several, by the path that the state has."""
  found: dict[str, tuple[str, ...]] = {}
  for alias, path in aliases(model):
    found[path] = (*found.get(path, ()), alias)
  return found


def renamed(freeze_mask: Any, model: Any, paths: Sequence[str], where: str) -> Any:
  """The mask with every entry under the path that the state has for its variable.

  Args:
    freeze_mask: a freeze mask, evaluated.
    model: the module.
    paths: the variables that the mask is about.
    where: the call that errors name.
  Raises:
    ValueError: the names of one variable have different masks.
  """
  shared = [(alias, path) for alias, path in aliases(model) if path in set(paths)]
  if not shared:
    return freeze_mask
  flat = _masks.flatten(freeze_mask)
  entries = dict(zip(flat.paths, flat.leaves, strict=True))
  result, problems = dict(entries), []
  for alias, path in shared:
    given, own = _nearest(alias, entries), _nearest(path, entries)
    if given is None or given == own:
      continue
    if own is None:
      result[path] = entries[given]
    elif not _same(entries[own], entries[given]):
      expected = f"the mask of {path}, which is the same variable as {alias}"
      problems.append(Problem(given, expected, "another"))
  if problems:
    fail(where, problems, "A shared variable has one mask: give it under one of its names.")
  for path in entries:
    covers_alias = any(_tree.covers(path, alias) for alias, _ in shared)
    if covers_alias and not any(_tree.covers(path, name) for name in paths):
      del result[path]
  return _tree.nested(list(result), list(result.values()))


def _nearest(path: str, entries: dict[str, Any]) -> str | None:
  """The entry at the path or at the smallest subtree that holds it."""
  return next((a for a in _tree.ancestors(path) if a in entries), None)


def _same(a: Any, b: Any) -> bool:
  if isinstance(a, _masks.Runtime) or isinstance(b, _masks.Runtime):
    return a is b
  return np.array_equal(np.asarray(a), np.asarray(b))


def show_filter(wrt: Any) -> str:
  """A filter as errors write it."""
  if isinstance(wrt, (tuple, list)):
    return "(" + ", ".join(map(show_filter, wrt)) + ")"
  return wrt.__name__ if isinstance(wrt, type) else repr(wrt)
