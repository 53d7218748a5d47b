"""The transforms: zero frozen updates, or optimize the trainable values alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from . import _arguments, _bits, _copies, _journal, _masters, _packing, _provenance, _remask, _tree
from ._choice import Prefer
from ._errors import Problem, describe, fail
from ._layout import Frozen, Full, Index, Layout
from ._masks import Changing, FreezeMask
from ._owner import Owner
from ._packed import Packed, applied, dense, is_packed
from ._packing import Layouts
from ._provenance import Record


class MaskedFreezeState(NamedTuple):
  """State of `masked_freeze`: the mask it works with."""

  layouts: Any


class Held(NamedTuple):
  """Moments of frozen elements, packed; their layouts are no mask that anything works with."""

  layouts: Any
  inner_state: Any


class SelectiveState(NamedTuple):
  """State of `selective_transform`.

  Attributes:
    layouts: the freeze mask as it works; `maskopt.mask_of` finds it.
    inner_state: the inner optimizer's state over packed values.
    masters: packed values in the master dtype where that is wider than the parameter, else
      `optax.MaskedNode`; None without `master_dtype`.
    held: moments of elements that are frozen for now, if `maskopt.migrate` was to hold them.
  """

  # First, so that whoever restores a state field by field meets the mask before its arrays.
  layouts: Any
  inner_state: Any
  masters: Any
  held: Held | None = None


# Stands for the layouts where `optax.tree_map_params` asks for a state's structure: a leaf, so that
# it is a prefix of whatever the layouts are.
_UNKNOWN = 0


def masked_freeze(freeze_mask: FreezeMask) -> optax.GradientTransformationExtraArgs:
  """Zero the updates of frozen elements.

    new_update[i] = -0.0 if freeze_mask[i] else update[i]        True = frozen

  Chain it last: what stands after it can move a frozen element again, and what stands before it (a
  clip, a moment, a finiteness check) has seen the frozen gradients. `selective_transform` has
  neither limit and costs less. The zero is negative because adding -0.0 changes no number's sign.

  Args:
    freeze_mask: a freeze mask over the parameters; bools and NumPy arrays are analysed once, a
      `jax.Array` is data.
  Returns:
    A transformation with updates of the same structure, shapes and dtypes; NaN and Inf at frozen
    elements become zero. Its state holds the mask, at most one byte an element. `update` takes
    `freeze_mask=` too: the next value of a runtime mask, without a retrace.
  Raises:
    ValueError: the mask names no parameter, misses one, or does not broadcast; lists every path.
      The state is another mask's, or none.
    TypeError: a mask leaf is not boolean, or an integer parameter would train.
  Example:
    >>> import jax.numpy as jnp, numpy as np, optax, maskopt
    >>> params = {"w": jnp.array([1.0, 1.0])}
    >>> tx = optax.chain(optax.sgd(0.5), maskopt.masked_freeze({"w": np.array([True, False])}))
    >>> updates, _ = tx.update({"w": jnp.array([jnp.nan, 1.0])}, tx.init(params), params)
    >>> maskopt.apply_updates(params, updates)["w"].tolist()
    [1.0, 0.5]
  """
  where = "maskopt.masked_freeze(freeze_mask=...)"
  if isinstance(freeze_mask, Changing) and freeze_mask.mode == "runtime":
    return freeze_mask.running(masked_freeze)
  owner = Owner(freeze_mask, where, prefer="time")

  def init(params: optax.Params) -> Any:
    if _tree.is_placeholder(params):
      return MaskedFreezeState(_UNKNOWN)
    return MaskedFreezeState(owner.layouts(_copies.trained(params)))

  def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    del params
    owner.check(state, MaskedFreezeState)
    layouts, next_mask = state.layouts, extra.get("freeze_mask")
    if next_mask is not None:
      layouts = _remask.turned(layouts, next_mask, where)

    def zeroed(updates: Any) -> Any:
      return layouts.map(_zeroed_update, layouts.flat(updates, where))

    return _copies.each(zeroed, updates), MaskedFreezeState(layouts)

  return optax.GradientTransformationExtraArgs(init, update)


def _zeroed_update(update: Any, layout: Layout, index: Index) -> Any:
  if is_packed(update) or _tree.is_hole(update) or isinstance(layout, Full):
    return update
  return dense(Record(layout, index, layout.take(update, index)), jnp.result_type(update))


def selective_transform(
  optimizer: optax.GradientTransformation,
  *,
  freeze_mask: FreezeMask,
  prefer: Prefer = "time",
  master_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Run an optimizer on the trainable elements as if the others did not exist.

    v = take(params), g = take(grads)        the trainable values of every leaf
    u, state = optimizer.update(g, state, v)
    update[i] = u[k] if i == trainable[k] else -0.0

  Frozen gradients reach no norm, moment, clip or finiteness check, so they may be NaN. With
  `maskopt.apply_updates` in the same `jit` the dense updates are never built.

  Args:
    optimizer: any Optax transformation, `optax.MultiSteps` too.
    freeze_mask: a freeze mask over the parameters (over each copy, if `optax.lookahead` keeps two);
      True = frozen. A function of the parameters is called once, in `init`.
    prefer: "time" stores each leaf the way that is fastest on its platform; "memory" packs even
      where a dense leaf would be faster.
    master_dtype: keep the trainable values of narrower float parameters in this dtype, train those,
      and let `maskopt.apply_updates` set their rounded values.
  Returns:
    A transformation: full-shaped updates for array gradients, packed updates for packed gradients.
    Its state holds the inner state over trainable values plus at most 4 bytes for a scattered
    trainable element (or one byte an element of a leaf that stays dense). Extra arguments shaped
    like the parameters are packed too; functions among them (a line search's `value_fn`) see full
    parameters. `update` takes `freeze_mask=`: the next value of a runtime mask, without a retrace;
    elements that stay trainable keep their moments, newly trainable ones start anew, and under an
    Adam as if their first gradient had always been theirs (see `migrate`): one learning rate long.
  Raises:
    ValueError: the mask does not fit the parameters, the state is another mask's or none, one
      array stands at two paths, or the optimizer selects already.
    TypeError: a mask leaf is not boolean, an integer parameter would train, or `master_dtype` is
      no dtype of floats.
  Warns:
    UserWarning: the optimizer depends on the shape of a leaf (muon, adafactor) whose trainable
      elements are no block; names the leaf.
  Example:
    >>> import jax.numpy as jnp, numpy as np, optax, maskopt
    >>> params = {"w": jnp.array([1.0, 1.0])}
    >>> mask = {"w": np.array([True, False])}
    >>> tx = maskopt.selective_transform(optax.adamw(0.1), freeze_mask=mask)
    >>> updates, _ = tx.update({"w": jnp.array([jnp.nan, 1.0])}, tx.init(params), params)
    >>> float(maskopt.apply_updates(params, updates)["w"][0])
    1.0
  """
  where = "maskopt.selective_transform(freeze_mask=...)"
  _arguments.check_prefer(prefer)
  _arguments.check_master_dtype(master_dtype)
  inner = _arguments.with_extra_args(optimizer)
  if isinstance(freeze_mask, Changing) and freeze_mask.mode == "runtime":

    def make(mask: FreezeMask) -> optax.GradientTransformationExtraArgs:
      return selective_transform(inner, freeze_mask=mask, prefer=prefer, master_dtype=master_dtype)

    return freeze_mask.running(make)
  owner = Owner(freeze_mask, where, prefer=prefer, optimizer=inner)

  def init(params: optax.Params) -> Any:
    if _tree.is_placeholder(params):
      return SelectiveState(_UNKNOWN, inner.init(params), None if master_dtype is None else params)
    params = _copies.each(_tree.parameters, params)
    layouts = owner.layouts(_copies.trained(params))
    values = _copies.each(lambda p: layouts.take(p, where), params)
    masters = _masters.create(values, master_dtype)
    try:
      inner_state = inner.init(_masters.over(masters, values))
    except ValueError:
      _refuse_twice(state_of(inner, params))
      raise
    _refuse_twice(inner_state)
    return SelectiveState(layouts, inner_state, masters)

  def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    next_mask = extra.pop("freeze_mask", None)
    owner.check(state, SelectiveState)
    _copies.check_gradients(updates, where)
    _arguments.need_params(params, where, master_dtype, next_mask)
    if next_mask is not None:
      _arguments.need_positions(updates, where)

    def inner_update(layouts: Layouts, grads: Any, inner_state: Any, values: Any) -> Any:
      packed = {k: _arguments.packed_argument(v, layouts, params, where) for k, v in extra.items()}
      return inner.update(grads, inner_state, values, **packed)

    if next_mask is not None:
      state = _remask.remasked(inner, inner_update, state, next_mask, params, updates, where)
    layouts = state.layouts
    flat = layouts.flat(updates, where)
    _journal.write(lambda: _received(layouts, flat))
    _arguments.warn_of_other_gradients(layouts, flat, where)
    values = None if params is None else _copies.each(lambda p: layouts.take(p, where), params)
    masters = _masters.follow(state.masters, values)
    grads = _masters.like(_copies.trained(masters), layouts.take(updates, where))
    packed, inner_state = inner_update(
      layouts, grads, state.inner_state, _masters.over(masters, values)
    )
    masters, targets = _masters.step(masters, packed, values)
    full = _copies.each(lambda *both: layouts.map(_outgoing, flat, *both), packed, targets)
    state = state._replace(inner_state=inner_state, masters=masters)
    return full, state

  return optax.GradientTransformationExtraArgs(init, update)


def state_of(tx: Any, params: Any) -> Any:
  """The state of a transform over whole parameters, without values; None if it has none."""
  try:
    return jax.eval_shape(tx.init, params)
  except Exception:  # asked about an error that is on its way already
    return None


def selects(state: Any) -> bool:
  """Whether a state is of `selective_transform`, or holds one; those of a partition are its own."""

  def stop(x: Any) -> bool:
    return isinstance(x, SelectiveState) or hasattr(x, "joined")

  return any(isinstance(x, SelectiveState) for x in jax.tree.leaves(state, is_leaf=stop))


def _refuse_twice(state: Any) -> None:
  """Raise if an inner state is of a transform that selects: it would see packed values only."""
  if selects(state):
    expected, got = "an optimizer of whole parameters", "one of maskopt.selective_transform"
    fail(
      "maskopt.selective_transform(optimizer, ...)",
      [Problem("optimizer", expected, got)],
      "It would select twice. Join the masks with maskopt.union, and give the optimizer inside.",
    )


def _received(layouts: Layouts, flat: _tree.Flat) -> Iterator[_journal.Received]:
  """For each gradient, whether its packed values came along."""
  static = layouts.static
  for path, layout, leaf, index in zip(
    static.paths, static.layouts, flat.leaves, layouts.index, strict=True
  ):
    if layout is not None:
      packed = _packing.came_packed(leaf, layout, index)
      yield _journal.Received(path, layout.kind, packed)


def _outgoing(grad: Any, layout: Layout, index: Index, update: Any, target: Any) -> Any:
  """One leaf's update in the form its gradient had: packed in, packed out; array in, array out.

  `target` is (new value, difference to the old one) where the parameter is to be set.
  """
  if isinstance(layout, Frozen):
    return (
      Packed(None, layout) if is_packed(grad) else dense(Record(layout, index, None), layout.dtype)
    )
  if _tree.is_hole(update):
    return update
  sets = target is not None
  if is_packed(grad):
    return Packed(target[0] if sets else update, layout, sets, index)
  if sets:
    full = dense(Record(layout, index, target[1]), target[1].dtype)
    return _provenance.made_of.remember(full, Record(layout, index, target[0], sets=True))
  if isinstance(layout, Full):
    return update
  return dense(Record(layout, index, update), update.dtype)


def apply_updates(params: chex.ArrayTree, updates: chex.ArrayTree) -> chex.ArrayTree:
  """Add updates to parameters, in place on the trainable elements.

    new[i] = params[i] if updates[i] == 0 else params[i] + updates[i]

  The first case keeps the bits: -0.0, subnormals and NaN payloads too. In one `jit` with the
  `update` that made them, the updates of packed leaves are added to their trainable elements alone
  and the dense updates are never built; donate the parameters to make that in place. Everywhere
  else, and with any other updates, the equation above is computed on the whole leaf.

  Args:
    params: the parameters, in any containers.
    updates: arrays of the same shapes, or packed leaves; the sum is taken in the wider dtype.
  Returns:
    The new parameters, same containers, shapes and dtypes. NaN updates make NaN where they train.
  Raises:
    ValueError: the trees have different paths or shapes; lists every one.
  Example:
    >>> import jax.numpy as jnp, maskopt
    >>> maskopt.apply_updates({"w": jnp.array([-0.0, 1.0])}, {"w": jnp.array([0.0, 2.0])})["w"]
    Array([-0.,  3.], dtype=float32)
  """
  where = "maskopt.apply_updates(updates=...)"
  flat = _tree.flatten(params)
  given = _tree.flatten(updates, is_leaf=is_packed)
  remedy = "Give the updates that the transformation returned for these parameters."
  if flat.paths != given.paths:
    _packing.fail_paths(given.paths, flat.paths, where, remedy)
  problems = [
    Problem(path, f"an update of shape {np.shape(p)}", describe(u))
    for path, p, u in zip(flat.paths, flat.leaves, given.leaves, strict=True)
    if not (_tree.is_hole(p) or _tree.is_hole(u)) and np.shape(p) != np.shape(u)
  ]
  if problems:
    fail(where, problems, remedy)
  new = [
    _applied(p, u, path) for path, p, u in zip(flat.paths, flat.leaves, given.leaves, strict=True)
  ]
  return flat.unflatten(new)


def _applied(p: Any, u: Any, path: str) -> Any:
  if _tree.is_hole(p) or (not is_packed(u) and _tree.is_hole(u)):
    return p
  record = u.record if is_packed(u) else _provenance.made_of.recall(u)
  _journal.write(lambda: [_journal.Applied(path, record is not None)])
  if record is not None:
    return applied(p, record)
  return _bits.added(jnp.asarray(p), jnp.asarray(_journal.marked(u, path)))


def mask_of(state: Any) -> Layouts:
  """Return the freeze mask a transform works with, from its optimizer state.

  Args:
    state: the state of `selective_transform` or `masked_freeze`, or any state that holds one.
  Returns:
    The mask and its layout for each leaf. Give it wherever a freeze mask is asked for: its index
    arrays are then arguments of the surrounding `jit`. `.freeze_mask` is the mask as bools.
  Raises:
    ValueError: the state holds no mask, or several different ones.
  Example:
    >>> import jax.numpy as jnp, optax, maskopt
    >>> tx = maskopt.selective_transform(optax.adam(0.1), freeze_mask={"w": True})
    >>> maskopt.mask_of(tx.init({"w": jnp.ones(3)})).freeze_mask
    {'w': True}
  """
  nodes = jax.tree.leaves(
    state, is_leaf=lambda x: isinstance(x, (Layouts, Held)) or hasattr(x, "joined")
  )
  nodes = [x.joined() if hasattr(x, "joined") else x for x in nodes]
  found = {x.static: x for x in nodes if isinstance(x, Layouts)}
  if len(found) != 1:
    problem = Problem("", "a state with one freeze mask", f"one with {len(found)}")
    fail("maskopt.mask_of(state)", [problem], "Give it the state of one maskopt transform.")
  # In an nnx optimizer the arrays are variables.
  return nnx.as_pure(next(iter(found.values())))
