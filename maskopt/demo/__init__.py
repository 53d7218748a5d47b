"""Demonstrations on real data: `maskopt demo NAME`; one module, one command each."""

from __future__ import annotations

import typer
from typer.core import TyperGroup

from .digits import digits as digits
from .freeze_weights import freeze_weights as freeze_weights
from .grow import grow as grow
from .keras_lstm import keras_lstm as keras_lstm
from .matlab_layer import matlab_layer as matlab_layer
from .multipliers import multipliers as multipliers
from .new_units import new_units as new_units
from .transfer import transfer as transfer


class _MainByDefault(TyperGroup):
  """`maskopt demo --steps 100` is `maskopt demo digits --steps 100`."""

  def parse_args(self, ctx, args):
    asks_help = bool(args) and args[0] in ctx.help_option_names
    if not asks_help and (not args or args[0].startswith("-")):
      args = [digits.__name__, *args]
    return super().parse_args(ctx, args)


app = typer.Typer(
  cls=_MainByDefault,
  help="Run a demonstration on real data. Without a name it is `digits`: `maskopt demo --steps 60 "
  "--seed 1 --out DIRECTORY --json`. Each tells its options: `maskopt demo digits --help`.",
  rich_markup_mode="markdown",
)
# The name of a demonstration is its function's, with hyphens.
app.command()(digits)
app.command()(matlab_layer)
app.command()(freeze_weights)
app.command()(keras_lstm)
app.command()(multipliers)
app.command()(new_units)
app.command()(grow)
app.command()(transfer)
