"""What three runs did: accuracy, memory, time, and the audit's verdict, as a table or as JSON."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

import maskopt

from ._data import Images
from ._training import Run


class Scores(NamedTuple):
  """Shares of test images told right.

  Attributes:
    old: images of old digits, asked which of the old digits it is.
    new: images of new digits, asked which of the new digits it is.
    all: all images, asked which of the ten digits it is.
  """

  old: float
  new: float
  all: float


class Exam:
  """The test images and the questions about them."""

  def __init__(self, graph: Any, test: Images, old: list[int], new: list[int]):
    self.test, self.old, self.new = test, old, new
    self._logits = jax.jit(lambda params: nnx.merge(graph, params)(test.pixels))

  def logits(self, params: Any) -> np.ndarray:
    """The outputs for every test image, shape (n, 10)."""
    return np.asarray(self._logits(params))

  def scores(self, params: Any) -> Scores:
    """How much of the test a network gets right."""
    logits, labels = self.logits(params), self.test.labels

    def right(asked: list[int]) -> float:
      about = np.isin(labels, asked)
      answers = np.array(asked)[logits[about][:, asked].argmax(axis=1)]
      return float(np.mean(answers == labels[about]))

    return Scores(right(self.old), right(self.new), right(self.old + self.new))


class Outcome(NamedTuple):
  """What became of one run.

  Attributes:
    name: of the run.
    curve: (step, scores), the first before any step.
    state_bytes: of the optimizer.
    milliseconds: of a step.
    audit: of its parameters under the freeze mask.
    changes: per layer, the largest change of any weight of each unit, its bias included.
    outputs_kept: whether the outputs of the old digits have the bits they had, on all test images.
  """

  name: str
  curve: list[tuple[int, Scores]]
  state_bytes: int
  milliseconds: float
  audit: Any
  changes: dict[str, np.ndarray]
  outputs_kept: bool

  @property
  def scores(self) -> Scores:
    """At the end."""
    return self.curve[-1][1]


class Comparison(NamedTuple):
  """Runs from the same parameters on the same batches.

  Attributes:
    outcomes: one per run.
    masks: per layer, the kernel's freeze mask of shape (in, out).
    train: the training images.
  """

  outcomes: list[Outcome]
  masks: dict[str, np.ndarray]
  train: Images

  @property
  def before(self) -> Scores:
    """What every run began with."""
    return self.outcomes[0].curve[0][1]

  def frozen_units(self, layer: str) -> np.ndarray:
    """Which units of a layer are frozen."""
    return np.asarray(self.masks[layer].all(axis=0))

  def largest_frozen_change(self, outcome: Outcome) -> float:
    """The largest change of any weight of a frozen unit."""
    changes = outcome.changes.items()
    return float(max(change[self.frozen_units(name)].max() for name, change in changes))


def compare(
  runs: list[Run], before: Any, freeze_mask: Any, exam: Exam, train: Images
) -> Comparison:
  """Audit every run against the snapshot of the parameters that all began with."""
  was, masks = nnx.to_pure_dict(before.tree), nnx.to_pure_dict(freeze_mask)
  outputs = _bits(exam.logits(before.tree)[:, exam.old])
  outcomes = [
    Outcome(
      run.name,
      run.curve,
      run.state_bytes,
      run.milliseconds,
      maskopt.audit(before, run.params, freeze_mask),
      _changes(was, nnx.to_pure_dict(run.params)),
      np.array_equal(_bits(exam.logits(run.params)[:, exam.old]), outputs),
    )
    for run in runs
  ]
  kernels = {name: layer["kernel"].shape for name, layer in was.items()}
  frozen = {name: np.broadcast_to(masks[name]["kernel"], shape) for name, shape in kernels.items()}
  return Comparison(outcomes, frozen, train)


def _bits(x: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(x).view(np.uint32)


def _changes(was: Any, now: Any) -> dict[str, np.ndarray]:
  def largest(name: str) -> np.ndarray:
    change = {key: np.abs(np.asarray(now[name][key]) - old) for key, old in was[name].items()}
    return np.maximum(change["kernel"].max(axis=0), change["bias"])

  return {name: largest(name) for name in was}


def show(comparison: Comparison, facts: dict[str, Any], *, as_json: bool) -> None:
  """Print the comparison to standard output."""
  if as_json:
    print(json.dumps(facts | _as_dict(comparison), indent=2))
    return
  console = Console()
  console.print(_table(comparison))
  console.print(_verdict(comparison))
  # Unbroken, so that the path can be copied and found.
  console.print(
    f"Picture: {facts['picture']}   ({facts['seconds']} s)", style="dim", soft_wrap=True
  )


def _as_dict(comparison: Comparison) -> dict[str, Any]:
  return {
    "ok": comparison.outcomes[-1].audit.ok,
    "before": comparison.before._asdict(),
    "runs": [
      {
        "name": x.name,
        **x.scores._asdict(),
        "old_outputs_bit_equal": x.outputs_kept,
        "optimizer_bytes": x.state_bytes,
        "step_ms": round(x.milliseconds, 3),
        "frozen_elements": x.audit.frozen,
        "frozen_elements_changed": x.audit.changed,
        "largest_frozen_change": comparison.largest_frozen_change(x),
        "trainable_elements_moved": x.audit.moved,
      }
      for x in comparison.outcomes
    ],
  }


def _table(comparison: Comparison) -> Table:
  outcomes, before = comparison.outcomes, comparison.before
  table = Table(title="One network, three ways to learn 5 to 9", title_justify="left")
  table.add_column("")
  table.add_column("before", justify="right", style="dim")
  for x in outcomes:
    table.add_column(x.name, justify="right")

  def row(label: str, first: str, *cells: str, end: bool = False) -> None:
    table.add_row(label, first, *cells, end_section=end)

  row("old: which of 0 to 4?", f"{before.old:.1%}", *(f"{x.scores.old:.1%}" for x in outcomes))
  row("new: which of 5 to 9?", f"{before.new:.1%}", *(f"{x.scores.new:.1%}" for x in outcomes))
  everything = (f"{x.scores.all:.1%}" for x in outcomes)
  row("all: which of the ten?", f"{before.all:.1%}", *everything, end=True)
  row("optimizer memory", "", *(f"{x.state_bytes / 1e3:,.0f} kB" for x in outcomes))
  row("time of a step", "", *(f"{x.milliseconds:.2f} ms" for x in outcomes), end=True)
  row("frozen but changed", "", *(f"{x.audit.changed:,}" for x in outcomes))
  largest = [comparison.largest_frozen_change(x) for x in outcomes]
  row("the largest change", "", *(f"{c:.2g}" for c in largest))
  row("outputs 0 to 4", "", *("bit-equal" if x.outputs_kept else "differ" for x in outcomes))
  row("audit", "", *(_passed(x.audit.ok) for x in outcomes))
  return table


def _passed(ok: bool) -> str:
  return "[bold green]passed[/]" if ok else "[bold red]FAILED[/]"


def _verdict(comparison: Comparison) -> str:
  audit = comparison.outcomes[-1].audit
  kept = "every one kept its bits" if audit.ok else f"{audit.changed:,} changed"
  return (
    f"{audit.frozen:,} elements frozen, {audit.trainable:,} trainable; under maskopt {kept}.\n"
    "Freezing keeps what the old outputs say. It does not teach the new outputs about old digits, "
    "which they never saw: hence the low scores when all ten compete."
  )
