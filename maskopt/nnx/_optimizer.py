"""The optimizer of nnx modules: `flax.nnx.Optimizer` on the trainable elements, in place."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn, TypeVar

import jax
import optax
from flax import nnx

from .. import _freeze, _masks, _ties, _tree
from .._choice import Prefer
from .._errors import Problem, fail
from .._packed import is_packed
from . import _carried

M = TypeVar("M", bound=nnx.Module)

_WHERE = "maskopt.nnx.Optimizer(freeze_mask=...)"
_UPDATE = "maskopt.nnx.Optimizer.update(model, grads)"
# What a packed value does not inherit of its parameter: these name dimensions it may not have.
_SHARDING = ("out_sharding", "optimizer_sharding", "sharding_names", "sharding")


class Optimizer(nnx.Optimizer[M]):
  """Optimize the trainable elements of an nnx module as if the others did not exist.

    parameter[i] keeps its bits if freeze_mask[i]        the others follow `tx` on them alone

  A drop-in for `flax.nnx.Optimizer`: `update(model, grads)` runs `tx` on packed values and writes
  in place on the trainable elements, under `nnx.jit`, `nnx.scan` and in either graph mode. Donate
  the model and the optimizer to `nnx.jit` to save the copy. Weight decay, momentum and NaN
  gradients do not move a frozen bit.

  Handling objects costs `nnx.jit` about 0.2 ms a call and 0.15 ms a layer, whosever the optimizer.
  Where that is much of a step, let `nnx.cached_partial` hold model and optimizer, or take tree mode
  (`graph=False` here and at `nnx.jit`) if no variable is shared.

  Args:
    model: the module whose parameters train.
    tx: any Optax transformation.
    freeze_mask: a freeze mask over `nnx.state(model, wrt)`; True = frozen. None takes the masks
      that the modules carry, of which `maskopt.nnx.freeze_mask` tells. A shared variable may go by
      any of its names.
    wrt: filter of the variables that may train, as in `flax.nnx.Optimizer`.
    prefer: as in `maskopt.selective_transform`.
    master_dtype: as in `maskopt.selective_transform`.
    graph: as in `flax.nnx.Optimizer`.

  Attributes:
    step: number of updates.
    tx: `tx` on the trainable elements.
    opt_state: its state, a tree of variables; `maskopt.mask_of(optimizer.opt_state)` is the mask.
    slots: the same variables by name, under which `nnx.state(optimizer)` has them.
    wrt: the filter.

  Raises:
    ValueError: the mask does not fit the module, is for variables that `wrt` does not select, or
      trains what a module's own mask freezes; names every path. Or `tx` selects already.
    TypeError: a mask leaf is not boolean, or an integer parameter would train.

  Example:
    >>> import jax.numpy as jnp, numpy as np, optax, maskopt
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    >>> mask = {"kernel": True, "bias": np.array([False, True])}
    >>> optimizer = maskopt.nnx.Optimizer(model, optax.adam(0.1), freeze_mask=mask)
    >>> grads = nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(model)
    >>> _ = optimizer.update(model, grads)
    >>> model.bias[...].round(3).tolist()
    [-0.10000000149011612, 0.0]
  """

  def __init__(
    self,
    model: M,
    tx: optax.GradientTransformation,
    freeze_mask: _masks.FreezeMask | None = None,
    wrt: Any = nnx.Param,
    *,
    prefer: Prefer = "time",
    master_dtype: Any = None,
    graph: bool | None = None,
  ):
    _refuse_filter(freeze_mask)
    params = nnx.state(model, wrt, graph=graph)
    if not jax.tree.leaves(params):
      kinds = ", ".join(sorted(set(_ties.kinds(model).values()))) or "no variables"
      expected = f"variables that wrt={_ties.show_filter(wrt)} selects"
      fail("maskopt.nnx.Optimizer(wrt=...)", [Problem("", expected, kinds)], "Give another filter.")
    mask = _carried.agreed(model, params, freeze_mask, wrt, _WHERE)
    selective = _freeze.selective_transform(
      tx, freeze_mask=mask, prefer=prefer, master_dtype=master_dtype
    )

    def init(params: Any) -> Any:
      # `optax.tree_map_params` asks for the state's structure with a placeholder.
      if _tree.is_placeholder(params):
        return selective.init(params)
      try:
        return selective.init(_unlabelled(params, mask))
      except ValueError:
        if _freeze.selects(_freeze.state_of(tx, params)):
          _refuse_selective()
        raise

    wrapped = optax.GradientTransformationExtraArgs(init, selective.update)
    super().__init__(model, wrapped, wrt=wrt, graph=graph)
    whole = freeze_mask is None and wrt is nnx.Param
    if whole and all(x is False for x in jax.tree.leaves(mask)):
      warnings.warn(
        f"`{_WHERE}`: nothing is frozen, for no mask is given and no module carries one. Give it a "
        "freeze mask, or freeze_mask=False to train everything.",
        stacklevel=2,
      )

  @property
  def opt_state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]  # read, written
    """The optimizer state, a tree whose leaves are the variables themselves."""
    return self._structure.unflatten(self._ordered())

  @opt_state.setter
  def opt_state(self, tree: Any) -> None:
    # What Flax marks as data only an attribute of one of its objects takes unmarked.
    tree = _Unmarked(tree).tree
    # Flat, for `nnx.jit` walks every container of an object in Python, twice a call: of a nested
    # state it took as long for the containers as for the variables.
    paths, structure = jax.tree_util.tree_flatten_with_path(_compact(tree), is_leaf=_is_box)
    names = [_tree.path_of(keys).replace("/", ".") for keys, _ in paths]
    assert len(set(names)) == len(names)
    self.slots = nnx.data({name: x for name, (_, x) in zip(names, paths, strict=True)})
    self._names, self._structure = tuple(names), structure

  def _ordered(self) -> list[nnx.Variable]:
    """The variables in the order of the state; `nnx.jit` gives dicts back in sorted order."""
    return [self.slots[name] for name in self._names]

  def update(self, model: M, grads: Any, /, **kwargs: Any) -> optax.Updates:
    """Update the optimizer state and the trainable elements of the model, in place.

    Args:
      model: the module; its other variables are left alone.
      grads: gradients from `maskopt.nnx.grad`, packed or not, or from `nnx.grad`; more kinds of
        variables than `wrt` selects are allowed.
      **kwargs: for `tx.update`; `freeze_mask=` is the next value of a runtime mask.
    Returns:
      The updates as `tx` gave them, -0.0 where frozen.
    Raises:
      ValueError: there are no gradients for some of the parameters; names the paths and the kinds.
      TypeError: model and gradients are in the wrong order.
    """
    if isinstance(grads, nnx.Module) and not isinstance(model, nnx.Module):
      problem = Problem(
        "", "the module, then gradients", type(grads).__name__ + " second", TypeError
      )
      fail(_UPDATE, [problem], "Call optimizer.update(model, grads).")
    params = nnx.as_pure(nnx.state(model, self.wrt, graph=self.graph))
    chosen = _values(nnx.state(grads, self.wrt, graph=self.graph))
    self._check(params, chosen, grads)
    updates: Any
    updates, opt_state = self.tx.update(
      chosen, nnx.as_pure(self.opt_state), params, **nnx.as_pure(kwargs)
    )
    # In the trace of tx.update, so that packed values are added where they belong.
    new_params = _freeze.apply_updates(params, updates)
    nnx.update(model, new_params)
    new_slots = self._structure.flatten_up_to(opt_state)
    for slot, value in zip(self._ordered(), new_slots, strict=True):
      slot.set_value(value)
    self.step[...] += 1
    return updates

  def _check(self, params: Any, chosen: Any, grads: Any) -> None:
    wanted = _tree.flatten(params).paths
    given = _tree.flatten(chosen, is_leaf=is_packed).paths
    if wanted == given:
      return
    boxes = jax.tree.leaves(grads, is_leaf=_is_box)
    kinds = sorted({type(x).__name__ for x in boxes if _is_box(x)})
    of = f"gradients of {', '.join(kinds) or 'no variables'}"
    expected = f"a gradient of what wrt={_ties.show_filter(self.wrt)} selects"
    problems = [Problem(p, expected, f"none among {of}") for p in wanted if p not in set(given)]
    problems += [
      Problem(p, f"a variable of the model that wrt={_ties.show_filter(self.wrt)} selects", of)
      for p in given
      if p not in set(wanted)
    ]
    remedy = "Differentiate with the optimizer's filter: argnums=nnx.DiffState(0, wrt)."
    fail(_UPDATE, problems, remedy)


def _refuse_filter(freeze_mask: Any) -> None:
  """Raise if the third argument is what `flax.nnx.Optimizer` takes there: a filter."""
  if isinstance(freeze_mask, type):
    problem = Problem("", "a freeze mask", f"the type {freeze_mask.__name__}", TypeError)
    fail(_WHERE, [problem], f"A filter of variables is for wrt={freeze_mask.__name__}.")


def _refuse_selective() -> NoReturn:
  """Raise for a transform that selects already: it would see packed values only."""
  expected, got = "an optimizer of whole parameters", "one of maskopt.selective_transform"
  fail(
    "maskopt.nnx.Optimizer(tx=...)",
    [Problem("tx", expected, got)],
    "It would select twice. Write maskopt.nnx.Optimizer(model, optax.adam(...), freeze_mask) "
    "with the optimizer that maskopt.selective_transform was given, or leave this transform as "
    "it is and give it to flax.nnx.Optimizer(model, tx, wrt=nnx.Param).",
  )


class _Unmarked(nnx.Pytree, pytree=False):
  def __init__(self, tree: Any):
    self.tree = tree


def _values(grads: Any) -> Any:
  """Gradients without their variables; `nnx.as_pure` would rebuild packed leaves inside them."""
  return jax.tree.map(lambda x: x.get_raw_value() if _is_box(x) else x, grads, is_leaf=_is_box)


def _compact(opt_state: Any) -> Any:
  """The state with every array in a variable, and no variable without an array: frozen leaves."""

  def boxed(x: Any) -> Any:
    if _is_box(x):
      return x if jax.tree.leaves(x) else x.get_raw_value()
    return nnx.OptArray(x)

  return jax.tree.map(boxed, opt_state, is_leaf=_is_box)


def _is_box(x: Any) -> bool:
  return isinstance(x, nnx.Variable)


def _unlabelled(params: Any, freeze_mask: Any) -> Any:
  """The parameters without sharding labels wherever the state is no image of the parameter."""
  if isinstance(freeze_mask, _masks.Runtime):
    return params
  boxes, treedef = jax.tree.flatten(params, is_leaf=_is_box)
  masks = _masks.resolve(freeze_mask, params, _WHERE)
  bare = [
    _without_labels(box) if mask is not False and _is_box(box) else box
    for box, mask in zip(boxes, masks, strict=True)
  ]
  return treedef.unflatten(bare)


def _without_labels(box: Any) -> Any:
  metadata = {k: v for k, v in box.get_metadata().items() if k not in _SHARDING}
  return type(box)(box.get_raw_value(), **metadata)
