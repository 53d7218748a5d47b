"""A runtime mask's next value: what stays trainable keeps its moments, what is new starts anew."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import _carry, _choice, _copies, _masks, _masters, _packing, _provenance, _thaw, _tree
from ._errors import Problem, fail
from ._layout import Dense, Elements, Frozen, Full
from ._masks import Runtime
from ._packed import is_packed
from ._packing import Layouts


class Turn:
  """The next value of a runtime mask, if it is another.

  Attributes:
    clock: an array that says so; after `once`, what the turn leaves.
  """

  def __init__(
    self,
    clock: Any,
    *,
    due: Callable[[Any], Any],
    done: Callable[[Any], Any],
    layouts: Callable[[Layouts, Any], Layouts],
  ):
    self.clock = clock
    self._due = due
    self._done = done
    self._layouts = layouts

  def once(self, change: Callable[[Any, Callable[[Layouts], Layouts]], Any], state: Any) -> Any:
    """`change(state, layouts)` if the clock says so, else the state.

    A loop of one turn or none: XLA hands on a loop's state in place, but copies a conditional's.
    The clock is asked in the loop and goes through it, for small kernels before it are costly: XLA
    shares them out to threads and waits for these.
    """

    def turn(carry: Any) -> Any:
      clock, state = carry
      return self._done(clock), change(state, lambda layouts: self._layouts(layouts, clock))

    carry = self.clock, state
    self.clock, state = jax.lax.while_loop(lambda carry: self._due(carry[0]), turn, carry)
    return state


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
    return freeze_mask.once(lambda layouts, change: change(layouts), layouts)
  return with_mask(layouts, freeze_mask, where)


def remasked(
  inner: Any,
  inner_update: Callable[[Layouts, Any, Any, Any], Any],
  state: Any,
  freeze_mask: Any,
  params: Any,
  updates: Any,
  where: str,
) -> Any:
  """The state of `selective_transform` for a mask that has its next value, or may have.

    leaf'[k] = leaf[j] if trainable'[k] == trainable[j] else fresh[k]

  over every leaf of the inner state that is shaped like the packed values; `fresh` is what the
  inner optimizer's `init` gives, with an Adam's moments as `_thaw` seeds them. Other leaves (step
  counts) are kept.
  """

  def moved(state: Any, new: Layouts, differs: Any) -> Any:
    return _moved(inner, inner_update, state, new, differs, params, updates, where)

  if isinstance(freeze_mask, Turn):
    return freeze_mask.once(lambda s, change: moved(s, change(s.layouts), True), state)
  new = with_mask(state.layouts, freeze_mask, where)
  return moved(state, new, _differ(state.layouts, new))


def _moved(
  inner: Any,
  inner_update: Callable[[Layouts, Any, Any, Any], Any],
  state: Any,
  new: Layouts,
  differs: Any,
  params: Any,
  updates: Any,
  where: str,
) -> Any:
  old, queue = state.layouts, _Queue(new)
  params, updates = queue.given(params), queue.given(updates)
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

    fresh = seeded(fresh) if differs is True else jax.lax.cond(differs, seeded, lambda s: s, fresh)
  carry = _carries(old, new)

  def merged(n: int, before: Any, after: Any) -> Any:
    layout = new.static.layouts[n] if n >= 0 else None
    if layout is None or not _carry.is_per_element(layout, before):
      return before
    if isinstance(layout, (Full, Dense)):  # element by element, in place
      return _carry.stacked(carry[n], layout, before, after)
    return queue.next(lambda after: _carry.stacked(carry[n], layout, before, after), after)

  inner_state = jax.tree.map(merged, owners, state.inner_state, fresh)
  masters = state.masters
  if masters is not None:
    masters = _copies.each(
      lambda m, fresh: jax.tree.map(merged, number, m, fresh), masters, fresh_masters
    )
  return state._replace(inner_state=inner_state, layouts=queue.last(new, old), masters=masters)


class _Queue:
  """Arrays computed one after the other, for side by side XLA would hold the scratch of all.

  It plans past barriers, but not past what an array's entries will be.
  """

  def __init__(self, new: Layouts):
    self._free = _made(jax.tree.leaves(new))

  def given(self, tree: Any) -> Any:
    """A tree that is read once the new layouts are known, and not before.

    XLA:CPU reads a narrow leaf from a wide copy. That has to do with no turn of a loop in
    particular, so it would be made ahead of the loop, at every step.
    """

    def hidden(x: Any) -> Any:
      noted = _provenance.made_of.recall(x) or _provenance.unmasked.recall(x)
      wide = is_packed(x) or noted or jnp.result_type(x).itemsize >= 4
      return x if wide else jax.lax.optimization_barrier((x, self._free))[0]

    return jax.tree.map(hidden, tree, is_leaf=is_packed)

  def next(self, make: Callable[[Any], Any], x: Any) -> Any:
    """`make(x)`, once all before it is made."""
    made = make(jnp.where(self._free, x, jnp.zeros_like(x)))
    self._free = _made([made])
    return made

  def last(self, new: Layouts, old: Layouts) -> Layouts:
    """The new layouts; what the old ones hold is overwritten once it is read no more."""
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(self._free, a, b), new, old)


def _made(arrays: list[Any]) -> Any:
  """True, once arrays are made."""
  # Two entries, for one would be read where it is used, and its array kept until then.
  some = [jnp.real(x).reshape(-1)[:2].astype(jnp.int32) | 1 for x in arrays]
  return jnp.all(jnp.concatenate(some) != 0) if some else jnp.asarray(True)


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
