"""Parameters that come as two copies of one tree, as `optax.lookahead` keeps them.

It trains the fast copy, moves the slow one after it, and is given gradients of the fast copy alone.
One mask is over the tree, so over both copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from ._errors import Problem, fail


def trained(params: Any) -> Any:
  """The copy that gradients are of; any other tree is its own."""
  return params.fast if isinstance(params, optax.LookaheadParams) else params


def each(fun: Callable[..., Any], *trees: Any) -> Any:
  """`fun` of the trees, or of each of their copies."""
  if isinstance(trees[0], optax.LookaheadParams):
    return optax.LookaheadParams(
      fast=fun(*(t.fast for t in trees)), slow=fun(*(t.slow for t in trees))
    )
  return fun(*trees)


def check_gradients(updates: Any, where: str) -> None:
  """Raise if gradients come as two copies."""
  if isinstance(updates, optax.LookaheadParams):
    problem = Problem("", "gradients of the fast parameters alone", "LookaheadParams")
    fail(where, [problem], "Differentiate at params.fast, as optax.lookahead asks.")
