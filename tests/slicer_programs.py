"""Programs the slicer is tested on, with the FLOPs that a person would count for them.

Counts are in multiply-adds times two, matmuls and convolutions only. `full` is JAX's own backward
pass; `least` is what cannot be avoided: a partial dW, and a partial dx where nothing below needs
the rest of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from maskopt._slicer import NONE, region


@dataclasses.dataclass
class Case:
  """A gradient program, what is wanted of it and the least FLOPs that takes."""

  grad: Callable[..., Any]
  args: tuple[Any, ...]
  demands: list[Any]
  least: float
  slack: float = 0.02


def rng(seed: int = 0) -> np.random.Generator:
  return np.random.default_rng(seed)


def normal(r: np.random.Generator, *shape: int, scale: float = 1.0) -> jax.Array:
  return jnp.asarray(r.normal(size=shape) * scale, jnp.float32)


def some(n: int, share: float, seed: int = 1) -> np.ndarray:
  """Scattered sorted positions, a share of n."""
  return np.sort(rng(seed).choice(n, max(1, round(share * n)), replace=False))


def demand_by(params: Any, choose: Callable[[str, tuple[int, ...]], Any]) -> list[Any]:
  """One demand per leaf, chosen from its path and shape; None means NONE."""
  out = []
  for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    wanted = choose(jax.tree_util.keystr(path), leaf.shape)
    out.append(NONE if wanted is None else wanted)
  return out


WRAPS: dict[str, Callable[[Any], Any]] = {
  "plain": lambda f: f,
  "jit": jax.jit,
  "checkpoint": jax.checkpoint,
}


# --- multi-layer perceptrons, in four libraries --------------------------------------------------
B, D, L = 16, 40, 4


def _mlp_least(kind: str, share: float) -> float:
  """Forward L products, dW in part, L - 1 products for dx; columns also shrink the lowest dx."""
  unit = 2 * B * D * D
  dx = {"columns": L - 2 + share, "block": L - 2 + share, "rows": L - 1}[kind]
  dw = share * share if kind == "block" else share
  return unit * (L + L * dw + dx)


def _kernel_region(kind: str, shape: tuple[int, ...], share: float = 0.1) -> Any:
  rows, cols = some(shape[0], share), slice(0, round(share * shape[1]))
  return {
    "columns": (region(shape, None, some(shape[1], share)),),
    "rows": (region(shape, rows, None),),
    "block": (region(shape, slice(0, round(share * shape[0])), cols),),
  }[kind]


class _LinenMLP(linen.Module):
  @linen.compact
  def __call__(self, x: Any) -> Any:
    for _ in range(L):
      x = jnp.tanh(linen.Dense(D)(x))
    return x


class _NnxMLP(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(L)])

  def __call__(self, x: Any) -> Any:
    for layer in self.layers:
      x = jnp.tanh(layer(x))
    return x


def _mlp_parts(library: str) -> tuple[Callable[[Any, Any], Any], Any, bool]:
  """(apply, params, whether kernels are stored transposed)."""
  if library == "raw":
    r = rng()
    params = [{"w": normal(r, D, D, scale=D**-0.5), "b": jnp.zeros(D)} for _ in range(L)]

    def apply(p: Any, x: Any) -> Any:
      for layer in p:
        x = jnp.tanh(x @ layer["w"] + layer["b"][None])
      return x

    return apply, params, False
  if library == "linen":
    model = _LinenMLP()
    return model.apply, model.init(jax.random.key(0), jnp.zeros((1, D))), False
  if library == "nnx":
    graph, params = nnx.split(_NnxMLP(nnx.Rngs(0)))
    return lambda p, x: nnx.merge(graph, p)(x), params, False
  layers = [eqx.nn.Linear(D, D, key=k) for k in jax.random.split(jax.random.key(0), L)]
  params, static = eqx.partition(layers, eqx.is_array)

  def apply(p: Any, x: Any) -> Any:
    for layer in eqx.combine(p, static):
      x = jnp.tanh(jax.vmap(layer)(x))
    return x

  return apply, params, True


def mlp(library: str, kind: str, wrap: str = "plain") -> Case:
  apply, params, transposed = _mlp_parts(library)
  apply = WRAPS[wrap](apply)

  def loss(p: Any, x: Any) -> Any:
    return jnp.sum(apply(p, x) ** 2)

  def choose(_: str, shape: tuple[int, ...]) -> Any:
    if len(shape) == 1:  # biases of the same units; rows have none
      return None if kind == "rows" else _bias_region(kind, shape)
    wanted = _kernel_region(kind, shape)
    return tuple(type(r)(r[::-1]) for r in wanted) if transposed else wanted

  x = normal(rng(2), B, D)
  least = _mlp_least(kind, round(0.1 * D) / D)
  least += _recompute(wrap, 2 * B * D * D * L)
  return Case(jax.grad(loss), (params, x), demand_by(params, choose), least)


def _bias_region(kind: str, shape: tuple[int, ...]) -> Any:
  share = slice(0, round(0.1 * shape[0])) if kind == "block" else some(shape[0], 0.1)
  return (region(shape, share),)


def _recompute(wrap: str, forward: float) -> float:
  """What jax.checkpoint runs again: the forward pass (the slope of tanh is read off its result)."""
  return forward if wrap == "checkpoint" else 0.0


def mlp_scan(kind: str, wrap: str = "plain") -> Case:
  """The same layers under `lax.scan`: dx runs in every iteration, whole but for nothing below."""
  w = normal(rng(), L, D, D, scale=D**-0.5)

  def body(x: Any, layer: Any) -> tuple[Any, None]:
    return jnp.tanh(x @ layer), None

  def loss(w: Any, x: Any) -> Any:
    return jnp.sum(lax.scan(WRAPS[wrap](body), x, w)[0] ** 2)

  inner = _kernel_region(kind, (D, D))
  demands = [tuple(type(r)((None, *r)) for r in inner)]
  share = round(0.1 * D) / D
  unit = 2 * B * D * D
  dw = share * share if kind == "block" else share
  least = unit * (2 * L + L * dw) + _recompute(wrap, unit * L)
  return Case(jax.grad(loss), (w, normal(rng(2), B, D)), demands, least)


# --- convolutions --------------------------------------------------------------------------------
def _conv(x: Any, w: Any, stride: int = 1, groups: int = 1, dilation: int = 1) -> Any:
  return lax.conv_general_dilated(
    x, w, (stride, stride), "SAME", rhs_dilation=(dilation, dilation),
    dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
  )  # fmt: skip


def cnn(kind: str, wrap: str = "plain") -> Case:
  """Three linen convolutions with pooling between; 10% of output or input channels trainable."""
  n, size, c, k = 2, 16, 20, 3

  class Net(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
      x = linen.max_pool(linen.relu(linen.Conv(c, (k, k))(x)), (2, 2), (2, 2))
      x = linen.relu(linen.Conv(c, (k, k))(x))
      x = linen.pooling.pool(x, 0.0, lax.add, (2, 2), (2, 2), "VALID") / 4.0
      return linen.relu(linen.Conv(c, (k, k))(x))

  model, x = Net(), normal(rng(2), n, size, size, c)
  params = model.init(jax.random.key(0), x)
  apply = WRAPS[wrap](model.apply)

  def choose(_: str, shape: tuple[int, ...]) -> Any:
    if len(shape) == 1:
      return (region(shape, some(c, 0.1)),) if kind == "out" else None
    index = some(c, 0.1)
    return (region(shape, None, None, *((None, index) if kind == "out" else (index, None))),)

  units = [2 * n * (size >> level) ** 2 * k * k * c * c for level in range(3)]
  least = sum(units) * 1.1 + units[2] + units[1] * (0.1 if kind == "out" else 1)
  least += _recompute(wrap, sum(units))
  grad = jax.grad(lambda p, x: jnp.sum(apply(p, x) ** 2))
  return Case(grad, (params, x), demand_by(params, choose), least)


def grouped_cnn(kind: str) -> Case:
  """A grouped or depthwise convolution above another: whole groups train."""
  n, size, c, k = 2, 8, 40, 3
  groups = c if kind == "depthwise" else 10
  r = rng()
  params = [normal(r, k, k, c // groups, c, scale=0.2) for _ in range(2)]
  kept = np.arange(c).reshape(groups, -1)[some(groups, 0.1)].ravel()

  def loss(p: Any, x: Any) -> Any:
    for w in p:
      x = jnp.tanh(_conv(x, w, groups=groups, dilation=2 if kind == "dilated" else 1))
    return jnp.sum(x**2)

  unit = 2 * n * size**2 * k * k * (c // groups) * c
  demands = [(region(w.shape, None, None, None, kept),) for w in params]
  # channels never mix, so even the forward pass is needed for the wanted groups only
  return Case(jax.grad(loss), (params, normal(r, n, size, size, c)), demands, unit * 0.5)


def conv_taps(taps: Any = slice(1, 2), stride: int = 1, dilation: int = 1) -> Case:
  """One tap row of a 5x5 kernel (its gradient is a convolution whose outputs are the taps)."""
  n, size, c, k = 2, 15, 8, 5
  r = rng()
  w = normal(r, k, k, c, c, scale=0.1)
  demand = (region(w.shape, taps, None, None, None),)

  def loss(w: Any, x: Any) -> Any:
    return jnp.sum(jnp.tanh(_conv(x, w, stride, dilation=dilation)) ** 2)

  rows = len(range(*taps.indices(k)))
  positions = (-(-size // stride)) ** 2
  unit = 2 * n * positions * k * k * c * c
  return Case(jax.grad(loss), (w, normal(r, n, size, size, c)), [demand], unit * (1 + rows / k))


# --- recurrent -----------------------------------------------------------------------------------
def lstm(wrap: str = "plain") -> Case:
  """10% of the gate columns of an LSTM: input and recurrent kernels, carried by the scan."""
  n, steps, d = 4, 6, 20
  r = rng()
  params = {"wi": normal(r, d, 4 * d, scale=0.2), "wh": normal(r, d, 4 * d, scale=0.2)}

  def cell(p: Any, state: Any, x: Any) -> tuple[Any, None]:
    c, h = state
    i, f, g, o = jnp.split(x @ p["wi"] + h @ p["wh"], 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return (c, jax.nn.sigmoid(o) * jnp.tanh(c)), None

  def loss(p: Any, xs: Any) -> Any:
    zero = jnp.zeros((n, d))
    step = WRAPS[wrap](lambda state, x: cell(p, state, x))
    return jnp.sum(lax.scan(step, (zero, zero), xs)[0][1] ** 2)

  wanted = some(4 * d, 0.1)
  demands = [(region((d, 4 * d), None, wanted),)] * 2
  unit = 2 * n * steps * d * 4 * d
  # forward: two products; backward: both kernels in part, and dh whole through time
  least = unit * (2 + 0.2 + 1) + _recompute(wrap, 2 * unit)
  return Case(jax.grad(loss), (params, normal(r, steps, n, d)), demands, least)


class _NnxRecurrent(nnx.Module):
  def __init__(self, kind: str, d: int, rngs: nnx.Rngs):
    cell = {"lstm": nnx.OptimizedLSTMCell, "gru": nnx.GRUCell}[kind](d, d, rngs=rngs)
    self.rnn = nnx.RNN(cell)

  def __call__(self, x: Any) -> Any:
    cell = self.rnn.cell
    start = cell.initialize_carry((x.shape[0], x.shape[-1]), rngs=nnx.Rngs(0))
    return self.rnn(x, initial_carry=start)


def nnx_recurrent(kind: str) -> tuple[Callable[..., Any], tuple[Any, ...], list[Any]]:
  """(grad, args, demands): nnx cells, for equality."""
  d = 20
  model = _NnxRecurrent(kind, d, nnx.Rngs(0))
  graph, params, rest = nnx.split(model, nnx.Param, ...)

  def loss(p: Any, x: Any) -> Any:
    return jnp.sum(nnx.merge(graph, p, rest)(x) ** 2)

  def choose(_: str, shape: tuple[int, ...]) -> Any:
    return (region(shape, *[None] * (len(shape) - 1), some(shape[-1], 0.1)),)

  return jax.grad(loss), (params, normal(rng(2), 3, 5, d)), demand_by(params, choose)


# --- attention -----------------------------------------------------------------------------------
T, E, H = 12, 40, 10


def _attend(q: Any, k: Any, v: Any) -> Any:
  scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
  return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


def _norm(x: Any) -> Any:
  mean = jnp.mean(x, -1, keepdims=True)
  return (x - mean) * lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-6)


def _block_fused(p: Any, x: Any) -> Any:
  b, t, e = x.shape
  q, k, v = jnp.split(_norm(x) @ p["qkv"], 3, axis=-1)
  q, k, v = (a.reshape(b, t, H, e // H) for a in (q, k, v))
  x = x + _attend(q, k, v).reshape(b, t, e) @ p["out"]
  return x + jax.nn.gelu(_norm(x) @ p["up"]) @ p["down"]


def _block_einsum(p: Any, x: Any) -> Any:
  y = _norm(x)
  q, k, v = (jnp.einsum("bte,ehd->bthd", y, p[name]) for name in ("q", "k", "v"))
  x = x + jnp.einsum("bthd,hde->bte", _attend(q, k, v), p["o"])
  return x + jax.nn.gelu(_norm(x) @ p["up"]) @ p["down"]


def _transformer_params(kind: str, r: np.random.Generator) -> dict[str, jax.Array]:
  width = E // H
  mlp = {"up": normal(r, E, 4 * E, scale=0.1), "down": normal(r, 4 * E, E, scale=0.1)}
  if kind == "fused":
    return {"qkv": normal(r, E, 3 * E, scale=0.1), "out": normal(r, E, E, scale=0.1), **mlp}
  heads = {n: normal(r, E, H, width, scale=0.1) for n in "qkv"}
  return {**heads, "o": normal(r, H, width, E, scale=0.1), **mlp}


def _least_of_columns(wanted: np.ndarray, linear: float, attention: float) -> float:
  """dq, dk and dv of these columns, the scores of the heads they lie in, and what those need."""
  q, k, v = (wanted[wanted // E == part] % E for part in range(3))
  heads = np.unique(np.r_[q, k] // (E // H))
  values = np.union1d(v, (heads[:, None] * (E // H) + np.arange(E // H)).ravel())
  return (len(wanted) / E + len(heads) / H) * attention + len(values) / E * linear


def transformer(kind: str, wrap: str = "plain", layers: int = 2) -> Case:
  """Two blocks: 10% of the columns of a fused qkv, or one whole head of ten behind einsums."""
  r, block = rng(), {"fused": _block_fused, "heads": _block_einsum}[kind]
  params = [_transformer_params(kind, r) for _ in range(layers)]
  block = WRAPS[wrap](block)

  def loss(p: Any, x: Any) -> Any:
    for layer in p:
      x = block(layer, x)
    return jnp.sum(x**2)

  def choose(path: str, shape: tuple[int, ...]) -> Any:
    if "qkv" in path:
      return (region(shape, None, some(3 * E, 0.1)),)
    if kind == "heads" and path.split("'")[1] in "qkv":
      return (region(shape, None, [3]),)
    return None

  n = 2
  linear, attention = 2 * n * T * E * E, 2 * n * T * T * E
  forward = layers * (12 * linear + 2 * attention)
  # backward: dx of the MLP (8) and of `out` (1) and attention's four products in every block; dx of
  # qkv (3) above the lowest block. In the lowest one only the trainable part of q, k, v is wanted.
  if kind == "heads":
    lowest = 8 * linear + 0.1 * linear + 0.1 * 4 * attention
  else:
    lowest = 8 * linear + _least_of_columns(some(3 * E, 0.1), linear, attention)
  backward = (layers - 1) * (12 * linear + 4 * attention) + lowest + layers * 0.3 * linear
  # recomputed: everything but the product that only the block's result needs
  again = _recompute(wrap, layers * (8 * linear + 2 * attention))
  slack = 0.08 if kind == "fused" else 0.02
  grad, x = jax.grad(loss), normal(r, n, T, E)
  return Case(grad, (params, x), demand_by(params, choose), forward + backward + again, slack)


def transformer_scan(kind: str, wrap: str = "plain", layers: int = 3) -> Case:
  """The blocks under `lax.scan`: every layer passes dx on whole, and shares one region."""
  r, block = rng(), {"fused": _block_fused, "heads": _block_einsum}[kind]
  params = jax.tree.map(lambda *x: jnp.stack(x), *[_transformer_params(kind, r)] * layers)
  block = WRAPS[wrap](block)

  def loss(p: Any, x: Any) -> Any:
    return jnp.sum(lax.scan(lambda x, layer: (block(layer, x), None), x, p)[0] ** 2)

  def choose(path: str, shape: tuple[int, ...]) -> Any:
    if "qkv" in path:
      return (region(shape, None, None, some(3 * E, 0.1)),)
    if kind == "heads" and path.split("'")[1] in "qkv":
      return (region(shape, None, None, [3]),)
    return None

  n = 2
  linear, attention = 2 * n * T * E * E, 2 * n * T * T * E
  least = layers * (24.3 * linear + 6 * attention)
  least += _recompute(wrap, layers * (8 * linear + 2 * attention))
  return Case(jax.grad(loss), (params, normal(r, n, T, E)), demand_by(params, choose), least)


# --- embeddings ----------------------------------------------------------------------------------
def embedding(kind: str, one_hot: bool = False, wrap: str = "plain") -> Case:
  """Rows or columns of an embedding below one linear layer that trains nothing."""
  vocabulary, d, n, t = 60, 20, 4, 7
  r = rng()
  params = {"table": normal(r, vocabulary, d), "head": normal(r, d, d, scale=0.2)}
  ids = jnp.asarray(r.integers(0, vocabulary, (n, t)))

  def apply(p: Any, ids: Any) -> Any:
    x = jax.nn.one_hot(ids, vocabulary) @ p["table"] if one_hot else jnp.take(p["table"], ids, 0)
    return jnp.tanh(x @ p["head"])

  def loss(p: Any, ids: Any) -> Any:
    return jnp.sum(WRAPS[wrap](apply)(p, ids) ** 2)

  wanted = some(vocabulary, 0.1) if kind == "rows" else (None, some(d, 0.1))
  r_table = region((vocabulary, d), *(wanted if isinstance(wanted, tuple) else (wanted,)))
  unit, lookup = 2 * n * t * d * d, 2 * n * t * vocabulary * d if one_hot else 0
  least = unit + unit * (0.1 if kind == "columns" else 1) + lookup * 1.1
  least += _recompute(wrap, unit + lookup)
  return Case(jax.grad(loss), (params, ids), [NONE, (r_table,)], least)


def tied_logits(wrap: str = "plain") -> Case:
  """Rows of a table that is both embedding and output layer."""
  vocabulary, d, n, t = 60, 20, 4, 7
  r = rng()
  table = normal(r, vocabulary, d)
  ids = jnp.asarray(r.integers(0, vocabulary, (n, t)))

  def apply(table: Any, ids: Any) -> Any:
    return jax.nn.log_softmax(jnp.tanh(jnp.take(table, ids, axis=0)) @ table.T)

  def loss(table: Any, ids: Any) -> Any:
    scores = WRAPS[wrap](apply)(table, ids)
    return -jnp.mean(jnp.take_along_axis(scores, ids[..., None], -1))

  unit = 2 * n * t * vocabulary * d
  demand = (region(table.shape, some(vocabulary, 0.1)),)
  # checkpointed, the forward pass runs only once: its result alone is asked by nobody
  least = unit * (1 + 1 + 0.1)
  return Case(jax.grad(loss), (table, ids), [demand], least)
