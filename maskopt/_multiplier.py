"""Factors on the final update: a learning rate of its own for any leaf, unit or element."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from . import _masks, _owned, _packing, _provenance, _tree
from ._errors import Problem, describe, fail
from ._packing import Packed, is_packed
from ._provenance import Record

_WHERE = "maskopt.scale_by_multiplier(multipliers=...)"


class MultiplierState(NamedTuple):
  """State of `scale_by_multiplier`: the factor of each leaf, by path."""

  factors: Any


def scale_by_multiplier(multipliers: Any) -> optax.GradientTransformationExtraArgs:
  """Multiply each final update by a factor of its own.

    new_update[i] = -0.0 if multiplier[i] == 0 else multiplier[i] * update[i]

  Chain it after the optimizer: before Adam a factor cancels out of the step. After
  `selective_transform` in one `jit` it scales the packed values; dense updates stay unbuilt.

  Args:
    multipliers: a finite number, or an array of these that broadcasts to the parameter, per leaf or
      subtree; a function of the parameters is called once, in `init`. Zero freezes updates, not
      moments; a negative factor moves the other way.
  Returns:
    A transformation; updates keep structure, shapes and dtypes. The factors are in its state, in
    their broadcastable shapes, so they may change without a retrace.
  Raises:
    ValueError: a path is missing, unknown, or its factor does not broadcast, is NaN or infinite
      (unless it is traced); lists every path.
    TypeError: a factor is not a real number, or an update *sets* its parameter (`master_dtype`).
  Example:
    >>> import jax.numpy as jnp, optax, maskopt
    >>> tx = optax.chain(optax.sgd(1.0), maskopt.scale_by_multiplier({"w": 0.5, "b": 0}))
    >>> params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    >>> tx.update(params, tx.init(params))[0]["w"].tolist()
    [-0.5, -0.5]
  """

  def init(params: optax.Params) -> Any:
    if _tree.is_placeholder(params):
      return MultiplierState(0)
    flat = _tree.flatten(params)
    given = _masks.evaluate(multipliers, params)
    factors = _masks.align(_tree.flatten(given), flat, _checked, _WHERE, "a multiplier")
    factors = zip(map(_key, flat.paths), factors, strict=True)
    return MultiplierState({k: jnp.asarray(f) for k, f in factors if f is not None})

  def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    del params, extra
    flat = _tree.flatten(updates, is_leaf=is_packed)
    _check(state, flat)
    leaves = [
      scaled(u, state.factors.get(_key(path)), path)
      for path, u in zip(flat.paths, flat.leaves, strict=True)
    ]
    return flat.unflatten(leaves), state

  return optax.GradientTransformationExtraArgs(init, update)


def _key(path: str) -> str:
  """A leaf's name in the state, where none may be empty."""
  return path or "root"


def _check(state: Any, flat: _tree.Flat) -> None:
  """Raise unless the state is ours, with a factor for every update."""
  factors = getattr(state, "factors", None)
  if not isinstance(state, MultiplierState) or not isinstance(factors, dict):
    problem = Problem("", "the state that init(params) returned", _owned.named(state))
    fail(f"{_WHERE}.update", [problem], "Call tx.update(updates, state).")
  given = {_key(path) for path in flat.paths}
  problems = [Problem(key, "an update", "none") for key in factors if key not in given]
  problems += [
    Problem(path, "no update, for the parameters had none of that path", "one")
    for path, u in zip(flat.paths, flat.leaves, strict=True)
    if _key(path) not in factors and (is_packed(u) or not _tree.is_hole(u))
  ]
  if problems:
    fail(f"{_WHERE}.update", problems, "Call init with the parameters that the updates are of.")


def _checked(
  factor: Any, leaf: Any, path: str, own: bool, problems: list[Problem]
) -> np.ndarray | jax.Array | None:
  """One leaf's factor as an array of the leaf's rank or a scalar."""
  array = factor if isinstance(factor, (np.ndarray, jax.Array)) else np.asarray(factor)
  shape = np.shape(leaf)
  if not any(jnp.issubdtype(array.dtype, kind) for kind in (np.integer, np.floating)):
    problems.append(Problem(path, "a real factor", describe(factor), TypeError))
  elif not _is_finite(array):
    got = describe(array) + " with NaN or infinity" if array.ndim else str(float(array))
    problems.append(Problem(path, "finite factors", got))
  elif array.ndim and not own:
    problems.append(Problem(path, "a number, for it is given to a subtree", describe(array)))
  elif not _masks.broadcasts(array.shape, shape):
    problems.append(Problem(path, f"a factor that broadcasts to {shape}", describe(array)))
  else:
    rank = len(shape) if array.ndim else 0
    return array.reshape((1,) * (rank - array.ndim) + array.shape)
  return None


def _is_finite(array: np.ndarray | jax.Array) -> bool:
  """Whether no factor is NaN or infinite, as far as that can be asked here."""
  if isinstance(array, jax.Array) and (isinstance(array, Tracer) or not array.is_fully_addressable):
    return True
  return bool(np.isfinite(np.asarray(array, np.float64)).all())


def scaled(update: Any, factor: Any, path: str) -> Any:
  """One leaf's update times a factor, packed if the update was made of packed values."""
  if factor is None or (not is_packed(update) and _tree.is_hole(update)):
    return update
  record = update.record if is_packed(update) else _provenance.made_of.recall(update)
  if record is None:
    return _times(update, factor)
  if record.sets:
    problem = Problem(path, "an update that adds to its parameter", "one that sets it", TypeError)
    fail(_WHERE, [problem], "With master_dtype, put the factor inside selective_transform.")
  if record.values is None:
    return update
  spread = jnp.broadcast_to(factor, record.layout.shape) if factor.ndim else factor
  chosen = record.layout.take(spread, record.index) if factor.ndim else factor
  if isinstance(record.values, tuple):  # the parts of several optimizers
    parts = chosen if factor.ndim else (chosen,) * len(record.values)
    pairs = zip(record.values, parts, strict=True)
    values = type(record.values)(_times(v, c) for v, c in pairs)
  else:
    values = _times(record.values, chosen)
  record = Record(record.layout, record.index, values)
  if is_packed(update):
    return Packed(record.values, record.layout, index=record.index)
  return _packing.dense(record, update.dtype)


def _times(update: Any, factor: Any) -> Any:
  # A select and never a product alone: 0 * inf is NaN.
  return jnp.where(factor == 0, jnp.full_like(update, -0.0), update * factor.astype(update.dtype))
