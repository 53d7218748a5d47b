"""A runtime mask's next value: what stays trainable keeps its moments, what is new starts anew."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import _carry, _choice, _copies, _masks, _masters, _packing, _thaw, _tree
from ._errors import Problem, fail
from ._layout import Elements, Frozen, Full
from ._masks import Runtime, Turn
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
      index.append({"flat": searched(mask.mask, layout)})
    else:
      index.append({"frozen": jnp.array(mask.mask)})  # a copy: the state may be donated
  if problems:
    fail(where, problems, "Give init a runtime mask: maskopt.runtime(mask).")
  return Layouts(layouts.static, index)


def searched(mask: Any, layout: Elements) -> Any:
  """Flat positions of what a mask trains, sorted; a row mask is searched row by row.

  A mask that trains fewer than the layout holds gets positions past the end, unique ones.
  """
  told = [d for d, n in enumerate(mask.shape) if n > 1]
  leading = layout.shape[: max(told, default=len(layout.shape) - 1) + 1]
  inner = math.prod(layout.shape[len(leading) :])
  mask = mask.reshape(mask.shape[: len(leading)])
  rows = _choice.positions(mask, leading, -(-layout.length // max(inner, 1)))
  rest = (1,) * (len(layout.shape) - len(leading))
  return spread(rows.reshape(-1, *rest), layout.shape)[: layout.length]


def spread(row: Any, shape: tuple[int, ...]) -> Any:
  """Flat positions in the whole leaf, sorted, from those over some of its dimensions."""
  axis = next((d for d, n in enumerate(row.shape) if n != 1), 0)
  outer, inner = math.prod(shape[:axis]), math.prod(shape[len(shape) - (row.ndim - axis - 1) :])
  size = math.prod(shape) // max(outer * inner, 1)
  runs = jnp.arange(outer, dtype=jnp.int32).reshape(-1, 1, 1) * (size * inner)
  within = row.reshape(1, -1, 1) * inner
  return (runs + within + jnp.arange(inner, dtype=jnp.int32).reshape(1, 1, -1)).reshape(-1)


def turned(layouts: Layouts, freeze_mask: Any, where: str) -> Layouts:
  """The same layouts with a mask that has its next value, or may have."""
  if isinstance(freeze_mask, Turn):
    return once(freeze_mask.when, freeze_mask.layouts, layouts)
  return with_mask(layouts, freeze_mask, where)


def remasked(
  inner: Any,
  inner_update: Callable[[Layouts, Any, Any, Any], Any],
  state: Any,
  new: Layouts,
  params: Any,
  updates: Any,
  where: str,
) -> Any:
  """The state of `selective_transform` for the layouts of the next mask.

    leaf'[k] = leaf[j] if trainable'[k] == trainable[j] else fresh[k]

  over every leaf of the inner state that is shaped like the packed values; `fresh` is what the
  inner optimizer's `init` gives, with an Adam's moments as `_thaw` seeds them. Other leaves (step
  counts) are kept.
  """
  old = state.layouts
  values = _copies.each(lambda p: new.take(p, where), params)
  fresh_masters = _masters.restart(state.masters, values)
  seen = _masters.over(fresh_masters, values)
  fresh = inner.init(seen)
  number = _numbers(_copies.trained(values))
  owners = optax.tree_map_params(
    inner, lambda _, n: n, fresh, number, transform_non_params=lambda _: -1
  )
  if _thaw.nodes(fresh):
    grads = _masters.like(_copies.trained(fresh_masters), new.take(updates, where))
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
    masters = _copies.each(
      lambda m, fresh: jax.tree.map(merged, number, m, fresh), masters, fresh_masters
    )
  return state._replace(inner_state=inner_state, layouts=new, masters=masters)


def once(when: Any, change: Callable[[Any], Any], state: Any) -> Any:
  """`change(state)` if `when`, else the state.

  A loop of one turn or none: XLA hands on a loop's state in place, but copies a conditional's.
  """

  def turn(carry: Any) -> Any:
    return jnp.zeros_like(carry[0]), change(carry[1])

  return jax.lax.while_loop(lambda carry: carry[0], turn, (when, state))[1]


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
