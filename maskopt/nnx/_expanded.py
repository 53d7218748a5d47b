"""Layers with new units beside old ones that stay as they are, in one matmul."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from .. import _bits
from .._errors import Problem, fail
from ._masked import MaskedConv, MaskedLinear


class ExpandedLinear(MaskedLinear):
  """An `nnx.Linear` with its old units frozen and new ones beside them that train.

    y = x @ [old kernel | new columns] + [old bias | new bias]        in one matmul

  The first units are the old ones, bit for bit as they were; only rounding may tell their outputs
  from the old layer's, for a wider matmul may sum in another order. See `MaskedLinear` for what an
  optimizer does to frozen weights.

  Args:
    layer: the old layer; its values are copied.
    new_features: number of new units.
    **options: for the new units, as in `nnx.Linear`: `kernel_init`, `bias_init`, and `rngs=`.
  Raises:
    ValueError: there are no new units; TypeError: layer is no `nnx.Linear`.
  Example:
    >>> import maskopt
    >>> from flax import nnx
    >>> old = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> layer = maskopt.nnx.ExpandedLinear(old, 1, rngs=nnx.Rngs(1))
    >>> layer.kernel.shape, bool((layer.kernel[:, :2] == old.kernel[...]).all())
    ((3, 3), True)
    >>> maskopt.nnx.freeze_mask(layer)["bias"].tolist()
    [True, True, False]
  """

  def __init__(self, layer: nnx.Linear, new_features: int, **options: Any):
    _check(layer, nnx.Linear, new_features, "maskopt.nnx.ExpandedLinear(layer, new_features)")
    kept = ("use_bias", "dtype", "param_dtype", "precision", "dot_general", "promote_dtype")
    kept += ("preferred_element_type",)
    super().__init__(
      layer.in_features,
      layer.out_features + new_features,
      **{name: getattr(layer, name) for name in kept},
      **options,
    )
    _keep_old(self, layer)


class ExpandedConv(MaskedConv):
  """An `nnx.Conv` with its old channels frozen and new ones beside them that train.

    y = convolve(x, [old kernel | new channels]) + [old bias | new bias]        in one convolution

  See `ExpandedLinear`.

  Args:
    layer: the old layer; its values are copied.
    new_features: number of new output channels.
    **options: for the new channels, as in `nnx.Conv`: `kernel_init`, `bias_init`, and `rngs=`.
  Raises:
    ValueError: there are no new channels, or the layer has feature groups or a weight mask;
      TypeError: layer is no `nnx.Conv`.
  Example:
    >>> import maskopt
    >>> from flax import nnx
    >>> old = nnx.Conv(1, 2, (3, 3), rngs=nnx.Rngs(0))
    >>> maskopt.nnx.ExpandedConv(old, 4, rngs=nnx.Rngs(1)).kernel.shape
    (3, 3, 1, 6)
  """

  def __init__(self, layer: nnx.Conv, new_features: int, **options: Any):
    where = "maskopt.nnx.ExpandedConv(layer, new_features)"
    _check(layer, nnx.Conv, new_features, where)
    if layer.feature_group_count != 1 or layer.mask is not None:
      got = "a weight mask" if layer.mask is not None else f"{layer.feature_group_count} groups"
      problem = Problem("layer", "a convolution without feature groups or weight mask", got)
      fail(where, [problem], "New channels would have no group or mask entry of their own.")
    kept = ("strides", "padding", "input_dilation", "kernel_dilation", "use_bias", "dtype")
    kept += ("param_dtype", "precision", "conv_general_dilated", "promote_dtype")
    kept += ("preferred_element_type",)
    super().__init__(
      layer.in_features,
      layer.out_features + new_features,
      layer.kernel_size,
      **{name: getattr(layer, name) for name in kept},
      **options,
    )
    _keep_old(self, layer)


def _check(layer: Any, kind: type, new_features: int, where: str) -> None:
  problems = []
  if not isinstance(layer, kind):
    problems.append(Problem("layer", f"an nnx.{kind.__name__}", type(layer).__name__, TypeError))
  if not isinstance(new_features, (int, np.integer)) or new_features < 1:
    problems.append(Problem("new_features", "a positive number of units", repr(new_features)))
  if problems:
    fail(where, problems, "Grow a layer that exists by at least one unit.")


def _keep_old(new: Any, old: Any) -> None:
  """Put the old values first, as they are, and freeze them."""
  frozen = np.arange(new.out_features) < old.out_features
  for name in ("kernel", "bias"):
    box, source = getattr(new, name), getattr(old, name)
    if box is not None:
      value, first = box.get_value(), source.get_value()
      # Integer views, so that even a NaN keeps its payload.
      parts = [_bits.bits(first), _bits.bits(value[..., old.out_features :])]
      box.set_value(_bits.from_bits(jnp.concatenate(parts, axis=-1), value.dtype))
      setattr(new, f"{name}_freeze_mask", frozen)
