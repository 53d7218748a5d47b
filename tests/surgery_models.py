"""Small networks of each kind, in nnx and in linen, and how they are grown, called and trained."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn, nnx

import maskopt


class NnxMLP(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(3, 5, rngs=rngs)
    self.head = nnx.Linear(5, 2, rngs=rngs)

  def __call__(self, x):
    return self.head(jnp.tanh(self.hidden(x)))


class NnxCNN(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
    self.dense = nnx.Linear(4 * 3 * 3, 6, rngs=rngs)
    self.head = nnx.Linear(6, 2, rngs=rngs)

  def __call__(self, x):
    x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
    return self.head(nnx.relu(self.dense(x.reshape(x.shape[0], -1))))


class NnxLSTM(nnx.Module):
  def __init__(self, rngs, cell=nnx.OptimizedLSTMCell):
    self.rnn = nnx.RNN(cell(3, 4, rngs=rngs))
    self.head = nnx.Linear(4, 2, rngs=rngs)

  def __call__(self, x):
    return self.head(self.rnn(x)[:, -1])


class NnxAttention(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(11, 4, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False)
    self.head = nnx.Linear(4, 2, rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens)
    return self.head((x + self.attention(x)).mean(1))


class LinenMLP(nn.Module):
  units: int = 5
  outputs: int = 2

  @nn.compact
  def __call__(self, x):
    return nn.Dense(self.outputs, name="head")(jnp.tanh(nn.Dense(self.units, name="hidden")(x)))


class LinenCNN(nn.Module):
  units: int = 4

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(self.units, (3, 3), name="conv")(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
    x = nn.max_pool(x, (2, 2), (2, 2))
    x = nn.relu(nn.Dense(6, name="dense")(x.reshape(x.shape[0], -1)))
    return nn.Dense(2, name="head")(x)


class LinenLSTM(nn.Module):
  units: int = 4

  @nn.compact
  def __call__(self, x):
    x = nn.RNN(nn.OptimizedLSTMCell(self.units, name="cell"))(x)
    return nn.Dense(2, name="head")(x[:, -1])


class LinenAttention(nn.Module):
  heads: int = 2

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(11, 4, name="embed")(tokens)
    attention = nn.MultiHeadDotProductAttention(
      self.heads, qkv_features=2 * self.heads, out_features=4, name="attention"
    )
    return nn.Dense(2, name="head")((x + attention(x)).mean(1))


@dataclasses.dataclass(frozen=True)
class Case:
  """One network: the layer that grows, and how the old and the new forward are called."""

  name: str
  layer: str
  inputs: Any
  build: Callable[[], Any]
  forward: Any = None
  new_forward: Any = None

  def model(self):
    """The old model, which no operation may change."""
    return _built(self.name)

  def apply(self, model, new=False):
    if isinstance(model, nnx.Module):
      return model(self.inputs)
    module = self.new_forward if new else self.forward
    return module.apply(model if "params" in model else {"params": model}, self.inputs)


@functools.cache
def _built(name):
  return next(c for c in CASES if c.name == name).build()


def images():
  return normal(0, (2, 6, 6, 2))


def normal(seed, shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


INPUTS = {
  "mlp": normal(1, (4, 3)),
  "cnn": images(),
  "lstm": normal(2, (2, 5, 3)),
  "attention": jnp.asarray(np.random.default_rng(3).integers(0, 11, (2, 5))),
}
_LAYERS = {"mlp": "hidden", "cnn": "conv", "lstm": "rnn", "attention": "attention"}
_NNX = {"mlp": NnxMLP, "cnn": NnxCNN, "lstm": NnxLSTM, "attention": NnxAttention}
_LINEN = {"mlp": LinenMLP, "cnn": LinenCNN, "lstm": LinenLSTM, "attention": LinenAttention}


def _nnx_case(name):
  return Case(f"nnx-{name}", _LAYERS[name], INPUTS[name], lambda: moved(_NNX[name](nnx.Rngs(0))))


def _linen_case(name, more=2):
  old = _LINEN[name]()
  field = "heads" if name == "attention" else "units"
  new = dataclasses.replace(old, **{field: getattr(old, field) + more})
  layer = "cell" if name == "lstm" else _LAYERS[name]

  def build():
    return _noisy(old.init(jax.random.key(0), INPUTS[name]))

  return Case(f"linen-{name}", layer, INPUTS[name], build, old, new)


def _noisy(tree):
  """Values that nothing starts with, so that biases and statistics tell; variances stay > 0."""
  rng = np.random.default_rng(4)

  def noisy(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    return x + jnp.asarray(rng.uniform(0.01, 0.2, x.shape), x.dtype)

  return jax.tree.map(noisy, tree)


def moved(module):
  graph, params, rest = nnx.split(module, (nnx.Param, nnx.BatchStat), ...)
  return nnx.merge(graph, _noisy(params), rest)


def mlp():
  return moved(NnxMLP(nnx.Rngs(0)))


CASES = [_nnx_case(n) for n in _NNX] + [_linen_case(n) for n in _LINEN]


def parameters(model):
  if isinstance(model, nnx.Module):
    return nnx.state(model, nnx.Param)
  return model.get("params", model)


def bits(x):
  x = np.asarray(x)
  return x.view(f"u{x.dtype.itemsize}")


def paths(tree):
  """Leaves by path, without the attribute that holds a variable's value."""
  found = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    jax.tree_util.keystr(k, simple=True, separator="/").removesuffix("/value"): x for k, x in found
  }


def by_path(model):
  return {p: np.asarray(x) for p, x in paths(parameters(model)).items()}


def trained(case, model, freeze_mask, steps=20, new=True):
  """The parameters after some steps of Adam with weight decay under the mask."""
  params = parameters(model)
  tx = maskopt.selective_transform(optax.adamw(0.05, weight_decay=0.1), freeze_mask=freeze_mask)
  state = tx.init(params)

  def loss(p):
    if isinstance(model, nnx.Module):
      graph, _, rest = nnx.split(model, nnx.Param, ...)
      out = nnx.merge(graph, p, rest, copy=True)(case.inputs)
    else:
      module = case.new_forward if new else case.forward
      rest = {k: v for k, v in model.items() if k != "params"} if "params" in model else {}
      out = module.apply({"params": p, **rest}, case.inputs)
    return ((out - 1.0) ** 2).mean()

  @jax.jit
  def step(p, s):
    updates, s = tx.update(jax.grad(loss)(p), s, p)
    return maskopt.apply_updates(p, updates), s

  with jax.numpy_dtype_promotion("standard"):  # Optax's Adam asks for it
    for _ in range(steps):
      params, state = step(params, state)
  return params
