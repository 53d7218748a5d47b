"""Values for new elements: as a layer starts, by the kind of its parameter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _patterns
from .._errors import Problem, describe, fail
from . import _placement

Initializer = Callable[..., Any]
_ONES = ("scale", "var", "gamma")
_PROJECTIONS = ("query", "key", "value")


def fresh(
  path: str, shape: tuple[int, ...], dtype: Any, key: Any, init: Any, where: str
) -> np.ndarray:
  """Return a new leaf's values.

  Args:
    path: of the leaf; its last part says what kind it is.
    shape: of the new leaf.
    dtype: of the new leaf.
    key: a random key for the whole operation; each path gets its own.
    init: an initializer `(key, shape, dtype)` for leaves of two or more axes, rules
      [(glob, initializer)] for any leaves, or None: variance 1 / fan-in, biases and means 0, scales
      and variances 1.
    where: the call that errors name.
  """
  if not jnp.issubdtype(dtype, jnp.inexact):
    return np.zeros(shape, dtype)
  own = jax.random.fold_in(key, int.from_bytes(path.encode(), "little") % (2**32 - 5))
  chosen = _chosen(path, len(shape), init)
  values = _start(path, shape, dtype, own) if chosen is None else chosen(own, shape, dtype)
  values = _placement.host(values)
  if values.shape != shape or values.dtype != np.dtype(dtype):
    problem = Problem(path, f"{np.dtype(dtype)} of shape {shape} from init", describe(values))
    fail(where, [problem], "An initializer takes (key, shape, dtype).")
  return values


def _chosen(path: str, rank: int, init: Any) -> Initializer | None:
  if init is None:
    return None
  if callable(init):
    return init if rank > 1 else None
  pairs = init.items() if hasattr(init, "items") else init
  return next((f for glob, f in pairs if _patterns.glob(glob).fullmatch(path)), None)


def _start(path: str, shape: tuple[int, ...], dtype: Any, key: Any) -> Any:
  name = path.rpartition("/")[2]
  if len(shape) < 2 or name == "bias":
    return jnp.ones(shape, dtype) if name in _ONES else jnp.zeros(shape, dtype)
  values = jax.random.normal(key, shape, jnp.float32) / math.sqrt(max(_fan_in(path, shape), 1))
  return values.astype(dtype)


def _fan_in(path: str, shape: tuple[int, ...]) -> int:
  parts = path.split("/")
  if parts[-1] == "embedding":
    return shape[-1]
  if len(shape) == 3 and len(parts) > 1 and parts[-2] in _PROJECTIONS:
    return shape[0]
  return math.prod(shape[:-1])


def check(init: Any, where: str) -> None:
  """Raise unless init is an initializer or rules of initializers."""
  pairs = [] if init is None or callable(init) else _pairs(init)
  if pairs is None or not all(isinstance(p[0], str) and callable(p[1]) for p in pairs):
    problem = Problem("init", "an initializer or [(glob, initializer)]", describe(init), TypeError)
    fail(where, [problem], "Give jax.nn.initializers.lecun_normal(), say.")


def _pairs(init: Any) -> list[Any] | None:
  try:
    pairs = list(init.items() if hasattr(init, "items") else init)
  except TypeError:
    return None
  return pairs if all(isinstance(p, tuple) and len(p) == 2 for p in pairs) else None
