"""What becomes of a network that grows: the ways to grow it, and what each of them learnt."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Way(NamedTuple):
  """One way to learn the pairs.

  Attributes:
    name: of the run.
    freezes: whether old units hold still.
    revisits: whether a pair brings the images of all pairs before it.
    own: whether the loss lets only the pair's own outputs compete, and not all so far.
  """

  name: str
  freezes: bool = False
  revisits: bool = False
  own: bool = False


class Learnt(NamedTuple):
  """What it took to learn one pair.

  Attributes:
    digits: of the pair.
    shape: how many hidden units and outputs there are.
    total: parameters there are.
    state_bytes: of the optimizer.
    audit: of the training, under the mask "old frozen, new trainable".
    outputs_kept: whether training left the old outputs their bits, on all test images.
    difference: relative change of old outputs in growing.
  """

  digits: list[int]
  shape: tuple[int, int]
  total: int
  state_bytes: int
  audit: Any
  outputs_kept: bool
  difference: float

  @property
  def ok(self) -> bool:
    """Whether all that is old has its bits."""
    return bool(self.audit.ok and self.outputs_kept)


class Outcome(NamedTuple):
  """What became of one way.

  Attributes:
    way: that was gone.
    task_aware: accuracy on pair j after pair i, the pair being told; NaN for j > i.
    class_incremental: the same, all outputs so far competing.
    learnt: each pair.
    params: of the final network.
  """

  way: Way
  task_aware: np.ndarray
  class_incremental: np.ndarray
  learnt: list[Learnt]
  params: Any
