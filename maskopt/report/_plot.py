"""A picture of each leaf: what is frozen, and what moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import _copies, _tree
from .._errors import show
from .._layout import Index, Layout
from .._masks import FreezeMask
from .._packing import Layouts
from . import _elements, _images, _parts, _show
from ._audit import matched
from ._images import Grid
from ._snapshot import taken

if TYPE_CHECKING:
  from matplotlib.figure import Figure

_WHERE = "maskopt.plot(params, freeze_mask)"
# Colours that stay apart without red-green vision and in grey: amber trains, deep blue is frozen.
_TRAINS, _FROZEN = "#FFC75F", "#14375E"
_KEPT, _HATCH, _LEAK, _STILL = "#DCDCDC", "#B8B8B8", "#E6007E", "#FFFFFF"
_TITLE = 34  # letters across a panel
_PANEL = (2.7, 2.2)  # inches
_PIXELS = 600
_RINGS = 60  # beyond so many leaking blocks their colour is seen without a ring


class _Panel(NamedTuple):
  """What is drawn of one leaf; `change` and `leaks` are None without `before`."""

  path: str
  layout: Layout
  frozen: int
  grid: Grid
  share: np.ndarray
  change: np.ndarray | None = None
  leaks: np.ndarray | None = None

  @property
  def leaked(self) -> int:
    return 0 if self.leaks is None else int(self.leaks.sum())


def plot(
  params: Any, freeze_mask: FreezeMask | Layouts, before: Any = None, *, limit: int = 24
) -> Figure:
  r"""Draw each leaf's freeze mask and, given `before`, its change beside it.

    mask image[r, c] = frozen share of the block        change image[r, c] = max |params - before|

  A leaf is drawn as a matrix of its last axis, a vector as a strip, and a large one by blocks. In
  the change, frozen elements are hatched grey; one that changed is magenta, and ringed.

  Args:
    params: a tree of arrays, linen's variables, or a module; without `before` it may be abstract.
    freeze_mask: any freeze mask over them, or `maskopt.mask_of(state)`.
    before: the same parameters earlier, best a `snapshot`.
    limit: how many leaves are drawn at most: those that leaked, then the largest; the title says
      how many there are.
  Returns:
    A `matplotlib.figure.Figure` of its own, unknown to pyplot: `figure.savefig("mask.png")`.
  Raises:
    ImportError: matplotlib is not installed.
    ValueError: the mask does not fit, or the trees differ.
    TypeError: the mask is not boolean, or it is called inside `jit`.
  Example:
    >>> import jax.numpy as jnp, numpy as np, maskopt
    >>> figure = maskopt.plot({"w": jnp.ones((4, 3))}, {"w": np.array([True, False, False])})
    >>> figure.axes[0].get_title()
    'w\n(4, 3), 33.3% frozen'
  """
  try:
    from matplotlib.figure import Figure
  except ImportError as e:
    raise ImportError(
      "`maskopt.plot`: expected matplotlib, which is not installed. "
      "Install it with pip install 'maskopt[plot]'."
    ) from e
  panels = _panels(params, freeze_mask, before)
  shown = _chosen(panels, limit)
  compared = before is not None
  columns = _columns(len(shown), compared)
  rows = -(-len(shown) * (1 + compared) // columns)
  size = (_PANEL[0] * columns + 1.2, _PANEL[1] * max(rows, 1) + 1.0)
  figure = Figure(figsize=size, dpi=140, layout="constrained")
  figure.suptitle(_headline(panels, shown, compared), fontsize=11)
  _draw(figure, shown, rows, columns, compared)
  return figure


def _columns(leaves: int, compared: bool) -> int:
  if compared:
    return 2 if leaves <= 3 else 4
  return max(min(leaves, 4), 2)


def _panels(params: Any, freeze_mask: Any, before: Any) -> list[_Panel]:
  """Analyse the mask once and reduce every leaf to its images."""
  inner, mask, _ = _parts.parts(params, freeze_mask, _WHERE)
  flat = _tree.flatten(inner)
  layouts = _elements.analysed(mask, inner, _WHERE)
  old = new = None
  if before is not None:
    views = [taken(x, _WHERE, copy=False) for x in (before, inner)]
    was, now = (_tree.flatten(_parts.parts(view.tree, freeze_mask)[0]) for view in views)
    old, new = matched(now, was, _WHERE), dict(zip(now.paths, now.leaves, strict=True))
  return [
    _panel(path, layout, index, old and old[path], new and new[path])
    for path, layout, index in (
      (flat.paths[i], layouts.static.layouts[i], layouts.index[i])
      for i in _parts.network_order(_copies.trained(params), flat.paths)
    )
    if layout is not None and layout.size
  ]


def _panel(path: str, layout: Layout, index: Index, old: Any, new: Any) -> _Panel:
  grid = _images.grid(layout.shape)
  share = _images.frozen_share(layout, index, grid)
  frozen = _elements.frozen_count(layout, index)
  pair = (None, None) if old is None else _images.change(old, new, layout, index, grid)
  return _Panel(path, layout, frozen, grid, share, *pair)


def _chosen(panels: list[_Panel], limit: int) -> list[_Panel]:
  """Leaks first, then the largest leaves; drawn in the order of the tree."""
  ranked = sorted(panels, key=lambda p: (p.leaked == 0, -p.layout.size))[:limit]
  kept = {p.path for p in ranked}
  return [p for p in panels if p.path in kept]


def _headline(panels: list[_Panel], shown: list[_Panel], compared: bool) -> str:
  total = sum(p.layout.size for p in panels)
  frozen = sum(p.frozen for p in panels)
  parts = [f"{_show.share(frozen, total)} of {total:,} parameters frozen"]
  if compared:
    leaked = sum(p.leaked for p in panels)
    parts.append(f"LEAK: {leaked:,} of {frozen:,} frozen changed" if leaked else "no leak")
  if len(shown) < len(panels):
    held = _show.share(sum(p.layout.size for p in shown), total)
    parts.append(f"the {len(shown)} largest of {len(panels)} leaves ({held} of the parameters)")
  return "; ".join(parts)


def _draw(figure: Any, shown: list[_Panel], rows: int, columns: int, compared: bool) -> None:
  from matplotlib.cm import ScalarMappable
  from matplotlib.colors import LinearSegmentedColormap, Normalize

  colours = LinearSegmentedColormap.from_list("frozen", [_TRAINS, _FROZEN])
  norm = _norm_of_change(shown) if compared else None
  mask_axes, change_axes = [], []
  for i, (panel, name) in enumerate(zip(shown, _names(shown), strict=True)):
    at = i * (1 + compared) + 1
    axes = figure.add_subplot(rows, columns, at)
    axes.imshow(_sharp(panel.share), cmap=colours, vmin=0, vmax=1, **_placed(panel))
    share = _show.share(panel.frozen, panel.layout.size)
    _dress(axes, panel, f"{name}\n{_show.shape(panel.layout.shape)}, {share} frozen")
    mask_axes.append(axes)
    if compared:
      beside = figure.add_subplot(rows, columns, at + 1)
      _draw_change(beside, panel, norm)
      change_axes.append(beside)
  if not shown:
    return
  bar = _bar(figure, ScalarMappable(Normalize(0, 1), colours), mask_axes + change_axes, rows)
  bar.set_ticks([0, 0.5, 1], labels=["trains", "half", "frozen"])
  if compared:
    beside = _bar(figure, ScalarMappable(norm, "viridis"), mask_axes + change_axes, rows)
    beside.set_label("change, largest of the block", fontsize=8)
    _explain_change(figure)


def _bar(figure: Any, ink: Any, axes: list[Any], rows: int) -> Any:
  """A colour bar two panels high at most, at the top."""
  height = min(1.0, 2.0 / rows)
  bar = figure.colorbar(ink, ax=axes, shrink=0.85 * height, aspect=18, anchor=(0.0, 1.0))
  bar.ax.tick_params(labelsize=8, which="both")
  return bar


def _names(panels: list[_Panel]) -> list[str]:
  """The paths, shortened to a panel's width if they can still be told apart, else in lines."""
  paths = _show.apart([show(panel.path) for panel in panels], _TITLE)
  return ["\n".join(_show.folded(path, _TITLE)) for path in paths]


def _sharp(image: np.ndarray) -> np.ndarray:
  """Repeat blocks beyond the pixels of a panel, for they are reduced more evenly than enlarged."""
  for axis in (0, 1):
    image = np.repeat(image, -(-_PIXELS // image.shape[axis]), axis=axis)
  return image


def _placed(panel: _Panel) -> dict[str, Any]:
  """Draw blocks as they are, on the leaf's own indices."""
  rows, columns = panel.grid.shape
  return {
    "aspect": "auto",
    "interpolation": "antialiased",
    "extent": (-0.5, columns - 0.5, rows - 0.5, -0.5),
  }


def _dress(axes: Any, panel: _Panel, title: str, **ink: Any) -> None:
  from matplotlib.ticker import MaxNLocator

  rows, _ = panel.grid.shape
  axes.set_title(title, fontsize=8, **ink)
  axes.tick_params(labelsize=7, length=2)
  axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
  axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
  if rows == 1:
    axes.set(yticks=[], box_aspect=0.16)


def _norm_of_change(shown: list[_Panel]) -> Any:
  """One logarithmic scale for all leaves, of six decades at most."""
  from matplotlib.colors import LogNorm

  sizes = np.concatenate([np.ravel(p.change) for p in shown if p.change is not None] or [[0.0]])
  sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
  if not sizes.size:
    return LogNorm(1e-6, 1.0)
  top = float(sizes.max())
  # A decade at least, or equal changes would look like none.
  return LogNorm(min(max(float(sizes.min()), top * 1e-6), top / 10), top)


def _draw_change(axes: Any, panel: _Panel, norm: Any) -> None:
  import matplotlib
  from matplotlib.colors import to_rgba

  assert panel.change is not None and panel.leaks is not None
  finite = np.clip(panel.change, norm.vmin, norm.vmax)
  image = matplotlib.colormaps["viridis"](norm(finite))
  image[panel.change == 0] = to_rgba(_STILL)
  # Frozen blocks are holes in the image: the hatched background shows through.
  image[(panel.share == 1) & (panel.leaks == 0)] = to_rgba(_KEPT, 0.0)
  image[panel.leaks > 0] = to_rgba(_LEAK)
  axes.patch.set(facecolor=_KEPT, edgecolor=_HATCH, hatch="////")
  axes.imshow(_sharp(image), **_placed(panel))
  found = np.argwhere(panel.leaks > 0)
  if 0 < len(found) <= _RINGS:
    y = panel.grid.rows[found[:, 0]] + panel.grid.heights[found[:, 0]] / 2 - 0.5
    x = panel.grid.columns[found[:, 1]] + panel.grid.widths[found[:, 1]] / 2 - 0.5
    axes.scatter(x, y, s=90, facecolors="none", edgecolors=_LEAK, linewidths=1.4, clip_on=False)
  _dress(axes, panel, _verdict(panel), **({"color": _LEAK, "weight": "bold"} if found.size else {}))


def _verdict(panel: _Panel) -> str:
  if panel.leaked:
    return f"LEAK\n{panel.leaked:,} of {panel.frozen:,} frozen changed"
  largest = float(np.max(panel.change)) if panel.change is not None else 0.0
  moved = f"largest change {largest:.2g}" if largest else "nothing moved"
  return f"{moved}\n{'frozen bits kept' if panel.frozen else 'nothing frozen'}"


def _explain_change(figure: Any) -> None:
  """What the colours outside the scale mean."""
  from matplotlib.patches import Patch

  figure.legend(
    handles=[
      Patch(facecolor=_KEPT, edgecolor=_HATCH, hatch="////", label="frozen, kept"),
      Patch(facecolor=_LEAK, label="frozen, CHANGED"),
      Patch(facecolor=_STILL, edgecolor="black", linewidth=0.5, label="trainable, did not move"),
    ],
    loc="outside lower center",
    ncols=3,
    fontsize=8,
    frameon=False,
  )
