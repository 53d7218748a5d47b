"""From demands on the outputs of a function to the program that computes just them.

outputs[k] = tuple(fun(*args)[k][r] for r in demands[k])
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core

from . import _region as rg
from ._flops import count_flops
from ._interpret import Analysis, JaxprPlan
from ._region import Demand, Pick, Region, full
from ._rule import Blocks, shape_of, whole
from ._sampled import Sampled
from ._take import take

# A leaf demanded beyond this share is computed whole and sliced after: the matmul saved no longer
# pays for the gathers (measured on CPU, columns of a kernel; see benchmarks/slicer.py).
SLICE_BELOW: Final = 0.5


class Token:
  """A demand for all or nothing."""

  def __init__(self, name: str):
    self._name = name

  def __repr__(self) -> str:
    return self._name


ALL: Final = Token("ALL")
NONE: Final = Token("NONE")
OutputDemand: TypeAlias = Token | Sampled | Sequence[Region]


@dataclasses.dataclass(frozen=True)
class Stop:
  """A partial demand that a primitive did not pass on: it was computed whole."""

  primitive: str
  reason: str
  line: str
  count: int


class Report:
  """What a plan saves and what stopped it; FLOPs are counted when asked for.

  Attributes:
    stops: `Stop`s, most frequent first.
    flops_full: matmul and convolution FLOPs of the program as JAX runs it.
    flops_sliced: the same for the sliced program.
  """

  def __init__(self, plan: Plan):
    self._plan = plan

  @property
  def stops(self) -> list[Stop]:
    found = self._plan.inner.stops.most_common()
    return [Stop(name, reason, line, count) for (name, reason, line), count in found]

  @functools.cached_property
  def flops_full(self) -> int:
    return count_flops(self._plan.closed, [d is not NONE for d in self._plan.demands])

  @functools.cached_property
  def flops_sliced(self) -> int:
    return count_flops(jax.make_jaxpr(self._plan.emit)(*self._plan.abstract))


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """A sliced program: `emit(consts, args)` evaluates it on flat arguments."""

  closed: core.ClosedJaxpr
  demands: Sequence[OutputDemand]
  inner: JaxprPlan

  @property
  def report(self) -> Report:
    return Report(self)

  @property
  def abstract(self) -> tuple[list[Any], list[Any]]:
    """Shapes and dtypes of (consts, args)."""
    return [v.aval for v in self.closed.jaxpr.constvars], [v.aval for v in self.closed.jaxpr.invars]

  def emit(
    self, consts: Sequence[Any], args: Sequence[Any], picks: Sequence[Any] | None = None
  ) -> list[Any]:
    """Evaluate the demanded blocks.

    Args:
      consts: the constants of the closed jaxpr.
      args: its flat arguments.
      picks: the indices of every `Sampled` demand in order; by default those it was planned with.
    Returns:
      Per output: None for NONE, the array for ALL, a tuple of blocks for regions, and a vector of
      the elements for `Sampled`.
    """
    if picks is None:
      picks = [d.indices for d in self.demands if isinstance(d, Sampled)]
    jaxpr = self.closed.jaxpr
    values: list[Blocks] = [
      [(r, x)] for v, x in zip(jaxpr.invars, args, strict=True) for r in whole(v)
    ]
    blocks = self.inner.emit(consts, values, picks)
    return [_present(d, b, v) for d, b, v in zip(self.demands, blocks, jaxpr.outvars, strict=True)]


def _present(demand: OutputDemand, blocks: list[Any], v: Any) -> Any:
  if demand is NONE:
    return None
  if demand is ALL or isinstance(demand, Sampled):
    return blocks[0] if isinstance(blocks[0], jax.Array) else jnp.asarray(blocks[0], v.aval.dtype)
  assert not isinstance(demand, Token)
  shape = shape_of(v)
  if _is_gated(demand, shape):
    return tuple(take(blocks[0], full(len(shape)), rg.canonical(r, shape)) for r in demand)
  return tuple(blocks)


def _is_gated(demand: Sequence[Region], shape: tuple[int, ...]) -> bool:
  """Whether so much is wanted that slicing does not pay."""
  return rg.share(tuple(demand), shape) > SLICE_BELOW


def analyze(closed: core.ClosedJaxpr, demands: Sequence[OutputDemand]) -> Plan:
  """Plan a program that computes only the demanded blocks of the outputs.

  Args:
    closed: the program.
    demands: one per output: `NONE`, `ALL`, `Sampled` or a sequence of regions of it.
  Returns:
    The `Plan`; beyond `SLICE_BELOW` of an output, it is computed whole and sliced after.
  """
  analysis = Analysis()
  demands = list(demands)
  keys = itertools.accumulate((isinstance(d, Sampled) for d in demands), initial=0)
  wanted = tuple(map(_regions, demands, map(shape_of, closed.jaxpr.outvars), keys))
  return Plan(closed, demands, analysis.plan(closed.jaxpr, wanted))


def _regions(demand: OutputDemand, shape: tuple[int, ...], key: int) -> Demand:
  if demand is NONE:
    return ()
  if isinstance(demand, Sampled):
    return (Pick(key, demand.indices.shape[0]),)
  if demand is ALL:
    return (full(len(shape)),)
  assert not isinstance(demand, Token)
  if _is_gated(demand, shape):
    return (full(len(shape)),)
  return tuple(rg.canonical(r, shape) for r in demand)


def slice_program(
  fun: Callable[..., Any], demands: Sequence[OutputDemand], *args: Any
) -> tuple[list[Any], Report]:
  """Evaluate only the demanded blocks of a function's outputs.

  outputs[k] = tuple(fun(*args)[k][r] for r in demands[k])

  Args:
    fun: any traceable function; its outputs are flattened.
    demands: one per flat output: `NONE`, `ALL`, `Sampled` or a sequence of regions.
    *args: pytrees of arrays.
  Returns:
    (outputs, report): per flat output None, the array, a tuple of blocks or a vector;
    differentiable, batchable and jittable like `fun` itself.
  """
  closed = jax.make_jaxpr(fun)(*args)
  plan = analyze(closed, demands)
  return plan.emit(closed.consts, jax.tree.leaves(args)), plan.report
