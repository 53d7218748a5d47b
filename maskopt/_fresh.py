"""A fresh optimizer state of which constants are not written until somebody wants them.

A migration replaces most of what `init` returns. Moments that begin as one number would be dense
arrays for nothing, and the packed parameters they were shaped after would be gathered for nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import core


@dataclasses.dataclass(frozen=True)
class Constant:
  """An array that has one value throughout; a leaf of a tree, though not of a JAX one."""

  value: Any
  shape: tuple[int, ...]

  @property
  def dtype(self) -> Any:
    return self.value.dtype

  @property
  def ndim(self) -> int:
    return len(self.shape)


def whole(tree: Any) -> Any:
  """The tree with all its constants written."""
  return jax.tree.map(lambda x: jnp.full(x.shape, x.value) if isinstance(x, Constant) else x, tree)


def operand(x: Any) -> Any:
  """What stands for x in a `where`."""
  return x.value if isinstance(x, Constant) else x


def state(init: Callable[[Any], Any], params: Any) -> Any:
  """Return `init(params)`, with `Constant` leaves where it is known to fill an array.

  Whoever reads values (a mask that is a function of them) or places arrays (a mesh) cannot be
  traced; then everything is written.
  """
  if not _alone(params):
    return init(params)
  try:
    # A function of its own, for JAX remembers traces and what init reads may have changed.
    closed, shaped = jax.make_jaxpr(lambda p: init(p), return_shape=True)(params)
  except Exception:  # whatever is wrong without tracing too, `init` itself says better, and alone
    closed = shaped = None
  if closed is None:
    return init(params)
  values = dict(zip(closed.jaxpr.invars, jax.tree.leaves(params), strict=True))
  values |= zip(closed.jaxpr.constvars, closed.consts, strict=True)
  values |= {eqn.outvars[0]: _constant(eqn) for eqn in closed.eqns if _fills(eqn)}
  _evaluate(closed, values)
  leaves = [_read(v, values) for v in closed.jaxpr.outvars]
  return jax.tree.unflatten(jax.tree.structure(shaped), leaves)


def _alone(params: Any) -> bool:
  """Whether all parameters are at hand on one device, the one that a trace would assume."""
  arrays = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
  if any(isinstance(x, Tracer) for x in arrays):
    return False
  devices = {device for x in arrays for device in x.devices()}
  return len(devices) <= 1 and all(d.platform == jax.default_backend() for d in devices)


def _fills(eqn: Any) -> bool:
  return eqn.primitive.name == "broadcast_in_dim" and isinstance(eqn.invars[0], core.Literal)


def _constant(eqn: Any) -> Constant:
  aval: Any = eqn.outvars[0].aval
  return Constant(jnp.asarray(eqn.invars[0].val, aval.dtype), aval.shape)


def _evaluate(closed: Any, values: dict[Any, Any]) -> None:
  """Run what the outputs depend on and is not known yet."""
  needed = {v for v in closed.jaxpr.outvars if not isinstance(v, core.Literal)} - values.keys()
  run = []
  for eqn in reversed(closed.eqns):
    if needed.intersection(eqn.outvars):
      run.append(eqn)
      needed |= {v for v in eqn.invars if not isinstance(v, core.Literal)}
  for eqn in reversed(run):
    params = eqn.primitive.get_bind_params(eqn.params)
    out = eqn.primitive.bind(*(whole(_read(v, values)) for v in eqn.invars), **params)
    values.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))


def _read(v: Any, values: dict[Any, Any]) -> Any:
  if isinstance(v, core.Literal):
    aval: Any = v.aval
    return jnp.asarray(v.val, aval.dtype)
  return values[v] if isinstance(values[v], Constant) else jnp.asarray(values[v])
