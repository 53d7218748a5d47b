"""The proof: which frozen elements kept their bits, and which did not."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from .. import _tree
from .._errors import Problem, describe, fail, show
from .._layout import Full, Index, Layout
from .._masks import FreezeMask
from .._packing import Layouts
from . import _elements, _parts, _show
from ._parts import Other
from ._show import Shown, Table
from ._snapshot import Snapshot, taken

_WHERE = "maskopt.audit(before, after, freeze_mask)"
_CHANGES_SHOWN = 3
_NOTHING_MOVED = (
  "! nothing that trains has moved: was the gradient computed with another mask, or did the "
  "optimizer never step?"
)


class Change(NamedTuple):
  """One frozen element that changed: where, from what, to what."""

  position: tuple[int, ...]
  old: Any
  new: Any

  def __str__(self) -> str:
    old, new = str(self.old), str(self.new)
    if old == new:  # two NaNs, say: only their bits tell them apart
      old, new = _with_bits(self.old), _with_bits(self.new)
    place = f"[{', '.join(map(str, self.position))}] " if self.position else ""  # not of a scalar
    return f"{place}{old} -> {new}"


def _with_bits(x: Any) -> str:
  return f"{x} (0x{np.asarray(x).byteswap().tobytes().hex()})"


class LeafAudit(NamedTuple):
  """What became of one leaf.

  Attributes:
    path: as rules write it.
    frozen: number of frozen elements.
    changed: how many of them have other bits than before.
    trainable: number of trainable elements.
    moved: how many of them have other bits than before.
    changes: the first changed frozen elements, in the order of the leaf.
  """

  path: str
  frozen: int
  changed: int
  trainable: int
  moved: int
  changes: tuple[Change, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class Audit(Shown):
  """What `audit` returns; true if every frozen element kept its bits. It prints itself.

  Attributes:
    leaves: one `LeafAudit` per parameter leaf.
    notes: paths of other state that moved: statistics, counts of random numbers.
    drifted: paths of other state that moved although all parameters of its layer are frozen, as
      BatchNorm statistics do; the layer computes something else with no weight touched.
  """

  leaves: tuple[LeafAudit, ...]
  notes: tuple[str, ...] = ()
  drifted: tuple[str, ...] = ()

  @property
  def ok(self) -> bool:
    """Whether every frozen element kept its bits."""
    return self.changed == 0

  def __bool__(self) -> bool:
    return self.ok

  @property
  def frozen(self) -> int:
    """Number of frozen elements."""
    return sum(leaf.frozen for leaf in self.leaves)

  @property
  def changed(self) -> int:
    """Number of frozen elements whose bits changed."""
    return sum(leaf.changed for leaf in self.leaves)

  @property
  def trainable(self) -> int:
    """Number of trainable elements."""
    return sum(leaf.trainable for leaf in self.leaves)

  @property
  def moved(self) -> int:
    """Number of trainable elements whose bits changed."""
    return sum(leaf.moved for leaf in self.leaves)

  def raise_if_failed(self, *, drift: bool = False) -> None:
    """Raise if a frozen element changed; with `drift=True` also if a frozen layer's state moved.

    Raises:
      ValueError: names every leaf with its first changed elements.
    """
    problems = [
      Problem(leaf.path, f"{leaf.frozen:,} frozen elements with the bits they had", _got(leaf))
      for leaf in self.leaves
      if leaf.changed
    ]
    if drift:
      problems += [
        Problem(path, "still statistics, for its layer is frozen", "others")
        for path in self.drifted
      ]
    if problems:
      fail(
        _WHERE,
        problems,
        "Wrap the optimizer in maskopt.selective_transform and apply its updates with "
        "maskopt.apply_updates; run frozen layers with their running statistics.",
      )

  def _table(self) -> Table:
    return Table(
      self._verdict(),
      ("path", "frozen", "changed", "trainable", "moved"),
      [
        (show(x.path), *(f"{n:,}" for n in (x.frozen, x.changed, x.trainable, x.moved)))
        for x in self.leaves
      ],
      ["bad" if x.changed else "" for x in self.leaves],
      right=frozenset({1, 2, 3, 4}),
      notes=[*self._changes(), *self._state()],
      title_style="good" if self.ok else "bad",
    )

  def _verdict(self) -> str:
    frozen = _show.counted(self.frozen, "frozen element")
    moved = f"{self.moved:,} of {_show.counted(self.trainable, 'trainable element')} moved"
    if self.ok:
      return f"Audit passed: {frozen} kept every bit, {moved}"
    return f"Audit FAILED: {self.changed:,} of {frozen} changed, {moved}"

  def _changes(self) -> list[tuple[str, str]]:
    return [("bad", f"! {show(x.path)}: {_got(x)}") for x in self.leaves if x.changed]

  def _state(self) -> list[tuple[str, str]]:
    notes = []
    if self.trainable and not self.moved:
      notes.append(("warn", _NOTHING_MOVED))
    if self.drifted:
      what = _show.listed(self.drifted)
      notes.append(("warn", f"! moved in layers that are wholly frozen: {what}"))
    if self.notes:
      notes.append(("dim", f"Moved, not parameters: {_show.listed(self.notes)}"))
    return notes


def _got(leaf: LeafAudit) -> str:
  first = "; ".join(map(str, leaf.changes[:_CHANGES_SHOWN]))
  more = "; ..." if leaf.changed > _CHANGES_SHOWN else ""
  return f"{leaf.changed:,} that changed: {first}{more}"


def audit(before: Any, after: Any, freeze_mask: FreezeMask | Layouts, *, limit: int = 8) -> Audit:
  """Compare the bits of frozen elements before and after training.

    ok = all(bits(before[i]) == bits(after[i]) where freeze_mask[i])

  Bits and not values: a changed sign of zero or payload of NaN counts, and NaN equals itself.

  Args:
    before: a `snapshot`, or a tree or module that no step has changed or donated since.
    after: a tree, a module, or another snapshot, with the same leaves.
    freeze_mask: any freeze mask over the parameters, or `maskopt.mask_of(state)`; of
      `optax.LookaheadParams` both copies are compared under it.
    limit: how many changed elements of a leaf are reported with position and values.
  Returns:
    An `Audit`: true if no frozen element changed. It counts per leaf, names the first changed
    elements, and names other state that moved: in `notes`, or in `drifted` if its layer is wholly
    frozen. Costs one pass over the leaves on the host and a byte an element of the largest.
  Raises:
    ValueError: the trees differ in paths, shapes or dtypes, or the mask does not fit; lists every
      leaf. Or both sides are the same nnx variables, changed in place.
    TypeError: the mask is not boolean, or it is called inside `jit`.
  Example:
    >>> import jax.numpy as jnp, numpy as np, maskopt
    >>> params = {"w": jnp.array([0.0, 1.0])}
    >>> after = {"w": jnp.array([-0.0, 2.0])}
    >>> report = maskopt.audit(params, after, {"w": np.array([True, False])})
    >>> report.ok, report.leaves[0].changes[0].position
    (False, (0,))
    >>> report
    Audit FAILED: 1 of 1 frozen element changed, 1 of 1 trainable element moved
    path  frozen  changed  trainable  moved
    ---------------------------------------
    w          1        1          1      1
    ---------------------------------------
    ! w: 1 that changed: [0] 0.0 -> -0.0
  """
  _refuse_same(before, after)
  source = next((x for x in (after, before) if isinstance(x, nnx.Module)), None)
  if source is not None:
    freeze_mask = _parts.under_own_names(freeze_mask, source, _WHERE)
  first, second = (taken(x, _WHERE, copy=False) for x in (before, after))
  if not all(isinstance(x.tree, optax.LookaheadParams) for x in (first, second)):
    return _audited(first, second, source, freeze_mask, limit)
  audits = {
    name: _audited(_copy(first, name), _copy(second, name), None, freeze_mask, limit)
    for name in optax.LookaheadParams._fields
  }
  leaves = [x._replace(path=_tree.join(k, x.path)) for k, a in audits.items() for x in a.leaves]
  return Audit(tuple(leaves))


def _refuse_same(before: Any, after: Any) -> None:
  """Raise if both sides are the same nnx variables, which a step updates in place."""
  old, new = ({id(x): path for path, x in _variables(tree)} for tree in (before, after))
  if old and old.keys() <= new.keys():
    problem = Problem(next(iter(old.values())), "values from before the step", "the same variable")
    remedy = "Steps change a module in place: take before = maskopt.snapshot(model) ahead of them."
    fail("maskopt.audit(before, after, ...)", [problem], remedy)


def _variables(tree: Any) -> list[tuple[str, nnx.Variable]]:
  if isinstance(tree, nnx.Module):
    tree = nnx.state(tree)
  leaves, _ = jax.tree_util.tree_flatten_with_path(
    tree, is_leaf=lambda x: isinstance(x, nnx.Variable)
  )
  return [(_tree.path_of(keys), x) for keys, x in leaves if isinstance(x, nnx.Variable)]


def _copy(snapshot: Snapshot, name: str) -> Snapshot:
  """One of the two copies that lookahead keeps."""
  return Snapshot(getattr(snapshot.tree, name), getattr(snapshot.specs, name), ())


def _audited(first: Snapshot, second: Snapshot, source: Any, freeze_mask: Any, limit: int) -> Audit:
  """Compare two snapshots of one tree; `source` is the module they are of, if they are."""
  params, mask, others = _parts.parts(first.tree, freeze_mask)
  specs = _parts.parts(first.specs, freeze_mask)[0]
  new_params, _, new_others = _parts.parts(second.tree, freeze_mask)
  old, new = _tree.flatten(params), _tree.flatten(new_params)
  by_path = matched(old, new, _WHERE)
  layouts = _elements.analysed(mask, specs, _WHERE)
  order = _parts.network_order(params if source is None else source, old.paths)
  leaves = [
    _compared(path, leaf, by_path[path], layout, index, limit)
    for path, leaf, layout, index in (
      (old.paths[i], old.leaves[i], layouts.static.layouts[i], layouts.index[i]) for i in order
    )
    if layout is not None
  ]
  notes, drifted = _moved(
    [*first.others, *others], [*second.others, *new_others], {x.path: x for x in leaves}
  )
  return Audit(tuple(leaves), notes, drifted)


def matched(old: _tree.Flat, new: _tree.Flat, where: str) -> dict[str, Any]:
  """The new leaves by path; raise unless both trees have the same ones."""
  by_path, known = dict(zip(new.paths, new.leaves, strict=True)), set(old.paths)
  problems = [
    Problem(path, "no leaf", "one that was not there before")
    for path in new.paths
    if path not in known
  ]
  for path, leaf in zip(old.paths, old.leaves, strict=True):
    if path not in by_path:
      problems.append(Problem(path, "the leaf that was there before", "none"))
    elif _signature(leaf) != _signature(by_path[path]):
      problems.append(Problem(path, describe(leaf), describe(by_path[path])))
  if problems:
    fail(where, problems, "Compare a model with itself: the same paths, shapes and dtypes.")
  return by_path


def _signature(leaf: Any) -> Any:
  return None if _tree.is_hole(leaf) else (leaf.shape, leaf.dtype)


def differs(old: np.ndarray, new: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Which elements have other bits; keys of random numbers hold several words an element."""
  result = _bits(old) != _bits(new)
  return result.any(axis=tuple(range(len(shape), result.ndim)))


def _bits(x: np.ndarray) -> np.ndarray:
  x = np.asarray(x, order="C")
  if x.dtype.itemsize in (1, 2, 4, 8):
    return x.view(f"u{x.dtype.itemsize}")
  return x.reshape(-1).view(np.uint64).reshape(*x.shape, x.dtype.itemsize // 8)


def _compared(path: str, old: Any, new: Any, layout: Layout, index: Index, limit: int) -> LeafAudit:
  differ = differs(old, new, layout.shape)
  frozen = _elements.frozen_count(layout, index)
  if isinstance(layout, Full) or not differ.any():
    return LeafAudit(path, frozen, 0, layout.size - frozen, int(np.count_nonzero(differ)), ())
  leaked = differ & _elements.frozen_mask(layout, index)
  changed = int(np.count_nonzero(leaked))
  moved = int(np.count_nonzero(differ)) - changed
  changes = _first(leaked, old, new, limit) if changed else ()
  return LeafAudit(path, frozen, changed, layout.size - frozen, moved, changes)


def _first(leaked: np.ndarray, old: Any, new: Any, limit: int) -> tuple[Change, ...]:
  flat = np.flatnonzero(leaked)[:limit]
  positions = zip(*np.unravel_index(flat, leaked.shape), strict=True) if leaked.ndim else [()]
  return tuple(Change(at, old[at], new[at]) for at in (tuple(int(i) for i in p) for p in positions))


def _moved(
  old: list[Other], new: list[Other], leaves: dict[str, LeafAudit]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Paths of other state that moved: (of layers that train, of layers that are wholly frozen)."""
  if not old or not new:
    return (), ()  # one side is a bare tree of parameters: nothing to compare
  before = {x.path: x for x in old}
  notes, drifted = [], []
  for x in new:
    known = before.pop(x.path, None)
    if known is None or _state_differs(known.value, x.value):
      counts = np.issubdtype(x.value.dtype, np.integer)
      (drifted if not counts and _is_frozen_layer(x.owner, leaves) else notes).append(x.path)
  return tuple([*notes, *before]), tuple(drifted)


def _state_differs(old: np.ndarray, new: np.ndarray) -> bool:
  return _signature(old) != _signature(new) or bool(np.any(_bits(old) != _bits(new)))


def _is_frozen_layer(path: str, leaves: dict[str, LeafAudit]) -> bool:
  """Whether the nearest layer above the path that has parameters has frozen ones only."""
  for layer in list(_tree.ancestors(path))[1:]:
    inside = [leaf for p, leaf in leaves.items() if _tree.covers(layer, p)]
    if inside:
      return all(leaf.trainable == 0 for leaf in inside)
  return False
