"""Reductions, scans along an axis, windows and batched algebra: dimensions that the operation does
not mix pass a demand on; dimensions it mixes are read whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from ._region import Region
from ._rule import Equation, Piece, rebind, rule, shape_of


@rule(
  "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor",
  "argmax", "argmin",
)  # fmt: skip
def reduce(eqn: Equation, r: Region) -> Piece:
  rest = iter(r)
  rank = len(shape_of(eqn.invars[0]))
  read = Region(None if d in eqn.params["axes"] else next(rest) for d in range(rank))
  return Piece([read], rebind(eqn))


def widened(r: Region, mixed: Sequence[bool]) -> Region | None:
  """The region with the mixed dimensions whole; None if nothing is left of the demand."""
  wide = Region(None if m else d for d, m in zip(r, mixed, strict=True))
  return None if wide.is_full else wide


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def cumulative(eqn: Equation, r: Region) -> Piece | None:
  got = widened(r, [d == eqn.params["axis"] for d in range(len(r))])
  return None if got is None else Piece([got], rebind(eqn), got)


CORE_RANKS = {"cholesky": 2, "triangular_solve": 2, "fft": None}  # None: as many as fft_lengths


@rule(*CORE_RANKS)
def batched(eqn: Equation, r: Region) -> Piece | None:
  """Leading dimensions are a batch; the trailing ones are mixed."""
  rank = CORE_RANKS[eqn.primitive.name] or len(eqn.params["fft_lengths"])
  got = widened(r, [d >= len(r) - rank for d in range(len(r))])
  if got is None or any(len(shape_of(v)) != len(r) for v in eqn.invars):
    return None
  return Piece([got] * len(eqn.invars), rebind(eqn), got)


@rule(
  "reduce_window_sum", "reduce_window_max", "reduce_window_min", "select_and_scatter_add",
  "select_and_gather_add",
)  # fmt: skip
def window(eqn: Equation, r: Region) -> Piece | None:
  """Pooling and its gradient: batch and channels pass, positions under a window are read whole."""
  p, rank = eqn.params, len(r)
  ones = (1,) * rank

  def is_mixed(d: int) -> bool:
    sizes = [p["window_dimensions"][d], p["window_strides"][d]]
    sizes += [(p.get(name) or ones)[d] for name in ("base_dilation", "window_dilation")]
    return any(n != 1 for n in sizes) or tuple(p["padding"][d]) != (0, 0)

  got = widened(r, [is_mixed(d) for d in range(rank)])
  return None if got is None else Piece([got] * len(eqn.invars), rebind(eqn), got)
