"""Integer views of arrays, and the addition that keeps bits where it adds nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_VIEWS = {
  np.dtype(t): np.dtype(f"uint{8 * np.dtype(t).itemsize}")
  for t in (
    *(jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64),
    *(jnp.float8_e4m3fn, jnp.float8_e4m3b11fnuz, jnp.float8_e4m3fnuz),
    *(jnp.float8_e5m2, jnp.float8_e5m2fnuz),
  )
}


def bits(x: Any) -> Any:
  """The integer view of a real float array; complex and integer arrays are their own."""
  view = _VIEWS.get(jnp.result_type(x))
  return x if view is None else lax.bitcast_convert_type(x, view)


def from_bits(x: Any, dtype: Any) -> Any:
  """The inverse of `bits`."""
  return x if jnp.result_type(x) == dtype else lax.bitcast_convert_type(x, dtype)


@jax.custom_jvp
def added(p: Any, u: Any) -> Any:
  """Return `p + u` in p's dtype, with p's own bits wherever u is zero.

  The sum is taken in the wider dtype and then rounded, as Optax does. Adding zero is not the
  identity: it turns -0.0 into 0.0 and, on XLA:CPU, a subnormal into zero.
  """
  with jax.numpy_dtype_promotion("standard"):
    wide = jnp.promote_types(p.dtype, u.dtype)
  total = (p.astype(wide) + u.astype(wide)).astype(p.dtype)
  return from_bits(jnp.where(u == 0, bits(p), bits(total)), p.dtype)


@added.defjvp
def _added_jvp(primals: Any, tangents: Any) -> Any:
  (p, u), (dp, du) = primals, tangents
  return added(p, u), dp + du.astype(dp.dtype)
