"""How an element starts that is thawed under an Adam which has run for a while.

Adam corrects the bias of its moments by one step count for all. Where that is large, moments that
start at zero pass for settled ones, and the first updates are 2.5 to 5 times too long. So a thawed
element gets the moments that its first gradient g would have left behind, had it been its gradient
at each of the t steps so far:

  mu = (1 - b1^t) g        nu = (1 - b2^t) g^2        so that  mu_hat = g,  nu_hat = g^2

What g is after a clip, and what b1 and b2 are, is asked of the optimizer itself: two updates from a
fresh state with the same gradients leave (1 - b1) g, then (1 + b1) (1 - b1) g, and so with nu.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import core, lax

# Gradients may be gathered over several steps before Adam sees them.
_MOST_STEPS = 64
_RUN = 1024


def is_adam(node: Any) -> bool:
  """Whether a node of a state holds a step count and two moments, as Optax's Adams do."""
  return {"count", "mu", "nu"} <= set(getattr(type(node), "_fields", ()))


def nodes(state: Any) -> list[Any]:
  """The Adam nodes of a state, in the order of its leaves."""
  return [x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x)]


def replaced(state: Any, new: list[Any]) -> Any:
  """The state with other Adam nodes."""
  rest = iter(new)
  return jax.tree.map(lambda x: next(rest) if is_adam(x) else x, state, is_leaf=is_adam)


def seeded(step: Callable[[Any], Any], fresh: Any, counts: list[Any]) -> Any:
  """Return a fresh state whose Adam moments are those of a constant gradient.

  Args:
    step: the state after one update with the gradients of the thaw.
    fresh: the state that `init` returns.
    counts: for each Adam node, the steps that its elements are to have behind them.
  """
  first = _next(step, fresh)
  second = _next(step, first)
  new = [
    _constant(*each)
    for each in zip(*(nodes(s) for s in (fresh, first, second)), counts, strict=True)
  ]
  return replaced(fresh, new)


def _next(step: Callable[[Any], Any], state: Any) -> Any:
  """The state after the next update that reaches every Adam; after one, while tracing."""
  start = [n.count for n in nodes(state)]
  for _ in range(_MOST_STEPS):
    state = step(state)
    moved = [n.count != c for n, c in zip(nodes(state), start, strict=True)]
    if any(isinstance(m, core.Tracer) for m in moved) or all(bool(m.all()) for m in moved):
      break
  return state


def _constant(fresh: Any, first: Any, second: Any, count: Any) -> Any:
  """One node with moments of the gradient that led to `first`, as old as `count` steps."""
  mu1, mu2, squares = _sums(first.mu, second.mu, jax.tree.map(jnp.square, first.mu))
  nu1, nu2 = _sums(first.nu, second.nu)
  # 1 - b, from moments m and (1 + b) m.
  rest1, rest2 = 2 - mu2 / mu1, 2 - nu2 / nu1
  # No running averages of g and g^2 (Adamax, Yogi), or no gradient at all: leave them as they are.
  squares = squares * rest2 / jnp.square(rest1)
  known = (rest1 > 0) & (rest2 > 0) & (jnp.abs(nu1 / squares - 1) < 0.02)
  scale1, scale2 = _settled(rest1, count) / rest1, _settled(rest2, count) / rest2

  def seed(scale: Any, start: Any, m: Any) -> Any:
    wide = jnp.promote_types(m.dtype, jnp.float32)
    return jnp.where(known, (m.astype(wide) * scale.astype(wide)).astype(m.dtype), start)

  def filled(nu: Any) -> Any:
    # An element without a gradient yet: when it comes, it counts as its neighbours' did.
    some = nu != 0
    total, count = _sum(nu, some)
    mean = (total / jnp.maximum(count, 1)).astype(nu.dtype)
    return jnp.where(some | ~known, nu, mean)

  mu = jax.tree.map(lambda s, m: seed(scale1, s, m), fresh.mu, first.mu)
  nu = jax.tree.map(lambda s, m: filled(seed(scale2, s, m)), fresh.nu, first.nu)
  return fresh._replace(mu=mu, nu=nu)


def _settled(rest: Any, count: Any) -> Any:
  """1 - b^count."""
  return 1 - jnp.exp(count.astype(jnp.float32) * jnp.log1p(-rest))


def _sums(*trees: Any) -> list[Any]:
  """For each of some trees alike the sum of all that is in it, without signs."""
  leaves = zip(*map(jax.tree.leaves, trees), strict=True)
  sums = [_sum(*map(jnp.abs, arrays)) for arrays in leaves]
  zeros = (jnp.zeros((), jnp.float32),) * len(trees)
  return [sum(each) for each in zip(zeros, *sums, strict=True)]


def _sum(*arrays: Any) -> tuple[Any, ...]:
  """The float32 sums of arrays of one shape; in a graph all in one pass.

  What XLA:CPU is to sum it writes into memory first, array by array, and keeps that memory aside at
  every step, also at those that sum nothing. A reduction of several arrays is one fused loop.
  """
  if not isinstance(arrays[0], core.Tracer):
    return tuple(jnp.sum(x, dtype=jnp.float32) for x in arrays)
  sums = tuple(x.astype(jnp.float32) for x in arrays)
  zeros = (jnp.zeros((), jnp.float32),) * len(arrays)
  while sums[0].ndim:
    if sums[0].shape[-1] > _RUN:
      sums = tuple(map(_in_runs, sums))
    sums = tuple(lax.reduce(sums, zeros, _added, (sums[0].ndim - 1,)))
  return sums


def _in_runs(x: Any) -> Any:
  """The last dimension as two, for sums of sums round less than one long sum."""
  rows = -(-x.shape[-1] // _RUN)
  end = rows * _RUN - x.shape[-1]
  padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, end)])
  return padded.reshape(*x.shape[:-1], rows, _RUN)


def _added(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
  return tuple(x + y for x, y in zip(a, b, strict=True))
