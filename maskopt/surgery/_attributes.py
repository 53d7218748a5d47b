"""The sizes that nnx layers keep beside their kernels, read off the kernels anew.

Sizes are read from the end of a shape: `nnx.vmap` stacks the kernels of a scanned stack of layers
along axes in front, of which the layer itself knows nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx


def refit(module: Any) -> None:
  """Set the sizes that the ready-made layers of a module remember to those of their variables."""
  for _, node in nnx.iter_graph(module):
    for kind, sizes in _SIZES:
      if isinstance(node, kind):
        for name, value in sizes(node).items():
          if getattr(node, name) != value:
            setattr(node, name, value)


def _linear(layer: Any) -> dict[str, Any]:
  return dict(zip(("in_features", "out_features"), layer.kernel.shape[-2:], strict=True))


def _linear_general(layer: Any) -> dict[str, Any]:
  outs = len(layer.kernel.shape) - len(layer.out_features)
  shape = layer.kernel.shape
  return {"in_features": shape[outs - len(layer.axis) : outs], "out_features": shape[outs:]}


def _einsum(layer: Any) -> dict[str, Any]:
  sizes: dict[str, Any] = {"kernel_shape": layer.kernel.shape[-len(layer.kernel_shape) :]}
  if layer.bias is None:
    return sizes
  return sizes | {"bias_shape": layer.bias.shape[-len(layer.bias_shape) :]}


def _conv(layer: Any) -> dict[str, Any]:
  *_, reads, makes = shape = layer.kernel.shape[-len(layer.kernel_shape) :]
  groups = layer.feature_group_count
  if groups > 1 and reads == 1 and layer.in_features == layer.out_features:
    groups = makes  # one filter for each channel
  return {
    "kernel_shape": shape,
    "in_features": reads * groups,
    "out_features": makes,
    "feature_group_count": groups,
  }


def _conv_transpose(layer: Any) -> dict[str, Any]:
  *_, reads, makes = shape = layer.kernel.shape[-len(layer.kernel_shape) :]
  if layer.transpose_kernel:
    reads, makes = makes, reads
  return {"kernel_shape": shape, "in_features": reads, "out_features": makes}


def _embed(layer: Any) -> dict[str, Any]:
  return dict(zip(("num_embeddings", "features"), layer.embedding.shape[-2:], strict=True))


def _norm(layer: Any) -> dict[str, Any]:
  own = (getattr(layer, name, None) for name in ("scale", "bias", "mean"))
  sizes = [x.shape[-1] for x in own if x is not None]
  return {"num_features": sizes[0]} if sizes and isinstance(layer.num_features, int) else {}


def _group_norm(layer: Any) -> dict[str, Any]:
  """Groups keep their size, and one group over everything stays one."""
  sizes = [x.shape[-1] for x in (layer.scale, layer.bias) if x is not None]
  if not sizes:
    return {}
  if layer.num_groups == 1:
    return {"group_size": sizes[0]}
  return {"num_groups": sizes[0] // layer.group_size}


def _lstm(cell: Any) -> dict[str, Any]:
  return {"in_features": cell.ii.kernel.shape[-2], "hidden_features": cell.hi.kernel.shape[-2]}


def _cell(cell: Any) -> dict[str, Any]:
  hidden = cell.dense_h.kernel.shape[-2]
  return {"in_features": cell.dense_i.kernel.shape[-2], "hidden_features": hidden}


def _attention(layer: Any) -> dict[str, Any]:
  reads, heads, width = layer.query.kernel.shape[-3:]
  return {
    "num_heads": heads,
    "head_dim": width,
    "qkv_features": heads * width,
    "in_features": reads,
    "in_kv_features": layer.key.kernel.shape[-3],
    "num_kv_heads": layer.key.kernel.shape[-2],
    "out_features": layer.out.kernel.shape[-1],
  }


_SIZES: tuple[tuple[Any, Callable[[Any], dict[str, Any]]], ...] = (
  (nnx.Linear, _linear),
  (nnx.LinearGeneral, _linear_general),
  (nnx.Einsum, _einsum),
  (nnx.Conv, _conv),
  (nnx.ConvTranspose, _conv_transpose),
  (nnx.Embed, _embed),
  ((nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm), _norm),
  (nnx.GroupNorm, _group_norm),
  (nnx.LSTMCell, _lstm),
  ((nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell), _cell),
  (nnx.MultiHeadAttention, _attention),
)
