"""Evaluate a JAX program for the wanted blocks of its outputs only."""

from ._flops import count_flops as count_flops
from ._plan import (
  ALL as ALL,
  NONE as NONE,
  SLICE_BELOW as SLICE_BELOW,
  Plan as Plan,
  Report as Report,
  Stop as Stop,
  analyze as analyze,
  slice_program as slice_program,
)
from ._region import Region as Region, region as region
from ._sampled import Sampled as Sampled
from ._spread import spread as spread, spread_pays as spread_pays
from ._sums import has_devices as has_devices
from ._union import in_order as in_order
