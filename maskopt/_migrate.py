"""Optimizer state from one transform to another: kept where an element goes on training."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _arguments, _carry, _copies, _fresh, _masks, _owned, _packing, _thaw, _tree
from ._errors import Problem, describe, fail, show
from ._freeze import Held, MaskedFreezeState, SelectiveState
from ._fresh import Constant
from ._layout import Frozen, Full, Layout
from ._multiplier import MultiplierState
from ._owned import Owned
from ._packing import Layouts, Static
from ._partition import PartitionState
from ._stacks import ScheduledState

Moments = Literal["keep", "reset", "hold"]

_WHERE = "maskopt.migrate(state, ...)"
_REMEDY = (
  "Give `to` the optimizer that made the state, with another mask, or use "
  'moments="reset" where only moments are in the way.'
)
# A part of the old state: its node, and the layouts its packed values have.
_Source = tuple[Any, Layouts]


def migrate(
  state: Any,
  params: Any,
  *,
  to: optax.GradientTransformation,
  moments: Moments = "keep",
  grads: Any = None,
) -> Any:
  """Return a state for another transform that goes on where this one stands.

    new[i] = state[i] if i trained before and trains now else to.init(params)[i]

  Any layout goes to any other: masks, `prefer`, packed or plain Optax. Counts, schedules and
  injected hyperparameters go on; the mask, and the factors of `scale_by_multiplier`, are those of
  `to`. Kept values keep their bits; a leaf of which nothing changed shares its arrays with `state`.
  A runtime schedule goes on at the step of another, with the moments of its own first mask.

  A thawed element starts with the values of `to.init`. Under an Adam that has run for t steps that
  makes its first updates up to 5 times too long. With `grads` it starts as if its gradient had
  always been this one: `mu = (1 - b1^t) g` and `nu = (1 - b2^t) g^2`, g as the Adam sees it, so its
  first update is one learning rate long. That holds for `adam`, `adamw`, `nadam`, `radam`,
  `amsgrad`, `lamb`. RMSProp, Lion, momentum and Adagrad start as in a new run and need no gradient;
  Adamax starts slowly, Yogi and AdaBelief up to 3 times too fast, with gradients or without.

  Args:
    state: any state of `to`'s optimizer under another mask, or under none.
    params: the parameters as they are now.
    to: the transform that goes on: the same optimizer under another mask, a `partition`, or plain.
    moments: "keep"; "reset": every element starts anew, counts go on; "hold": elements that freeze
      now leave their moments packed beside the state, and find them when they thaw, if every
      migration in between holds too.
    grads: whole gradients of the parameters (`jax.grad`), for the thaw.
  Returns:
    A state for `to.update`, with the structure of `to.init(params)` unless something is held.
  Raises:
    ValueError: the state is not one of `to`'s optimizer, belongs to other parameters, or holds
      something other than a value per element where the mask changed; lists every path. `to` is
      over other parameters.
    TypeError: `to` is no transformation.
  Warns:
    UserWarning: elements thaw under a running Adam and there is no `grads`.
  Example:
    >>> import jax.numpy as jnp, numpy as np, optax, maskopt
    >>> params = {"w": jnp.ones(2)}
    >>> first, second = (
    ...   maskopt.selective_transform(optax.adam(0.1), freeze_mask={"w": np.array(mask)})
    ...   for mask in ([True, False], [False, False])
    ... )
    >>> grads = {"w": jnp.array([4.0, 4.0])}
    >>> _, state = first.update(grads, first.init(params), params)
    >>> state = maskopt.migrate(state, params, to=second, grads=grads)
    >>> updates, _ = second.update(grads, state, params)
    >>> updates["w"].round(3).tolist() == [np.float32(-0.1)] * 2
    True
  """
  if moments not in ("keep", "reset", "hold"):
    problem = Problem("", '"keep", "reset" or "hold"', repr(moments))
    fail("maskopt.migrate(moments=...)", [problem], "Leave it out to keep moments.")
  params = _copies.each(_tree.parameters, params)
  fresh = _begun(to, params)
  adams = bool(_thaw.nodes(fresh))
  if adams and grads is not None:
    counted = _Merge(_copies.trained(params), "reset").run(to, fresh, state)
    counts = [n.count for n in _thaw.nodes(counted) if n.count is not None]
    start = _fresh.whole(fresh)
    fresh = _thaw.seeded(lambda s: to.update(grads, s, params)[1], start, counts)
  merge = _Merge(_copies.trained(params), moments)
  migrated = _fresh.whole(merge.run(to, fresh, state))
  if adams and grads is None:
    _warn_of_jolt(merge, migrated)
  return migrated


def _begun(to: Any, params: Any) -> Any:
  """The state of `to.init(params)`; raises, in migrate's name, if there is none."""
  _arguments.check_transform(to, "maskopt.migrate(to=...)", "Give it the transform that goes on.")
  try:
    return _fresh.state(to.init, params)
  except (TypeError, ValueError) as error:
    got = f"some that to.init refuses ({error})"
    problem = Problem("", "the parameters that `to` was made for", got, type(error))
    remedy = "Give the parameters as they are now, and a mask over these to the transform."
    fail("maskopt.migrate(params=...)", [problem], remedy)


def _plain(params: Any) -> Layouts:
  """The layouts of a state without a mask."""
  flat = _tree.flatten(params)
  layouts = [
    None if _tree.is_hole(x) else Full(tuple(np.shape(x)), str(_masks.dtype_of(x)))
    for x in flat.leaves
  ]
  return Layouts(Static.of(flat.paths, layouts), [{}] * len(layouts))


class _Merge:
  """One walk over the new state, with the old one beside it.

  Args:
    params: the parameters.
    moments: what `migrate` was given.
  """

  def __init__(self, params: Any, moments: Moments):
    self._params = params
    self._plain = _plain(params)
    self._reset = moments == "reset"
    self._holds = moments == "hold"
    self._problems: list[Problem] = []
    self._carries: dict[tuple[int, int, int], Any] = {}
    self._alive: list[Any] = []  # keeps the ids in `_carries` unique
    self._placings: dict[tuple[int, ...], tuple[Layouts, list[Layouts]]] = {}

  def run(self, to: Any, fresh: Any, state: Any) -> Any:
    """The fresh state with what the old one has; raises for all that has no place."""
    marked = _owned.marked(to, fresh, "maskopt.migrate(to=...)")
    merged = self._merged(marked, [(state, self._plain)], self._plain, "")
    if self._problems:
      fail(_WHERE, self._problems, _REMEDY)
    return merged

  def _fits(self, fresh: Any, source: _Source, new: Layouts) -> bool:
    """Whether a source that nobody promised has the structure that is asked for."""
    trial = _Merge(self._params, "reset")
    trial._merged(fresh, [source], new, "")
    return not trial._problems

  def _merged(self, fresh: Any, sources: Sequence[_Source], new: Layouts, path: str) -> Any:
    if isinstance(fresh, ScheduledState):
      return self._scheduled(fresh, sources, new, path)
    # The state of the mask that is in place, whoever put it there.
    sources = [(s.inner_state if isinstance(s, ScheduledState) else s, k) for s, k in sources]
    if fresh is None or not sources or isinstance(fresh, (MaskedFreezeState, MultiplierState)):
      return _owned.unmarked(fresh)
    if isinstance(fresh, SelectiveState):
      return self._selective(fresh, self._selected(sources), path)
    if isinstance(fresh, PartitionState):
      return self._partition(fresh, sources, path)
    # The old transform was selective here and the new one is not.
    sources = [
      (s.inner_state, s.layouts) if isinstance(s, SelectiveState) else (s, k) for s, k in sources
    ]
    if isinstance(fresh, Owned):
      return self._placed(fresh.tree, sources, new, path)
    children, treedef = _owned.children(fresh)
    if len(children) == 1 and children[0][0] == ():
      return self._leaf(fresh, sources[0][0], path)
    return self._node(fresh, children, treedef, sources, new, path)

  def _scheduled(
    self, fresh: ScheduledState, sources: Sequence[_Source], new: Layouts, path: str
  ) -> ScheduledState:
    """A runtime schedule goes on at the step of another, and begins after anything else."""
    steps = [node.step for node, _ in sources if isinstance(node, ScheduledState)]
    nodes = [(s.inner_state if isinstance(s, ScheduledState) else s, k) for s, k in sources]
    inner = self._merged(fresh.inner_state, nodes, new, _tree.join(path, "inner_state"))
    return fresh.at((steps or [fresh.step])[0], fresh.placed)._replace(inner_state=inner)

  def _node(
    self, fresh: Any, children: Any, treedef: Any, sources: Any, new: Layouts, path: str
  ) -> Any:
    inner = [(_owned.children(s)[0], k) for s, k in sources]
    keys = [key for key, _ in children]
    for (node, _), (found, _) in zip(sources, inner, strict=True):
      if type(node) is not type(fresh) or [key for key, _ in found] != keys:
        self._problems.append(Problem(path, _owned.named(fresh), _owned.named(node)))
        return _owned.unmarked(fresh)
    merged = [
      self._merged(
        child, [(found[n][1], k) for found, k in inner], new, _tree.join(path, _tree.path_of(key))
      )
      for n, (key, child) in enumerate(children)
    ]
    return treedef.unflatten(merged)

  def _leaf(self, fresh: Any, old: Any, path: str) -> Any:
    """A value that belongs to no parameter goes on."""
    alike = jnp.shape(fresh) == jnp.shape(old) if hasattr(fresh, "shape") else fresh == old
    if not alike or getattr(fresh, "dtype", None) != getattr(old, "dtype", None):
      self._problems.append(Problem(path, describe(fresh), describe(old)))
    return old

  def _selected(self, sources: Sequence[_Source]) -> list[_Source]:
    """Every part of the sources in which an optimizer has its own state."""
    found: list[_Source] = []
    for node, layouts in sources:
      if isinstance(node, PartitionState):
        found += self._selected([(group, layouts) for group in node.inner_states.values()])
      else:
        found.append((node, node.layouts if isinstance(node, SelectiveState) else layouts))
    return found

  def _selective(self, fresh: SelectiveState, sources: list[_Source], path: str) -> SelectiveState:
    inner, masters = [], []
    for node, layouts in sources:
      whole = isinstance(node, SelectiveState)
      source = (node.inner_state if whole else node, layouts)
      if not inner or self._fits(fresh.inner_state, source, fresh.layouts):
        inner.append(source)
        masters += [(node.masters, layouts)] if whole and node.masters is not None else []
      if whole and self._holds and node.held is not None:
        inner.append((node.held.inner_state, node.held.layouts))
    merged = self._merged(fresh.inner_state, inner, fresh.layouts, _tree.join(path, "inner_state"))
    wide = self._merged(fresh.masters, masters, fresh.layouts, _tree.join(path, "masters"))
    held = self._held(fresh, inner) if self._holds else None
    return SelectiveState(layouts=fresh.layouts, inner_state=merged, masters=wide, held=held)

  def _held(self, fresh: SelectiveState, sources: Sequence[_Source]) -> Held | None:
    """What the sources know of elements that are now frozen, packed."""
    masks, paths = [], []
    for k, layout in enumerate(fresh.layouts.static.layouts):
      if layout is not None:
        unknown = [_frozen(old, k) for _, old in sources]
        masks.append(functools.reduce(np.logical_and, unknown) | ~_frozen(fresh.layouts, k))
        paths.append(fresh.layouts.static.paths[k])
    if all(mask.all() for mask in masks):
      return None
    mask = _tree.nested(paths, masks)
    layouts = _packing.layouts_of(mask, self._params, _WHERE, prefer="values")
    empty = jax.tree.map(lambda x: _emptied(x, layouts), fresh.inner_state)
    inner = self._merged(empty, sources, layouts, "held")
    return Held(layouts=layouts, inner_state=inner)

  def _partition(self, fresh: PartitionState, sources: Any, path: str) -> PartitionState:
    groups = {}
    for name, group in fresh.inner_states.items():
      mine, others = [], []
      for node, layouts in sources:
        named = node.inner_states if isinstance(node, PartitionState) else {}
        mine += [(named[name], layouts)] if name in named else []
        rest = [g for other, g in named.items() if other != name] if named else [node]
        others += [(g, layouts) for g in rest]
      if not mine:
        others = [s for s in others if self._fits(group, s, group.layouts)]
      below = _tree.join(path, "inner_states", name)
      groups[name] = self._merged(group, mine + others, group.layouts, below)
    return PartitionState(groups)

  def _placed(self, tree: Any, sources: Sequence[_Source], new: Layouts, path: str) -> Any:
    """A tree shaped like the parameters, with the old values of what trained already."""
    if isinstance(tree, optax.LookaheadParams):  # masters of both copies

      def copied(copy: Any, *nodes: Any) -> Any:
        olds = [(node, k) for node, (_, k) in zip(nodes, sources, strict=True)]
        return self._placed(copy, olds, new, path)

      sources = [s for s in sources if isinstance(s[0], optax.LookaheadParams)]
      return _copies.each(copied, tree, *(node for node, _ in sources))
    flat = _tree.flatten(tree)
    leaves = list(flat.leaves)
    olds = [old for _, old in sources]
    self._placings[(id(new), *map(id, olds))] = (new, olds)
    for node, old in reversed(sources):
      found = _tree.flatten(node)
      if not flat.paths == found.paths == new.static.paths == old.static.paths:
        got = ", ".join(map(show, found.paths[:4]))
        expected = ", ".join(map(show, new.static.paths[:4]))
        self._problems.append(Problem(path, f"leaves for {expected}, ...", f"for {got}, ..."))
        continue
      for k, (after, before) in enumerate(zip(leaves, found.leaves, strict=True)):
        if not _tree.is_hole(after):
          where = _tree.join(path, flat.paths[k])
          leaves[k] = self._moved(k, old, new, before, after, where)
    return flat.unflatten(leaves)

  def _moved(self, k: int, old: Layouts, new: Layouts, before: Any, after: Any, path: str) -> Any:
    a, b = old.static.layouts[k], new.static.layouts[k]
    if self._reset or a is None or b is None or _tree.is_hole(before):
      return after
    if a.shape != b.shape:
      got = f"a state for one of shape {a.shape}"
      self._problems.append(Problem(path, f"a parameter of shape {b.shape}", got))
    elif before.dtype != after.dtype:
      self._problems.append(Problem(path, describe(after), describe(before)))
    elif _carry.is_per_element(a, before) and _carry.is_per_element(b, after):
      return _carry.stacked(self._carry(k, old, new), b, before, after)
    elif a == b and before.shape == after.shape:
      return before
    elif before.shape != after.shape or not bool(jnp.all(before == _fresh.operand(after))):
      expected = f"a value for each trainable element of a leaf of shape {a.shape}"
      self._problems.append(Problem(path, expected, describe(before)))
    return after

  def _carry(self, k: int, old: Layouts, new: Layouts) -> Any:
    """How values of leaf k move; worked out once for all the moments of the leaf."""
    key = (k, id(old), id(new))
    if key not in self._carries:
      a, b = old.static.layouts[k], new.static.layouts[k]
      assert a is not None and b is not None
      self._alive += [old, new]
      self._carries[key] = _carry.carrier(a, old.index[k], b, new.index[k])
    return self._carries[key]

  def thawed(self) -> list[str]:
    """The paths at which something trains now that no source knows."""
    paths = {
      path: None
      for new, olds in self._placings.values()
      for k, path in enumerate(new.static.paths)
      if all(_gains(old, new, k) for old in olds) and self._begins(olds, new, k)
    }
    return list(paths)

  def _begins(self, olds: Sequence[Layouts], new: Layouts, k: int) -> bool:
    """Whether an element of leaf k has no value in any source: ones are moved, as moments are."""
    layout = new.static.layouts[k]
    assert layout is not None and layout.packed_shape is not None
    known: Any = Constant(jnp.zeros((), jnp.uint8), layout.packed_shape)
    for old in olds:
      source = old.static.layouts[k]
      assert source is not None
      ones = jnp.ones(source.packed_shape or (), jnp.uint8)
      known = self._carry(k, old, new)(ones, known)
    missing = _fresh.whole(known) == 0
    return bool(jnp.any(missing & ~new.index[k].get("frozen", jnp.zeros((), bool))))


def _gains(old: Layouts, new: Layouts, k: int) -> bool:
  """Whether the new layout may train an element that the old one does not; cheap."""
  a, b = old.static.layouts[k], new.static.layouts[k]
  if a is None or b is None or isinstance(a, Full) or isinstance(b, Frozen):
    return False
  return not (a == b and a.digest)


def _emptied(x: Any, layouts: Layouts) -> Any:
  """A tree shaped like the parameters with zeros for the given layouts; nothing else is held."""
  if not isinstance(x, Owned):
    return None
  flat = _tree.flatten(x.tree)
  if flat.paths != layouts.static.paths:
    return None
  dtypes = [y.dtype for y in flat.leaves if not _tree.is_hole(y)]

  def zeros(leaf: Any, layout: Layout | None) -> Any:
    if layout is None or layout.packed_shape is None:
      return optax.MaskedNode()
    dtype = dtypes[0] if _tree.is_hole(leaf) and dtypes else getattr(leaf, "dtype", layout.dtype)
    return jnp.zeros(layout.packed_shape, dtype)

  pairs = zip(flat.leaves, layouts.static.layouts, strict=True)
  return Owned(flat.unflatten([zeros(*pair) for pair in pairs]))


def _frozen(layouts: Layouts, k: int) -> np.ndarray:
  layout = layouts.static.layouts[k]
  assert layout is not None
  return np.asarray(_carry.frozen(layout, layouts.index[k]))


def _warn_of_jolt(merge: _Merge, migrated: Any) -> None:
  steps = max(int(jnp.max(n.count)) for n in _thaw.nodes(migrated) if n.count is not None)
  paths = merge.thawed() if steps else []
  if not paths:
    return
  named = ", ".join(map(show, paths[:6])) + (", ..." if len(paths) > 6 else "")
  warnings.warn(
    f"`{_WHERE}`: at {named}, elements thaw with empty moments under an Adam that has run {steps} "
    "steps: their first updates may be up to 5 times too long. Give grads=, the gradients of all "
    "parameters, and they start at one learning rate.",
    stacklevel=3,
  )
