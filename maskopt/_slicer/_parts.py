"""Single elements of a sum that devices share: each reads them of its part, and only they travel.

  picked[k] = sum_d part_d[where[k]]        instead of  (sum_d part_d)[where[k]]

The partitioner sums a weight gradient over the devices as soon as it is multiplied, before anything
is gathered of it. Which dimensions are shared only the partitioner knows, under Auto axes, so this
is one operation with a partitioning of its own. On one device it is a product and a gather.

JAX keeps the Python of a partitioning beside its program. So `jax.export` refuses to serialise it,
and the persistent compilation cache finds it again in another process only under
`jax_remove_custom_partitioning_ptr_from_cache_key`. A program traced of arguments that are not yet
placed (`in_shardings`, shapes without shardings) has none, nor has one for TPUs, whose compiler
calls no Python: these reduce first and gather after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ._sums import Sum

DEVICES: Final = "devices"  # the one axis of the mesh on which a part is computed


def pick_shared(total: Sum, shape: Sequence[int], where: jax.Array, *operands: Any) -> jax.Array:
  """Read single elements of a sum over dimensions that devices may share.

  out[k] = sum(operands).ravel()[where[k]]

  Args:
    total: the sum.
    shape: of its output.
    where: int32 of shape (n,), flat positions in the output, all in range.
    *operands: its operands.
  Returns:
    n elements, whole on every device. Derivatives and batches are those of `total.read`.
  """

  def plain(where: Any, *xs: Any) -> Any:
    return total.read(shape, where, *xs)

  partitioned = custom_partitioning(plain)
  partitioned.def_partition(
    lambda mesh, args, out: _partition(mesh, total, shape, args),
    infer_sharding_from_operands=lambda mesh, args, out: _whole(_devices(mesh, args)),
    decode_shardings=False,  # a dimension may be cut by a part of a mesh axis, which has no name
    sharding_rule=_sharding_rule(total),
    **_kinds(total),
  )
  batched = jax.custom_batching.custom_vmap(lambda where, *xs: partitioned(where, *xs))

  @batched.def_vmap
  def _(axis_size: int, in_batched: list[bool], *args: Any) -> tuple[Any, bool]:
    del axis_size
    return jax.vmap(plain, [0 if b else None for b in in_batched])(*args), True

  differentiable = jax.custom_jvp(lambda where, *xs: batched(where, *xs))

  @differentiable.defjvp
  def _(primals: Any, tangents: Any) -> tuple[Any, Any]:
    return differentiable(*primals), jax.jvp(plain, primals, tangents)[1]

  return differentiable(where, *operands)


def _sharding_rule(total: Sum) -> str:
  operands = ", ".join(" ".join(dims) for dims in total.dims)
  return f"k, {operands} -> k"


def _kinds(total: Sum) -> dict[str, tuple[str, ...]]:
  """Names that devices may cut, for their parts are summed, and names that must be whole."""
  names = dict.fromkeys(d for dims in total.dims for d in dims)
  return {
    "reduction_factors": tuple(d for d in names if d[0] in "so"),
    "need_replication_factors": ("k", *(d for d in names if d[0] == "w")),
  }


class _Cut(NamedTuple):
  """How a dimension is cut: into how many parts, and which of them every device has."""

  parts: int
  part: tuple[int, ...]


def _devices(mesh: Mesh, args: Sequence[Any]) -> tuple[Any, ...]:
  """The devices in the order of the program."""
  for sharding in (a.sharding for a in args if a.sharding is not None and a.shape):
    n = len(sharding.device_set)
    rank = next(len(a.shape) for a in args if a.sharding is sharding)
    return tuple(sharding.devices_indices_map((n,) * rank))
  return tuple(mesh.devices.flat)


def _whole(devices: Sequence[Any]) -> NamedSharding:
  return NamedSharding(Mesh(np.array(devices), (DEVICES,)), PartitionSpec())


def _cuts(arg: Any, n: int) -> list[_Cut]:
  """How the dimensions of an operand are cut over n devices, whatever kind its sharding is."""
  rank = len(arg.shape)
  if arg.sharding is None:
    return [_Cut(1, (0,) * n)] * rank
  # A size that every count divides shows each of them.
  rows = arg.sharding.devices_indices_map((n,) * rank).values()
  spans = [[range(*s.indices(n)) for s in row] for row in rows]
  counts = [n // len(span) for span in spans[0]]
  return [_Cut(c, tuple(s[d].start * c // n for s in spans)) for d, c in enumerate(counts)]


class _Agreed(NamedTuple):
  """Cuts that fit together: every combination of parts is on equally many devices.

  Args:
    cuts: per name of a dimension.
    groups: the devices that hold each combination once.
    combinations: how many there are.
  """

  cuts: dict[str, _Cut]
  groups: list[list[int]]
  combinations: int


def _agree(total: Sum, cuts: Sequence[Sequence[_Cut]], n: int) -> _Agreed:
  chosen: dict[str, _Cut] = {}
  combination, count = np.zeros(n, int), 1
  found = [
    (name, cut)
    for dims, operand in zip(total.dims, cuts, strict=True)
    for name, cut in zip(dims, operand, strict=True)
  ]
  for name, cut in sorted(found, key=lambda f: f[0][0] != "s"):  # what is summed goes first
    if cut.parts == 1 or name in chosen or name[0] == "w":
      continue
    together = combination * cut.parts + cut.part
    held = np.bincount(together, minlength=count * cut.parts)
    if held.min() == held.max():
      chosen[name], combination, count = cut, together, count * cut.parts
  groups = np.argsort(combination, kind="stable").reshape(count, -1).T
  return _Agreed(chosen, groups.tolist(), count)


def _partition(mesh: Mesh, total: Sum, shape: Sequence[int], args: Sequence[Any]) -> Any:
  """What every device computes of its part, and how the operands come to it."""
  devices = _devices(mesh, args)
  operands, whole = args[1:], _whole(devices)
  cuts = [_cuts(a, len(devices)) for a in operands]
  agreed = _agree(total, cuts, len(devices))
  places = [
    _placed(dims, a, own, agreed.cuts, devices)
    for dims, a, own in zip(total.dims, operands, cuts, strict=True)
  ]

  def local(where: Any, *xs: Any) -> Any:
    # A mesh of Explicit axes around the whole program lays out nothing on one device.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
      parts = [
        _own_part(x, a.shape, {d: agreed.cuts[k] for d, k in enumerate(dims) if k in agreed.cuts})
        for x, a, dims in zip(xs, operands, total.dims, strict=True)
      ]
      return _summed(total, shape, agreed, where, parts)

  return whole.mesh, local, whole, (whole, *places)


def _placed(
  dims: Sequence[str], arg: Any, own: Sequence[_Cut], cuts: dict[str, _Cut], devices: Sequence[Any]
) -> Any:
  """The sharding of an operand that is cut as agreed; or whole, and then each device cuts it."""
  if all(cut == cuts.get(name, cut if cut.parts == 1 else None)
         for name, cut in zip(dims, own, strict=True)):  # fmt: skip
    return _whole(devices) if arg.sharding is None else arg.sharding
  mesh = _mesh_of(cuts, np.array(devices))
  if mesh is None:
    return _whole(devices)
  return NamedSharding(mesh, PartitionSpec(*(name if name in cuts else None for name in dims)))


def _mesh_of(cuts: dict[str, _Cut], devices: np.ndarray) -> Mesh | None:
  """The devices in their order as a mesh with an axis for every cut, if that can be."""
  axes: list[tuple[str, int]] = []
  left = devices.size
  for name, cut in sorted(cuts.items(), key=lambda item: -item[1].part.index(1)):
    stride = cut.part.index(1)
    regular = all(part == k // stride % cut.parts for k, part in enumerate(cut.part))
    if not regular or left % (stride * cut.parts):
      return None
    axes += [(f"rest{stride}", left // (stride * cut.parts)), (name, cut.parts)]
    left = stride
  names, sizes = zip(*axes, ("rest", left), strict=True)
  return Mesh(devices.reshape(sizes), names)


def _mine(cut: _Cut, size: int) -> jax.Array:
  """Where this device's part of a dimension begins, of parts of that size."""
  return jnp.asarray(cut.part, jnp.int32)[lax.axis_index(DEVICES)] * np.int32(size)


def _own_part(x: Any, shape: Sequence[int], cuts: dict[int, _Cut]) -> Any:
  """Cut out this device's part of an operand, with zeros past the end of the last one.

  Parts are of one size; what an operand that comes cut has there is not defined.
  """
  for d, cut in cuts.items():
    size = -(-shape[d] // cut.parts)
    lacking = size * cut.parts - shape[d]
    if x.shape[d] == shape[d]:
      x = lax.pad(x, np.zeros((), x.dtype), [(0, lacking * (d == k), 0) for k in range(x.ndim)])
      x = lax.dynamic_slice_in_dim(x, _mine(cut, size), size, d)
    elif lacking:
      exists = lax.broadcasted_iota(jnp.int32, x.shape, d) + _mine(cut, size) < shape[d]
      x = jnp.where(exists, x, jnp.zeros_like(x))
  return x


def _summed(
  total: Sum, shape: Sequence[int], agreed: _Agreed, where: Any, parts: Sequence[Any]
) -> Any:
  """Sum over devices what each has of the sum at the positions, or zero."""
  cut = {d: agreed.cuts[f"o{d}"] for d in range(len(shape)) if f"o{d}" in agreed.cuts}
  local = tuple(-(-n // cut[d].parts) if d in cut else n for d, n in enumerate(shape))
  inside = None
  if cut:
    places = list(jnp.unravel_index(where, shape))
    inside = jnp.ones(where.shape, bool)
    for d, c in cut.items():
      places[d] = places[d] - _mine(c, local[d])
      inside &= (places[d] >= 0) & (places[d] < local[d])
    where = jnp.ravel_multi_index(places, local, mode="clip")
  picked = total.read(local, where, *parts, part=True)
  if inside is not None:
    picked = jnp.where(inside, picked, jnp.zeros_like(picked))
  if agreed.combinations == 1:
    return picked
  groups = agreed.groups if len(agreed.groups) > 1 else None
  return lax.psum(picked, DEVICES, axis_index_groups=groups)
