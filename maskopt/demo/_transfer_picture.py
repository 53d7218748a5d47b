"""The paper's figure from our runs: accuracy on B by the number of layers that were taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ._curves import KINDS, Curves, Mean
from ._picture import FROZEN, INK, SOFT, STYLE

_RED = "#C8372D"
# Colour says whose layers, the filling whether they are frozen.
_INKS = {"BnB": FROZEN, "BnB+": "#6FA8DC", "AnB": _RED, "AnB+": "#E8958D"}
_MARKS = {"BnB": "o", "BnB+": "o", "AnB": "D", "AnB+": "D"}
_SHIFTS = {"BnB+": -0.21, "BnB": -0.07, "AnB": 0.07, "AnB+": 0.21}
_NAMES = {
  "BnB": "BnB: B's own layers, frozen",
  "BnB+": "BnB+: B's own layers, fine-tuned",
  "AnB": "AnB: A's layers, frozen",
  "AnB+": "AnB+: A's layers, fine-tuned",
}


def save(curves: Curves, path: Path) -> Path:
  """Draw the picture and save it as a PNG."""
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(13, 7.4), dpi=110, facecolor="white")
    grid = figure.add_gridspec(
      2, 2, width_ratios=(1.25, 1), wspace=0.2, hspace=0.36, left=0.06, right=0.97, top=0.81,
      bottom=0.085,
    )  # fmt: skip
    _title(figure, curves)
    _draw_accuracies(figure.add_subplot(grid[:, 0]), curves)
    _draw_parts(figure.add_subplot(grid[0, 1]), curves)
    _draw_close(figure.add_subplot(grid[1, 1]), curves)
    figure.savefig(path)
  return path


def _title(figure: Any, curves: Curves) -> None:
  size, frozen, tuned = curves.base.size, curves.changes("AnB"), curves.changes("AnB+")
  splits = f"{size} random splits" if size > 1 else "one random split"
  worst = min(tuned)
  said = (
    "Layers 1 to n come from a network that learned A (red) or B (blue); new layers above them "
    f"learn B; {splits}.\nFrozen, A's layers change the accuracy on B by {_points(frozen[0])} "
    f"(n = 1) to {_points(frozen[-1])} points (n = {curves.layers}); fine-tuned, by "
    f"{_points(worst)} at worst (n = {tuned.index(worst) + 1})."
  )
  figure.text(0.06, 0.935, "What five digits teach for the other five", size=19, weight="bold")
  figure.text(0.06, 0.92, said, color=SOFT, size=11.5, va="top", linespacing=1.45)


def _points(change: Mean) -> str:
  return f"{change.mean:+.1f}".replace("-", "\N{MINUS SIGN}")


def _draw_accuracies(axes: Any, curves: Curves) -> None:
  """Every run as a small mark, means connected, the spread over the splits as bars."""
  base = curves.base.mean()
  axes.axhline(base, color=SOFT, lw=1, ls=(0, (4, 3)), zorder=1)
  _marks(axes, np.zeros(curves.base.size), curves.base, INK, "s")
  axes.errorbar(
    0, base, _spread(curves.base), color=INK, marker="s", ms=8, mfc="white", mew=1.8, capsize=4,
    ls="", label="baseB: all layers new", zorder=4,
  )  # fmt: skip
  for kind in KINDS:
    values, at = curves.kinds[kind], _at(curves, kind)
    _marks(axes, np.tile(at, len(values)), values.ravel(), _INKS[kind], _MARKS[kind])
    axes.plot([0, at[0]], [base, values[:, 0].mean()], color=_INKS[kind], lw=1.8, zorder=2)
    bars = _spread(values)
    axes.errorbar(at, values.mean(axis=0), bars, label=_NAMES[kind], zorder=3, **_line(kind))
  axes.set_title(f"Accuracy on B (% of test images{_bars(curves, 'deviation')})")
  axes.legend(frameon=False, loc="best", handlelength=1.8, labelspacing=0.6)
  _calm(axes, curves)
  axes.set_xlabel("n, the number of layers taken")


def _bars(curves: Curves, what: str) -> str:
  """What bars show; of one split there are none."""
  return f", ± standard {what}" if curves.base.size > 1 else ""


def _at(curves: Curves, kind: str) -> np.ndarray:
  """Where the curve's points stand: beside those of the others."""
  return np.arange(1, curves.layers + 1) + _SHIFTS[kind]


def _spread(values: np.ndarray) -> np.ndarray:
  """The standard deviation over the splits."""
  return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def _marks(axes: Any, x: np.ndarray, y: np.ndarray, ink: str, mark: str) -> None:
  axes.scatter(x + 0.06, y, s=12, color=ink, marker=mark, alpha=0.35, linewidths=0, zorder=2)


def _line(kind: str) -> dict[str, Any]:
  fill = "white" if kind.endswith("+") else _INKS[kind]
  return {
    "color": _INKS[kind], "marker": _MARKS[kind], "mfc": fill, "ms": 6.5, "mew": 1.6, "lw": 1.8,
    "capsize": 3, "elinewidth": 1.2,
  }  # fmt: skip


def _draw_parts(axes: Any, curves: Curves) -> None:
  """What frozen layers cost, in the paper's two parts."""
  n, own, other = np.arange(curves.layers + 1), _means(curves, "BnB"), _means(curves, "AnB")
  axes.fill_between(n, own, other, color=_RED, alpha=0.16, lw=0)
  axes.fill_between(n, 0, own, color=FROZEN, alpha=0.3, lw=0)
  for kind, means in (("BnB", own), ("AnB", other)):
    axes.errorbar(n, means, markevery=slice(1, None), **_line(kind))
  low, high = min(own.min(), other.min()), max(own.max(), other.max(), 0.0)
  room = 0.16 * max(high - low, 1)
  axes.set_ylim(low - room / 2, high + room)
  # At the last but one layer the names have room on both sides.
  at = curves.layers - 1
  middle, word = (own[at] + other[at]) / 2, {"weight": "bold"}
  if own[at] - other[at] > room:
    axes.text(at, middle, "specific to A", color=_RED, ha="center", va="center", **word)
  top = high + room / 3
  axes.text(curves.layers, top, "adapted to each other", color=FROZEN, ha="right", **word)
  axes.set_title("The cost of frozen layers (points against baseB)")
  _calm(axes, curves)


def _draw_close(axes: Any, curves: Curves) -> None:
  """What is near `baseB`, enlarged, with standard errors of the paired changes."""
  axes.axhline(0, color=SOFT, lw=1, ls=(0, (4, 3)))
  for kind in ("BnB", "BnB+", "AnB+"):
    changes = curves.changes(kind)
    means, errors = zip(*changes, strict=True)
    axes.errorbar(_at(curves, kind), means, errors, **_line(kind))
  axes.set_title(f"The other three, enlarged (points{_bars(curves, 'error')})")
  _calm(axes, curves)
  axes.set_xlabel("n, the number of layers taken")


def _calm(axes: Any, curves: Curves) -> None:
  axes.set_xlim(-0.3, curves.layers + 0.4)
  axes.set_xticks(range(curves.layers + 1))
  axes.grid(axis="y", color="#EEF1F4")
  axes.set_axisbelow(True)
  axes.tick_params(length=0)


def _means(curves: Curves, kind: str) -> np.ndarray:
  """The mean changes for n = 0 to L."""
  return np.array([0.0, *(change.mean for change in curves.changes(kind))])
