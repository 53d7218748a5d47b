"""Backward analysis and forward emission of one jaxpr.

Analysis walks the equations from last to first and joins, per variable, the regions that its
readers ask for; emission walks forward and evaluates every wanted region of every variable once.

  plan.emit(...)[k] = outvars[k][demands[k]]        nothing that no demand reaches is computed
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from jax.extend import core, source_info_util

from .. import _sharded
from . import (
  _control,
  _region as rg,
  _rules_contract as _rules_contract,
  _rules_index as _rules_index,
  _rules_multi,
  _rules_reduce as _rules_reduce,
  _rules_reshape as _rules_reshape,
  _rules_shape as _rules_shape,
  _sampled,
)
from ._region import Demand, Pick, Region, Wanted, full
from ._rule import (
  RULES,
  Blocks,
  Equation,
  Picks,
  Piece,
  Step,
  bind,
  context_of,
  has_side_effects,
  is_literal,
  out_shape,
  shape_of,
  whole,
)
from ._take import take

Demands: TypeAlias = tuple[Demand, ...]
Stop: TypeAlias = tuple[str, str, str]  # primitive, reason, source line


# What reads less than all of its operands even where all of its outputs, or all of one, is wanted.
_READ_LESS = frozenset({"slice", "split", "unstack", "pad"})


class Environment(dict[Any, Blocks]):
  """The blocks computed so far of every variable."""

  def write(self, v: Any, blocks: Blocks) -> None:
    self.setdefault(v, []).extend(blocks)

  def __init__(self, picks: Picks):
    super().__init__()
    self.picks = picks

  def read(self, v: Any, wanted: Wanted) -> Any:
    if isinstance(wanted, Pick):
      return self._read_pick(v, wanted)
    if is_literal(v):
      return v.val if wanted.is_full else take(v.val, full(len(wanted)), wanted)
    blocks = self[v]
    for have, block in blocks:
      if have == wanted:
        return block
    for have, block in blocks:
      if isinstance(have, Region) and rg.covers(have, wanted):
        part = take(block, have, wanted)
        blocks.append((wanted, part))  # the next reader of the same region shares it
        return part
    raise AssertionError(f"{wanted} of {v} was never demanded")

  def _read_pick(self, v: Any, pick: Pick) -> Any:
    blocks = [] if is_literal(v) else self[v]
    for have, block in blocks:
      if have == pick:
        return block
    part = _sampled.read(self.read(v, whole(v)[0]), pick, self.picks)
    blocks.append((pick, part))
    return part


@dataclasses.dataclass(eq=False)
class JaxprPlan:
  """The steps that compute the demanded regions of a jaxpr's outputs.

  Args:
    jaxpr: the program.
    demands: per output, the regions wanted.
    ins: per input, the regions that are read.
    steps: what to evaluate, in program order.
    last: per step, the variables that nothing reads afterwards.
    stops: partial demands that a primitive did not pass on, here or in an inner jaxpr.
  """

  jaxpr: core.Jaxpr
  demands: Demands
  ins: Demands
  steps: list[Step]
  last: list[list[Any]]
  stops: Counter[Stop]
  compiled: Callable[..., Any] | None = None  # set by whoever calls the plan as one function

  def emit(
    self, consts: Sequence[Any], values: Sequence[Blocks], picks: Picks = ()
  ) -> list[list[Any]]:
    """Evaluate the plan.

    Args:
      consts: one array per constant of the jaxpr.
      values: per input, blocks that cover `ins`.
      picks: the index arrays that picks refer to.
    Returns:
      Per output, one block per demanded region.
    """
    env = Environment(picks)
    for v, const in zip(self.jaxpr.constvars, consts, strict=True):
      env.write(v, [(full(len(shape_of(v))), const)])
    for v, blocks in zip(self.jaxpr.invars, values, strict=True):
      env.write(v, list(blocks))
    for step, last in zip(self.steps, self.last, strict=True):
      with context_of(step.eqn):
        pairs = zip(step.eqn.invars, step.ins, strict=True)
        operands = [[env.read(v, r) for r in regions] for v, regions in pairs]
        results = step.run(operands, picks)
      for v, blocks in zip(step.eqn.outvars, results, strict=True):
        env.write(v, blocks)
      for v in last:
        env.pop(v, None)
    outputs = zip(self.jaxpr.outvars, self.demands, strict=True)
    return [[env.read(v, r) for r in regions] for v, regions in outputs]


class Analysis:
  """Plans by (jaxpr, demands): layers that share a jaxpr are analysed once."""

  def __init__(self) -> None:
    self._plans: dict[tuple[int, Demands], JaxprPlan] = {}

  def plan(self, jaxpr: core.Jaxpr, demands: Demands) -> JaxprPlan:
    key = id(jaxpr), demands
    if key not in self._plans:
      self._plans[key] = self._analyze(jaxpr, demands)
    return self._plans[key]

  def _analyze(self, jaxpr: core.Jaxpr, demands: Demands) -> JaxprPlan:
    wanted: dict[Any, Demand] = {}
    for v, regions in zip(jaxpr.outvars, demands, strict=True):
      _want(wanted, v, regions)
    steps: list[Step] = []
    stops: Counter[Stop] = Counter()
    for eqn in reversed(jaxpr.eqns):
      outs = tuple(wanted.get(v, ()) for v in eqn.outvars)
      if not any(outs) and not has_side_effects(eqn):
        continue
      step = self._step(eqn, outs, stops)
      steps.append(step)
      for v, regions in zip(eqn.invars, step.ins, strict=True):
        _want(wanted, v, regions)
    ins = tuple(wanted.get(v, ()) for v in jaxpr.invars)
    return JaxprPlan(jaxpr, demands, ins, steps[::-1], _last_reads(jaxpr, steps), stops)

  def _step(self, eqn: Equation, outs: Demands, stops: Counter[Stop]) -> Step:
    asked, outs = outs, _passable(eqn, outs)
    if outs != asked:
      stops[(eqn.primitive.name, _sampled.GATHERED, _line(eqn))] += 1
    name = eqn.primitive.name
    is_partial = _reads_less(eqn) or any(not r.is_full for regions in outs for r in regions)
    if has_side_effects(eqn) and name not in _control.CALLS:
      return _whole(eqn)
    if name in _control.CALLS:
      unwanted = any(not d and not _is_dropped(v) for v, d in zip(eqn.outvars, outs, strict=True))
      step = _control.CALLS[name](eqn, outs, self.plan) if is_partial or unwanted else None
      if step is not None:
        if step.stopped is not None:
          stops[(name, step.stopped, _line(eqn))] += 1
        if not is_partial and not any(map(_is_shorter, step.plans)):
          return _whole(eqn)
        for plan in step.plans:
          stops.update(plan.stops)
        return step
    if not is_partial:
      return _whole(eqn)
    step = _by_rule(eqn, outs)
    if step.stopped is not None:
      stops[(name, step.stopped, _line(eqn))] += 1
    return step


def _reads_less(eqn: Equation) -> bool:
  return eqn.primitive.name in _READ_LESS and _sharded.spec_of(eqn.invars[0].aval) is None


def _passable(eqn: Equation, outs: Demands) -> Demands:
  """The demands with picks widened where the equation has no rule to pass them on."""
  if not any(isinstance(r, Pick) for d in outs for r in d):
    return outs
  name = eqn.primitive.name
  if name in _sampled.TRANSPARENT or name in _sampled.PICKED:
    return outs
  return tuple(
    rg.without_picks(d, len(shape_of(v))) for d, v in zip(outs, eqn.outvars, strict=True)
  )


def _want(wanted: dict[Any, Demand], v: Any, regions: Demand) -> None:
  """Join regions to what is wanted of a variable; dimensions sharded explicitly stay whole."""
  if not regions or is_literal(v):
    return
  shape, old = shape_of(v), wanted.get(v, ())
  spec = _sharded.spec_of(v.aval)
  for r in regions:
    if spec is not None and isinstance(r, Pick):
      r = full(len(shape))
    elif spec is not None:
      r = Region(None if s is not None else d for s, d in zip(spec, r, strict=True))
    old = rg.join(old, r, shape)
  wanted[v] = old


def _last_reads(jaxpr: core.Jaxpr, backward: list[Step]) -> list[list[Any]]:
  """Per step in program order, the variables that it is the last to read."""
  seen = {v for v in jaxpr.outvars if not is_literal(v)}
  last: list[list[Any]] = []
  for step in backward:
    fresh = {v for v in (*step.eqn.invars, *step.eqn.outvars) if not is_literal(v)} - seen
    seen |= fresh
    last.append(list(fresh))
  return last[::-1]


def _is_dropped(v: Any) -> bool:
  return type(v).__name__ == "DropVar"


def _is_shorter(plan: JaxprPlan) -> bool:
  return len(plan.steps) < len(plan.jaxpr.eqns)


def _whole(eqn: Equation, stopped: str | None = None) -> Step:
  """Compute the equation as JAX would; readers slice what they want."""

  def run(operands: list[list[Any]], picks: Picks) -> list[Blocks]:
    del picks
    out = bind(eqn, *[blocks[0] for blocks in operands])
    out = out if eqn.primitive.multiple_results else [out]
    return [[(r, x) for r in whole(v)] for v, x in zip(eqn.outvars, out, strict=True)]

  return Step(eqn, [whole(v) for v in eqn.invars], run, stopped)


def _by_rule(eqn: Equation, outs: Demands) -> Step:
  name = eqn.primitive.name
  if name in _rules_multi.MULTI:
    return _rules_multi.MULTI[name](eqn, outs) or _whole(eqn, "this demand has no rule")
  if name not in RULES or len(outs) != 1:
    return _whole(eqn, "no rule for this primitive")
  pieces: dict[Wanted, Piece] = {}  # by what comes out: rounded up, two demands may be one
  for r in outs[0]:
    piece = _sampled.PICKED[name](eqn, r) if isinstance(r, Pick) else RULES[name](eqn, r)
    if piece is None and isinstance(r, Pick):
      return _by_rule(eqn, (whole(eqn.outvars[0]),))._replace(stopped=_sampled.GATHERED)
    if piece is None:
      return _whole(eqn, "this demand has no rule")
    pieces[r if piece.got is None else piece.got] = piece
  shape = out_shape(eqn)
  if len(pieces) > 1 and rg.share(_regions(pieces), shape) > 1:
    return _whole(eqn, "its regions, rounded up, are more than the whole")
  reads = [[p.ins[k] for p in pieces.values()] for k in range(len(eqn.invars))]
  ins = [tuple(r for r in column if r is not None) for column in reads]

  def run(operands: list[list[Any]], picks: Picks) -> list[Blocks]:
    queues = [iter(blocks) for blocks in operands]
    out: Blocks = []
    for got, p in pieces.items():
      args = [None if r is None else next(q) for r, q in zip(p.ins, queues, strict=True)]
      args = [picks, *args] if p.needs_picks else args
      out.append((got, p.emit(*args)))
    return [out]

  return Step(eqn, ins, run)


def _regions(wanted: Iterable[Wanted]) -> Demand:
  return tuple(r for r in wanted if isinstance(r, Region))


def _line(eqn: Equation) -> str:
  return source_info_util.summarize(eqn.source_info)
