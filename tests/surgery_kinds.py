"""Networks of many kinds, what grows in them, and the shapes that must come out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import surgery_models as models
from flax import nnx

IMAGES, TOKENS = models.images(), models.INPUTS["attention"]


class Normed(nnx.Module):
  """A convolution, a group normalisation, a convolution."""

  def __init__(self, rngs, groups):
    self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
    self.norm = nnx.GroupNorm(4, num_groups=groups, rngs=rngs)
    self.last = nnx.Conv(4, 3, (1, 1), rngs=rngs)

  def __call__(self, x):
    return self.last(nnx.relu(self.norm(self.conv(x))))


class Tied(nnx.Module):
  """Tokens in and out through one table."""

  def __init__(self, rngs):
    self.embed = nnx.Embed(11, 4, rngs=rngs)
    self.mix = nnx.Linear(4, 4, rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens)
    return self.embed.attend(x + jnp.tanh(self.mix(x)))


class Chain(nnx.Module):
  """A list of layers."""

  def __init__(self, rngs):
    self.blocks = nnx.List([nnx.Linear(3 if k == 0 else 4, 4, rngs=rngs) for k in range(3)])
    self.head = nnx.Linear(4, 2, rngs=rngs)

  def __call__(self, x):
    for block in self.blocks:
      x = nnx.tanh(block(x))
    return self.head(x)


class Shared(nnx.Module):
  """One layer under two names, called twice."""

  def __init__(self, rngs):
    self.first = nnx.Linear(3, 4, rngs=rngs)
    self.again = nnx.Linear(4, 4, rngs=rngs)
    self.once_more = self.again
    self.head = nnx.Linear(4, 2, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.tanh(self.once_more(nnx.tanh(self.again(nnx.tanh(self.first(x)))))))


class Dropped(nnx.Module):
  """Dropout between two layers."""

  def __init__(self, rngs):
    self.hidden = nnx.Linear(3, 4, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.head = nnx.Linear(4, 2, rngs=rngs)

  def __call__(self, x):
    return self.head(self.dropout(self.hidden(x)))


class EqxCNN(eqx.Module):
  conv: eqx.nn.Conv2d
  head: eqx.nn.Linear

  def __init__(self, key):
    self.conv = eqx.nn.Conv2d(2, 4, 3, key=key)
    self.head = eqx.nn.Linear(4 * 4 * 4, 3, key=key)

  def __call__(self, x):
    return self.head(jax.nn.relu(self.conv(x)).reshape(-1))


class EqxRecurrent(eqx.Module):
  cell: Any
  head: eqx.nn.Linear

  def __init__(self, cell, key):
    self.cell = cell(3, 4, key=key)
    self.head = eqx.nn.Linear(4, 2, key=key)

  def __call__(self, xs):
    zeros = jnp.zeros(self.cell.weight_hh.shape[-1])
    is_lstm = isinstance(self.cell, eqx.nn.LSTMCell)
    start = (zeros, zeros) if is_lstm else zeros
    last, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), start, xs)
    return self.head(last[0] if is_lstm else last)


class EqxTokens(eqx.Module):
  embed: eqx.nn.Embedding
  attention: eqx.nn.MultiheadAttention

  def __init__(self, key):
    self.embed = eqx.nn.Embedding(11, 4, key=key)
    self.attention = eqx.nn.MultiheadAttention(2, 4, key=key)

  def __call__(self, tokens):
    x = jax.vmap(self.embed)(tokens)
    return self.attention(x, x, x)


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
  """A network, what grows in it, and shapes that must come out."""

  name: str
  build: Callable[[], Any]
  inputs: Any
  layers: dict[str, int]
  shapes: dict[str, tuple[int, ...]]
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def moved(make):
  return lambda: models.moved(make(nnx.Rngs(0)))


def sequential(rngs):
  return nnx.Sequential(
    *(nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 5, rngs=rngs), nnx.relu),
    nnx.Linear(5, 2, rngs=rngs),
  )


KEY = jax.random.key(0)
KINDS = [
  Kind(
    "one channel a group",
    moved(lambda r: Normed(r, 4)),
    IMAGES,
    {"conv": 2},
    {"norm/scale": (6,), "last/kernel": (1, 1, 6, 3)},
  ),
  Kind(
    "whole groups",
    moved(lambda r: Normed(r, 2)),
    IMAGES,
    {"conv": 1},
    {"conv/kernel": (3, 3, 2, 6), "norm/bias": (6,)},
    {"of": 2},
  ),
  Kind(
    "tokens of a tied table",
    moved(Tied),
    TOKENS,
    {"embed": 3},
    {"embed/embedding": (14, 4)},
  ),
  Kind(
    "tokens and the stream",
    moved(Tied),
    TOKENS,
    {"embed": 3, "mix": 2},
    {"embed/embedding": (14, 6), "mix/kernel": (6, 6), "mix/bias": (6,)},
  ),
  Kind(
    "heads and the output",
    moved(lambda r: nnx.MultiHeadAttention(4, 8, rngs=r, decode=False)),
    models.normal(4, (2, 5, 8)),
    {"query": 2, "out": 1},
    {"value/kernel": (8, 6, 2), "key/bias": (6, 2), "out/kernel": (6, 2, 9)},
  ),
  Kind(
    "nnx.Sequential",
    moved(sequential),
    models.INPUTS["mlp"],
    {"layers/0": 2, "layers/2": 1, "layers/4": 3},
    {"layers/2/kernel": (6, 6), "layers/4/kernel": (6, 5)},
  ),
  Kind(
    "nnx.List",
    moved(Chain),
    models.INPUTS["mlp"],
    {"blocks/0": 1, "blocks/1": 2, "blocks/2": 3},
    {"blocks/1/kernel": (5, 6), "blocks/2/kernel": (6, 7), "head/kernel": (7, 2)},
  ),
  Kind(
    "a shared layer by its other name",
    moved(Shared),
    models.INPUTS["mlp"],
    {"once_more": 2},
    {"first/kernel": (3, 6), "again/kernel": (6, 6), "head/kernel": (6, 2)},
  ),
  Kind(
    "eqx.nn.MLP",
    lambda: eqx.nn.MLP(3, 2, 4, 2, key=KEY),
    models.normal(5, (3,)),
    {"layers/0": 2, "layers/1": 1, "layers/2": 3},
    {"layers/1/weight": (5, 6), "layers/2/weight": (5, 5), "layers/2/bias": (5,)},
  ),
  Kind(
    "Equinox convolution",
    lambda: EqxCNN(KEY),
    models.normal(6, (2, 6, 6)),
    {"conv": 2, "head": 1},
    {"conv/weight": (6, 2, 3, 3), "conv/bias": (6, 1, 1), "head/weight": (4, 96)},
  ),
  Kind(
    "eqx.nn.LSTMCell",
    lambda: EqxRecurrent(eqx.nn.LSTMCell, KEY),
    models.normal(7, (5, 3)),
    {"cell": 2},
    {"cell/weight_hh": (24, 6), "cell/bias": (24,), "head/weight": (2, 6)},
  ),
  Kind(
    "eqx.nn.GRUCell",
    lambda: EqxRecurrent(eqx.nn.GRUCell, KEY),
    models.normal(7, (5, 3)),
    {"cell": 2},
    {"cell/weight_hh": (18, 6), "cell/bias_n": (6,), "head/weight": (2, 6)},
  ),
  Kind(
    "eqx.nn.Embedding",
    lambda: EqxTokens(KEY),
    jnp.arange(5),
    {"embed": 3},
    {"embed/weight": (14, 4)},
  ),
]
