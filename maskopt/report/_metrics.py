"""Numbers to log at every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import core

from .. import _copies, _packing, _tree
from .._errors import fail
from .._joint import Joint, Parts
from .._layout import Frozen, Full, Index, Layout
from .._masks import FreezeMask
from .._packed import is_packed
from .._packing import Layouts
from . import _elements, _parts

_WHERE = "maskopt.metrics(freeze_mask=...)"
_INT32 = 2**31 - 1


def metrics(
  params: Any, freeze_mask: FreezeMask | Layouts, *, per_leaf: bool = False, **trees: Any
) -> dict[str, Any]:
  """Return numbers to log: how much is frozen, what the optimizer holds, how large each part is.

    param_norm_trainable = sqrt(sum |params[i]|**2 where not freeze_mask[i])

  Works inside `jit` too, where the norms are traced and the counts stay static; give it
  `maskopt.mask_of(state)` there, so that index arrays are arguments and no constants.

  Args:
    params: a tree of arrays, linen's variables, or a module.
    freeze_mask: any freeze mask over them, or `maskopt.mask_of(state)`.
    per_leaf: add the shares and norms of each leaf, as `frozen_share/dense/kernel`.
    **trees: more trees like the parameters, gradients or updates say, by name: `grad=grads` adds
      `grad_norm_trainable` and `grad_norm_frozen`. Packed leaves have no frozen part.
  Returns:
    A flat dict: `frozen_share`, `trainable_parameters`, `optimizer_bytes` (Adam's, see `summary`;
    under the mask of a `partition` each of its optimizers is taken for an Adam),
    `param_norm_trainable` and `param_norm_frozen`. Python numbers, or scalars inside `jit`. Norms
    are taken in float32 at least, over float and complex leaves; a NaN makes only its own part NaN.
  Raises:
    ValueError: the mask or a tree does not fit, or has leaves without values.
    TypeError: a mask leaf is not boolean.
  Example:
    >>> import jax.numpy as jnp, numpy as np, maskopt
    >>> numbers = maskopt.metrics({"w": jnp.array([3.0, 4.0])}, {"w": np.array([True, False])})
    >>> numbers["frozen_share"], numbers["param_norm_frozen"], numbers["param_norm_trainable"]
    (0.5, 3.0, 4.0)
  """
  # Gradients and updates come in linen's collections too, where the parameters do.
  trees = {
    name: _parts.parts(tree, freeze_mask)[0] if isinstance(tree, Mapping) else tree
    for name, tree in trees.items()
  }
  params, freeze_mask, _ = _parts.parts(params, freeze_mask)
  layouts = _packing.layouts_of(freeze_mask, params, _WHERE)
  numbers = _counts(_elements.as_stored(layouts), per_leaf)
  for name, tree in {"param": params, **trees}.items():
    numbers |= _norms(name, tree, layouts, per_leaf)
  if any(isinstance(x, core.Tracer) for x in numbers.values()):
    return numbers
  return {name: _number(x) for name, x in jax.device_get(numbers).items()}


def _number(x: Any) -> int | float:
  return x if isinstance(x, (int, float)) else x.item()


def _static(n: int) -> int | float:
  """A count that may leave a jitted function, where integers have 32 bits."""
  return n if n <= _INT32 else float(n)


def _counts(layouts: Layouts, per_leaf: bool) -> dict[str, Any]:
  found = [
    (path, layout, _trainable(layout, index), index)
    for path, layout, index in zip(
      layouts.static.paths, layouts.static.layouts, layouts.index, strict=True
    )
    if layout is not None
  ]
  total = sum(layout.size for _, layout, _, _ in found)
  trainable = sum(n for _, _, n, _ in found)
  held = sum(
    2 * _elements.packed_bytes(k) + _elements.index_bytes(index) for _, k, _, index in found
  )
  numbers = {
    "frozen_share": _frozen_share(trainable, total),
    "trainable_parameters": _static(trainable) if isinstance(trainable, int) else trainable,
    "optimizer_bytes": _static(held),
  }
  if per_leaf:
    numbers |= {
      f"frozen_share/{path or 'root'}": _frozen_share(n, layout.size)
      for path, layout, n, _ in found
    }
  return numbers


def _trainable(layout: Layout, index: Index) -> Any:
  """How many elements of a leaf train; a scalar array if only a runtime mask knows."""
  if layout.count is not None:
    return layout.count
  if isinstance(layout, Joint):
    return sum(_trainable(*part) for part in _elements.parts(layout, index))
  mask = index["frozen"]
  return jnp.count_nonzero(~mask) * (layout.size // max(mask.size, 1))


def _frozen_share(trainable: Any, total: int) -> Any:
  return 1 - trainable / total if total else 0.0


def _norms(name: str, tree: Any, layouts: Layouts, per_leaf: bool) -> dict[str, Any]:
  where = f"maskopt.metrics({name}=...)" if name != "param" else "maskopt.metrics(params, ...)"
  tree = _copies.trained(tree)
  problems = _parts.unreadable(tree)
  if problems:
    fail(where, problems, "Norms need values; maskopt.summary does without.")
  flat = layouts.flat(tree, where)
  parts = {
    path: _squares(leaf, layout, index)
    for path, leaf, layout, index in zip(
      flat.paths, flat.leaves, layouts.static.layouts, layouts.index, strict=True
    )
    if layout is not None and not _is_numberless(leaf)
  }
  numbers = {}
  for i, part in enumerate(("trainable", "frozen")):
    key = f"{name}_norm_{part}"
    numbers[key] = jnp.sqrt(_sum([squares[i] for squares in parts.values()]))
    if per_leaf:
      numbers |= {f"{key}/{p or 'root'}": jnp.sqrt(squares[i]) for p, squares in parts.items()}
  return numbers


def _is_numberless(leaf: Any) -> bool:
  """Whether a leaf has no norm: integers, keys, holes, gradients of integers."""
  x = leaf.values if is_packed(leaf) else leaf
  x = x[0] if isinstance(x, Parts) else x
  return x is not None and (_tree.is_hole(x) or not jnp.issubdtype(jnp.result_type(x), jnp.inexact))


def _squares(leaf: Any, layout: Layout, index: Index) -> tuple[Any, Any]:
  """Sums of squares over the trainable and over the frozen elements of a leaf."""
  if is_packed(leaf):
    return (_nothing() if leaf.values is None else _square_sum(leaf.values)), _nothing()
  leaf = jnp.asarray(leaf)
  if isinstance(layout, Frozen):
    return _nothing(), _square_sum(leaf)
  if isinstance(layout, Full):
    return _square_sum(leaf), _nothing()
  values = layout.take(leaf, index)
  # Not the difference of two sums: a NaN that trains would spoil the frozen part.
  rest = layout.put(jax.tree.map(jnp.zeros_like, values), leaf, index)
  return _square_sum(values), _square_sum(rest)


def _nothing() -> Any:
  return jnp.zeros((), jnp.float32)


def _square_sum(values: Any) -> Any:
  """Over one array, or over those of several parts."""
  return _sum([_array_square_sum(x) for x in jax.tree.leaves(values)])


def _array_square_sum(x: Any) -> Any:
  real = jnp.abs(x) if jnp.iscomplexobj(x) else x
  return jnp.sum(jnp.square(real.astype(_wide(real.dtype))))


def _wide(dtype: Any) -> Any:
  return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32


def _sum(squares: list[Any]) -> Any:
  widest = max((x.dtype for x in squares), key=lambda d: d.itemsize, default=jnp.float32)
  return sum((x.astype(widest) for x in squares), jnp.zeros((), widest))
