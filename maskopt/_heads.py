"""Where the attention heads are in a parameter."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ._complaints import Complaint
from ._sides import Side


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One parameter as rule values see it.

  Attributes:
    value: the parameter, concrete or abstract.
    shape: its shape.
    siblings: the shapes of the parameters of the same layer, its own among them.
    side: where the output units of its layer are.
  """

  value: Any
  shape: tuple[int, ...]
  siblings: tuple[tuple[int, ...], ...]
  side: Side = Side()


def head_axis(leaf: Leaf, n: int, axis: int | None) -> int | None:
  """Return the axis that runs over `n` heads or is split into them; None for a bias without any.

  A kernel makes heads, (in, n, d) or (in, n * d), or reads them, (n, d, out) or (n * d, out). The
  bias has heads only where its kernel makes them.

  Raises:
    Complaint: no axis fits, or the shape leaves open which one is meant.
  """
  kernel = max(leaf.siblings, key=len)
  if len(leaf.shape) == len(kernel) or len(kernel) < 2:
    return _own_axis(leaf.shape, leaf.siblings, n, axis)
  of_kernel = _own_axis(kernel, leaf.siblings, n, axis)
  rank = len(leaf.shape)
  if leaf.side.out_first:
    found, matching = of_kernel, kernel[:rank]
  else:
    found, matching = of_kernel - (len(kernel) - rank), kernel[len(kernel) - rank :]
  return found if 0 <= found < rank and leaf.shape == matching else None


def _own_axis(
  shape: tuple[int, ...], siblings: tuple[tuple[int, ...], ...], n: int, axis: int | None
) -> int:
  rank = len(shape)
  if axis is not None:
    if not -rank <= axis < rank:
      raise Complaint(f"an axis in [{-rank}, {rank - 1}]", f"{axis} of shape {shape}", _REMEDY)
    if shape[axis] % n:
      raise Complaint(f"an axis {axis} that {n} heads divide", f"shape {shape}", _COUNT)
    return axis % rank
  exact = [k for k in range(rank) if shape[k] == n]
  if rank == 3 and len(exact) > 1:
    # (in, n, d) or (n, d, out): never the last axis; a bias (n, d) or (out,) tells the two apart.
    ranks = {len(s) for s in siblings if len(s) < 3}
    exact = [k for k in exact if k < 2 and ranks <= {k + 1}]
  if rank == 2:
    exact = [k for k in range(rank) if shape[k] % n == 0]
  if len(exact) == 1:
    return exact[0]
  if not exact:
    raise Complaint(f"an axis for {n} heads", f"shape {shape}, where none fits", _COUNT)
  got = f"shape {shape}, where axes {exact} may be meant"
  raise Complaint(f"one axis for {n} heads", got, _REMEDY)


_COUNT = "Give the number of heads as of=, and name kernels that have heads with the pattern."
_REMEDY = (
  "Say which axis of the kernel: maskopt.heads(idx, of=n, axis=-1) where heads are made, axis=0 "
  "where they are read (the other way round in Equinox)."
)


_PARTS = "Say parts=1 where the axis holds one projection, parts=3 for query, key and value."


def head_mask(size: int, n: int, chosen: slice | np.ndarray, parts: int, where: str) -> np.ndarray:
  """Return which of `size` positions belong to the chosen heads.

  position[p, h, d] = h in chosen        size = parts * n * d
  """
  if size % (parts * n):
    raise Complaint(f"{parts} x {n} heads", f"an axis of {size} {where}", _PARTS)
  keep = np.zeros((parts, n, size // (parts * n)), bool)
  keep[:, chosen] = True
  return keep.reshape(size)


def parts_of(leaf: Leaf, axis: int, n: int, parts: int | None) -> int:
  """How many projections lie side by side on the axis; 3 for a fused query, key and value.

  Raises:
    Complaint: the axis is 2 or 3 times the model's size, so the projections may be side by side or
      interleaved, and both are in use.
  """
  if parts is not None:
    return parts
  kernel = max(leaf.siblings, key=len)
  size, others = leaf.shape[axis], [m for m in kernel if m != leaf.shape[axis]]
  if len(kernel) == 2 and size != n and any(size in (2 * m, 3 * m) for m in others):
    ratio = size // others[0]
    got = f"an axis of {size} beside one of {others[0]}"
    remedy = f"Say parts={ratio} if whole projections lie side by side, parts=1 if they interleave."
    raise Complaint(f"the order of {ratio} fused projections", got, remedy)
  return 1
