"""An optimizer state as a tree of nodes, and which of its parts are shaped like the parameters."""

from __future__ import annotations

from typing import Any

import jax
import optax

from ._errors import Problem, describe, fail


class Owned:
  """Stands in a state for a tree shaped like the parameters."""

  def __init__(self, tree: Any):
    self.tree = tree


def marked(tx: Any, state: Any, where: str) -> Any:
  """The state of a transform with every tree shaped like the parameters as one `Owned` leaf."""
  try:
    return optax.tree_map_params(tx, Owned, state, is_leaf=lambda _: True)
  except Exception as error:
    got = f"{type(error).__name__}: {error}"[:200]
    problem = Problem("", "a transform that optax.tree_map_params can map", got)
    fail(where, [problem], "Migrate its parts one by one.")


def unmarked(state: Any) -> Any:
  """The state with the trees themselves."""
  return jax.tree.map(lambda x: x.tree if isinstance(x, Owned) else x, state)


def children(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
  """One level of a tree: the children under their keys, and how to build it again."""
  return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)


def named(node: Any) -> str:
  """A node as errors name it."""
  fields = getattr(type(node), "_fields", None)
  if fields is not None:
    return f"{type(node).__name__}({', '.join(fields)})"
  if isinstance(node, (tuple, list, dict)):
    return f"a {type(node).__name__} of {len(node)}"
  return describe(node)
