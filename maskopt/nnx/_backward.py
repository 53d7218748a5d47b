"""The backward pass of one layer, for the trainable blocks of its parameters only.

  dW[i] = 0 if frozen[i], never computed        dx as if nothing were frozen

XLA does not push a slice through a matmul, and a `where` with `stop_gradient` saves nothing, so the
layer brings its own derivative: its transposed program, sliced to what trains. JAX's `linear_call`
would keep forward mode, but has neither `vmap` nor second derivatives, which `custom_vjp` has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _packing, _slicer
from .._layout import Block, Frozen, Full, Index, Layout, Slice


def call(
  fun: Callable[..., Any], params: dict[str, Any], masks: dict[str, Any], *inputs: Any
) -> Any:
  """Return `fun(params, *inputs)`, with block-only gradients of the parameters.

  Args:
    fun: a pure function of a dict of arrays and further trees of arrays.
    params: arrays by name.
    masks: a static mask for each of them.
    inputs: differentiated where they are inexact.
  """
  if all(mask is False for mask in masks.values()):
    return fun(params, *inputs)

  @jax.custom_vjp
  def layer(params: dict[str, Any], inputs: Any) -> Any:
    return fun(params, *inputs)

  def forward(params: dict[str, Any], inputs: Any) -> Any:
    return fun(params, *inputs), (params, inputs)

  def backward(saved: Any, dy: Any) -> Any:
    params, inputs = saved
    return _pulled_back(fun, masks, params, inputs, dy)

  layer.defvjp(forward, backward)
  return layer(params, inputs)


def _pulled_back(
  fun: Callable[..., Any], masks: dict[str, Any], params: Any, inputs: Any, dy: Any
) -> tuple[Any, Any]:
  """Cotangents of parameters and inputs; None stands for zeros."""
  # Here and not in `call`: its index arrays belong to the trace that uses them.
  layouts = _packing.layouts_of(masks, params, "masked layer", prefer="values")
  names = list(layouts.static.paths)
  leaves, treedef = jax.tree.flatten(inputs)
  moving = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves]

  def whole(values: Sequence[Any], fixed: Sequence[Any]) -> list[Any]:
    first, second = iter(values), iter(fixed)
    return treedef.unflatten([next(first) if moves else next(second) for moves in moving])

  def transposed(params: Any, values: Any, fixed: Any, dy: Any) -> Any:
    def of(params: Any, values: Any) -> Any:
      return fun(params, *whole(values, fixed))

    dparams, dvalues = jax.vjp(of, params, values)[1](dy)
    return [dparams[name] for name in names], dvalues

  values = [x for x, moves in zip(leaves, moving, strict=True) if moves]
  fixed = [x for x, moves in zip(leaves, moving, strict=True) if not moves]
  demands = [_demand(layout) for layout in layouts.static.layouts] + [_slicer.ALL] * len(values)
  outputs, _ = _slicer.slice_program(transposed, demands, params, values, fixed, dy)
  gradients = {
    name: _full(g, masks[name], layout, index)
    for name, g, layout, index in zip(
      names, outputs[: len(names)], layouts.static.layouts, layouts.index, strict=True
    )
  }
  return gradients, tuple(whole(outputs[len(names) :], [None] * len(fixed)))


def _demand(layout: Layout | None) -> Any:
  assert layout is not None
  if isinstance(layout, Frozen):
    return _slicer.NONE
  if layout.blocks:
    return tuple(_slicer.region(layout.shape, *sets) for sets in layout.blocks)
  return _slicer.ALL


def _full(g: Any, mask: Any, layout: Layout | None, index: Index) -> Any:
  """A parameter's gradient, zero where frozen, of what was demanded."""
  assert layout is not None
  if g is None or isinstance(layout, Full):
    return g
  if not layout.blocks:
    # The mask is a constant of the program; positions would be a four times larger one.
    return jnp.where(mask, jnp.zeros_like(g), g)
  whole = jnp.zeros(layout.shape, g[0].dtype)
  if isinstance(layout, (Block, Slice)):
    return layout.put(g[0], whole, index)
  for sets, block in zip(layout.blocks, g, strict=True):
    whole = whole.at[jnp.ix_(*(np.asarray(s, np.int32) for s in sets))].set(block)
  return whole
