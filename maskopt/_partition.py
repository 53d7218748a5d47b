"""Several optimizers for one tree of parameters, told apart element by element."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _arguments, _joint, _masks, _provenance, _traced, _tree
from ._choice import Prefer
from ._errors import Problem, describe, fail
from ._freeze import SelectiveState, selective_transform
from ._layout import Frozen, Full, Index, Layout
from ._packed import Packed, dense, is_packed
from ._packing import Layouts
from ._provenance import Record
from ._traced import Traced

Label = str | int

_WHERE = "maskopt.partition(labels=...)"


class PartitionState(NamedTuple):
  """State of `partition`: for each label that trains, the state of its `selective_transform`."""

  inner_states: dict[str, Any]

  def joined(self) -> Layouts:
    """The freeze mask of the whole: what no optimizer trains is frozen."""
    return _joint.Joined([state.layouts for state in self.inner_states.values()])


def partition(
  optimizers: Mapping[Label, optax.GradientTransformation | None],
  labels: Any,
  *,
  prefer: Prefer = "time",
  master_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Train each element with the optimizer of its label.

    new[i] = step of optimizers[labels[i]] on the elements of that label alone

  Two learning rates in one kernel, old units slow and new units fast, are two labels. Each group is
  a `selective_transform` that freezes the others, so norms, clips and moments never mix and each
  holds the state of its own elements only.

  Args:
    optimizers: label -> optimizer; None and `optax.set_to_zero()` freeze.
    labels: per leaf or subtree a label (a str or an int), or an array of labels (ints or strings)
      that broadcasts to the leaf; a function of the parameters is called once, in `init`.
    prefer: as in `selective_transform`, for every group.
    master_dtype: as in `selective_transform`, for every group.
  Returns:
    A transformation; updates have the form of the gradients, arrays or packed. With
    `maskopt.apply_updates` in the same `jit` each group is written in place. `maskopt.mask_of` of
    its state is the mask of what no group trains.
  Raises:
    ValueError: a label without optimizer, an optimizer whose label nothing has, a path that is
      missing or unknown, or labels that do not broadcast; lists every path.
    TypeError: a label is neither str nor int.
  Example:
    >>> import jax.numpy as jnp, numpy as np, optax, maskopt
    >>> labels = {"w": np.array(["old", "new"])}
    >>> tx = maskopt.partition({"old": optax.sgd(0.01), "new": optax.sgd(1.0)}, labels)
    >>> params = {"w": jnp.zeros((2, 2))}
    >>> updates, _ = tx.update({"w": jnp.ones((2, 2))}, tx.init(params), params)
    >>> updates["w"][0].tolist() == [np.float32(-0.01), -1.0]
    True
  """
  keys = _checked_keys(optimizers)
  groups = {
    str(label): selective_transform(
      optimizer,
      freeze_mask=_others(labels, label),
      prefer=prefer,
      master_dtype=master_dtype,
    )
    for label, optimizer in optimizers.items()
    if optimizer is not None and not _freezes(optimizer)
  }

  def init(params: optax.Params) -> PartitionState:
    if not _tree.is_placeholder(params):
      params = _tree.parameters(params)
      _check_labels(labels, params, keys)
    return PartitionState({name: tx.init(params) for name, tx in groups.items()})

  def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    _check_state(state, groups)
    joined = state.joined()
    flat = joined.flat(updates, _WHERE)
    inner_states, moved = {}, []
    for name, tx in groups.items():
      layouts = state.inner_states[name].layouts
      share = _share(flat, joined, state, name)
      out, inner_states[name] = tx.update(share, state.inner_states[name], params, **extra)
      moved.append(layouts.flat(out, _WHERE).leaves)
    olds = [None] * len(flat.leaves) if params is None else _tree.flatten(params).leaves
    leaves = [
      _combined(grad, layout, old, parts)
      for grad, layout, old, *parts in zip(
        flat.leaves, joined.static.layouts, olds, *moved, strict=True
      )
    ]
    return flat.unflatten(leaves), PartitionState(inner_states)

  return optax.GradientTransformationExtraArgs(init, update)


def _freezes(optimizer: Any) -> bool:
  """Whether the optimizer is None or `optax.set_to_zero()`, which is known by its code."""
  code = [
    getattr(getattr(x, "update", None), "__code__", x) for x in (optimizer, optax.set_to_zero())
  ]
  return optimizer is None or code[0] is code[1]


def _is_label(label: Any) -> bool:
  whole = isinstance(label, (int, np.integer)) and not isinstance(label, bool)
  return whole or isinstance(label, str)


def _checked_keys(optimizers: Any) -> list[Label]:
  where = "maskopt.partition(optimizers=...)"
  remedy = 'Give a dict such as {"old": optax.adam(1e-4), "new": optax.adam(1e-3)}.'
  if not isinstance(optimizers, Mapping):
    fail(where, [Problem("", "a dict of optimizers", describe(optimizers), TypeError)], remedy)
  keys = list(optimizers)
  problems = [
    Problem(f"optimizers[{k!r}]", "a label, str or int, as key", describe(k), TypeError)
    for k in keys
    if not _is_label(k)
  ]
  problems += [
    Problem(f"optimizers[{k!r}]", "an Optax transformation or None", describe(tx), TypeError)
    for k, tx in optimizers.items()
    if tx is not None and not _arguments.is_transform(tx)
  ]
  names = [str(k) for k in keys]
  problems += [
    Problem(f"optimizers[{k!r}]", "labels that read differently", f"both {k!r} and {k}")
    for k in keys
    if isinstance(k, str) and names.count(k) > 1
  ]
  if not problems and all(_freezes(tx) for tx in optimizers.values()):
    problems.append(Problem("", "at least one optimizer that trains", "none"))
  if problems:
    fail(where, problems, remedy)
  return keys


def _others(labels: Any, label: Label) -> Any:
  """The freeze mask of one group: every element of another label is frozen."""
  if _masks.is_function(labels):
    return lambda params: _others(labels(params), label)
  flat = _tree.flatten(labels)
  problems = [
    Traced(path, "a label, or an array of labels", _traced.told(x), TypeError)
    for path, x in zip(flat.paths, flat.leaves, strict=True)
    if _traced.is_traced(x)
  ]
  if problems:
    fail(_WHERE, problems, _traced.REMEDY)
  return flat.unflatten([None if x is None else _differs(x, label) for x in flat.leaves])


def _differs(entry: Any, label: Label) -> Any:
  if not isinstance(entry, (np.ndarray, jax.Array)):
    return bool(entry != label)
  entry = np.asarray(entry)
  alike = (entry.dtype.kind in "US") == isinstance(label, str)
  return entry != label if alike else np.ones(entry.shape, bool)


def _check_labels(labels: Any, params: Any, keys: Sequence[Label]) -> None:
  """Raise unless every element has a known label and every label has an element."""
  used: set[Label] = set()
  known = ", ".join(map(repr, keys))

  def checked(entry: Any, leaf: Any, path: str, own: bool, problems: list[Problem]) -> None:
    found, problem = _labels_of(entry, np.shape(leaf), path, own)
    used.update(found)
    strangers = sorted(map(repr, found - set(keys)))
    if strangers:
      problem = Problem(path, f"one of the labels {known}", ", ".join(strangers))
    if problem is not None:
      problems.append(problem)

  entries = _tree.flatten(_masks.evaluate(labels, params))
  _masks.align(entries, _tree.flatten(params), checked, _WHERE, "a label")
  unused = [Problem("", f"an element with the label {k!r}", "none") for k in keys if k not in used]
  if unused:
    fail(_WHERE, unused, "Take the optimizer out, or label what it should train.")


def _labels_of(
  entry: Any, shape: tuple[int, ...], path: str, own: bool
) -> tuple[set[Label], Problem | None]:
  """The labels that occur in one leaf's entry, or what is wrong with it."""
  if _is_label(entry):
    return {str(entry) if isinstance(entry, str) else int(entry)}, None
  expected = f"a label, or labels that broadcast to {shape}"
  if _traced.is_traced(entry):
    return set(), Traced(path, expected, _traced.told(entry), TypeError)
  if not isinstance(entry, (np.ndarray, jax.Array)):
    return set(), Problem(path, expected, describe(entry), TypeError)
  array = np.asarray(entry)
  if array.dtype.kind not in "iuU":
    return set(), Problem(path, "str or int labels", describe(entry), TypeError)
  if not own:
    return set(), Problem(path, "one label, for it is given to a subtree", describe(entry))
  alone = array.size == 1 and np.prod(shape, dtype=np.int64) > 1
  if not _masks.broadcasts(array.shape, shape) or alone:
    got = describe(entry) + _masks.misfit(array.shape, shape, "label")
    return set(), Problem(path, expected, got)
  return {x.item() for x in np.unique(array)}, None


def _check_state(state: Any, groups: Mapping[str, Any]) -> None:
  expected = f"the state of groups {', '.join(groups)}"
  got = None
  if not isinstance(state, PartitionState):
    got = type(state).__name__
  elif set(state.inner_states) != set(groups):
    got = f"one of groups {', '.join(state.inner_states)}"
  elif not all(
    isinstance(s, SelectiveState) and isinstance(s.layouts, Layouts)
    for s in state.inner_states.values()
  ):
    got = "one without layouts"
  if got:
    fail(_WHERE, [Problem("", expected, got)], "Call init with the parameters.")


def _share(flat: _tree.Flat, joined: Layouts, state: PartitionState, name: str) -> Any:
  """One group's gradients, as packed leaves, so that it builds no dense update."""
  layouts = state.inner_states[name].layouts
  members = list(state.inner_states)
  leaves = []
  for k, (leaf, layout, index) in enumerate(
    zip(flat.leaves, layouts.static.layouts, layouts.index, strict=True)
  ):
    if layout is None or (not is_packed(leaf) and _tree.is_hole(leaf)):
      leaves.append(leaf)
    elif isinstance(layout, Frozen):
      leaves.append(Packed(None, layout))
    else:
      whole, indices = joined.static.layouts[k], joined.index[k]
      training = [m for m in members if _joint.trains(_layout_of(state, m, k))]
      values = _values(leaf, whole, indices, training.index(name), layout, index)
      leaves.append(Packed(values, layout, index=index))
  return flat.unflatten(leaves)


def _layout_of(state: PartitionState, name: str, k: int) -> Layout | None:
  return state.inner_states[name].layouts.static.layouts[k]


def _values(
  leaf: Any, whole: Layout | None, indices: Index, part: int, layout: Layout, index: Index
) -> Any:
  """The values of one group, from gradients in whatever form they came."""
  record = None if is_packed(leaf) else _provenance.made_of.recall(leaf)
  known = None if whole is None or record is None else record.values_of(whole, indices)
  if known is not None or (is_packed(leaf) and leaf.layout == whole):
    values = leaf.values if known is None else known
    return (
      values[part] if isinstance(whole, _joint.Joint) else _of_full(values, whole, layout, index)
    )
  if is_packed(leaf):
    shape = jnp.zeros(layout.shape, jnp.result_type(leaf.values))
    return layout.take(leaf.layout.put(leaf.values, shape, leaf.index), index)
  return layout.take(leaf, index)


def _of_full(values: Any, whole: Layout | None, layout: Layout, index: Index) -> Any:
  return values if whole == layout else layout.take(values, index)


def _combined(grad: Any, layout: Layout | None, old: Any, parts: Sequence[Any]) -> Any:
  """One leaf's update, from the updates of the groups; they share no element."""
  if layout is None:
    return grad
  records = [p.record for p in parts if is_packed(p) and p.values is not None]
  if not records:
    still = Frozen(layout.shape, layout.dtype)
    return Packed(None, still) if is_packed(grad) else _still(still, grad)
  record = _as_one(records)
  if is_packed(grad):
    return Packed(record.values, record.layout, record.sets, record.index)
  if record.sets:
    return _provenance.made_of.remember(_difference(record, old), record)
  if isinstance(record.layout, Full):
    return record.values
  return dense(record, record.values.dtype)


def _still(layout: Layout, grad: Any) -> Any:
  if _tree.is_hole(grad):
    return grad
  return dense(Record(layout, {}, None), layout.dtype)


def _as_one(records: Sequence[Record]) -> Record:
  if len(records) == 1:
    return records[0]
  return Record(
    _joint.joint([r.layout for r in records]),
    _joint.joint_index([r.index for r in records]),
    _joint.Parts(r.values for r in records),
    records[0].sets,
  )


def _difference(record: Record, old: Any) -> Any:
  """The dense update that stands for values to be set."""
  layout, index = record.layout, record.index
  wide = jnp.float32 if jnp.dtype(layout.dtype).itemsize < 4 else jnp.float64

  def change(new: Any, before: Any) -> Any:
    return new.astype(wide) - before.astype(wide)

  values = jax.tree.map(change, record.values, layout.take(old, index))
  return layout.put(values, jnp.full(layout.shape, -0.0, wide), index)
