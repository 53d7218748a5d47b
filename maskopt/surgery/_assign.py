"""New values for chosen elements: given ones, or those a layer starts with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _rules, _tree
from .._errors import Problem, describe, fail
from .._selectors import frozen
from . import _initial, _placement
from ._model import Model
from ._result import State, Surgery, result

_REMEDY = "Give a number, an array that broadcasts to the parameter or to the chosen part of it."


def assign(
  model: Any,
  rules: Sequence[tuple[Any, ...]] | Mapping[Any, Any],
  *,
  layers: Any = None,
  opt_state: Any = None,
  tx: Any = None,
  to: Any = None,
) -> Surgery:
  """Write values into chosen elements.

    new[i] = value[i] if a rule chooses i else old[i]        the first rule that does

  Args:
    model: an nnx module, linen variables or parameters, or any tree of parameters.
    rules: (pattern, value) or (pattern, where, value) triples. Patterns and `where` are those of
      `maskopt.build_mask`: `where` says which elements, True for all. A value is a number, an array
      that broadcasts to the parameter or to the chosen block of it, or a function of the leaf.
    layers: network order, as in `maskopt.build_mask`.
    opt_state: an optimizer state to be taken along, as in `grow`.
    tx: as in `grow`.
    to: as in `grow`.
  Returns:
    A `Surgery`. Values take the parameter's dtype; elements that no rule chooses keep their bits
    and are frozen in the mask. Assigned elements train and have fresh moments.
  Raises:
    ValueError: a rule names no parameter or no element that is left, or a value does not fit; lists
      every one.
    TypeError: a value is no number or array.
  Example:
    >>> import jax.numpy as jnp, numpy as np, maskopt
    >>> params = {"w": jnp.ones((2, 2))}
    >>> maskopt.surgery.assign(params, [("w", np.s_[0, :], [3.0, 4.0])]).model["w"].tolist()
    [[3.0, 4.0], [1.0, 1.0]]
  """
  call = "maskopt.surgery.assign"
  where = f"{call}(rules=...)"
  state = State(opt_state, tx, to)
  state.check(where)
  old = Model(model)
  source = model["params"] if old.is_variables else model
  chosen: dict[str, np.ndarray] = {}
  values: dict[str, np.ndarray] = {}
  problems: list[Problem] = []
  for number, (pattern, which, value) in enumerate(_triples(rules, where)):
    found = _chosen(call, source, [(pattern, which)], layers)
    left = {p: m & ~chosen.get(p, np.zeros((), bool)) for p, m in found.items()}
    if not any(m.any() for m in left.values()):
      got = "none: other rules came first" if found else "none"
      problems.append(Problem(f"rules[{number}]", "elements that are left for it", got))
    for path, mask in left.items():
      leaf = _placement.host(old.arrays[_full(old, path)])
      filled = _filled(value, leaf, found[path], path, problems)
      if filled is not None:
        values[path] = np.where(mask, filled, values.get(path, leaf))
        chosen[path] = mask | chosen.get(path, np.zeros((), bool))
  if problems:
    fail(where, problems, _REMEDY)
  return _written(old, chosen, values, {}, state, where)


def reset(
  model: Any,
  rules: Any,
  *,
  init: Any = None,
  key: Any = None,
  layers: Any = None,
  opt_state: Any = None,
  tx: Any = None,
  to: Any = None,
) -> Surgery:
  """Initialise chosen elements anew.

    new[i] = init(key)[i] if rules choose i else old[i]

  Args:
    model: an nnx module, linen variables or parameters, or any tree of parameters.
    rules: rules of `maskopt.build_mask`; True = initialise anew, everything else stays.
    init: initializer `(key, shape, dtype)` of weights, or rules [(glob, initializer)]; by default
      variance 1 / fan-in, biases 0, scales 1.
    key: random key; by default `jax.random.key(0)`.
    layers: network order, as in `maskopt.build_mask`.
    opt_state: an optimizer state to be taken along, as in `grow`.
    tx: as in `grow`.
    to: as in `grow`.
  Returns:
    A `Surgery`: other elements keep their bits and are frozen in the mask; those that start anew
    train and have fresh moments. Statistics of a layer that starts anew as a whole start anew too.
  Raises:
    ValueError: a rule names no parameter or does not fit one.
    TypeError: a rule's value, or init, is of no kind listed.
  Example:
    >>> import jax.numpy as jnp, maskopt
    >>> params = {"body": {"bias": jnp.ones(2)}, "head": {"bias": jnp.ones(2)}}
    >>> maskopt.surgery.reset(params, [("head", True)]).model["head"]["bias"].tolist()
    [0.0, 0.0]
  """
  call = "maskopt.surgery.reset"
  where = f"{call}(rules=...)"
  state = State(opt_state, tx, to)
  state.check(where)
  _initial.check(init, where)
  key = jax.random.key(0) if key is None else key
  old = Model(model)
  chosen = _chosen(call, model["params"] if old.is_variables else model, rules, layers)
  values: dict[str, np.ndarray] = {}
  for path, mask in chosen.items():
    leaf = _placement.host(old.arrays[_full(old, path)])
    new = _initial.fresh(path, leaf.shape, leaf.dtype, key, init, where)
    values[path] = np.where(mask, new, leaf)
  statistics = {
    path: _initial.fresh(path, np.shape(x), x.dtype, key, None, where)
    for path, x in old.arrays.items()
    if path not in old.params and _starts_anew(old, path, x, chosen)
  }
  return _written(old, chosen, values, statistics, state, where)


def _triples(rules: Any, where: str) -> list[tuple[Any, Any, Any]]:
  pairs = list(rules.items()) if isinstance(rules, Mapping) else list(rules)
  wrong = [
    Problem(f"rules[{n}]", "(pattern, value) or (pattern, where, value)", describe(r), TypeError)
    for n, r in enumerate(pairs)
    if not isinstance(r, (tuple, list)) or len(r) not in (2, 3)
  ]
  if wrong:
    fail(where, wrong, 'Write [("dense/bias", 0.0), ("dense/kernel", np.s_[:, 0], 1.0)].')
  return [(r[0], True if len(r) == 2 else r[1], r[-1]) for r in pairs]


def _chosen(call: str, source: Any, rules: Any, layers: Any) -> dict[str, np.ndarray]:
  """The chosen elements of each parameter of which any are, as bools of the parameter's rank."""
  mask = _tree.flatten(_rules._build(call, frozen, source, rules, False, layers))
  leaves = zip(mask.paths, mask.leaves, strict=True)
  found = {p: np.asarray(m) for p, m in leaves if not _tree.is_hole(m)}
  return {p: m for p, m in found.items() if m.any()}


def _full(old: Model, path: str) -> str:
  """The path of a parameter among all arrays."""
  return _tree.join("params", path) if old.is_variables else path


def _filled(
  value: Any, leaf: np.ndarray, mask: np.ndarray, path: str, problems: list[Problem]
) -> np.ndarray | None:
  """The value at the chosen places of the whole leaf."""
  if callable(value) and not hasattr(value, "dtype"):
    value = value(leaf)
  array = np.asarray(value)
  if array.dtype == object or not (
    jnp.issubdtype(array.dtype, np.number) and _same_kind(array.dtype, leaf.dtype)
  ):
    problems.append(Problem(path, f"values for {leaf.dtype}", describe(value), TypeError))
    return None
  array = array.astype(leaf.dtype)
  if _broadcasts(array.shape, leaf.shape):
    return np.broadcast_to(array, leaf.shape)
  wide = np.broadcast_to(mask, leaf.shape)
  axes = [
    np.flatnonzero(wide.any(tuple(k for k in range(leaf.ndim) if k != d))) for d in range(leaf.ndim)
  ]
  block = np.ix_(*axes)
  if wide[block].all() and _broadcasts(array.shape, wide[block].shape):
    filled = np.array(leaf)
    filled[block] = array
    return filled
  expected = f"values that broadcast to {leaf.shape} or to the chosen {wide[block].shape}"
  problems.append(Problem(path, expected, describe(array)))
  return None


def _same_kind(a: Any, b: Any) -> bool:
  """Whether values of one dtype may be written into the other: no fractions into integers."""
  order = [np.integer, np.floating, np.complexfloating]
  rank = [next(n for n, k in enumerate(order) if jnp.issubdtype(x, k)) for x in (a, b)]
  return rank[0] <= rank[1]


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
  try:
    return np.broadcast_shapes(shape, to) == to
  except ValueError:
    return False


def _starts_anew(old: Model, path: str, x: Any, chosen: Mapping[str, np.ndarray]) -> bool:
  """Whether a statistic belongs to a layer of which every parameter starts anew."""
  if not (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)):
    return False
  layer = old.inside(path).rpartition("/")[0]
  own = [old.inside(p) for p in old.params if old.inside(p).rpartition("/")[0] == layer]
  return bool(own) and all(p in chosen and chosen[p].all() for p in own)


def _written(
  old: Model,
  chosen: Mapping[str, np.ndarray],
  values: Mapping[str, np.ndarray],
  statistics: Mapping[str, np.ndarray],
  state: State,
  where: str,
) -> Surgery:
  """The model with values at chosen elements, which are new; everything else is old."""
  arrays = dict(statistics) | {_full(old, p): x for p, x in values.items()}
  new = old.rebuilt({p: _placement.like(x, old.arrays[p]) for p, x in arrays.items()})
  placements = {}
  for path in old.params:
    name = old.inside(path)
    rank = len(np.shape(old.arrays[path]))
    placements[name] = _placement.whole(name, rank, chosen.get(name, False))
  return result(old.source, new, placements, state, where)
