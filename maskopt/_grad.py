"""Gradients of the trainable elements alone: drop-in for `jax.grad` and `jax.value_and_grad`.

JAX computes a whole weight gradient and XLA does not push a slice through a matmul, so a mask saves
nothing there. Here the gradient is traced, and only what the trainable blocks need of it is
computed: see `_slicer`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _argnums, _choice, _journal, _packing, _provenance, _sharded, _slicer, _tree
from ._joint import Joint, Parts
from ._layout import Block, Dense, Elements, Frozen, Full, Index, Layout, Slice
from ._packed import Packed
from ._packing import Layouts
from ._provenance import Record
from ._slicer._sampled import SAMPLE_BELOW


def value_and_grad(
  fun: Callable[..., Any],
  freeze_mask: Any,
  argnums: int | Sequence[int] = 0,
  has_aux: bool = False,
  packed: bool = False,
  *,
  holomorphic: bool = False,
  allow_int: bool = False,
  reduce_axes: Sequence[Any] = (),
) -> Callable[..., tuple[Any, Any]]:
  """Return a function that evaluates `fun` and its gradient at trainable elements.

    value, g = fun(x), where g[i] = 0 if freeze_mask[i] else d fun / d x[i]

  A drop-in for `jax.value_and_grad`, for any function. Wholly frozen leaves are not differentiated,
  so the backward pass stops at the lowest layer that trains; of a leaf that trains in blocks only
  the blocks are computed, and whatever below serves only the rest is not. Everything trainable is
  JAX's own program, and so is a function that asks arrays for their values, as eager code may.

  Args:
    fun: a scalar function; its differentiated arguments are trees of arrays.
    freeze_mask: a freeze mask over the argument `argnums`, a tuple of masks for several, or
      `maskopt.mask_of(state)`. A new structured mask is a new trace. Scattered and runtime masks
      should come as `mask_of(state)`, for an array mask at hand is a constant of the program.
    argnums: which positional argument, or arguments, to differentiate.
    has_aux: whether `fun` returns (value, auxiliary data).
    packed: return packed leaves in place of full-shaped ones, to accumulate or `pmean` by hand.
    holomorphic: as in `jax.value_and_grad`.
    allow_int: as in `jax.value_and_grad`; frozen integer leaves are always allowed.
    reduce_axes: as in `jax.value_and_grad`.
  Returns:
    A function of the same arguments that returns (value, gradient), or ((value, aux), gradient).
    The gradient has the argument's containers, shapes and dtypes and exact zeros where frozen
    (float0 for integer leaves); NaN and Inf pass as in JAX. Inside one `jit`, `selective_transform`
    and `apply_updates` receive its blocks and the full-shaped array is never built.

    Devices that share a batch reduce blocks and not whole gradients. Scattered elements too, if the
    arguments are placed on their mesh, save on TPU under `jit` (XLA lacks the means there) and
    those of kernels that a `scan` takes apart. `jax.export` refuses such a program, and JAX's
    persistent cache finds it only with `jax_remove_custom_partitioning_ptr_from_cache_key`.
  Raises:
    ValueError: the mask does not fit the argument; TypeError: a mask leaf is not boolean, or the
      argument is an nnx module (split it, or use its state).
  Example:
    >>> import jax.numpy as jnp, numpy as np, maskopt
    >>> loss = lambda w, x: ((x @ w["kernel"]) ** 2).sum()
    >>> w, mask = {"kernel": jnp.eye(2)}, {"kernel": np.array([True, False])}
    >>> value, g = maskopt.value_and_grad(loss, mask)(w, jnp.ones((1, 2)))
    >>> float(value), g["kernel"].tolist()
    (2.0, [[0.0, 2.0], [0.0, 2.0]])
  """
  where = "maskopt.grad(freeze_mask=...)"
  _argnums.check(fun, argnums)
  jax_options: dict[str, Any] = {
    "has_aux": has_aux,
    "holomorphic": holomorphic,
    "allow_int": allow_int,
    "reduce_axes": tuple(reduce_axes),
  }

  @functools.wraps(fun, updated=())
  def evaluated(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    params, with_params = _argnums.chosen(args, argnums, where)
    layouts = _packing.layouts_of(freeze_mask, params, where, prefer="values")
    flat = layouts.flat(params, where)
    split = _Split(layouts, flat, _densest(args, kwargs, packed))

    def of_trained(trained: list[Any]) -> Any:
      return fun(*with_params(split.merged(trained)), **kwargs)

    def of_all(leaves: list[Any]) -> Any:
      return fun(*with_params(flat.unflatten(leaves)), **kwargs)

    differentiated = jax.value_and_grad(of_trained, **jax_options)
    whole = jax.value_and_grad(of_all, **{**jax_options, "allow_int": True})
    value, gradients, plan = _evaluate(differentiated, split)
    _journal.write(lambda: [_note(whole, split, differentiated, plan)])
    leaves = [
      leaf if layout is None else _presented(g, leaf, layout, index, packed, split.densest)
      for g, leaf, layout, index in zip(
        split.spread(gradients), flat.leaves, layouts.static.layouts, layouts.index, strict=True
      )
    ]
    return value, flat.unflatten(leaves)

  return evaluated


def grad(
  fun: Callable[..., Any],
  freeze_mask: Any,
  argnums: int | Sequence[int] = 0,
  has_aux: bool = False,
  packed: bool = False,
  *,
  holomorphic: bool = False,
  allow_int: bool = False,
  reduce_axes: Sequence[Any] = (),
) -> Callable[..., Any]:
  """Return a function that evaluates the gradient of `fun` at trainable elements.

    g[i] = 0 if freeze_mask[i] else d fun / d x[i]

  A drop-in for `jax.grad`; see `value_and_grad` for what is computed and for the arguments.

  Args:
    fun: a scalar function; its differentiated arguments are trees of arrays.
    freeze_mask: a freeze mask over the argument `argnums`, a tuple of masks for several, or
      `maskopt.mask_of(state)`.
    argnums: which positional argument, or arguments, to differentiate.
    has_aux: whether `fun` returns (value, auxiliary data).
    packed: return packed leaves in place of full-shaped ones.
    holomorphic: as in `jax.grad`.
    allow_int: as in `jax.grad`; frozen integer leaves are always allowed.
    reduce_axes: as in `jax.grad`.
  Returns:
    A function of the same arguments that returns the gradient, or (gradient, aux).
  Raises:
    ValueError: the mask does not fit the argument; TypeError: a mask leaf is not boolean.
  Example:
    >>> import jax.numpy as jnp, numpy as np, maskopt
    >>> g = maskopt.grad(lambda w: (w**2).sum(), np.array([True, False]))
    >>> g(jnp.array([1.0, 1.0])).tolist()
    [0.0, 2.0]
  """
  both = value_and_grad(
    fun,
    freeze_mask,
    argnums,
    has_aux,
    packed,
    holomorphic=holomorphic,
    allow_int=allow_int,
    reduce_axes=reduce_axes,
  )

  @functools.wraps(fun, updated=())
  def gradient(*args: Any, **kwargs: Any) -> Any:
    value, g = both(*args, **kwargs)
    return (g, value[1]) if has_aux else g

  return gradient


@dataclasses.dataclass(frozen=True)
class _Split:
  """The leaves that train, apart from those that do not; and what is dense, see `_densest`."""

  layouts: Layouts
  flat: _tree.Flat
  densest: float

  @property
  def _trains(self) -> list[bool]:
    return [
      layout is not None and not isinstance(layout, Frozen)
      for layout in self.layouts.static.layouts
    ]

  @property
  def trained(self) -> list[Any]:
    pairs = zip(self.flat.leaves, self._trains, strict=True)
    return [leaf for leaf, trains in pairs if trains]

  @property
  def demands(self) -> list[Any]:
    """What the gradient of each trained leaf is wanted for."""
    triples = zip(self.layouts.static.layouts, self.layouts.index, self._trains, strict=True)
    return [
      _demand(layout, index, self.densest) for layout, index, trains in triples if trains and layout
    ]

  def merged(self, trained: list[Any]) -> Any:
    """The whole argument with other trained leaves."""
    new = iter(trained)
    pairs = zip(self.flat.leaves, self._trains, strict=True)
    return self.flat.unflatten([next(new) if trains else leaf for leaf, trains in pairs])

  def spread(self, gradients: list[Any]) -> list[Any]:
    """One gradient per leaf; None where nothing trains."""
    new = iter(gradients)
    return [next(new) if trains else None for trains in self._trains]


def _demand(layout: Layout, index: Index, densest: float) -> Any:
  if layout.blocks:
    return _regions(layout)
  if _is_sampled(layout, densest):
    # The unused slots of a runtime mask lie past the end; `_values` zeroes what they read.
    return _slicer.Sampled(jnp.minimum(index["flat"], layout.size - 1))
  return _slicer.ALL


def _regions(layout: Layout) -> tuple[_slicer.Region, ...]:
  return tuple(_slicer.region(layout.shape, *sets) for sets in layout.blocks)


_SAMPLED_BELOW = max(density for _, density in SAMPLE_BELOW)


def _densest(args: Any, kwargs: Any, packed: bool) -> float:
  """The share from which the scattered elements of a leaf are gathered from its whole gradient.

  On one device a sampled product must pay. Where several share the sum, gathering first makes the
  all-reduce as small as what trains, so it is done if anyone will gather at all.
  """
  arrays = (x for x in jax.tree.leaves((args, kwargs)) if isinstance(x, jax.Array))
  if not any(_slicer.has_devices(jax.typeof(x)) for x in arrays):
    return _SAMPLED_BELOW
  return 1.0 if packed else max(_SAMPLED_BELOW, _choice.densest_elements())


def _is_sampled(layout: Layout, densest: float = _SAMPLED_BELOW) -> bool:
  """Whether the gradient is asked for single elements, and not for all."""
  return isinstance(layout, Elements) and layout.length < densest * layout.size


def computed(layout: Layout) -> str:
  """What the backward pass computes of a leaf: "none", "blocks", "elements" or "whole"."""
  if isinstance(layout, Frozen):
    return "none"
  if layout.blocks:
    share = (layout.count or 0) / max(layout.size, 1)
    return "blocks" if share <= _slicer.SLICE_BELOW else "whole"
  return "elements" if _is_sampled(layout) else "whole"


# What JAX raises where a function needs the value of an array that is traced.
_CONCRETE = (
  jax.errors.ConcretizationTypeError,
  jax.errors.TracerArrayConversionError,
  jax.errors.TracerIntegerConversionError,
  jax.errors.NonConcreteBooleanIndexError,
)


def _evaluate(
  differentiated: Callable[..., Any], split: _Split
) -> tuple[Any, list[Any], _slicer.Plan | None]:
  """The value with its aux, each trained leaf's gradient as demanded, and the plan if any."""
  demands = split.demands
  if all(demand is _slicer.ALL for demand in demands):
    return *differentiated(split.trained), None
  static: list[Any] = []

  def traced(trained: list[Any]) -> Any:
    value, gradients = differentiated(trained)
    leaves, treedef = jax.tree.flatten(value)
    # Auxiliary data may hold what a traced program cannot return, or not as it is: only JAX's own
    # arrays are part of the program, and the rest takes the way around.
    arrays = [isinstance(x, jax.Array) for x in leaves]
    static[:] = [
      treedef,
      [None if is_array else x for x, is_array in zip(leaves, arrays, strict=True)],
    ]
    return [x for x, is_array in zip(leaves, arrays, strict=True) if is_array], gradients

  closed = None
  with contextlib.suppress(*_CONCRETE):
    closed = jax.make_jaxpr(traced)(split.trained)
  if closed is None:
    # Run eagerly, the function may ask data for its values; under a jit that fails once more here.
    value, gradients = differentiated(split.trained)
    return value, _slicer.slice_program(lambda *g: g, demands, *gradients)[0], None
  treedef, others = static
  count = len(closed.out_avals) - len(demands)
  plan = _slicer.analyze(closed, [_slicer.ALL] * count + demands)
  outputs = plan.emit(closed.consts, split.trained)
  values = iter(outputs[:count])
  value = treedef.unflatten([next(values) if x is None else x for x in others])
  return value, outputs[count:], plan


def _note(
  whole: Callable[..., Any],
  split: _Split,
  differentiated: Callable[..., Any],
  plan: _slicer.Plan | None,
) -> _journal.Gradient:
  """What this gradient costs, and what it would have cost JAX."""
  full = _slicer.count_flops(jax.make_jaxpr(whole)(split.flat.leaves))
  if plan is None:
    sliced = _slicer.count_flops(jax.make_jaxpr(differentiated)(split.trained))
    return _journal.Gradient(full, sliced, (), split.layouts)
  report = plan.report
  return _journal.Gradient(full, report.flops_sliced, tuple(report.stops), split.layouts)


def _presented(
  g: Any, leaf: Any, layout: Layout, index: Index, packed: bool, densest: float
) -> Any:
  """One leaf's gradient as the caller gets it, remembered as what it was made of."""
  if isinstance(layout, Frozen):
    if packed:
      return Packed(None, layout)
    return _provenance.made_of.remember(_no_gradient(leaf), Record(layout, index, None))
  if isinstance(layout, Full):
    return g
  sampled = _is_sampled(layout, densest)
  values = _values(g, layout, index, sampled)
  if packed:
    return Packed(values, layout, index=index)
  full = values
  if not isinstance(layout, Dense):
    record = Record(layout, index, values)
    full = _provenance.made_of.remember(_among_zeros(values, layout, index, leaf), record)
  whole = not layout.blocks and not sampled
  return _provenance.unmasked.remember(full, Record(layout, index, g)) if whole else full


def _among_zeros(values: Any, layout: Layout, index: Index, leaf: Any) -> Any:
  """The full-shaped gradient, sharded as the leaf is."""
  if isinstance(layout, (Block, Slice)) and layout.blocks and _slicer.spread_pays(layout.shape):
    spread = _slicer.spread(values, _regions(layout)[0], layout.shape)
    return _sharded.like(spread, leaf)
  return layout.put(values, jnp.zeros_like(leaf, values.dtype), index)


def _values(g: Any, layout: Layout, index: Index, sampled: bool) -> Any:
  """The packed values, of what was demanded by `_demand`."""
  if not layout.blocks:
    return jnp.where(index["flat"] < layout.size, g, 0) if sampled else layout.take(g, index)
  if isinstance(layout, (Block, Slice)):
    return g[0]
  if isinstance(layout, Joint):
    blocks = iter(g)
    return Parts(
      _values([next(blocks) for _ in part.blocks], part, index[str(k)], sampled)
      for k, part in enumerate(layout.parts)
    )
  if isinstance(layout, Elements):
    return _slicer.in_order(g, _regions(layout), layout.shape)
  assert isinstance(layout, Dense)  # the values are the whole leaf
  if len(g) == 1 and _slicer.spread_pays(layout.shape):
    return _slicer.spread(g[0], _regions(layout)[0], layout.shape)
  whole = jnp.zeros(layout.shape, g[0].dtype)
  for sets, block in zip(layout.blocks, g, strict=True):
    whole = whole.at[jnp.ix_(*(np.asarray(s, np.int32) for s in sets))].set(block)
  return whole


def _no_gradient(leaf: Any) -> Any:
  """Zeros as JAX gives them: float0 for what is no float."""
  dtype = jnp.result_type(leaf)
  if not jnp.issubdtype(dtype, np.inexact):
    return np.zeros(np.shape(leaf), jax.dtypes.float0)
  return jnp.zeros_like(leaf, dtype)
