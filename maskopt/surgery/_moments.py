"""An optimizer state after surgery: old elements keep their moments, new ones get fresh ones.

moment'[place of i] = moment[i] if old element i was trained else init(params')[place of i]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from .. import _tree
from .._errors import Problem, describe, fail
from .._layout import Full, Index, Layout
from .._packing import Layouts
from . import _placement
from ._placement import Placement

_REMEDY = "Give the state that tx.init returned for these parameters, or one that followed from it."
NEXT = (
  "Write to=lambda freeze_mask: maskopt.selective_transform(optimizer, freeze_mask=freeze_mask)."
)


@dataclasses.dataclass(frozen=True)
class _Owned:
  """A leaf of a state that belongs to a parameter."""

  number: int
  value: Any
  place: tuple[Any, ...]


def moved(
  opt_state: Any,
  tx: Any,
  to: Any,
  old_params: Any,
  new_params: Any,
  placements: Mapping[str, Placement],
  where: str,
) -> Any:
  """Return the state for the new parameters.

  Args:
    opt_state: the state of `tx` over the old parameters.
    tx: its transform.
    to: the transform for the new parameters.
    old_params: the old parameters.
    new_params: the new parameters.
    placements: where old elements stand in the new parameters.
    where: the call that errors name.
  """
  if any(isinstance(x, nnx.OptState) for x in jax.tree.leaves(opt_state, is_leaf=_is_box)):
    opt_state, old_params, new_params = map(_unboxed, (opt_state, old_params, new_params))
  old_flat, new_flat = _tree.flatten(old_params), _tree.flatten(new_params)
  fresh = started(to, new_params, where)
  old = _Slots(opt_state, tx, old_params, old_flat, where)
  new = _Slots(fresh, to, new_params, new_flat, where)
  old.check(where)
  slots, known = {slot for slot, _ in old.owned}, {slot for slot, _ in new.owned}
  if old.owned and new.owned and not (slots & known):
    got = f"moments at {', '.join(sorted(slots))}, and not at {', '.join(sorted(known))}"
    remedy = "Leave opt_state out and start the new optimizer with to.init(new parameters)."
    fail(where, [Problem("opt_state", "a state of the same optimizer", got)], remedy)
  leaves = [
    new.leaf(key, value, old, placements) for key, value in zip(new.keys, new.leaves, strict=True)
  ]
  return new.treedef.unflatten(leaves)


def started(tx: Any, params: Any, where: str) -> Any:
  """The transform's fresh state; raises if it is made for other shapes, as one with a mask is."""
  try:
    return tx.init(params)
  except (ValueError, TypeError) as error:
    reason = str(error).rstrip(".")
  problem = Problem("tx", "a transform that takes the new parameters", f"an error: {reason}")
  fail(where, [problem], f"Say which comes next: to=. {NEXT}")


class _Slots:
  """The leaves of a state by what they are: (slot, parameter) for moments, their path for others.

  A slot is the path of a moment's tree in the state, without what wraps an optimizer, so that the
  moments of `adam`, of `selective_transform(adam)` and of the groups of a `partition` meet.
  """

  def __init__(self, state: Any, tx: Any, params: Any, flat: _tree.Flat, where: str) -> None:
    self.flat = flat
    self._layouts = _layouts(state)
    marked = _marked(state, tx, params)
    if marked is None:
      got = "one of other leaves"
      fail(where, [Problem("opt_state", "a state of tx over these parameters", got)], _REMEDY)
    found, self.treedef = jax.tree_util.tree_flatten_with_path(marked, is_leaf=_is_unit)
    lengths = [len(p) for p in _keys(params)]
    self.keys: list[Any] = []
    self.leaves: list[Any] = []
    # What stands at a key, by the group of a partition; "" outside of one.
    self.owned: dict[Any, dict[str, _Owned]] = {}
    self.others: dict[str, dict[str, Any]] = {}
    for path, leaf in found:
      owned = isinstance(leaf, _Owned)
      if owned:
        leaf = dataclasses.replace(leaf, place=path)
      slot, group = _slot(path[: len(path) - lengths[leaf.number]] if owned else path)
      key: Any = (slot, flat.paths[leaf.number]) if owned else slot
      self.keys.append((key, group))
      self.leaves.append(leaf)
      (self.owned if owned else self.others).setdefault(key, {})[group] = leaf

  def layout(self, leaf: _Owned) -> tuple[Layout, Index] | None:
    """How a moment stores its elements; None if it does not have one for each."""
    shape, own = np.shape(leaf.value), np.shape(self.flat.leaves[leaf.number])
    holders = [k for k in self._layouts if leaf.place[: len(k)] == k]
    if holders:
      layouts = self._layouts[max(holders, key=len)]
      layout = layouts.static.layouts[leaf.number]
      if layout is not None and layout.packed_shape == shape:
        return layout, layouts.index[leaf.number]
      return None
    return (Full(own, str(jnp.result_type(leaf.value))), {}) if shape == own else None

  def check(self, where: str) -> None:
    """Raise if a moment does not belong to its parameter."""
    problems = [
      Problem(
        f"{slot}/{path}",
        f"a moment of {np.shape(self.flat.leaves[leaf.number])}",
        describe(leaf.value),
      )
      for (slot, path), leaves in self.owned.items()
      for leaf in leaves.values()
      if not _is_placeholder(leaf.value) and self.layout(leaf) is None
    ]
    if problems:
      fail(where, problems, _REMEDY)

  def leaf(self, named: Any, leaf: Any, old: _Slots, placements: Mapping[str, Placement]) -> Any:
    """One leaf of our state, with what the old state knows of it."""
    key, group = named
    if isinstance(leaf, Layouts):
      return leaf
    if not isinstance(leaf, _Owned):
      known = _own_first(old.others.get(key, {}), group)
      return next((x for x in known if hasattr(x, "dtype") and _alike(x, leaf)), leaf)
    placement = placements.get(key[1])
    if placement is None:
      return leaf.value
    known = _own_first(old.owned.get((key[0], placement.path), {}), group)
    return self._moment(leaf, old, known, placement)

  def _moment(
    self, leaf: _Owned, old: _Slots, known: Sequence[_Owned], placement: Placement
  ) -> Any:
    """A moment with the values of every group that has some; the first one wins."""
    into = self.layout(leaf)
    dtype = jnp.result_type(leaf.value)
    found = [(x.value, old.layout(x)) for x in known if jnp.result_type(x.value) == dtype]
    found = [(value, out) for value, out in found if out is not None]
    if into is None or not found:
      return leaf.value
    target, _ = _dense(leaf.value, *into)
    for value, out in reversed(found):
      values, has = _dense(value, *out)
      placed = placement.into(target, placement.old_part(values))
      kept = placement.into(np.zeros(target.shape, bool), placement.old_part(has))
      target = np.where(kept, placed, target)
    new = _placement.like(target, leaf.value)
    return new if isinstance(into[0], Full) else into[0].take(new, into[1])


def _slot(path: Sequence[Any]) -> tuple[str, str]:
  """The path without what wraps an optimizer, and the group of a partition that it lies in."""
  slot, group = [], ""
  names = iter([_tree.path_of((key,)) for key in path])
  for name in names:
    if name == "inner_states":
      group = next(names, "")
    elif name != "inner_state":
      slot.append(name)
  return "/".join(slot), group


def _own_first(groups: Mapping[str, Any], group: str) -> list[Any]:
  """What stands in each group, the one of that name first."""
  return sorted(groups.values(), key=lambda x: x is not groups.get(group))


def _alike(before: Any, after: Any) -> bool:
  return np.shape(before) == np.shape(after) and before.dtype == jnp.result_type(after)


def _dense(values: Any, layout: Layout, index: Index) -> tuple[np.ndarray, np.ndarray]:
  """The values at their places in the leaf, and which places have one."""
  if isinstance(layout, Full):
    return _placement.host(values), np.ones(layout.shape, bool)
  wide = layout.put(values, jnp.zeros(layout.shape, values.dtype), index)
  known = layout.put(
    jnp.ones(np.shape(values), jnp.uint8), jnp.zeros(layout.shape, jnp.uint8), index
  )
  return _placement.host(wide), np.asarray(known) == 1


def _marked(state: Any, tx: Any, params: Any) -> Any:
  """The state with its moments marked as their parameters'; None if it is none of tx over them."""

  def owned(x: Any, n: Any) -> Any:
    return x if _tree.is_hole(x) else _Owned(n, x, ())

  try:
    return optax.tree_map_params(tx, owned, state, _numbers(params), is_leaf=_tree.is_opaque)
  except (ValueError, TypeError, KeyError, AttributeError):  # as the trees happen to differ
    return None


def _layouts(state: Any) -> dict[tuple[Any, ...], Layouts]:
  """The masks that a state holds, by the path of the part that each belongs to."""
  found, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda x: isinstance(x, Layouts))
  return {path[:-1]: x for path, x in found if isinstance(x, Layouts)}


def _is_placeholder(value: Any) -> bool:
  """Whether an optimizer keeps nothing here for a parameter, as `adafactor` does in places."""
  return np.shape(value) == (1,)


def _is_box(x: Any) -> bool:
  return isinstance(x, nnx.Variable)


def _unboxed(tree: Any) -> Any:
  """The tree without nnx variables, as `tx.update` sees it."""
  return jax.tree.map(lambda x: x.get_raw_value() if _is_box(x) else x, tree, is_leaf=_is_box)


def _is_unit(x: Any) -> bool:
  return isinstance(x, (_Owned, Layouts)) or _tree.is_opaque(x)


def _numbers(params: Any) -> Any:
  """Each leaf's position; holes stay holes."""
  flat = _tree.flatten(params)
  return flat.unflatten([x if _tree.is_hole(x) else n for n, x in enumerate(flat.leaves)])


def _keys(params: Any) -> list[Any]:
  """The path of each leaf as JAX writes it."""
  found = jax.tree_util.tree_flatten_with_path(_tree.parameters(params), is_leaf=_tree.is_opaque)
  return [path for path, _ in found[0]]
