"""Weights of one network in another of other shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from .. import _patterns, _tree
from .._complaints import Complaint, Complaints
from .._errors import Problem, describe, fail
from ..report._show import Shown, Table, counted, shape as shown
from . import _placement
from ._model import Model
from ._placement import Placement
from ._result import State, Surgery, result

_WHERE = "maskopt.surgery.transplant(rules=...)"
_STYLES = {"copied": "good", "cropped": "warn", "skipped": "dim"}


@dataclasses.dataclass(frozen=True)
class Graft:
  """What became of one leaf of the target.

  Attributes:
    path: in the target.
    source: path in the source; empty if none was asked for.
    shape: in the target.
    source_shape: in the source; None if there is no such leaf.
    outcome: "copied" whole, "cropped" to what both have, or "skipped".
    count: number of copied elements.
    reason: why it was cropped or skipped.
  """

  path: str
  source: str
  shape: tuple[int, ...]
  source_shape: tuple[int, ...] | None
  outcome: str
  count: int
  reason: str = ""


@dataclasses.dataclass(frozen=True, repr=False)
class Transplant(Shown):
  """What `transplant` did to each leaf; it prints itself."""

  leaves: tuple[Graft, ...]

  def of(self, outcome: str) -> tuple[Graft, ...]:
    """The leaves that were "copied", "cropped" or "skipped"."""
    return tuple(x for x in self.leaves if x.outcome == outcome)

  def _table(self) -> Table:
    count = sum(x.count for x in self.leaves)
    told = [f"{len(self.of(x))} {x}" for x in _STYLES]
    return Table(
      f"Transplant: {counted(count, 'element')}; leaves {', '.join(told)}",
      ("path", "from", "source", "target", "outcome"),
      [
        (
          x.path,
          "same" if x.source == x.path else x.source or "-",
          "-" if x.source_shape is None else shown(x.source_shape),
          shown(x.shape),
          f"{x.outcome}: {x.reason}" if x.reason else x.outcome,
        )
        for x in self.leaves
      ],
      [_STYLES[x.outcome] for x in self.leaves],
    )


def transplant(
  source: Any,
  target: Any,
  rules: Any = None,
  *,
  crop: bool = True,
  opt_state: Any = None,
  tx: Any = None,
  to: Any = None,
) -> Surgery:
  """Copy what two networks have in common from one to the other.

    new[i] = source[i] for i < min(shape of source, shape of target), else target[i]

  Args:
    source: an nnx module, linen variables or parameters, or any tree of parameters.
    target: another; it need not be of the same kind.
    rules: (pattern, value) pairs over the paths of the target; the first match wins, and what no
      rule names is left alone. Patterns as in `maskopt.build_mask`, but for layer indices and nnx
      filters. A value is True for the same path in the source; False or None to leave the target as
      it is; a source path: of the leaf, or of the part that stands in for the part that the
      pattern names; or a function of the target's path that returns a source path. By default
      everything of the same path is copied.
    crop: copy the leading block where shapes differ; False skips such leaves.
    opt_state: an optimizer state over the source's parameters, as in `grow`: copied elements bring
      their moments.
    tx: as in `grow`.
    to: as in `grow`.
  Returns:
    A `Surgery`: the target with the copied values in its own dtypes; copied elements are frozen in
    the mask, the others train. `report` says of each leaf what was copied, cropped or skipped, and
    why. Statistics are copied like parameters.
  Raises:
    ValueError: a rule names no leaf of the target or no leaf of the source, or nothing was copied.
    TypeError: a rule's value is none of these.
  Example:
    >>> import jax.numpy as jnp, maskopt
    >>> old, new = {"w": jnp.ones((2, 2))}, {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
    >>> maskopt.surgery.transplant(old, new).report
    Transplant: 4 elements; leaves 0 copied, 1 cropped, 1 skipped
    path  from  source  target  outcome
    --------------------------------------------------------
    b     same  -       (2,)    skipped: the source has none
    w     same  (2, 2)  (3, 2)  cropped: shapes differ
    --------------------------------------------------------
  """
  state = State(opt_state, tx, to)
  state.check(_WHERE)
  give, take = Model(source), Model(target)
  origins = _origins(give, take, rules)
  given = {give.inside(p): p for p in _numbers(give)}
  arrays: dict[str, Any] = {}
  grafts: list[Graft] = []
  placements: dict[str, Placement] = {}
  for path, leaf in _numbers(take).items():
    name = take.inside(path)
    origin = origins.get(name)
    found = None if origin is None else given.get(origin)
    graft = _graft(name, origin, leaf, None if found is None else give.arrays[found], crop)
    grafts.append(graft)
    if graft.count and found is not None:
      placement = _overlap(origin or "", np.shape(give.arrays[found]), np.shape(leaf))
      values = placement.old_part(_placement.host(give.arrays[found]))
      new = placement.into(_placement.host(leaf), values.astype(leaf.dtype))
      arrays[path] = _placement.like(new, leaf)
      if path in take.params and found in give.params:
        placements[name] = placement
  if not arrays:
    got = f"{len(grafts)} leaves of other paths or ranks"
    remedy = "Say by rules what goes where: [(target path, source path)]."
    fail(_WHERE, [Problem("", "a leaf that both networks have", got)], remedy)
  new = take.rebuilt(arrays)
  return result(source, new, placements, state, _WHERE, Transplant(tuple(grafts)))


def _numbers(model: Model) -> dict[str, Any]:
  """Parameters and statistics; states of random generators belong to each network."""
  return {
    p: x
    for p, x in model.arrays.items()
    if p in model.params or jnp.issubdtype(x.dtype, jnp.inexact)
  }


def _origins(give: Model, take: Model, rules: Any) -> dict[str, str]:
  """The source path that each leaf of the target is to come from."""
  names = [take.inside(p) for p in _numbers(take)]
  if rules is None:
    return {n: n for n in names}
  known = [give.inside(p) for p in _numbers(give)]
  tree = _tree.nested(names, list(_numbers(take).values()))
  subject = _patterns.Subject(tree)
  pairs = list(rules.items()) if isinstance(rules, Mapping) else list(rules)
  complaints, seen, origins = Complaints(), set(), dict[str, str]()
  for k, (pattern, value) in enumerate(pairs):
    try:
      found = [subject.flat.paths[i] for i in _patterns.matches(pattern, subject)]
      for path in found:
        origin = None if path in seen else _origin(pattern, value, path, known)
        if origin is not None:
          origins[path] = origin
      seen |= set(found)
    except Complaint as complaint:
      complaints.add(f"rules[{k}] {_patterns.show(pattern)}", complaint)
  complaints.raise_all(_WHERE)
  return origins


def _origin(pattern: Any, value: Any, path: str, known: list[str]) -> str | None:
  """The source path that a rule's value gives for one path of the target."""
  if value is True:
    return path
  if value is None or value is False:
    return None
  if isinstance(value, Callable):
    value = value(path)
    if value is None:
      return None
  remedy = "Write True, False, a source path, or a function of the path that returns one."
  if not isinstance(value, str):
    raise Complaint("where the values come from", describe(value), remedy, TypeError)
  below = isinstance(pattern, str) and _tree.covers(pattern, path)
  origin = _tree.join(value, path[len(pattern) :].lstrip("/")) if below else value
  if not any(_tree.covers(value, name) for name in known):
    near = ", ".join(known[:8])
    raise Complaint("a path of the source", f"{value!r} (it has {near})", remedy)
  return origin


def _graft(name: str, origin: str | None, leaf: Any, found: Any, crop: bool) -> Graft:
  """What is to become of one leaf."""
  shape = tuple(np.shape(leaf))
  if origin is None:
    return Graft(name, "", shape, None, "skipped", 0, "no rule asks for it")
  if found is None:
    return Graft(name, origin, shape, None, "skipped", 0, "the source has none")
  other = tuple(np.shape(found))

  def skipped(reason: str) -> Graft:
    return Graft(name, origin, shape, other, "skipped", 0, reason)

  if len(other) != len(shape):
    return skipped("another number of axes")
  if not _fits(found.dtype, leaf.dtype):
    return skipped(f"{found.dtype} for {leaf.dtype}")
  if other == shape:
    return Graft(name, origin, shape, other, "copied", int(np.prod(shape)))
  if not crop:
    return skipped("shapes differ")
  count = int(np.prod([min(a, b) for a, b in zip(shape, other, strict=True)]))
  return Graft(name, origin, shape, other, "cropped", count, "shapes differ")


def _fits(source: Any, target: Any) -> bool:
  """Whether values of one dtype stand for the same numbers in the other, up to rounding."""
  if source == target:
    return True
  return all(jnp.issubdtype(x, jnp.floating) for x in (source, target))


def _overlap(path: str, source: tuple[int, ...], target: tuple[int, ...]) -> Placement:
  """The leading block that two shapes have in common."""
  both = [min(a, b) for a, b in zip(source, target, strict=True)]
  kept = tuple(None if m == b else np.arange(m) for m, b in zip(both, target, strict=True))
  taken = tuple(None if m == a else np.arange(m) for m, a in zip(both, source, strict=True))
  return Placement(path, kept, taken)
