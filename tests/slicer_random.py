"""Seeded random programs over the primitives that the slicer has rules for.

A program is a chain of operations on a pool of arrays. Every operation is continuous in its float
operands, so that rounding differences stay rounding differences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from maskopt._slicer import ALL, NONE, region

SIZES = [1, 2, 3, 4, 6, 8]
Rng = np.random.Generator


def _array(r: Rng, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  return jnp.asarray(r.normal(size=shape), dtype)


def _axis(r: Rng, x: Any) -> int:
  return int(r.integers(x.ndim))


def _ids(r: Rng, shape: tuple[int, ...], size: int) -> jax.Array:
  return jnp.asarray(r.integers(-1 if r.random() < 0.2 else 0, size, shape), jnp.int32)


# Each operation takes (rng, x, pool) and returns a function of traced x; randomness happens once.
def unary(r: Rng, x: Any, pool: Any) -> Any:
  f = [jnp.tanh, jnp.sin, lax.logistic, jnp.exp, jax.nn.relu, jax.nn.gelu, jnp.abs, jax.nn.silu]
  g = f[r.integers(len(f))]
  return lambda x: g(jnp.tanh(x))


def binary(r: Rng, x: Any, pool: Any) -> Any:
  y = _array(r, x.shape, x.dtype)
  f = [jnp.add, jnp.multiply, jnp.maximum, lax.sub, jnp.minimum][r.integers(5)]
  return lambda x: f(x, y)


def row_scale(r: Rng, x: Any, pool: Any) -> Any:
  y = _array(r, x.shape[-1:], x.dtype)
  return lambda x: x * y.reshape((1,) * (x.ndim - 1) + y.shape)


def where(r: Rng, x: Any, pool: Any) -> Any:
  m, y = jnp.asarray(r.random(x.shape) < 0.5), _array(r, x.shape, x.dtype)
  return lambda x: jnp.where(m, x, y)


def transpose(r: Rng, x: Any, pool: Any) -> Any:
  p = tuple(int(k) for k in r.permutation(x.ndim))
  return lambda x: jnp.transpose(x, p)


def reshape(r: Rng, x: Any, pool: Any) -> Any:
  n, shape = x.size, []
  while n > 1 and len(shape) < 3:
    d = int(r.choice([k for k in range(1, n + 1) if n % k == 0]))
    shape.append(d)
    n //= d
  shape = tuple([*shape, n] if n > 1 or not shape else shape)
  return lambda x: jnp.reshape(x, shape)


def merge(r: Rng, x: Any, pool: Any) -> Any:
  if x.ndim < 2:
    return lambda x: x[None]
  k = int(r.integers(x.ndim - 1))
  shape = (*x.shape[:k], x.shape[k] * x.shape[k + 1], *x.shape[k + 2 :])
  return lambda x: jnp.reshape(x, shape)


def matmul(r: Rng, x: Any, pool: Any) -> Any:
  w = _array(r, (x.shape[-1], int(r.choice(SIZES))), x.dtype)
  return lambda x: jnp.tanh(x @ w)


def batched_matmul(r: Rng, x: Any, pool: Any) -> Any:
  if x.ndim < 2:
    return matmul(r, x, pool)
  w = _array(r, (*x.shape[:-2], x.shape[-1], int(r.choice(SIZES))), x.dtype)
  return lambda x: jnp.tanh(jnp.matmul(x, w))


def reduce(r: Rng, x: Any, pool: Any) -> Any:
  a, f = _axis(r, x), [jnp.sum, jnp.max, jnp.min, jnp.mean][r.integers(4)]
  keep = bool(r.random() < 0.5) or x.ndim == 1
  return lambda x: f(jnp.tanh(x), axis=a, keepdims=keep)


def softmax(r: Rng, x: Any, pool: Any) -> Any:
  a = _axis(r, x)
  return lambda x: jax.nn.softmax(x, axis=a)


def cumulative(r: Rng, x: Any, pool: Any) -> Any:
  a, f = _axis(r, x), [lax.cumsum, lax.cummax, lax.cumlogsumexp][r.integers(3)]
  return lambda x: f(jnp.tanh(x), axis=a)


def sort(r: Rng, x: Any, pool: Any) -> Any:
  a = _axis(r, x)
  if r.random() < 0.5:
    return lambda x: lax.sort_key_val(x, jnp.tanh(x), dimension=a)[1]
  return lambda x: jnp.sort(x, axis=a)


def top_k(r: Rng, x: Any, pool: Any) -> Any:
  k = int(r.integers(1, x.shape[-1] + 1))
  return lambda x: lax.top_k(x, k)[0]


def broadcast(r: Rng, x: Any, pool: Any) -> Any:
  n = int(r.choice(SIZES))
  return lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], n, *x.shape[1:]))


def concatenate(r: Rng, x: Any, pool: Any) -> Any:
  a = _axis(r, x)
  shape = list(x.shape)
  shape[a] = int(r.choice(SIZES))
  y = _array(r, tuple(shape), x.dtype)
  return lambda x: jnp.concatenate([x, y, x], a)


def split(r: Rng, x: Any, pool: Any) -> Any:
  a = _axis(r, x)
  at = [int(k) for k in sorted(r.integers(0, x.shape[a] + 1, 2))]

  def f(x: Any) -> Any:
    parts = [p for p in jnp.split(x, at, a) if p.shape[a]]
    return jnp.concatenate([jnp.sin(p) for p in parts[::-1]], a)

  return f


def pad(r: Rng, x: Any, pool: Any) -> Any:
  config = []
  for n in x.shape:
    gap = int(r.integers(0, 3)) if r.random() < 0.3 else 0
    low, high = int(r.integers(-1, 3)), int(r.integers(-1, 3))
    keep = n + (n - 1) * gap + low + high >= 1
    config.append((low, high, gap) if keep else (0, 0, 0))
  return lambda x: lax.pad(x, jnp.asarray(0.5, x.dtype), config)


def strided_slice(r: Rng, x: Any, pool: Any) -> Any:
  cut = []
  for n in x.shape:
    a = int(r.integers(n))
    cut.append(slice(a, int(r.integers(a, n)) + 1, int(r.integers(1, 3))))
  return lambda x: x[tuple(cut)]


def rev(r: Rng, x: Any, pool: Any) -> Any:
  a = _axis(r, x)
  return lambda x: lax.rev(x, (a,))


def take_rows(r: Rng, x: Any, pool: Any) -> Any:
  a = _axis(r, x)
  ids = _ids(r, (int(r.choice(SIZES)),), x.shape[a])
  mode = ["fill", "clip", "wrap"][r.integers(3)]
  if mode == "fill":
    ids = jnp.abs(ids)
  return lambda x: jnp.take(x, ids, axis=a, mode=mode)


def take_along(r: Rng, x: Any, pool: Any) -> Any:
  a = _axis(r, x)
  ids = jnp.abs(_ids(r, x.shape, x.shape[a]))
  return lambda x: jnp.take_along_axis(x, ids, a)


def batched_take(r: Rng, x: Any, pool: Any) -> Any:
  if x.ndim < 2:
    return take_rows(r, x, pool)
  ids = _ids(r, (x.shape[0], 3), x.shape[1])
  return lambda x: jax.vmap(lambda row, i: row[i])(x, ids)


def scatter(r: Rng, x: Any, pool: Any) -> Any:
  ids = _ids(r, (5,), x.shape[0] + 1)
  y = _array(r, (5, *x.shape[1:]), x.dtype)
  mode = ["drop", "clip"][r.integers(2)]
  if r.random() < 0.5 or mode == "clip":
    return lambda x: x.at[ids].add(y, mode=mode)
  unique = jnp.arange(min(3, x.shape[0]))
  return lambda x: x.at[unique].set(y[: len(unique)], mode=mode)


def scatter_columns(r: Rng, x: Any, pool: Any) -> Any:
  a = x.ndim - 1
  ids = _ids(r, (4,), x.shape[a])
  y = _array(r, (*x.shape[:-1], 4), x.dtype)
  return lambda x: x.at[..., ids].add(y)


def batched_scatter(r: Rng, x: Any, pool: Any) -> Any:
  if x.ndim < 2:
    return scatter(r, x, pool)
  ids = _ids(r, (x.shape[0], 3), x.shape[1])
  y = _array(r, (x.shape[0], 3, *x.shape[2:]), x.dtype)
  return lambda x: jax.vmap(lambda row, i, u: row.at[i].add(u))(x, ids, y)


def dynamic(r: Rng, x: Any, pool: Any) -> Any:
  sizes = [n if r.random() < 0.5 else int(r.integers(1, n + 1)) for n in x.shape]
  starts = [int(r.integers(0, n)) for n in x.shape]
  if r.random() < 0.5:
    starts = [jnp.asarray(s) for s in starts]
  if r.random() < 0.5:
    return lambda x: lax.dynamic_slice(x, [jnp.asarray(s) for s in starts], sizes)
  y = _array(r, tuple(sizes), x.dtype)
  return lambda x: lax.dynamic_update_slice(x, y, starts)


def pool_windows(r: Rng, x: Any, pool: Any) -> Any:
  a = _axis(r, x)
  window = tuple(min(2, x.shape[k]) if k == a else 1 for k in range(x.ndim))
  strides = tuple(int(r.integers(1, 3)) if k == a else 1 for k in range(x.ndim))
  if r.random() < 0.5:
    low = np.asarray(-np.inf, x.dtype)
    return lambda x: lax.reduce_window(x, low, lax.max, window, strides, "SAME")
  zero = np.zeros((), x.dtype)
  return lambda x: lax.reduce_window(x, zero, lax.add, window, strides, "SAME")


def conv(r: Rng, x: Any, pool: Any) -> Any:
  if x.ndim < 2:
    return unary(r, x, pool)
  x2 = x.reshape(x.shape[0], -1, x.shape[-1])  # (batch, length, channels)
  c = x2.shape[-1]
  groups = int(r.choice([g for g in range(1, c + 1) if c % g == 0]))
  out, taps = groups * int(r.integers(1, 4)), int(r.integers(1, 4))
  w = _array(r, (taps, c // groups, out), x.dtype)
  stride, dilation, lhs = (int(r.integers(1, 3)) for _ in range(3))
  padding = [(int(r.integers(0, 3)), int(r.integers(2, 4)))]

  def f(x: Any) -> Any:
    y = lax.conv_general_dilated(
      x.reshape(x2.shape), jnp.tanh(w * jnp.sum(x)), (stride,), padding, (lhs,), (dilation,),
      dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups,
    )  # fmt: skip
    return jnp.tanh(y)

  return f


def scanned(r: Rng, x: Any, pool: Any) -> Any:
  w = _array(r, (x.shape[-1], x.shape[-1]), x.dtype)
  reverse = bool(r.random() < 0.5)

  def body(c: Any, row: Any) -> Any:
    c = jnp.tanh(c @ w + row)
    return c, jnp.sin(c)

  def f(x: Any) -> Any:
    final, ys = lax.scan(body, jnp.zeros(x.shape[1:], x.dtype), x, reverse=reverse)
    return jnp.concatenate([ys, final[None]])

  return f if x.ndim > 1 else unary(r, x, pool)


def columns_scanned(r: Rng, x: Any, pool: Any) -> Any:
  def f(x: Any) -> Any:
    return lax.scan(lambda c, row: (c * 0.5 + row, c), jnp.zeros(x.shape[1:], x.dtype), x)[1]

  return f


def looped(r: Rng, x: Any, pool: Any) -> Any:
  n = int(r.integers(1, 4))
  return lambda x: lax.fori_loop(0, n, lambda i, y: jnp.sin(y) * 0.5 + x, x)


def while_looped(r: Rng, x: Any, pool: Any) -> Any:
  def f(x: Any) -> Any:  # only forward: reverse mode does not go through `while`
    y = lax.stop_gradient(x)
    return x + lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.cos(s[1])), (0, y))[1]

  return f


def branched(r: Rng, x: Any, pool: Any) -> Any:
  y = _array(r, x.shape, x.dtype)
  k = int(r.integers(3))
  branches = [lambda x: x * 2, lambda x: jnp.sin(x) + y, lambda x: jnp.flip(x, 0)]
  return lambda x: lax.switch(k + (jnp.sum(x) > 1e6).astype(jnp.int32), branches, x)


def jitted(r: Rng, x: Any, pool: Any) -> Any:
  f = chain(r, x, pool, 3)[0]
  return jax.jit(f) if r.random() < 0.5 else jax.checkpoint(f)


def vmapped(r: Rng, x: Any, pool: Any) -> Any:
  if x.ndim < 2:
    return unary(r, x, pool)
  f = chain(r, jnp.zeros(x.shape[1:], x.dtype), pool, 2)[0]
  return jax.vmap(f)


OPERATIONS = [
  unary, binary, row_scale, where, transpose, reshape, merge, matmul, batched_matmul, reduce,
  softmax, cumulative, sort, top_k, broadcast, concatenate, split, pad, strided_slice, rev,
  take_rows, take_along, batched_take, scatter, scatter_columns, batched_scatter, dynamic,
  pool_windows, conv, scanned, columns_scanned, looped, while_looped, branched, jitted, vmapped,
]  # fmt: skip
BASIC = OPERATIONS[:-2]


def chain(r: Rng, x: Any, pool: Any, length: int) -> tuple[Callable[[Any], Any], list[str]]:
  """A random composition that accepts arrays like x."""
  functions, names = [], []
  shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
  while len(functions) < length:
    table = OPERATIONS if length > 3 else BASIC
    op = table[r.integers(len(table))]
    f = op(r, jnp.zeros(shape.shape, shape.dtype), pool)
    out = jax.eval_shape(f, shape)
    if not 0 < out.size <= 3000 or not 0 < out.ndim <= 5:
      continue
    functions.append(f)
    names.append(op.__name__)
    shape = out

  def run(x: Any) -> Any:
    for f in functions:
      x = f(x)
    return x

  return run, names


def random_index(r: Rng, n: int) -> Any:
  kind = r.integers(4)
  if kind == 0 or n == 1:
    return None
  if kind == 1:
    a = int(r.integers(n))
    return slice(a, int(r.integers(a, n)) + 1, int(r.integers(1, 4)))
  k = int(r.integers(1, max(2, n // 2 + 1)))
  return np.sort(r.choice(n, k, replace=False))


def random_demand(r: Rng, shape: tuple[int, ...]) -> Any:
  kind = r.random()
  if kind < 0.1:
    return NONE
  if kind < 0.15:
    return ALL
  n = 1 if kind < 0.8 else 2
  return tuple(region(shape, *(random_index(r, m) for m in shape)) for _ in range(n))


def random_program(seed: int) -> tuple[Callable[..., Any], list[Any], tuple[Any, ...], list[str]]:
  """(function, demands, args, names of its operations)."""
  r = np.random.default_rng(seed)
  dtype = [jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16][r.integers(4)]
  shape = tuple(int(n) for n in r.choice(SIZES[1:], int(r.integers(1, 4))))
  x = _array(r, shape, dtype)
  f, names = chain(r, x, [], int(r.integers(2, 7)))
  out = jax.eval_shape(f, x)
  weights = _array(r, out.shape, dtype)
  if r.random() < 0.6:
    g = jax.grad(lambda x: jnp.sum((f(x) * weights).astype(jnp.float32)))
    fun = g if r.random() < 0.7 else jax.jit(g)
    names = ["grad", *names]
    shapes = [x.shape]
  else:

    def fun(x: Any) -> Any:
      return f(x), jnp.sin(x)

    shapes = [out.shape, x.shape]
  return fun, [random_demand(r, s) for s in shapes], (x,), names
