"""What the type of an array says of the devices that share it.

On a mesh with Explicit axes it says how: JAX refuses to slice, index or flatten a dimension that is
cut. What must, gathers it first, and what stands for it afterwards is sharded like it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def has_devices(aval: Any) -> bool:
  """Whether the compiler may spread an array over devices."""
  mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
  if mesh is None or mesh.empty or mesh.size == 1:
    return False
  return all(kind != AxisType.Manual for kind in mesh.axis_types)


def spec_of(aval: Any) -> tuple[object, ...] | None:
  """The partition of an array on a mesh with Explicit axes, one entry per dimension, else None."""
  spec = getattr(getattr(aval, "sharding", None), "spec", None)
  return tuple(spec) if spec is not None and any(s is not None for s in spec) else None


def unsharded(x: Any, cut: Sequence[bool] | None = None) -> Any:
  """The array with the dimensions to be cut gathered; all of them by default."""
  aval = jax.typeof(x)
  spec = spec_of(aval)
  cut = [True] * len(spec or ()) if cut is None else cut
  if spec is None or all(s is None or not c for s, c in zip(spec, cut, strict=True)):
    return x
  whole = [None if c else s for s, c in zip(spec, cut, strict=True)]
  return jax.sharding.reshard(x, NamedSharding(aval.sharding.mesh, PartitionSpec(*whole)))


def like(x: Any, other: Any) -> Any:
  """The array sharded as another of its shape is, if that is."""
  aval = jax.typeof(other)
  spec = spec_of(aval)
  if spec is None or spec == spec_of(jax.typeof(x)):
    return x
  return jax.sharding.reshard(x, NamedSharding(aval.sharding.mesh, PartitionSpec(*spec)))
