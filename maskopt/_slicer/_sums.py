"""Sums that devices may share: which dimensions they run over, and which they pass on.

  sum = total of the sums of its parts, along any dimension that is summed over

Data parallelism cuts a weight gradient along the batch that it sums over, model parallelism along
the features that it passes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from .. import _sharded
from ._rule import Equation, bind, out_shape, shape_of


class Sum(NamedTuple):
  """A sum over dimensions of its operands.

  Args:
    dims: per operand, one name per dimension: "s0", "s1", ... are summed over, "o0", ... are those
      dimensions of the output, "w0", ... must be whole. Equal names are cut alike.
    read: (output shape, flat positions, *operands) to the elements of the sum of these operands;
      `part` says that they are of one device, so that there is nothing to lay out.
  """

  dims: tuple[tuple[str, ...], ...]
  read: Callable[..., Any]


def has_devices(aval: Any) -> bool:
  """Whether the compiler may spread a value over devices, and lets us say how.

  TPUs know no partitioning of an operation's own: a program that has one does not compile there.
  """
  if not _sharded.has_devices(aval):
    return False
  kind = getattr(aval.sharding.mesh.abstract_device, "device_kind", "")  # of a topology: no backend
  return jax.default_backend() in ("cpu", "gpu") and "tpu" not in kind.lower()


def _named(*dims: list[str]) -> tuple[tuple[str, ...], ...]:
  """The dimensions without a name get one of their own each."""
  count = iter(range(sum(map(len, dims))))
  return tuple(tuple(d or f"w{next(count)}" for d in operand) for operand in dims)


def _whole_first(compute: Callable[..., Any]) -> Callable[..., Any]:
  """Compute the whole sum, and gather."""

  def read(shape: Sequence[int], where: Any, *xs: Any, part: bool = False) -> Any:
    return jnp.ravel(compute(shape, *xs, part=part)).at[where].get(mode="promise_in_bounds")

  return read


def _bound(eqn: Equation) -> Callable[..., Any]:
  def compute(shape: Sequence[int], *xs: Any, part: bool) -> Any:
    del shape
    return bind(
      eqn, *xs, **({"out_sharding": None} if part and "out_sharding" in eqn.params else {})
    )

  return compute


def _dot(eqn: Equation) -> Sum:
  (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
  lhs, rhs = ([""] * len(shape_of(v)) for v in eqn.invars)
  for k, (a, b) in enumerate(zip(lhs_sum, rhs_sum, strict=True)):
    lhs[a] = rhs[b] = f"s{k}"
  for k, (a, b) in enumerate(zip(lhs_batch, rhs_batch, strict=True)):
    lhs[a] = rhs[b] = f"o{k}"
  out = iter(range(len(lhs_batch), len(out_shape(eqn))))
  for side in (lhs, rhs):
    side[:] = [d or f"o{next(out)}" for d in side]
  return Sum(_named(lhs, rhs), _whole_first(_bound(eqn)))


def _conv(eqn: Equation) -> Sum | None:
  p, dims = eqn.params, eqn.params["dimension_numbers"]
  if p["feature_group_count"] != 1:
    return None
  lhs, rhs = ([""] * len(shape_of(v)) for v in eqn.invars)
  lhs[dims.lhs_spec[1]] = rhs[dims.rhs_spec[1]] = "s0"
  if p["batch_group_count"] == 1:
    lhs[dims.lhs_spec[0]] = f"o{dims.out_spec[0]}"
    rhs[dims.rhs_spec[0]] = f"o{dims.out_spec[1]}"
  return Sum(_named(lhs, rhs), _whole_first(_bound(eqn)))


def _reduce_sum(eqn: Equation) -> Sum:
  axes = eqn.params["axes"]
  summed, kept = (iter(range(n)) for n in (len(axes), len(out_shape(eqn))))
  rank = len(shape_of(eqn.invars[0]))
  dims = [f"s{next(summed)}" if d in axes else f"o{next(kept)}" for d in range(rank)]
  return Sum(_named(dims), _whole_first(_bound(eqn)))


def _scatter_add(eqn: Equation) -> Sum | None:
  """What is added to the operand, which is left to be read by itself."""
  dn, shape = eqn.params["dimension_numbers"], out_shape(eqn)
  if dn.operand_batching_dims:
    return None
  updates = shape_of(eqn.invars[2])
  indices = [""] * len(shape_of(eqn.invars[1]))
  added = [""] * len(updates)
  windows = [d for d in range(len(shape)) if d not in dn.inserted_window_dims]
  for d, u in zip(windows, dn.update_window_dims, strict=True):
    if d not in dn.scatter_dims_to_operand_dims and updates[u] == shape[d]:
      added[u] = f"o{d}"
  scattered = [u for u in range(len(added)) if u not in dn.update_window_dims]
  for k, u in enumerate(scattered):
    indices[k] = added[u] = f"s{k}"
  aval: Any = eqn.outvars[0].aval

  def added_up(shape: Sequence[int], at: Any, values: Any, *, part: bool) -> Any:
    # Rows past the end of the last part are zeros, added wherever.
    hints = {"unique_indices": False, "indices_are_sorted": False} if part else {}
    return bind(eqn, jnp.zeros(shape, aval.dtype), at, values, **hints)

  return Sum(_named(indices, added), _whole_first(added_up))


_SUMS: Final[dict[str, Callable[[Equation], Sum | None]]] = {
  "dot_general": _dot,
  "conv_general_dilated": _conv,
  "reduce_sum": _reduce_sum,
  "scatter-add": _scatter_add,
  "scatter_add": _scatter_add,
}


def shared_sum(eqn: Equation) -> Sum | None:
  """How the equation sums what devices may share; None if it does not, or there is one device."""
  seen = any(has_devices(v.aval) for v in (*eqn.invars, *eqn.outvars))
  find = _SUMS.get(eqn.primitive.name) if seen else None
  found = find(eqn) if find else None
  return found if found and any(d[0] == "s" for dims in found.dims for d in dims) else None
