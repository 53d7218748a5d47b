"""Masked layers made of several: the LSTM cell and attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from .._errors import Problem, describe, fail
from ._masked import MaskedLinear, MaskedLinearGeneral

_GATES = {"i": ("ii", "hi"), "f": ("if_", "hf"), "g": ("ig", "hg"), "o": ("io", "ho")}
_PROJECTIONS = ("query", "key", "value", "out")


class MaskedLSTMCell(nnx.LSTMCell):
  """`nnx.LSTMCell` whose frozen weights get a zero gradient that costs nothing to compute.

    d loss / d W[i, j] = 0 if frozen[i, j], in the kernels of all four gates or of those named

  See `MaskedLinear` for what a mask does and what an optimizer does to it.

  Args:
    in_features: as in `nnx.LSTMCell`.
    hidden_features: as in `nnx.LSTMCell`.
    kernel_freeze_mask: static mask over each gate's input kernel (in, hidden), True = frozen; shape
      (hidden,) freezes units. A dict gives gates "i", "f", "g", "o" their own; the others train.
    recurrent_kernel_freeze_mask: the same over the recurrent kernels (hidden, hidden).
    bias_freeze_mask: the same over the biases (hidden,).
    **options: as in `nnx.LSTMCell`, `rngs=` among them.
  Raises:
    ValueError: a mask does not broadcast, or names no gate; TypeError: it is a `jax.Array`, or not
      boolean.
  Example:
    >>> import numpy as np, maskopt
    >>> from flax import nnx
    >>> gate = {"f": True}
    >>> cell = maskopt.nnx.MaskedLSTMCell(2, 3, bias_freeze_mask=gate, rngs=nnx.Rngs(0))
    >>> maskopt.nnx.freeze_mask(cell)["hf"]
    {'bias': True, 'kernel': False}
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    kernel_freeze_mask: Any = False,
    recurrent_kernel_freeze_mask: Any = False,
    bias_freeze_mask: Any = False,
    **options: Any,
  ):
    super().__init__(in_features, hidden_features, **options)
    gates = tuple(_GATES)
    kernels = _parts(kernel_freeze_mask, gates, "MaskedLSTMCell(kernel_freeze_mask=...)")
    recurrent = _parts(
      recurrent_kernel_freeze_mask, gates, "MaskedLSTMCell(recurrent_kernel_freeze_mask=...)"
    )
    biases = _parts(bias_freeze_mask, gates, "MaskedLSTMCell(bias_freeze_mask=...)")
    for gate, (inner, hidden) in _GATES.items():
      _mask(getattr(self, inner), MaskedLinear, kernels[gate], False)
      _mask(getattr(self, hidden), MaskedLinear, recurrent[gate], biases[gate])


class MaskedMultiHeadAttention(nnx.MultiHeadAttention):
  """`nnx.MultiHeadAttention` whose frozen weights get a zero gradient at no cost.

    d loss / d W[i] = 0 if frozen[i], in the kernels of all four projections or of those named

  See `MaskedLinear` for what a mask does and what an optimizer does to it.

  Args:
    num_heads: as in `nnx.MultiHeadAttention`.
    in_features: as in `nnx.MultiHeadAttention`.
    *args: as in `nnx.MultiHeadAttention`.
    kernel_freeze_mask: a bool for all projections, or a dict of static masks by "query", "key",
      "value" and "out", True = frozen; those left out train. Kernels are (in, heads, head size) and
      for "out" (heads, head size, out), so shapes (heads, 1) and (heads, 1, 1) freeze heads.
    bias_freeze_mask: the same over biases (heads, head size) and, for "out", (out,).
    **options: as in `nnx.MultiHeadAttention`, `rngs=` among them.
  Raises:
    ValueError: a mask does not broadcast, or names no projection; TypeError: it is a `jax.Array`,
      or not boolean.
  Example:
    >>> import numpy as np, maskopt
    >>> from flax import nnx
    >>> heads = {"query": np.array([[True], [False]])}
    >>> layer = maskopt.nnx.MaskedMultiHeadAttention(
    ...   2, 8, kernel_freeze_mask=heads, decode=False, rngs=nnx.Rngs(0)
    ... )
    >>> maskopt.nnx.freeze_mask(layer)["query"]["kernel"].shape
    (1, 2, 1)
  """

  def __init__(
    self,
    num_heads: int,
    in_features: int,
    *args: Any,
    kernel_freeze_mask: Any = False,
    bias_freeze_mask: Any = False,
    **options: Any,
  ):
    super().__init__(num_heads, in_features, *args, **options)
    where = "MaskedMultiHeadAttention(kernel_freeze_mask=...)"
    kernels = _parts(kernel_freeze_mask, _PROJECTIONS, where)
    biases = _parts(bias_freeze_mask, _PROJECTIONS, where.replace("kernel", "bias"))
    for name in _PROJECTIONS:
      _mask(getattr(self, name), MaskedLinearGeneral, kernels[name], biases[name])


def _parts(mask: Any, names: Sequence[str], where: str) -> dict[str, Any]:
  """One mask for each part of the layer."""
  if not isinstance(mask, Mapping):
    return dict.fromkeys(names, mask)
  wrong = [str(name) for name in mask if name not in names]
  if wrong:
    problems = [Problem(name, f"one of {', '.join(names)}", describe(mask[name])) for name in wrong]
    fail(where, problems, "Name the parts to freeze; the others train.")
  return {name: mask.get(name, False) for name in names}


def _mask(layer: Any, kind: type, kernel: Any, bias: Any) -> None:
  """Give a part masks of its own. It was built a moment ago and nobody else knows it."""
  layer.__class__ = kind
  layer.kernel_freeze_mask = kernel
  layer.bias_freeze_mask = bias
