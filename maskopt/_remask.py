"""A runtime mask's next value: what stays trainable keeps its moments, what is new starts anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import _carry, _choice, _masks, _masters, _packing, _thaw, _tree
from ._errors import Problem, fail
from ._layout import Elements, Frozen, Full
from ._masks import Next, Runtime
from ._packed import Packed, is_packed
from ._packing import Layouts


def with_mask(layouts: Layouts, freeze_mask: Any, where: str) -> Layouts:
  """The same layouts with the next value of their runtime masks."""
  masks = _masks.resolve(freeze_mask, _packing.abstract(layouts.static), where)
  index, problems = [], []
  for path, layout, old, mask in zip(
    layouts.static.paths, layouts.static.layouts, layouts.index, masks, strict=True
  ):
    if layout is None or not isinstance(mask, Runtime):
      index.append(old)
    elif layout.digest or isinstance(layout, (Frozen, Full)):
      problems.append(Problem(path, "a static mask, as init was given", "a runtime mask"))
    elif isinstance(layout, Elements):
      index.append({"flat": _choice.positions(mask.mask, layout.shape, layout.length)})
    else:
      index.append({"frozen": jnp.array(mask.mask)})  # a copy: the state may be donated
  if problems:
    fail(where, problems, "Give init a runtime mask: maskopt.runtime(mask).")
  return Layouts(layouts.static, index)


def remasked(
  inner: Any,
  inner_update: Callable[[Layouts, Any, Any, Any], Any],
  state: Any,
  freeze_mask: Any,
  params: Any,
  gradients: Callable[[Layouts], Any],
  where: str,
) -> Any:
  """The state of `selective_transform` for the next mask.

    leaf'[k] = leaf[j] if trainable'[k] == trainable[j] else fresh[k]

  over every leaf of the inner state that is shaped like the packed values; `fresh` is what the
  inner optimizer's `init` gives, with an Adam's moments as `_thaw` seeds them. Other leaves (step
  counts) are kept. `gradients(layouts)` are the packed ones to seed them with.
  """
  old, new = state.layouts, with_mask(state.layouts, freeze_mask, where)
  values = new.take(params, where)
  fresh_masters = _masters.restart(state.masters, values)
  seen = _masters.over(fresh_masters, values)
  fresh = inner.init(seen)
  number = _numbers(values)
  owners = optax.tree_map_params(
    inner, lambda _, n: n, fresh, number, transform_non_params=lambda _: -1
  )
  if _thaw.nodes(fresh):
    grads = _masters.like(fresh_masters, gradients(new))
    counts = [n.count for n in _thaw.nodes(state.inner_state)]

    def seeded(start: Any) -> Any:
      return _thaw.seeded(lambda s: inner_update(new, grads, s, seen)[1], start, counts)

    fresh = jax.lax.cond(_differ(old, new), seeded, lambda start: start, fresh)
  carry = _carries(old, new)

  def merged(n: int, before: Any, after: Any) -> Any:
    layout = new.static.layouts[n] if n >= 0 else None
    if layout is None or not _carry.is_per_element(layout, before):
      return before
    return _carry.stacked(carry[n], layout, before, after)

  inner_state = jax.tree.map(merged, owners, state.inner_state, fresh)
  masters = state.masters
  if masters is not None:
    masters = jax.tree.map(merged, number, masters, fresh_masters)
  return state._replace(inner_state=inner_state, layouts=new, masters=masters)


def changed(following: Next, change: Callable[[Any, Any], Any], state: Any) -> Any:
  """The state after `change(state, mask)`, if it is time for the next mask."""
  return jax.lax.cond(following.when, lambda s: change(s, following.mask), lambda s: s, state)


def taken_later(old: Layouts, updates: Any, where: str, new: Layouts) -> Any:
  """The gradients of one mask packed for the next; packed ones know nothing of what it thaws."""
  flat = new.flat(updates, where)
  carry = _carries(old, new)

  def moved(leaf: Any, k: int) -> Any:
    layout = new.static.layouts[k]
    if not is_packed(leaf) or layout is None or layout.digest or leaf.values is None:
      return leaf
    return Packed(carry[k](leaf.values, jnp.zeros_like(leaf.values)), layout)

  leaves = [moved(leaf, k) for k, leaf in enumerate(flat.leaves)]
  return new.take(flat.unflatten(leaves), where)


def _carries(old: Layouts, new: Layouts) -> list[Any]:
  """How each leaf's values move from one value of the mask to the next."""
  return [
    layout and _carry.carrier(layout, before, layout, after)
    for layout, before, after in zip(new.static.layouts, old.index, new.index, strict=True)
  ]


def _differ(old: Layouts, new: Layouts) -> Any:
  """Whether the masks differ anywhere."""
  pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
  changed = [jnp.any(a != b) for a, b in pairs if a is not b]
  return jnp.any(jnp.stack(changed)) if changed else jnp.asarray(False)


def _numbers(values: Any) -> Any:
  """Each packed value's position among the leaves; holes stay holes."""
  flat = _tree.flatten(values)
  return flat.unflatten([x if _tree.is_hole(x) else n for n, x in enumerate(flat.leaves)])
