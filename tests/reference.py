"""Plain NumPy oracles: what freezing means, written without the package under test.

A freeze mask here is a NumPy bool array of the parameter's shape, True = frozen.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

NARROW = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
WIDE = {"float32": np.float32, "float64": np.float64}
REAL = NARROW | WIDE
_UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def bits(x):
  """The integer view of any array; complex numbers as pairs."""
  x = np.asarray(x)
  if np.issubdtype(x.dtype, np.complexfloating):
    x = np.ascontiguousarray(x).view(x.real.dtype).reshape((*x.shape, 2))
  return np.ascontiguousarray(x).view(_UINT[x.dtype.itemsize]).reshape(x.shape)


def same_bits(a, b):
  """Whether two trees of arrays have the same containers, dtypes and bits."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    np.asarray(x).dtype == np.asarray(y).dtype and np.array_equal(bits(x), bits(y))
    for x, y in pairs
  )


def moved(before, after, frozen):
  """Positions of the frozen elements whose bits changed."""
  before, after = np.asarray(before), np.asarray(after)
  assert before.shape == after.shape and before.dtype == after.dtype
  changed = bits(before) != bits(after)
  changed = changed.any(-1) if changed.ndim > before.ndim else changed
  return np.argwhere(changed & np.broadcast_to(frozen, before.shape)).tolist()


def special(dtype):
  """Values that arithmetic rewrites: -0.0, subnormals, infinities, NaNs with payloads, extremes."""
  dtype = np.dtype(dtype)
  if np.issubdtype(dtype, np.complexfloating):
    real = special(np.empty(0, dtype).real.dtype)
    pairs = np.stack([real, real[::-1]], axis=-1)
    return np.ascontiguousarray(pairs).view(dtype).reshape(-1)
  info = ml_dtypes.finfo(dtype)
  uint = _UINT[dtype.itemsize]
  width = 8 * dtype.itemsize
  mantissa = info.nmant
  infinity = ((1 << (width - 1 - mantissa)) - 1) << mantissa
  quiet = infinity | 1 << (mantissa - 1)
  sign = 1 << (width - 1)
  patterns = [
    *(sign, 1, sign | 1, (1 << mantissa) - 1),  # -0.0, smallest subnormals, largest subnormal
    *(infinity, sign | infinity),
    *(quiet, quiet | 5, sign | quiet | 3),  # quiet NaNs
    *(infinity | 1, infinity | 6, sign | infinity | 2),  # signalling NaNs
    *(infinity - 1, sign | infinity - 1),  # largest finite
    0,
  ]
  return np.array(patterns, uint).view(dtype)


def normal(rng, shape, dtype):
  """Ordinary numbers between 1/2 and 2, of either sign."""
  x = rng.uniform(0.5, 2.0, shape) * rng.choice([-1.0, 1.0], shape)
  if np.issubdtype(np.dtype(dtype), np.complexfloating):
    x = x + 1j * normal(rng, shape, np.float64)
  return x.astype(dtype)


def with_specials(rng, shape, dtype, frozen):
  """Ordinary numbers where trainable, special ones in turn where frozen."""
  x = normal(rng, shape, dtype)
  frozen = np.broadcast_to(frozen, shape)
  cycle = np.resize(special(dtype), int(frozen.sum()))
  x[frozen] = cycle
  return x


def product(frozen):
  """Per-dimension index sets of the trainable elements, if these are their product."""
  trains = ~frozen
  sets = [
    np.flatnonzero(trains.any(tuple(k for k in range(trains.ndim) if k != d)))
    for d in range(trains.ndim)
  ]
  grid = np.zeros(frozen.shape, bool)
  grid[np.ix_(*sets)] = True
  return sets if np.array_equal(grid, trains) else None


class View:
  """What the inner optimizer sees of one leaf: "block", "elements", "dense" or "gone"."""

  def __init__(self, kind, frozen):
    self.kind, self.frozen = kind, frozen

  def take(self, x):
    x = np.asarray(x)
    if self.kind == "block":
      return jnp.asarray(x[np.ix_(*product(self.frozen))])
    if self.kind == "elements":
      return jnp.asarray(x[~self.frozen])
    return jnp.asarray(np.where(self.frozen, np.zeros((), x.dtype), x))

  def put(self, values, x):
    """A copy of x with the values at the trainable elements."""
    x, values = np.array(x), np.asarray(values)
    if self.kind == "dense":
      return np.where(self.frozen, x, values)
    x[~self.frozen] = values.reshape(-1)
    return x


def sub_problem(params, views):
  """The trainable values of a flat dict of leaves, as a problem of its own."""
  return {k: v.take(params[k]) for k, v in views.items() if v.kind != "gone"}


def rezero(values, views):
  """A dense view shows zeros at frozen elements at every step, whatever the optimizer did there."""
  return {
    k: jnp.where(views[k].frozen, jnp.zeros_like(x), x) if views[k].kind == "dense" else x
    for k, x in values.items()
  }


def adam(p, grads, lr=0.1, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
  """Adam's trajectory over a list of gradients, in float64."""
  p = np.asarray(p, np.float64)
  mu, nu = np.zeros_like(p), np.zeros_like(p)
  for t, g in enumerate(grads, 1):
    g = np.asarray(g, np.float64)
    mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g * g
    p = p - lr * (mu / (1 - b1**t) / (np.sqrt(nu / (1 - b2**t)) + eps) + weight_decay * p)
  return p
