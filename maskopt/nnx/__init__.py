"""Freezing in the words of Flax nnx: modules in, modules out."""

from ._assign import assign as assign
from ._carried import freeze_mask as freeze_mask
from ._composed import (
  MaskedLSTMCell as MaskedLSTMCell,
  MaskedMultiHeadAttention as MaskedMultiHeadAttention,
)
from ._expanded import ExpandedConv as ExpandedConv, ExpandedLinear as ExpandedLinear
from ._grad import grad as grad, value_and_grad as value_and_grad
from ._masked import (
  MaskedConv as MaskedConv,
  MaskedEmbed as MaskedEmbed,
  MaskedLinear as MaskedLinear,
)
from ._network import layers as layers, trainable_state as trainable_state
from ._optimizer import Optimizer as Optimizer
from ._statistics import freeze_statistics as freeze_statistics

__all__ = [
  "assign",
  "freeze_mask",
  "MaskedLSTMCell",
  "MaskedMultiHeadAttention",
  "ExpandedConv",
  "ExpandedLinear",
  "grad",
  "value_and_grad",
  "MaskedConv",
  "MaskedEmbed",
  "MaskedLinear",
  "layers",
  "trainable_state",
  "Optimizer",
  "freeze_statistics",
]
