"""Ordered rules: the first pattern that names a parameter says what becomes of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import numpy as np

from . import _patterns, _tree
from ._complaints import Complaint, Complaints, listing
from ._errors import Problem, describe, fail, show
from ._heads import Leaf
from ._patterns import Subject
from ._selectors import bare_index, factor, frozen
from ._sides import Side

Rules = Sequence[tuple[Any, Any]] | Mapping[Any, Any]


def build_mask(
  params: Any, rules: Rules, *, default: Any = False, layers: Any = None
) -> chex.ArrayTree:
  """Build a freeze mask from rules.

    mask[path] = value of the first rule whose pattern names path, else default        True = frozen

  A pattern is one of

  - a glob on the whole path: `*`, `?`, `[ab]` inside one part, `**` across parts. It covers what
    lies below the node it names: `lstm_1` is all of `lstm_1`, and not `lstm_10`;
  - a compiled regex, searched for in the path;
  - a layer index or slice in network order: `-2`, `slice(None, -3)`;
  - an nnx filter: a Variable type, `nnx.PathContains`, `nnx.Any`, ... (a string is always a glob);
  - a function `(path, leaf) -> bool`;
  - `...` for everything else.

  A value is True or False; a bool array that broadcasts to the parameter, or `maskopt.runtime` of
  one; an index of what to freeze (`np.s_[:, :3]`, `[0, 2]`); `maskopt.units`, `maskopt.heads`,
  `maskopt.train_only`; or a function of the leaf that returns one of these.

  Args:
    params: parameters in any containers, an `nnx.Module`, linen variables or an Equinox module;
      abstract ones too (`jax.eval_shape`).
    rules: (pattern, value) pairs, or a dict of them.
    default: the value where no rule applies.
    layers: network order for layer indices, where `params` cannot tell it: layer names, an nnx or
      Equinox module, or (linen_module, *example_inputs). An nnx module's order is that of its
      attributes as written, a linen module's that of its calls. Layers without parameters count.
  Returns:
    A freeze mask in the containers of `params`. Leaves are bools or NumPy bool arrays of the
    parameter's rank, of size 1 along each axis they do not depend on, so rows of a billion-element
    kernel cost kilobytes. `jax.Array` values stay `jax.Array`s: runtime data.
  Raises:
    ValueError: a rule names no parameter, can never apply, or does not fit a parameter; an index is
      out of range or the layer order is unknown. One error lists all of them.
    TypeError: a pattern or value is of no kind listed here, or traced where it must be read.
  Warns:
    UserWarning: everything is frozen.
  Example:
    >>> import numpy as np, maskopt
    >>> params = {"body": {"kernel": np.ones((4, 3))}, "head": {"kernel": np.ones((3, 2))}}
    >>> maskopt.build_mask(params, [("head", maskopt.units(1)), (..., True)])
    {'body': {'kernel': True}, 'head': {'kernel': array([[False,  True]])}}
  """
  mask = _build("maskopt.build_mask", frozen, params, rules, default, layers)
  if _all_are(mask, True):
    warnings.warn("maskopt.build_mask: the mask freezes every parameter.", stacklevel=2)
  return mask


def build_multipliers(
  params: Any, rules: Rules, *, default: Any = 1.0, layers: Any = None
) -> chex.ArrayTree:
  """Build a tree of update multipliers from rules.

    multiplier[path] = value of the first rule whose pattern names path, else default

  Args:
    params: as in `maskopt.build_mask`.
    rules: (pattern, factor) pairs, patterns as in `maskopt.build_mask`. A factor is a number, None
      for 0, which freezes, a float array that broadcasts to the parameter, or a function of the
      leaf that returns one of these. Negative factors are kept.
    default: the factor where no rule applies.
    layers: as in `maskopt.build_mask`.
  Returns:
    The containers of `params` with a float or a float array of the parameter's rank at each leaf.
  Raises:
    ValueError: as `maskopt.build_mask`, and NaN or infinite factors.
    TypeError: a pattern or factor is of no kind listed; a bool is no factor.
  Warns:
    UserWarning: every factor is 0.
  Example:
    >>> import numpy as np, maskopt
    >>> params = {"body": np.ones(3), "head": np.ones(2)}
    >>> maskopt.build_multipliers(params, [("head", 1.0), (..., None)])
    {'body': 0.0, 'head': 1.0}
  """
  multipliers = _build("maskopt.build_multipliers", factor, params, rules, default, layers)
  if _all_are(multipliers, 0.0):
    message = "maskopt.build_multipliers: every factor is 0, which freezes every parameter."
    warnings.warn(message, stacklevel=2)
  return multipliers


def _build(
  call: str,
  evaluate: Callable[[Any, Leaf], Any],
  params: Any,
  rules: Rules,
  default: Any,
  layers: Any,
) -> Any:
  pairs = _pairs(rules, f"{call}(rules=...)")
  subject = Subject(params, layers)
  if layers is not None:
    _check_layers(subject, f"{call}(layers=...)")
  complaints = Complaints()
  chosen = _first_matches(pairs, subject, complaints)
  leaves = _leaves(subject)
  _check_indices(pairs, chosen, subject, complaints)
  results: list[Any] = [x if _tree.is_opaque(x) else None for x in subject.flat.leaves]
  for k in subject.live:
    rule = chosen.get(k)
    try:
      results[k] = evaluate(default if rule is None else pairs[rule][1], leaves[k])
    except Complaint as complaint:
      source = "default" if rule is None else _name(rule, pairs)
      complaints.add(f"{show(subject.flat.paths[k])} ({source})", complaint)
  complaints.raise_all(f"{call}(rules=...)")
  return subject.flat.unflatten(results)


def _pairs(rules: Rules, where: str) -> list[tuple[Any, Any]]:
  if isinstance(rules, Mapping):
    return list(rules.items())
  remedy = "Write [(pattern, value), ...] or {pattern: value}."
  if isinstance(rules, (str, bytes)) or not hasattr(rules, "__iter__"):
    fail(where, [Problem("rules", "(pattern, value) pairs", describe(rules), TypeError)], remedy)
  pairs = list(rules)
  wrong = [k for k, r in enumerate(pairs) if not isinstance(r, (tuple, list)) or len(r) != 2]
  if wrong:
    kinds = "(pattern, value)"
    fail(
      where, [Problem(f"rules[{k}]", kinds, describe(pairs[k]), TypeError) for k in wrong], remedy
    )
  return [(pattern, value) for pattern, value in pairs]


def _check_layers(subject: Subject, where: str) -> None:
  """Look at `layers` even if no rule counts layers, so that a wrong one is heard of."""
  try:
    _ = subject.layers
  except Complaint as c:
    fail(where, [Problem("layers", c.expected, c.got, c.kind)], c.remedy)


def _name(k: int, pairs: list[tuple[Any, Any]]) -> str:
  return f"rules[{k}] {_patterns.show(pairs[k][0])}"


def _first_matches(
  pairs: list[tuple[Any, Any]], subject: Subject, complaints: Complaints
) -> dict[int, int]:
  """The rule of each parameter that has one."""
  chosen: dict[int, int] = {}
  for k, (pattern, _) in enumerate(pairs):
    try:
      found = _patterns.matches(pattern, subject)
      if all(leaf in chosen for leaf in found):
        raise _shadowed(sorted({chosen[leaf] for leaf in found}), len(found), pairs)
    except Complaint as complaint:
      complaints.add(_name(k, pairs), complaint)
      continue
    for leaf in found:
      chosen.setdefault(leaf, k)
  return chosen


def _shadowed(by: list[int], count: int, pairs: list[tuple[Any, Any]]) -> Complaint:
  names = listing([_name(k, pairs) for k in by])
  got = f"none: {names} came first for " + ("the one" if count == 1 else f"all {count}")
  remedy = "The first match wins: put narrow rules before wide ones, or drop this one."
  return Complaint("a parameter left for this rule", got, remedy)


def _check_indices(
  pairs: list[tuple[Any, Any]], chosen: dict[int, int], subject: Subject, complaints: Complaints
) -> None:
  """A bare index counts along the first axis, which is no more the same where ranks differ."""
  for k, (_, value) in enumerate(pairs):
    named = [leaf for leaf, rule in chosen.items() if rule == k]
    ranks = {np.ndim(subject.flat.leaves[leaf]): leaf for leaf in named}
    if len(ranks) > 1 and (index := bare_index(value)) is not None:
      shapes = [
        f"{tuple(np.shape(subject.flat.leaves[leaf]))} at {show(subject.flat.paths[leaf])}"
        for leaf in ranks.values()
      ]
      got = f"{describe(index)} for {' and '.join(shapes)}"
      expected = "parameters of one rank, for an index of their first axis"
      remedy = "For output units write maskopt.units(...), else a rule for each rank."
      complaints.add(_name(k, pairs), Complaint(expected, got, remedy))


def _leaves(subject: Subject) -> dict[int, Leaf]:
  """What rule values see of each parameter."""
  paths, shapes = subject.flat.paths, {}
  for k in subject.live:
    shapes[k] = tuple(np.shape(subject.flat.leaves[k]))
  beside: dict[str, list[tuple[int, ...]]] = {}
  for k in subject.live:
    beside.setdefault(paths[k].rpartition("/")[0], []).append(shapes[k])
  sides = subject.sides
  return {
    k: Leaf(
      subject.flat.leaves[k],
      shapes[k],
      tuple(beside[paths[k].rpartition("/")[0]]),
      next((sides[a] for a in _tree.ancestors(paths[k]) if a in sides), Side()),
    )
    for k in subject.live
  }


def _all_are(tree: Any, value: Any) -> bool:
  """Whether every parameter got this scalar; `bool` and `float` leaves never compare as arrays."""
  flat = _tree.flatten(tree)
  leaves = [x for x in flat.leaves if not _tree.is_opaque(x)]
  return bool(leaves) and all(type(x) is type(value) and x == value for x in leaves)
