"""A tree's parameters, and the state that stands beside them.

A module holds variables that are no parameters (BatchNorm statistics, counts of random numbers),
and so do the variables of linen, `{"params": ..., "batch_stats": ...}`. A freeze mask speaks of the
parameters; the rest is watched.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import core

from .. import _copies, _layers, _masks, _ties, _tree
from .._complaints import Complaint
from .._errors import Problem, fail
from .._packed import is_packed
from .._packing import Layouts


@dataclasses.dataclass(frozen=True)
class Other:
  """One array that is no parameter.

  Attributes:
    path: where the tree holds it.
    owner: the same path as the parameters of its layer would have it.
    kind: the variable's type, or the collection's name.
    value: the array.
  """

  path: str
  owner: str
  kind: str
  value: Any


def parts(
  tree: Any, freeze_mask: Any, where: str = "freeze_mask=..."
) -> tuple[Any, Any, list[Other]]:
  """Return the parameters, the mask over them, and everything else that the tree holds.

  The variables of linen come apart; what the mask freezes of their other collections stays, to be
  proved. A function is a mask over the parameters and is left for the analysis to call. Of the two
  copies that lookahead keeps, the one that trains is returned.
  """
  tree = _copies.trained(tree)
  if isinstance(tree, nnx.Module):
    return _tree.parameters(tree), under_own_names(freeze_mask, tree, where), beside(tree)
  if not _is_variables(tree):
    return tree, freeze_mask, []
  named = _collections_named(freeze_mask)
  if "params" not in named:
    return tree["params"], freeze_mask, list(_collections(tree))
  if isinstance(freeze_mask, Layouts):
    # What an optimizer holds moments of is for it a parameter, in whatever collection.
    inside = {"params": tree["params"]}, freeze_mask, list(_collections(tree, "params"))
    return inside if named == {"params"} else (tree, freeze_mask, [])
  return _without_state(tree, freeze_mask)


def _without_state(
  tree: Mapping[str, Any], freeze_mask: Mapping[str, Any]
) -> tuple[Any, Any, list[Other]]:
  """The variables without the state that their mask leaves free; none of it trains.

  `build_mask` over the variables names every collection, and gives False where no rule does.
  """
  flat, entries = _tree.flatten(tree), _masks.flatten(freeze_mask)
  known = {a for path in flat.paths for a in _tree.ancestors(path)}
  free = {p for p, x in zip(entries.paths, entries.leaves, strict=True) if _is_free(x)}
  params = {p for p in flat.paths if _collection(p) == "params"}
  free |= set(tree) - set(freeze_mask)
  held = {p for p in flat.paths if p not in params and not free.isdisjoint(_tree.ancestors(p))}
  absent = {p for p in free if _collection(p) in _COLLECTIONS - set(tree)}
  if not set(entries.paths) <= known | absent:
    return tree, freeze_mask, []  # for another tree, as the analysis of the mask will say
  if held | params == set(flat.paths):
    return tree["params"], freeze_mask["params"], list(_collections(tree))
  leaves = [None if p in held else x for p, x in zip(flat.paths, flat.leaves, strict=True)]
  others = [x for x in _collections(tree, "params") if x.path in held]
  return flat.unflatten(leaves), freeze_mask, others


def _is_free(mask: Any) -> bool:
  """Whether a mask is known to freeze nothing."""
  if isinstance(mask, np.ndarray):
    return mask.dtype == np.bool_ and not mask.any()
  return _masks.is_bool(mask) and not mask


def _collection(path: str) -> str:
  return path.partition("/")[0]


def under_own_names(freeze_mask: Any, module: nnx.Module, where: str) -> Any:
  """The mask with shared variables under the names that the module's state has for them."""
  if freeze_mask is None or isinstance(freeze_mask, Layouts) or _masks.is_function(freeze_mask):
    return freeze_mask
  paths = _tree.flatten(module).paths
  return _ties.renamed(freeze_mask, module, paths, where)


def beside(tree: Any) -> list[Other]:
  """What a module holds beside its parameters; a tree holds nothing that a mask could not name."""
  return list(_variables(tree)) if isinstance(tree, nnx.Module) else []


# linen's collections that no one trains. Any other name beside `params` may hold parameters, and a
# mask must speak of it.
_COLLECTIONS = {"batch_stats", "cache", "intermediates", "losses", "metrics", "perturbations"}


def _is_variables(tree: Any) -> bool:
  """Whether a tree is the variables of a linen module."""
  return (
    isinstance(tree, Mapping)
    and not isinstance(tree, nnx.State)
    and isinstance(tree.get("params"), Mapping)
    and set(tree) <= _COLLECTIONS | {"params"}
  )


def _collections_named(freeze_mask: Any) -> set[str]:
  """The first parts of the mask's paths."""
  if isinstance(freeze_mask, Layouts):
    return {_collection(path) for path in freeze_mask.static.paths}
  return set(freeze_mask) if isinstance(freeze_mask, Mapping) else set()


def _variables(module: nnx.Module) -> Iterator[Other]:
  for keys, variable in nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.Param))):
    path, kind = "/".join(map(str, keys)), type(variable).__name__
    yield from _others(path, path, kind, variable)


def _collections(tree: Mapping[str, Any], owner: str = "") -> Iterator[Other]:
  """The state beside linen's parameters, whose paths begin with `owner`."""
  for name, collection in tree.items():
    if name != "params":
      yield from _others(name, owner, name, collection)


def _others(path: str, owner: str, kind: str, tree: Any) -> Iterator[Other]:
  flat = _tree.flatten(tree)
  for inner, leaf in zip(flat.paths, flat.leaves, strict=True):
    if not _tree.is_hole(leaf):
      yield Other(_tree.join(path, inner), _tree.join(owner, inner), kind, leaf)


def network_order(source: Any, paths: Sequence[str]) -> list[int]:
  """Positions of the paths in the order of the layers, where the source knows it."""
  positions = list(range(len(paths)))
  try:
    place = {name: k for k, name in enumerate(_layers.layer_paths(source))}
  except Complaint:
    # A bare tree without an order of its own. JAX sorts the names of a dict by letters, which puts
    # layer 10 before layer 2; any other container stays as it is.
    parts = [path.split("/") for path in paths]
    by_letters = parts == sorted(parts)
    return sorted(positions, key=lambda i: _by_number(paths[i])) if by_letters else positions

  def layer(i: int) -> int:
    return next((place[a] for a in _tree.ancestors(paths[i]) if a in place), len(place))

  return sorted(positions, key=layer)


def _by_number(path: str) -> list[list[tuple[bool, int, str]]]:
  """A key that sorts the parts of a path by letters, and the numbers in them by value."""
  return [
    [
      (not chunk.isdecimal(), int(chunk) if chunk.isdecimal() else 0, chunk)
      for chunk in re.split(r"(\d+)", part)
      if chunk
    ]
    for part in path.split("/")
  ]


def is_key(x: Any) -> bool:
  """Whether x holds keys of random numbers, which have no bits of their own on the host."""
  return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def spec(x: Any) -> Any:
  """What remains of a leaf when its values are taken away."""
  return x if _tree.is_hole(x) else jax.ShapeDtypeStruct(np.shape(x), _masks.dtype_of(x))


def on_host(x: Any, path: str, problems: list[Problem], *, copy: bool) -> np.ndarray | None:
  """The leaf as a NumPy array; complaints go to `problems`.

  A copy is one indeed: on CPU `np.asarray` looks into the buffer, which a donating step overwrites.
  """
  reason = _unreadable(x)
  if reason is not None:
    problems.append(Problem(path, *reason))
    return None
  if is_key(x):
    x = jax.random.key_data(x)
  return (np.array if copy else np.asarray)(x, dtype=_masks.dtype_of(x))


def refuse_traced(leaves: Sequence[Any], where: str) -> None:
  """Raise one complaint for the whole tree inside jit, where a list of its leaves says no more."""
  if any(isinstance(x, core.Tracer) for x in leaves):
    problem = Problem("", "parameters at hand", "traced ones", TypeError)
    fail(where, [problem], "Call it outside jit, on what jit returns.")


def unreadable(tree: Any) -> list[Problem]:
  """Complaints about leaves that have no values at all: abstract or donated ones."""
  flat = _tree.flatten(tree, is_leaf=is_packed)
  reasons = ((p, _valueless(x)) for p, x in zip(flat.paths, flat.leaves, strict=True))
  return [Problem(path, *reason) for path, reason in reasons if reason is not None]


def is_readable(x: Any) -> bool:
  """Whether the host can read the values of a leaf now."""
  return _unreadable(x) is None


def _unreadable(x: Any) -> tuple[str, str] | None:
  """What was expected and what came, of a leaf that the host cannot read."""
  if isinstance(x, core.Tracer):
    return "an array at hand", "a traced one"
  if not getattr(x, "is_fully_addressable", True):
    return "an array that this process holds wholly", "one sharded over several processes"
  return _valueless(x)


def _valueless(x: Any) -> tuple[str, str] | None:
  if isinstance(x, jax.ShapeDtypeStruct):
    return "an array", "an abstract one without values"
  if isinstance(x, jax.Array) and not isinstance(x, core.Tracer) and x.is_deleted():
    return "an array that still exists (take the snapshot before the step)", "one that was donated"
  return None
