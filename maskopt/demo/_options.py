"""What every demonstration takes, and how it tells of its progress."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def _made(out: Path) -> Path:
  """The directory, made now: a training whose picture has no place to go is lost time."""
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise typer.BadParameter(f"cannot make the directory {out}: {error.strerror}") from error
  return out


Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps of each training.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the data, the network and the batches.")]
Out = Annotated[
  Path, typer.Option(file_okay=False, writable=True, callback=_made, help="Directory for pictures.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")]


def progress() -> Progress:
  """A progress bar on standard error; `live=` of a task is text that follows the bar."""
  return Progress(
    TextColumn("{task.description}"),
    BarColumn(bar_width=24),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("{task.fields[live]}"),
    console=Console(stderr=True),
  )
