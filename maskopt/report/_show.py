"""How objects show themselves: rich in a terminal, HTML in a notebook, plain text everywhere else.

An object describes itself once, as a `Table` of strings; the three forms differ in nothing but ink.
"""

from __future__ import annotations

import abc
import dataclasses
import html
import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

WIDTH = 100
_GAP = "  "
# The path column keeps this much of a line where columns can be spared; letters cut out of a name
# leave it legible only if that much remains.
_LEAST, _LEGIBLE = 18, 24
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
    spare: columns that are left out of lines too narrow for all, the first of them first.
    notes: (style, sentence) pairs that follow the table.
  """

  title: str
  headers: tuple[str, ...]
  rows: Sequence[tuple[str, ...]]
  styles: Sequence[str]
  right: frozenset[int] = frozenset()
  spare: tuple[int, ...] = ()
  notes: Sequence[tuple[str, str]] = ()
  title_style: str = ""

  def _columns(self, width: int) -> dict[int, int]:
    """The width of each column that has room; what is left of a line is for paths."""
    full = dict(enumerate(max(map(len, c)) for c in zip(self.headers, *self.rows, strict=True)))
    paths = [row[0] for row in self.rows]
    narrow: dict[int, int] = {}
    for count in range(len(self.spare) + 1):
      widths = {i: n for i, n in full.items() if i not in self.spare[:count]}
      room = width - _total(widths) + full[0]
      widths[0] = max(min(full[0], room), min(full[0], len(self.headers[0])))
      if all(len(path) <= widths[0] for path in apart(paths, widths[0])):
        return widths
      # No choice of columns spares every path a line of its own: then the first that leaves room.
      if narrow.get(0, 0) < min(full[0], _LEAST):
        narrow = widths
    return narrow

  def lines(self, width: int, rule: str = "-") -> Iterator[tuple[str, str]]:
    """(style, line) of the table; a path that cannot be shortened has lines of its own."""
    if not self.rows:
      return
    widths = self._columns(width)
    yield "", self._line(self.headers, widths)
    yield "", rule * _total(widths)
    paths = apart([row[0] for row in self.rows], widths[0])
    for path, row, style in zip(paths, self.rows, self.styles, strict=True):
      if len(path) > widths[0]:
        yield from ((style, line) for line in folded(path, width))
        path = ""
      yield style, self._line((path, *row[1:]), widths)
    yield "", rule * _total(widths)

  def text(self, width: int | None = None) -> str:
    """Plain ASCII with aligned columns, as wide as the terminal if that is narrow."""
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) if width is None else width
    lines = [*_wrapped(self.title, width), *(line for _, line in self.lines(width))]
    for _, note in self.notes:
      lines += _wrapped(note, width)
    return "\n".join(lines)

  def _line(self, cells: Sequence[str], widths: dict[int, int]) -> str:
    parts = [
      c.rjust(widths[i]) if i in self.right else c.ljust(widths[i])
      for i, c in enumerate(cells)
      if i in widths
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
    """The same lines in colour; only rich calls this, so it is there to import."""
    from rich.text import Text

    for line in _wrapped(self.title, width):
      yield Text(line, style=_RICH[self.title_style] or "bold")
    for style, line in self.lines(width, "\N{BOX DRAWINGS LIGHT HORIZONTAL}"):
      yield Text(line, style=_RICH[style], no_wrap=True, overflow="ignore")
    for style, note in self.notes:
      for line in _wrapped(note, width):
        yield Text(line, style=_RICH[style], no_wrap=True, overflow="ignore")


def _total(widths: dict[int, int]) -> int:
  return sum(widths.values()) + len(_GAP) * (len(widths) - 1)


def _wrapped(sentence: str, width: int) -> list[str]:
  indent = sentence[: len(sentence) - len(sentence.lstrip())] + "  "
  return textwrap.wrap(sentence, width, subsequent_indent=indent, break_on_hyphens=False)


def _tag(name: str, content: str, style: str) -> str:
  return f'<{name} style="{style}">{html.escape(content)}</{name}>'


class Shown(abc.ABC):
  """An object that shows itself as a `Table`."""

  @abc.abstractmethod
  def _table(self) -> Table: ...

  def __str__(self) -> str:
    return self._table().text()

  def __repr__(self) -> str:
    return str(self)

  def _repr_html_(self) -> str:
    return self._table().html()

  def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
    del console
    yield from self._table().rich(options.max_width)


def apart(paths: Sequence[str], width: int) -> list[str]:
  """Paths shortened to a width, but whole where two would look alike or lose their last part."""
  short = [shorten(path, width) for path in paths]
  alike = Counter(short)

  def tells(path: str, shown: str) -> bool:
    whole_name = shown.rpartition("/")[2] == path.rpartition("/")[2]
    return alike[shown] == 1 and (whole_name or width >= _LEGIBLE)

  return [s if tells(path, s) else path for path, s in zip(paths, short, strict=True)]


def folded(path: str, width: int) -> list[str]:
  """A path in lines that end between its parts, or within one that is longer than a line."""
  lines = [""]
  for part in re.findall(rf"[^/]{{,{max(width - 3, 1)}}}/|[^/]{{1,{max(width - 2, 1)}}}", path):
    if lines[-1].strip() and len(lines[-1]) + len(part) > width:
      lines.append("  ")
    lines[-1] += part
  return lines


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
