"""What a freeze mask saves in a loss or a whole step, what stops it, and where."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core, source_info_util

from . import _grad, _journal
from ._errors import Problem, describe, fail
from .report._show import Shown, Table

_WHERE = "maskopt.explain(fun_or_step, freeze_mask, *args)"


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation(Shown):
  """What `explain` found; it shows itself as a table.

  Attributes:
    flops_full: matmul and convolution FLOPs of JAX's whole gradient, forward pass included.
    flops_sliced: the same as maskopt computes it.
    stops: where a demand for a part met a primitive that could not pass it on; each has
      `primitive`, `reason`, `line`, `count`.
    leaves: one `Leaf` for every parameter.
  """

  flops_full: int
  flops_sliced: int
  stops: tuple[Any, ...]
  leaves: tuple[Leaf, ...]

  def _table(self) -> Table:
    share = self.flops_sliced / self.flops_full if self.flops_full else 1.0
    title = (
      f"Backward and forward matmuls: {self.flops_sliced:,} of {self.flops_full:,} FLOPs"
      f" ({share:.0%})"
    )
    rows = [(x.path or ".", x.layout, x.trains, x.gradient, x.update) for x in self.leaves]
    notes = [("warn", f"{x.path or '.'}: {x.lost}") for x in self.leaves if x.lost]
    notes += [
      ("warn", f"{s.primitive} at {s.line} was computed whole, {s.count} times: {s.reason}")
      for s in self.stops
    ]
    styles = ["warn" if x.lost else "" for x in self.leaves]
    headers = ("path", "layout", "trains", "gradient", "update")
    return Table(title, headers, rows, styles, notes=notes)


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One parameter's way through a step.

  Attributes:
    path: of the parameter.
    layout: how its trainable values are stored.
    trains: how many elements train, of how many.
    gradient: "none", "whole", "blocks" or "elements": what the backward pass computes.
    update: "in place", "whole leaf", "untouched", or "" if the step had no `apply_updates`.
    lost: why an update that could have been in place was not, or "".
  """

  path: str
  layout: str
  trains: str
  gradient: str
  update: str = ""
  lost: str = ""


def explain(
  fun_or_step: Callable[..., Any], freeze_mask: Any, *args: Any, has_aux: bool = False
) -> Explanation:
  """Trace a loss or a training step and report what the freeze mask saves in it.

    saved = 1 - flops_sliced / flops_full

  Args:
    fun_or_step: a loss, whose first argument is differentiated; or a step that calls `maskopt.grad`
      or `maskopt.value_and_grad`, and perhaps `update` and `maskopt.apply_updates`.
    freeze_mask: the freeze mask over the loss's first argument; a step uses its own.
    *args: arguments of the function, concrete or abstract.
    has_aux: whether a loss returns (value, auxiliary data).
  Returns:
    An `Explanation`: FLOPs full and sliced, the primitives that stopped a demand and their source
    lines, and for each leaf whether its update takes the in-place path and, if not, what changed it
    on the way. Nothing is run.
  Raises:
    ValueError: the mask does not fit, or a step computes its gradient by other means; TypeError:
      there is no function.
  Example:
    >>> import jax.numpy as jnp, numpy as np, maskopt
    >>> loss = lambda w, x: ((x @ w) ** 2).sum()
    >>> found = maskopt.explain(loss, np.arange(8) > 0, jnp.ones((8, 8)), jnp.ones((4, 8)))
    >>> found.flops_full, found.flops_sliced
    (1024, 576)
  """
  if not callable(fun_or_step):
    problem = Problem("", "a loss or a training step", describe(fun_or_step), TypeError)
    fail(_WHERE, [problem], "Give it the function itself, and its arguments after the mask.")
  with _journal.opened() as notes:
    closed = jax.make_jaxpr(fun_or_step)(*args)
  if not notes:
    value = jax.tree.leaves(closed.out_avals)
    if not value or value[0].shape != ():
      problem = Problem("", "a scalar loss, or a step that calls maskopt.grad", "neither")
      fail(_WHERE, [problem], "Compute the gradient with maskopt.value_and_grad in the step.")
    loss_grad = _grad.value_and_grad(fun_or_step, freeze_mask, has_aux=has_aux)
    with _journal.opened() as notes:
      closed = jax.make_jaxpr(loss_grad)(*args)
  return _explained(notes, closed.jaxpr)


def _explained(notes: list[_journal.Note], jaxpr: core.Jaxpr) -> Explanation:
  gradients = [n for n in notes if isinstance(n, _journal.Gradient)]
  received = {n.path: n for n in notes if isinstance(n, _journal.Received)}
  applied = {n.path: n for n in notes if isinstance(n, _journal.Applied)}
  marks = dict(_marks(jaxpr))
  leaves: dict[str, Leaf] = {}
  for gradient in gradients:
    for path, layout in gradient.layouts.items():
      update, lost = _update(layout.kind, received.get(path), applied.get(path), marks.get(path))
      trains = "?" if layout.count is None else f"{layout.count:,}"
      kind = received[path].kind if path in received else layout.kind
      count = f"{trains} of {layout.size:,}"
      leaves[path] = Leaf(path, kind, count, _grad.computed(layout), update, lost)
  return Explanation(
    sum(g.flops_full for g in gradients),
    sum(g.flops_sliced for g in gradients),
    tuple(stop for g in gradients for stop in g.stops),
    tuple(leaves.values()),
  )


def _update(kind: str, received: Any, applied: Any, mark: str | None) -> tuple[str, str]:
  """How the update was applied, and why not in place if it could have been."""
  if applied is None:
    return "", ""
  if kind == "Frozen":
    return "untouched", ""
  if applied.in_place:
    return "in place", ""
  if received is not None and received.kind in ("Dense", "Full"):
    return "whole leaf", ""
  if received is None:
    return "whole leaf", "update ran in another trace than apply_updates: call both in one jit."
  return "whole leaf", f"the packed update was lost: {mark or 'it was changed after update'}."


def _marks(jaxpr: core.Jaxpr) -> Iterator[tuple[str, str]]:
  """Each marked update's path, and what made the array that arrived."""
  makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
  for eqn in jaxpr.eqns:
    path = _journal.mark_of(eqn.params.get("name") or "") if eqn.primitive.name == "name" else None
    if path is not None:
      source = eqn.invars[0]
      yield path, _made_by(makers.get(source) if isinstance(source, core.Var) else None)
    for inner in _inner(eqn):
      yield from _marks(inner)


def _made_by(maker: Any) -> str:
  if maker is None:
    return "it came in as an argument of a jit; call update and apply_updates in one"
  line = source_info_util.summarize(maker.source_info)
  name = maker.primitive.name
  if any(True for _ in _inner(maker)):
    return f"it left a {name} at {line}; call update and apply_updates on the same side of it"
  return f"{name} at {line} changed it; put that transform inside selective_transform"


def _inner(eqn: Any) -> Iterator[core.Jaxpr]:
  for value in eqn.params.values():
    for x in value if isinstance(value, (tuple, list)) else [value]:
      if isinstance(x, core.ClosedJaxpr):
        yield x.jaxpr
      elif isinstance(x, core.Jaxpr):
        yield x
