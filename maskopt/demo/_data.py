"""Real data without a network: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

TEST_SHARE = 0.25


class Images(NamedTuple):
  """Images and what they show.

  Attributes:
    pixels: float32 of shape (n, 64), from 0 to 1.
    labels: int32 of shape (n,), from 0 to 9.
  """

  pixels: np.ndarray
  labels: np.ndarray

  def of(self, labels: Sequence[int]) -> Images:
    """The images that show one of these digits."""
    chosen = np.isin(self.labels, labels)
    return Images(self.pixels[chosen], self.labels[chosen])

  def batches(self, steps: int, seed: int, size: int = 64) -> Iterator[Images]:
    """Random batches with replacement; the same for the same seed."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
      chosen = rng.integers(len(self.labels), size=size)
      yield Images(self.pixels[chosen], self.labels[chosen])


def digits(seed: int) -> tuple[Images, Images]:
  """Training and test images, split by the seed; every digit has its share of both."""
  from sklearn.datasets import load_digits
  from sklearn.model_selection import train_test_split

  loaded: Any = load_digits()
  images = Images((loaded.data / 16).astype(np.float32), loaded.target.astype(np.int32))
  parts = train_test_split(
    np.arange(len(images.labels)),
    test_size=TEST_SHARE,
    random_state=seed,
    stratify=images.labels,
  )
  train, test = (Images(images.pixels[part], images.labels[part]) for part in parts)
  return train, test
