"""Freeze any element of any parameter in JAX, and pay only for what you train."""

# Transforms
from ._freeze import (
  apply_updates as apply_updates,
  mask_of as mask_of,
  masked_freeze as masked_freeze,
  selective_transform as selective_transform,
)
from ._multiplier import scale_by_multiplier as scale_by_multiplier
from ._partition import partition as partition

# Gradients of what trains
from ._explain import explain as explain
from ._grad import grad as grad, value_and_grad as value_and_grad
from ._stop_gradient import stop_gradient as stop_gradient

# Masks
from ._algebra import intersection as intersection, invert as invert, union as union
from ._masks import runtime as runtime
from ._packing import pack as pack, unpack as unpack
from ._rules import build_mask as build_mask, build_multipliers as build_multipliers
from ._selectors import heads as heads, train_only as train_only, units as units

# Change over time
from ._migrate import migrate as migrate
from ._schedule import unfreeze_schedule as unfreeze_schedule
from . import surgery as surgery

# Look and prove
from .report import (
  audit as audit,
  metrics as metrics,
  plot as plot,
  snapshot as snapshot,
  summary as summary,
)

# Flax
from . import linen as linen, nnx as nnx

__all__ = [
  "apply_updates",
  "mask_of",
  "masked_freeze",
  "selective_transform",
  "scale_by_multiplier",
  "partition",
  "explain",
  "grad",
  "value_and_grad",
  "stop_gradient",
  "intersection",
  "invert",
  "union",
  "runtime",
  "pack",
  "unpack",
  "build_mask",
  "build_multipliers",
  "heads",
  "train_only",
  "units",
  "migrate",
  "unfreeze_schedule",
  "surgery",
  "audit",
  "metrics",
  "plot",
  "snapshot",
  "summary",
  "linen",
  "nnx",
]

__version__ = "0.1.0"
