"""Whether a model still computes what it did, in numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors

from .. import _calls
from .._errors import Problem, fail
from . import _model, _placement
from ._model import Model

# Sums of another length are rounded in another order.
_ROUNDINGS = 256


def difference(
  old: Model,
  new: Any,
  forward: Any,
  new_forward: Any,
  inputs: Any,
  kept: Sequence[dict[int, np.ndarray]] | None,
  layer: str,
  where: str,
) -> float | None:
  """Return the largest change of an old output, relative to the largest output.

  Args:
    old: the old model.
    new: the new module or tree.
    forward: of the old model.
    new_forward: of the new model; None for the same one, unless that knows the old size.
    inputs: example inputs; abstract ones compare nothing.
    kept: for each output and axis that grew, where the old entries stand; None for the first ones.
    layer: what has changed, for errors.
    where: the call that errors name.
  Returns:
    None if there is nothing to compare. Infinity where an output appears or loses a NaN.
  """
  arrays, fill = _model.split_inputs(inputs)
  abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in (*arrays, *old.arrays.values()))
  fixed = new_forward is None and _is_linen(forward)
  if abstract or fixed:
    return None
  given = fill(arrays)
  model = Model(new)
  after: Any = forward if new_forward is None else _model.forward_of(model, new_forward)
  before_out = jax.tree.leaves(old.called(forward, list(old.arrays.values()), given)[0])
  try:
    after_out = jax.tree.leaves(model.called(after, list(model.arrays.values()), given)[0])
  except (TypeError, ValueError, errors.FlaxError) as error:
    reason = str(error).strip().split("\n")[0][:300].rstrip(".")
    expected = "a forward that takes its sizes from the parameters"
    remedy = (
      "Give new_forward=, the forward of the new model; or parts=, if several groups of units lie "
      "side by side on the axis (gates; query, key and value)."
    )
    fail(where, [Problem(layer, expected, f"an error: {reason}")], remedy)
  if len(before_out) != len(after_out):
    got = f"{len(after_out)} outputs in place of {len(before_out)}"
    fail(
      where, [Problem(layer, "the same outputs", got)], "Give new_forward= with the same outputs."
    )
  worst = 0.0
  for n, (a, b) in enumerate(zip(before_out, after_out, strict=True)):
    if not (hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.inexact)):
      continue
    a, b = _placement.host(a), _placement.host(b)
    worst = max(worst, _change(a, _old_entries(b, a.shape, kept[n] if kept else {})))
  return worst


def _is_linen(forward: Callable) -> bool:
  """Whether a forward is that of a linen module, which knows its sizes."""
  return any(_calls.is_linen(x) for x in getattr(forward, "args", ()))


def _old_entries(
  new: np.ndarray, shape: tuple[int, ...], kept: dict[int, np.ndarray]
) -> np.ndarray:
  for axis, positions in kept.items():
    new = new.take(positions, axis)
  return new[tuple(slice(n) for n in shape)] if new.ndim == len(shape) else new


def _change(a: np.ndarray, b: np.ndarray) -> float:
  if a.shape != b.shape:
    return float("inf")
  wide = np.complex128 if np.iscomplexobj(a) else np.float64
  a, b = a.astype(wide), b.astype(wide)
  same = (a == b) | (np.isnan(a) & np.isnan(b))
  if same.all():
    return 0.0
  with np.errstate(invalid="ignore"):
    gap, scale = np.abs(a - b)[~same].max(), np.abs(a[np.isfinite(a)]).max(initial=0)
  return float(gap / max(scale, np.finfo(np.float32).tiny)) if np.isfinite(gap) else float("inf")


def check(change: float, old: Model, mode: str, layer: str, where: str) -> None:
  """Raise unless the old outputs are what they were, up to rounding."""
  floats = [
    x.dtype
    for x in old.arrays.values()
    if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)
  ]
  eps = max((float(jnp.finfo(d).eps) for d in floats), default=0.0)
  if change <= min(_ROUNDINGS * eps, 0.1):
    return
  expected = f"the same old outputs (mode={mode!r} promises them)"
  remedy = (
    'Something computes over all units (a normalisation, a softmax): use mode="init". Or weights '
    'that make copied units read them too (a tied table): mode="zero" can. A forward in training '
    "mode (batch statistics, dropout) cannot be compared: give one for evaluation."
  )
  fail(where, [Problem(layer, expected, f"outputs that change by {change:.2g}")], remedy)
