"""A runtime mask's next value: what stays trainable keeps its moments, what is new starts anew."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import _choice, _masks, _masters, _packing, _tree
from ._errors import Problem, fail
from ._layout import Elements, Frozen, Full
from ._masks import Runtime
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


def remasked(inner: Any, state: Any, freeze_mask: Any, params: Any, where: str) -> Any:
  """The state of `selective_transform` for the next mask.

    leaf'[k] = leaf[j] if trainable'[k] == trainable[j] else fresh[k]

  over every leaf of the inner state that is shaped like the packed values; `fresh` is what the
  inner optimizer's `init` gives. Other leaves (step counts) are kept.
  """
  old, new = state.layouts, with_mask(state.layouts, freeze_mask, where)
  values = new.take(params, where)
  fresh_masters = _masters.restart(state.masters, values)
  fresh = inner.init(_masters.over(fresh_masters, values))
  number = _numbers(values)
  owners = optax.tree_map_params(
    inner, lambda _, n: n, fresh, number, transform_non_params=lambda _: -1
  )

  def merged(n: int, before: Any, after: Any) -> Any:
    if n < 0 or not isinstance(new.static.layouts[n], Elements):
      return before
    return _kept(old.index[n]["flat"], new.index[n]["flat"], before, after)

  inner_state = jax.tree.map(merged, owners, state.inner_state, fresh)
  masters = state.masters
  if masters is not None:
    masters = jax.tree.map(merged, number, masters, fresh_masters)
  return state._replace(inner_state=inner_state, layouts=new, masters=masters)


def _numbers(values: Any) -> Any:
  """Each packed value's position among the leaves; holes stay holes."""
  flat = _tree.flatten(values)
  return flat.unflatten([x if _tree.is_hole(x) else n for n, x in enumerate(flat.leaves)])


def _kept(old: Any, new: Any, before: Any, after: Any) -> Any:
  """Values at new positions: from before where the position was there already, else from after."""
  slot = jnp.minimum(jnp.searchsorted(old, new), old.shape[0] - 1)
  stays = jnp.expand_dims(old[slot] == new, tuple(range(1, before.ndim)))
  return jnp.where(stays, before[slot], after)
