"""From a traced program to its network of axes: calls and loops are walked into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend import core, source_info_util

from .._slicer._rule import opened, scan_parts
from . import _axes
from ._network import Network, Value

_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_CALLING = {
  "jit",
  "pjit",
  "closed_call",
  "core_call",
  "remat",
  "remat2",
  "checkpoint",
  "custom_jvp_call",
  "custom_vjp_call",
  "custom_vjp_call_jaxpr",
  "custom_lin",
}


def network_of(closed: core.ClosedJaxpr, inputs: Sequence[Value]) -> tuple[Network, list[Value]]:
  """Return the network of a program and its outputs; `inputs` name parameters and inputs."""
  network = Network()
  walk = _Walk(network)
  outputs = walk.run(closed.jaxpr, [walk.constant(c) for c in closed.consts], inputs)
  return network, outputs


class _Walk:
  def __init__(self, network: Network) -> None:
    self._network = network

  def constant(self, array: Any) -> Value:
    value = Value(tuple(np.shape(array)), "a constant of the forward", True)
    self._network.block(value, range(len(value.shape)), value.name)
    return value

  def run(self, jaxpr: Any, consts: Sequence[Value], inputs: Sequence[Value]) -> list[Value]:
    env: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
    env |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Value:
      return self.constant(atom.val) if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
      outs = self._equation(eqn, [read(x) for x in eqn.invars])
      env |= dict(zip(eqn.outvars, outs, strict=True))
    return [read(x) for x in jaxpr.outvars]

  def closed(self, closed: Any, inputs: Sequence[Value]) -> list[Value]:
    if not hasattr(closed, "consts"):
      return self.run(closed, [], inputs)
    return self.run(closed.jaxpr, [self.constant(c) for c in closed.consts], inputs)

  def _equation(self, eqn: Any, ins: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    if name in _CALLING:
      inner = next(eqn.params[k] for k in _CALLS if k in eqn.params)
      return self.closed(inner, ins)
    loop: Callable | None = {"scan": self._scan, "while": self._while, "cond": self._cond}.get(name)
    if loop is not None:
      return loop(eqn, ins)
    is_weight = all(v.is_weight for v in ins)
    outs = [Value(_shape(v), is_weight=is_weight) for v in eqn.outvars]
    self._network.place = _place(eqn)
    _axes.relate(self._network, eqn, ins, outs)
    self._network.place = ""
    return outs

  def _link(self, a: Value, b: Value, shift_a: int = 0, shift_b: int = 0) -> None:
    for axis in range(len(a.shape) - shift_a):
      self._network.same((a, axis + shift_a), (b, axis + shift_b))

  def _scan(self, eqn: Any, ins: list[Value]) -> list[Value]:
    consts, carries = scan_parts(eqn, opened(eqn.params["jaxpr"])[0])
    outs = [Value(_shape(v)) for v in eqn.outvars]
    # A carry depends on the inputs as soon as the loop runs, whatever it starts from.
    inner = ins[:consts] + [Value(v.shape) for v in ins[consts : consts + carries]]
    for given, carry in zip(ins[consts:], inner[consts:], strict=False):
      self._link(given, carry)
    for whole in ins[consts + carries :]:
      inner.append(Value(whole.shape[1:], is_weight=whole.is_weight))
      self._link(whole, inner[-1], shift_a=1)
    results = self.closed(eqn.params["jaxpr"], inner)
    for result, carry, out in zip(results[:carries], inner[consts:], outs, strict=False):
      self._link(result, carry)
      self._link(result, out)
    for result, out in zip(results[carries:], outs[carries:], strict=True):
      self._link(result, out, shift_b=1)
    return outs

  def _while(self, eqn: Any, ins: list[Value]) -> list[Value]:
    tests, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    given = ins[tests + consts :]
    carry = [Value(v.shape) for v in given]
    outs = [Value(v.shape) for v in given]
    self.closed(eqn.params["cond_jaxpr"], ins[:tests] + carry)
    results = self.closed(eqn.params["body_jaxpr"], ins[tests : tests + consts] + carry)
    for start, inside, result, out in zip(given, carry, results, outs, strict=True):
      self._link(start, inside)
      self._link(result, inside)
      self._link(result, out)
    return outs

  def _cond(self, eqn: Any, ins: list[Value]) -> list[Value]:
    outs = [Value(_shape(v)) for v in eqn.outvars]
    for branch in eqn.params["branches"]:
      for result, out in zip(self.closed(branch, ins[1:]), outs, strict=True):
        self._link(result, out)
    return outs


def _place(eqn: Any) -> str:
  """The module that an equation belongs to, as linen says it, or else its line."""
  module = str(eqn.source_info.name_stack).partition("/")[2]
  line = source_info_util.summarize(eqn.source_info).rpartition("/")[2]
  return f" (in {module or line})"


def _shape(var: Any) -> tuple[int, ...]:
  return tuple(getattr(var.aval, "shape", ()))
