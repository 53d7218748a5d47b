"""Freezing in the words of Flax linen: its train state, its layers, its batch statistics."""

from ._carried import freeze_mask as freeze_mask
from ._masked import (
  MaskedConv as MaskedConv,
  MaskedDense as MaskedDense,
  MaskedEmbed as MaskedEmbed,
)
from ._statistics import freeze_statistics as freeze_statistics
from ._train_state import TrainState as TrainState

__all__ = [
  "freeze_mask",
  "MaskedConv",
  "MaskedDense",
  "MaskedEmbed",
  "freeze_statistics",
  "TrainState",
]
