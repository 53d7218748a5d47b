"""The picture of the main demonstration: masks, the change of every neuron, accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure

from ._compare import Comparison, Outcome

# Colours that stay apart without red-green vision: blue is frozen, amber trains.
FROZEN, TRAINS = "#0B5FA5", "#F2A33A"
INK, SOFT, ICE = "#1F2933", "#6B7785", "#E4EDF5"
RUNS = ("#7B8794", "#C8372D", "#0A8F6A")
STYLE: Any = {
  "font.size": 10,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.edgecolor": SOFT,
  "axes.labelcolor": SOFT,
  "axes.titlesize": 11,
  "axes.titleweight": "bold",
  "axes.titlelocation": "left",
  "text.color": INK,
  "xtick.color": SOFT,
  "ytick.color": SOFT,
}


def save(comparison: Comparison, path: Path) -> Path:
  """Draw the picture and save it as a PNG."""
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(13, 9.4), dpi=110, facecolor="white")
    rows = figure.add_gridspec(
      3, 1, height_ratios=(0.8, 1.25, 1), hspace=0.5, left=0.07, right=0.97, top=0.85, bottom=0.07
    )
    _title(figure, comparison)
    _draw_masks(figure, rows[0], comparison)
    _draw_changes(figure, rows[1], comparison)
    _draw_results(figure, rows[2], comparison)
    figure.savefig(path)
  return path


def _title(figure: Any, comparison: Comparison) -> None:
  audit = comparison.outcomes[-1].audit
  share = audit.frozen / (audit.frozen + audit.trainable)
  figure.text(0.07, 0.945, "Learn 5 to 9, leave what knows 0 to 4 alone", size=19, weight="bold")
  parts = (
    ("Three runs from one network on the same batches with AdamW. ", SOFT),
    (f"Blue neurons are frozen ({share:.0%} of the parameters)", FROZEN),
    (", ", SOFT),
    ("amber ones train.", "#B8730F"),
  )
  x = 0.07
  for text, ink in parts:
    drawn = figure.text(x, 0.915, text, color=ink, size=11.5)
    x = drawn.get_window_extent().transformed(figure.transFigure.inverted()).x1


def _draw_masks(figure: Any, place: Any, comparison: Comparison) -> None:
  grid = place.subgridspec(1, 4, width_ratios=(0.85, 1, 1, 0.3), wspace=0.14)
  _draw_digits(figure, grid[0], comparison)
  colours = ListedColormap([TRAINS, FROZEN])
  for k, (name, mask) in enumerate(comparison.masks.items(), start=1):
    axes = figure.add_subplot(grid[k])
    axes.imshow(mask, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    units = comparison.frozen_units(name)
    axes.set_title(f"{name}: {units.sum()} of {units.size} frozen" if units.size > 20 else name)
    axes.set(yticks=[], xticks=[0, units.size - 1])
    axes.set_xlabel("unit", labelpad=-10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_digits(figure: Any, place: Any, comparison: Comparison) -> None:
  """One image of each digit, in the colour of the neurons that answer for it."""
  grid = place.subgridspec(2, 5, wspace=0.0, hspace=0.12)
  for digit in range(10):
    axes = figure.add_subplot(grid[digit])
    ink = FROZEN if digit < 5 else TRAINS
    shades = LinearSegmentedColormap.from_list("", ["#F4F6F8", ink])
    axes.imshow(comparison.train.of([digit]).pixels[0].reshape(8, 8), cmap=shades)
    axes.set(xticks=[], yticks=[], anchor="W")
    axes.spines[:].set_visible(False)


def _draw_changes(figure: Any, place: Any, comparison: Comparison) -> None:
  """For every run, how far each neuron moved; zero has a band of its own below the decades."""
  every = np.concatenate([c for x in comparison.outcomes for c in x.changes.values()])
  moved = every[every > 0]
  low, high = np.floor(np.log10(moved.min())), np.ceil(np.log10(moved.max()))
  grid = place.subgridspec(1, len(comparison.outcomes), wspace=0.05)
  for k, (outcome, ink) in enumerate(zip(comparison.outcomes, RUNS, strict=True)):
    axes = figure.add_subplot(grid[k])
    _draw_change(axes, comparison, outcome, int(low), int(high))
    audit = outcome.audit
    axes.text(0, 1.13, outcome.name, transform=axes.transAxes, size=14, weight="bold", color=ink)
    verdict = f"{audit.changed:,} of the {audit.frozen:,} blue parameters changed"
    axes.text(0, 1.04, verdict, transform=axes.transAxes, color=INK)
    if k:
      axes.tick_params(labelleft=False)
    else:
      axes.set_ylabel("largest change of a neuron's weights")
      axes.yaxis.set_label_coords(-0.125, 0.56)


def _draw_change(axes: Any, comparison: Comparison, outcome: Outcome, low: int, high: int) -> None:
  zero, start, centres = 10.0 ** (low - 1), 0, []
  for name, change in outcome.changes.items():
    frozen = comparison.frozen_units(name)
    at = start + np.arange(change.size) * (1 if change.size > 20 else 6)
    height = np.where(change == 0, zero, change)
    for chosen, ink in ((~frozen, TRAINS), (frozen, FROZEN)):
      axes.scatter(at[chosen], height[chosen], s=11, color=ink, alpha=0.8, linewidths=0)
    centres.append((at[0] + at[-1]) / 2)
    start = at[-1] + 28
  axes.axhspan(zero / 2.5, zero * 2.5, color=ICE, zorder=0, linewidth=0)
  axes.set(yscale="log", ylim=(zero / 2.5, 10.0**high * 1.2), xlim=(-12, start - 16))
  decades = range(low, high + 1)
  axes.set_yticks([zero, *(10.0**d for d in decades)])
  axes.set_yticklabels(["0", *(f"$10^{{{d}}}$" for d in decades)])
  axes.minorticks_off()
  axes.grid(axis="y", color="#EEF1F4", zorder=0)
  axes.set_axisbelow(True)
  axes.set_xticks(centres, list(outcome.changes))
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)


def _draw_results(figure: Any, place: Any, comparison: Comparison) -> None:
  grid = place.subgridspec(1, 3, width_ratios=(1, 1, 0.8), wspace=0.2)
  _draw_curves(figure.add_subplot(grid[0]), comparison, "old", "Which of 0 to 4? (% right)")
  _draw_curves(figure.add_subplot(grid[1]), comparison, "new", "Which of 5 to 9? (% right)")
  _draw_costs(figure.add_subplot(grid[2]), comparison)


def _draw_curves(axes: Any, comparison: Comparison, field: str, title: str) -> None:
  # The leaking run is nearly ours in accuracy: a wide pale line lets both be seen.
  for outcome, ink, width, alpha in zip(
    comparison.outcomes, RUNS, (2, 6, 2), (1, 0.35, 1), strict=True
  ):
    steps = [step for step, _ in outcome.curve]
    right = [100 * getattr(scores, field) for _, scores in outcome.curve]
    label = outcome.name
    axes.plot(steps, right, color=ink, lw=width, alpha=alpha, label=label, solid_capstyle="round")
  axes.set_title(title)
  axes.set_xlabel("step")
  axes.set_ylim(top=102)
  axes.grid(axis="y", color="#EEF1F4")
  axes.tick_params(length=0)
  axes.legend(frameon=False, loc="best", labelcolor="linecolor", handlelength=1.4)


def _draw_costs(axes: Any, comparison: Comparison) -> None:
  outcomes = comparison.outcomes
  kilobytes = [x.state_bytes / 1e3 for x in outcomes]
  axes.barh(range(len(outcomes)), kilobytes, color=RUNS, height=0.5)
  for k, outcome in enumerate(outcomes):
    axes.text(0, k - 0.36, outcome.name, color=RUNS[k], weight="bold", va="bottom")
    inside = kilobytes[k] > 0.5 * max(kilobytes)
    cost = f"{kilobytes[k]:,.0f} kB, {outcome.milliseconds:.2f} ms a step"
    axes.text(
      kilobytes[k] + max(kilobytes) * (-0.02 if inside else 0.02),
      k,
      cost,
      va="center",
      ha="right" if inside else "left",
      color="white" if inside else INK,
    )
  axes.set_title("Optimizer memory, time of a step")
  axes.set(xticks=[], yticks=[], ylim=(len(outcomes) - 0.6, -0.8))
  axes.spines[:].set_visible(False)
