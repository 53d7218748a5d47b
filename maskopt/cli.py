"""The `maskopt` command."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from typer import Typer

# What the demo extra installs; without it the package works and only this command does not.
_EXTRA = {"matplotlib", "rich", "sklearn", "typer"}


def main() -> None:
  """Run the command; without the packages of the demo extra, say in one line how to get them.

  Exit codes: 0; 1 if a demonstration's audit fails or the extra is missing; 2 for wrong usage.
  """
  try:
    _application()(prog_name="maskopt")
  except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRA:
      raise
    sys.exit(f"maskopt: {package} is not installed; run `pip install 'maskopt[demo]'`")


def _application() -> Typer:
  import typer

  from . import __version__, demo

  app = typer.Typer(
    help="Freeze any element of any parameter in JAX, and pay only for what you train.",
    no_args_is_help=True,
    add_completion=False,
  )
  app.add_typer(demo.app, name="demo")

  def show_version(wanted: bool) -> None:
    if wanted:
      typer.echo(f"maskopt {__version__}")
      raise typer.Exit()

  @app.callback()
  def options(
    version: bool = typer.Option(
      False, "--version", callback=show_version, is_eager=True, help="Show the version and exit."
    ),
  ) -> None:
    del version

  return app
