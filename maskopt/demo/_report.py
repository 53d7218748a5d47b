"""How a recipe tells its story: the words of both systems, steps, tables; or all of it as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_WIDTH = 100


class Report:
  """Prints a story as it goes, or one JSON object of its facts at the end.

  Attributes:
    facts: numbers and verdicts, in the order they were told.
  """

  def __init__(self, name: str, title: str, *, as_json: bool, **facts: Any):
    self.facts: dict[str, Any] = {"demo": name, **facts}
    self._as_json, self._steps = as_json, 0
    self._console = Console(quiet=as_json, highlight=False, emoji=False)
    self._console.width = min(self._console.width, _WIDTH) if self._console.is_terminal else _WIDTH
    # A table of parameters needs every column of a narrow terminal.
    self._indent = 3 if self._console.width == _WIDTH else 0
    self._console.print(Text(title, style="bold"))

  def words(self, system: str, pairs: Iterable[tuple[str, str]]) -> None:
    """The one-to-one table: what they write, what one writes here."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(system, style="cyan")
    table.add_column("maskopt", style="green")
    for theirs, ours in pairs:
      table.add_row(Text(theirs), Text(ours))
    self._console.print(table)

  def step(self, title: str, text: str = "") -> None:
    """Begin the next step of the story."""
    self._steps += 1
    self._console.print()
    self._console.print(Text(f"{self._steps}  {title}", style="bold"))
    if text:
      self.say(text)

  def say(self, text: str, style: str = "") -> None:
    """A paragraph, without markup: square brackets are often code here."""
    self.show(Text(text, style=style))

  def show(self, thing: Any) -> None:
    """A summary, an audit, or anything else that rich can draw."""
    self._console.print(Padding(thing, (0, 0, 0, self._indent), expand=False))

  def table(self, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table whose first column names the row; numbers align to the right."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for k, header in enumerate(headers):
      table.add_column(Text(header), justify="right" if k else "left", no_wrap=k == 0)
    for row in rows:
      table.add_row(*(_cell(cell) for cell in row))
    self.show(table)

  def finish(self, ok: bool, verdict: str) -> None:
    """Say how it ended, in these words if well; raises `typer.Exit(1)` if not."""
    self.facts["ok"] = ok
    if self._as_json:
      print(json.dumps(self.facts, indent=2))
    self._console.print()
    if not ok:
      self._console.print(Text("FAILED: what should have held does not.", style="bold red"))
      raise typer.Exit(1)
    self._console.print(Text(verdict, style="bold green"))


_MEANING = {"kept": "green", "yes": "green", "True": "green", "False": "blue", "partial": "yellow"}


def _cell(text: str) -> Text:
  return Text(text, style="bold red" if text.startswith("CHANGED") else _MEANING.get(text, ""))
