"""How objects show themselves: rich in a terminal, HTML in a notebook, plain text everywhere else.

An object describes itself once, as a `Table` of strings; the three forms differ in nothing but ink.
"""

from __future__ import annotations

import dataclasses
import html
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

WIDTH = 100
_GAP = "  "
# A style is the name of what a row means; each form has its own ink for it.
_RICH = {"": "", "good": "green", "bad": "bold red", "warn": "yellow", "dim": "dim"}
_HTML = {
  "": "",
  "good": "color:#009E73",
  "bad": "color:#D55E00;font-weight:bold",
  "warn": "color:#B07800",
  "dim": "opacity:0.65",
}


@dataclasses.dataclass(frozen=True)
class Table:
  """What an object says of itself.

  Attributes:
    title: one line.
    headers: of the columns; the first column holds paths and is the one that gives way.
    rows: cells as strings.
    styles: one per row, a key of `_RICH`.
    right: which columns align to the right.
    notes: (style, sentence) pairs that follow the table.
  """

  title: str
  headers: tuple[str, ...]
  rows: Sequence[tuple[str, ...]]
  styles: Sequence[str]
  right: frozenset[int] = frozenset()
  notes: Sequence[tuple[str, str]] = ()
  title_style: str = ""

  def fitted(self, width: int) -> tuple[list[tuple[str, ...]], list[int]]:
    """Rows whose paths are shortened until a line fits `width`, and the columns' widths."""
    widths = [max(map(len, column)) for column in zip(self.headers, *self.rows, strict=True)]
    others = sum(widths[1:]) + len(_GAP) * (len(widths) - 1)
    widths[0] = max(min(widths[0], width - others), min(widths[0], 12))
    rows = [(shorten(row[0], widths[0]), *row[1:]) for row in self.rows]
    return rows, widths

  def text(self, width: int = WIDTH) -> str:
    """Plain ASCII with aligned columns."""
    lines = [self.title]
    if self.rows:
      rows, widths = self.fitted(width)
      rule = "-" * (sum(widths) + len(_GAP) * (len(widths) - 1))
      lines += [self._line(self.headers, widths), rule]
      lines += [self._line(row, widths) for row in rows]
      lines += [rule]
    for _, note in self.notes:
      lines += textwrap.wrap(note, width, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)

  def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
    parts = [
      c.rjust(w) if i in self.right else c.ljust(w)
      for i, (c, w) in enumerate(zip(cells, widths, strict=True))
    ]
    return _GAP.join(parts).rstrip()

  def html(self) -> str:
    """A plain table that takes its colours from the page, so that dark notebooks stay readable."""
    aligned = [
      f"text-align:{'right' if i in self.right else 'left'}" for i in range(len(self.headers))
    ]
    body = []
    if self.rows:
      head = "".join(_tag("th", h, a) for h, a in zip(self.headers, aligned, strict=True))
      body = [f"<thead><tr>{head}</tr></thead><tbody>"]
      for row, style in zip(self.rows, self.styles, strict=True):
        cells = "".join(_tag("td", c, a) for c, a in zip(row, aligned, strict=True))
        body.append(f'<tr style="{_HTML[style]}">{cells}</tr>')
      body = ["<table>", *body, "</tbody></table>"]
    notes = [_tag("div", note, _HTML[style]) for style, note in self.notes]
    return "".join([_tag("div", self.title, _HTML[self.title_style]), *body, *notes])

  def rich(self, width: int) -> Iterator[Any]:
    """The table as rich draws it; only rich calls this, so it is there to import."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    yield Text(self.title, style=_RICH[self.title_style] or "bold")
    if self.rows:
      rows, widths = self.fitted(width)
      lines: dict[str, Any] = {"padding": (0, 1, 0, 0), "pad_edge": False, "show_edge": False}
      table = RichTable(box=box.SIMPLE_HEAD, **lines)
      for i, header in enumerate(self.headers):
        justify = "right" if i in self.right else "left"
        fixed = widths[0] if i == 0 else None
        table.add_column(Text(header), justify=justify, no_wrap=True, min_width=fixed)
      for row, style in zip(rows, self.styles, strict=True):
        table.add_row(*map(Text, row), style=_RICH[style])
      yield table
    for style, note in self.notes:
      yield Text(note, style=_RICH[style])


def _tag(name: str, content: str, style: str) -> str:
  return f'<{name} style="{style}">{html.escape(content)}</{name}>'


class Shown:
  """An object that shows itself as a `Table`."""

  def _table(self) -> Table:
    raise NotImplementedError

  def __str__(self) -> str:
    return self._table().text()

  def __repr__(self) -> str:
    return str(self)

  def _repr_html_(self) -> str:
    return self._table().html()

  def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
    del console
    yield from self._table().rich(options.max_width)


def shorten(path: str, width: int) -> str:
  """Cut parts out of the middle of a long path, or letters where no parts can go.

  The last part stays, then what tells siblings apart: numbers, the last but one, the first.
  """
  if len(path) <= width:
    return path
  parts = path.split("/")
  last = len(parts) - 1
  numbers = [i for i, part in enumerate(parts) if any(map(str.isdigit, part))]
  kept = {last}
  for i in [*numbers, last - 1, 0, *range(last - 2, 0, -1)]:
    if i >= 0 and len(_with_gaps(parts, kept | {i})) <= width:
      kept.add(i)
  short = _with_gaps(parts, kept)
  if len(kept) > 1 and len(short) <= width:
    return short
  half = max(width - 3, 2) // 2
  return path[:half] + "..." + path[len(path) - max(width - 3 - half, 1) :]


def _with_gaps(parts: Sequence[str], kept: set[int]) -> str:
  """The kept parts, with dots for each run of others."""
  shown = []
  for i, part in enumerate(parts):
    if i in kept:
      shown.append(part)
    elif i == 0 or i - 1 in kept:
      shown.append("...")
  return "/".join(shown)


def share(part: int, whole: int) -> str:
  """A percentage that says 0% and 100% only of none and of all."""
  if part == 0 or whole == 0:
    return "0%"
  if part == whole:
    return "100%"
  percent = 100 * part / whole
  if percent < 0.1:
    return "<0.1%"
  return ">99.9%" if 99.9 < percent < 100 else f"{percent:.1f}%"


def size(count: int) -> str:
  """Bytes in the largest unit that leaves a number above one."""
  if count < 1000:
    return f"{count} B"
  units = ("kB", "MB", "GB", "TB", "PB")
  power = next((k for k in range(1, 5) if count < 999.95 * 1000**k), 5)
  return f"{count / 1000**power:.1f} {units[power - 1]}"


def shape(dims: Sequence[int]) -> str:
  """A shape in the words of Python, scalars too."""
  return str(tuple(dims))


def counted(n: int, noun: str) -> str:
  """`1 unit`, `2 units`."""
  return f"{n:,} {noun}{'' if n == 1 else 's'}"


def listed(items: Sequence[Any], limit: int = 6) -> str:
  """The first few items and how many more there are."""
  shown = ", ".join(map(str, items[:limit]))
  return shown + (f", and {len(items) - limit:,} more" if len(items) > limit else "")
