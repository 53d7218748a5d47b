"""What the transfer experiment found: accuracies on B, their changes, and these in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ._report import Report

# In the order of the paper: B's own layers, then A's; frozen, then fine-tuned.
KINDS = ("BnB", "BnB+", "AnB", "AnB+")


class Mean(NamedTuple):
  """A mean over splits and its standard error, which is 0 for one split."""

  mean: float
  error: float

  def __str__(self) -> str:
    return f"{self.mean:+.1f} ± {self.error:.1f}" if self.error else f"{self.mean:+.1f}"

  @property
  def is_clear(self) -> bool:
    """Whether it is more than three standard errors from 0: two are soon found among five n."""
    return bool(self.error) and abs(self.mean) > 3 * self.error


@dataclasses.dataclass(frozen=True)
class Curves:
  """Accuracies on B in per cent.

  Attributes:
    base: of `baseB`, shape (seeds,).
    kinds: of each of `KINDS`, shape (seeds, layers); column n - 1 is that of n.
  """

  base: np.ndarray
  kinds: Mapping[str, np.ndarray]

  @property
  def layers(self) -> int:
    """The largest n."""
    return next(iter(self.kinds.values())).shape[1]

  def changes(self, kind: str) -> list[Mean]:
    """The change against the `baseB` of the same split, in points, for n = 1 to L."""
    return [mean(column) for column in (self.kinds[kind] - self.base[:, None]).T]


def mean(values: np.ndarray) -> Mean:
  """The mean with its standard error."""
  error = values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else 0.0
  return Mean(float(values.mean()), float(error))


def as_dict(curves: Curves) -> dict[str, Any]:
  """Everything as plain numbers."""
  return {
    "baseB": curves.base.round(3).tolist(),
    "kinds": {
      kind: [
        {
          "n": n,
          "accuracy": column.round(3).tolist(),
          "change": round(change.mean, 3),
          "standard_error": round(change.error, 3) if curves.base.size > 1 else None,
        }
        for n, (column, change) in enumerate(
          zip(curves.kinds[kind].T, curves.changes(kind), strict=True), 1
        )
      ]
      for kind in KINDS
    },
  }


def tell(report: Report, curves: Curves, trainable: list[int]) -> None:
  """Print the changes as a table, and what they say.

  Args:
    report: where to.
    curves: what was found.
    trainable: number of trainable parameters above n frozen layers, for n = 1 to L.
  """
  several = curves.base.size > 1
  errors = f", ± standard error over {curves.base.size} splits" if several else ""
  report.step(
    f"Accuracy on B against baseB, which has {curves.base.mean():.1f}%",
    f"In points{errors}. BnB and AnB train what the second column says, + trains all.",
  )
  changes = {kind: curves.changes(kind) for kind in KINDS}
  report.table(
    ("n", "parameters", *KINDS),
    [
      (str(n), f"{count:,}", *(str(changes[kind][n - 1]) for kind in KINDS))
      for n, count in enumerate(trainable, 1)
    ],
  )
  report.step("What they say")
  for text in findings(curves):
    report.say(text)
  if several:
    report.say("Clear of 0: by more than three standard errors.")
  else:
    report.say("One split says little: more --seeds give standard errors.")


def findings(curves: Curves) -> list[str]:
  """The questions of the paper, answered by our numbers and no more than they can."""
  own, tuned, _, other_tuned = (curves.changes(kind) for kind in KINDS)
  specific = [mean(column) for column in (curves.kinds["AnB"] - curves.kinds["BnB"]).T]
  gain = max(other_tuned)
  found = (
    "" if gain.is_clear and gain.mean > 0 else " No clear gain; on ImageNet the paper has one."
  )
  return [
    f"Specific to A (AnB against BnB): {specific[0]} at n = 1, {specific[-1]} at n = "
    f"{curves.layers}.",
    f"Adapted to each other (BnB): {_named(own, min(own))} at worst.",
    f"A as a start (AnB+): {_named(other_tuned, gain)} at best, "
    f"{_named(other_tuned, min(other_tuned))} at worst.{found}",
    f"B as a start (BnB+): {_named(tuned, max(tuned))} at best.",
  ]


def _named(changes: list[Mean], change: Mean) -> str:
  """The change, where it is, and whether it can be told from none."""
  clear = "" if change.is_clear or not change.error else ", not clear of 0"
  return f"{change} (n = {changes.index(change) + 1}{clear})"
