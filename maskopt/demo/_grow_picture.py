"""The picture of the growing network: its parts by age, accuracy matrices, what was forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator

from . import _continual
from ._data import Images
from ._grown import Outcome
from ._picture import INK, RUNS, SOFT, STYLE, TRAINS

# The older, the darker; what trains now is amber, as in the other pictures.
AGES = ("#07355C", "#0B5FA5", "#3F86C2", "#82B1D9", TRAINS)
OURS, OTHER, AGAIN = RUNS[2], RUNS[1], RUNS[0]
DRAWN = 3
_SHADES = LinearSegmentedColormap.from_list("", ["#C8372D", "#F3EDE4", "#0B5FA5"])


def save(outcomes: list[Outcome], images: Images, path: Path) -> Path:
  """Draw the picture of the first three ways and save it as a PNG."""
  drawn = outcomes[:DRAWN]
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(13.5, 11.2), dpi=100, facecolor="white")
    rows = figure.add_gridspec(
      *(3, 1),
      height_ratios=(1.15, 1, 1),
      hspace=0.47,
      left=0.075,
      right=0.975,
      top=0.855,
      bottom=0.055,
    )
    _title(figure, drawn[0])
    top = rows[0].subgridspec(1, 3, width_ratios=(1.7, 0.75, 0.95), wspace=0.22)
    _draw_network(figure.add_subplot(top[0]), drawn[0], images)
    _draw_head(figure.add_subplot(top[1]), drawn[0])
    _draw_memory(figure.add_subplot(top[2]), drawn)
    questions = (
      ("task_aware", "Which of the two? (the pair is told)"),
      ("class_incremental", "Which of all digits so far? (nobody tells the pair)"),
    )
    for place, (name, question) in zip((rows[1], rows[2]), questions, strict=True):
      _draw_question(figure, place, drawn, name, question)
    figure.savefig(path)
  return path


def _title(figure: Any, ours: Outcome) -> None:
  last = ours.learnt[-1]
  figure.text(
    0.04, 0.955, "Ten digits arrive in pairs; old units hold still", size=19, weight="bold"
  )
  share = last.audit.frozen / last.total
  lines = (
    f"Each pair brings {ours.learnt[0].shape[0]} hidden units and two outputs. While the last pair "
    f"(amber) is learnt, the older {share:.0%} of all weights (blue) are frozen to the bit.",
    "Every way: AdamW, cross-entropy over all digits so far, the same new weights. Joint training "
    "sees all images so far again, the others those of the pair.",
  )
  for k, line in enumerate(lines):
    figure.text(0.04, 0.93 - 0.02 * k, line, size=11, color=SOFT)


def _draw_network(axes: Any, ours: Outcome, images: Images) -> None:
  """Pixels, a block of hidden units for each pair, the pair's outputs."""
  count = len(ours.learnt)
  axes.set(xlim=(0, 10), ylim=(count - 0.45, -0.55), xticks=[], yticks=[])
  axes.spines[:].set_visible(False)
  axes.set_title("Who reads whom: new units lead to new outputs only")
  middle = (count - 1) / 2
  for i, learnt in enumerate(ours.learnt):
    ink = AGES[i]
    axes.plot([1.5, 3.2], [middle, i], color=ink, lw=2, solid_capstyle="round", zorder=1)
    for j in range(i, count):
      wide = {"lw": 1.6, "alpha": 0.85, "solid_capstyle": "round", "zorder": 1}
      axes.plot([5.6, 7.6], [i, j], color=AGES[j], **wide)
    box = {"boxstyle": "round,pad=0,rounding_size=0.12", "linewidth": 0, "zorder": 2}
    axes.add_patch(FancyBboxPatch((3.2, i - 0.3), 2.4, 0.6, facecolor=ink, **box))
    new = learnt.shape[0] - (ours.learnt[i - 1].shape[0] if i else 0)
    state = "train" if i == count - 1 else "frozen"
    told = {"ha": "center", "va": "center", "zorder": 3, "size": 9.5}
    axes.text(4.4, i, f"{new} units, {state}", color=INK if i > 2 else "white", **told)
    for k, digit in enumerate(learnt.digits):
      _draw_digit(axes, images, digit, ink, (7.7 + 1.05 * k, i))
  _draw_digit(axes, images, 8, SOFT, (0.2, middle), size=0.6)
  axes.text(0.85, middle + 0.85, "64 pixels", ha="center", color=SOFT)


def _draw_digit(
  axes: Any, images: Images, digit: int, ink: str, at: tuple[float, float], size: float = 0.42
) -> None:
  shades = LinearSegmentedColormap.from_list("", ["#F4F6F8", "#C77700" if ink == TRAINS else ink])
  x, y = at
  # Ten units of width are as long as some four of height.
  extent = (x, x + 2.15 * size, y + size, y - size)
  alike = images.of([digit]).pixels
  usual = np.argmin(np.square(alike - alike.mean(axis=0)).sum(axis=1))
  pixels = alike[usual].reshape(8, 8)
  axes.imshow(pixels, cmap=shades, extent=extent, aspect="auto", zorder=2)


def _draw_head(axes: Any, ours: Outcome) -> None:
  """The head's kernel, in the colour of the pair that each weight was learnt with."""
  kernel = np.abs(np.asarray(ours.params["head"]["kernel"]))
  inks = np.array([to_rgb(AGES[j]) for j, x in enumerate(ours.learnt) for _ in x.digits])
  depth = np.sqrt(np.minimum(kernel / np.quantile(kernel[kernel > 0], 0.95), 1))[..., None]
  axes.imshow(1 - depth * (1 - inks), aspect="auto", interpolation="nearest")
  edges = [0, *(x.shape[0] for x in ours.learnt)]
  pairs = [_label(x.digits) for x in ours.learnt]
  axes.set_yticks([(a + b) / 2 - 0.5 for a, b in zip(edges, edges[1:], strict=False)], pairs)
  axes.set_xticks(range(kernel.shape[1]))
  axes.tick_params(length=0)
  axes.set_xlabel("output", labelpad=2)
  axes.set_ylabel("units that came with", labelpad=4)
  axes.set_title("The head: white is zero, for good")
  for edge in edges[1:-1]:
    axes.axhline(edge - 0.5, color="#D5DBE1", lw=0.8)
    axes.axvline(2 * edges.index(edge) - 0.5, color="#D5DBE1", lw=0.8)
  axes.spines[:].set(visible=True, color="#D5DBE1")


def _draw_memory(axes: Any, outcomes: list[Outcome]) -> None:
  ours, other = outcomes[0], outcomes[1]
  at = np.arange(len(ours.learnt))
  for shift, outcome, ink in ((-0.2, ours, OURS), (0.2, other, OTHER)):
    kilobytes = [x.state_bytes / 1e3 for x in outcome.learnt]
    axes.bar(at + shift, kilobytes, width=0.38, color=ink, label=outcome.way.name)
    for x, y in zip(at + shift, kilobytes, strict=True):
      axes.text(x, y + 1.2, f"{y:.0f}", ha="center", color=ink, size=9)
  axes.set_xticks(at, [_label(x.digits) for x in ours.learnt])
  axes.set(yticks=[], title="Memory of AdamW (kB)", xlabel="pair that is learnt")
  axes.tick_params(length=0)
  axes.spines["left"].set_visible(False)
  axes.legend(frameon=False, loc="upper left", labelcolor="linecolor", handlelength=1)


def _draw_question(
  figure: Any, place: Any, outcomes: list[Outcome], name: str, question: str
) -> None:
  grid = place.subgridspec(1, 4, width_ratios=(1, 1, 1, 1.15), wspace=0.2)
  inks = (OURS, OTHER, AGAIN)
  for k, (outcome, ink) in enumerate(zip(outcomes, inks, strict=True)):
    axes = figure.add_subplot(grid[k])
    _draw_matrix(axes, getattr(outcome, name), [_label(x.digits) for x in outcome.learnt])
    axes.set_title(outcome.way.name, color=ink, size=11)
    axes.set_xlabel("accuracy on (%)", labelpad=2)
    if k == 0:
      axes.set_ylabel("after learning", labelpad=7)
      axes.text(-0.185, 1.19, question, transform=axes.transAxes, size=13, weight="bold")
  axes = figure.add_subplot(grid[3])
  lines = [(x.way.name, 100 * _continual.forgetting(getattr(x, name))) for x in outcomes]
  _draw_forgetting(axes, lines, [_label(x.digits) for x in outcomes[0].learnt])


def _draw_matrix(axes: Any, matrix: np.ndarray, pairs: list[str]) -> None:
  axes.imshow(matrix, cmap=_SHADES, vmin=0, vmax=1, aspect="auto")
  for i, j in zip(*np.nonzero(~np.isnan(matrix)), strict=True):
    share = matrix[i, j]
    ink = INK if 0.2 < share < 0.8 else "white"
    axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", color=ink, size=11)
  axes.set_xticks(range(len(pairs)), pairs)
  axes.set_yticks(range(len(pairs)), pairs)
  axes.set_xticks(np.arange(len(pairs) - 1) + 0.5, minor=True)
  axes.set_yticks(np.arange(len(pairs) - 1) + 0.5, minor=True)
  axes.grid(which="minor", color="white", lw=2)
  axes.tick_params(which="both", length=0)
  axes.spines[:].set_visible(False)


def _draw_forgetting(axes: Any, lines: list[tuple[str, np.ndarray]], pairs: list[str]) -> None:
  # Ours is drawn first, wide and pale, for another may lie on it.
  looks = ((OURS, 7, 0.4, "o"), (OTHER, 2, 1, "o"), (AGAIN, 2, 1, "o"))
  for (name, lost), (ink, width, alpha, mark) in zip(lines, looks, strict=True):
    axes.plot(lost, color=ink, lw=width, alpha=alpha, marker=mark, ms=4, label=name)
  highest = max(5.0, *(np.nanmax(lost) for _, lost in lines))
  lowest = min(0.0, *(np.nanmin(lost) for _, lost in lines))
  axes.set_xticks(range(len(pairs)), pairs)
  axes.set_xlim(0.7, len(pairs) - 0.7)
  room = 1.07 if highest > 50 else 1.6  # above small numbers, for the legend
  axes.set_ylim(lowest - 0.06 * highest, room * highest)
  axes.set_title("Forgetting (points)", size=11)
  axes.set_xlabel("after learning", labelpad=2)
  axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
  axes.grid(axis="y", color="#EEF1F4")
  axes.tick_params(length=0)
  axes.legend(frameon=False, loc="best", labelcolor="linecolor", handlelength=1.4)


def _label(digits: list[int]) -> str:
  return f"{digits[0]}, {digits[1]}"
