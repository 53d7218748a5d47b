"""Keras's layer.trainable on two LSTM layers, Flatten, Dense, softmax and Reshape.

There, a flag on each layer says whether it trains, and takes effect at the next `compile`. Here, a
mask over the parameters goes to the optimizer:

| Keras | maskopt |
| --- | --- |
| `model.summary()` | `maskopt.summary(network, freeze_mask)` |
| `model.trainable = False`, or the flag of each layer | `freeze_mask = True` |
| `for layer in model.layers[:-3]: ...` | `(slice(None, -3), True)` |
| `model.get_layer("lstm_1").trainable = False` | `("lstm_1", True)` |
| `print(layer.name, layer.trainable)` | `for layer in maskopt.nnx.layers(network, freeze_mask)` |
| `model.trainable_weights` | `maskopt.nnx.trainable_state(network, freeze_mask)` |
| `model.compile(...)`, anew after each change | `maskopt.nnx.Optimizer(network, tx, freeze_mask)`, anew |
| `model.fit(...)` | a jitted step, below |
| kernel, recurrent kernel, bias of `lstm` | `lstm/cell/dense_i/kernel`, `.../dense_h/kernel`, `.../bias` |

The digits are read as sequences: eight rows of eight pixels.
"""  # noqa: E501  (a row of a Markdown table is one line)

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import maskopt
import maskopt.nnx

from . import _data, _options
from ._data import Images
from ._options import Json, Seed, Steps
from ._report import Report
from ._ways import Tick

ROWS, UNITS = 8, 32
RATE, LOW_RATE = 3e-3, 3e-4
HEAD = [(slice(None, -3), True)]
WORDS = [
  ("model.summary()", "maskopt.summary(network, freeze_mask)"),
  ("model.trainable = False", "freeze_mask = True"),
  ("for layer in model.layers[:-3]: ...", "(slice(None, -3), True)"),
  ('model.get_layer("lstm_1").trainable = False', '("lstm_1", True)'),
  ("print(layer.name, layer.trainable)", "maskopt.nnx.layers(network, freeze_mask)"),
  ("model.compile(...), anew after each change", "maskopt.nnx.Optimizer(network, tx, mask), anew"),
]


class Flatten(nnx.Module):
  """(n, ...) to (n, all the rest)."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return x.reshape(len(x), -1)


class Softmax(nnx.Module):
  """Scores to probabilities."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return nnx.softmax(x)


class Reshape(nnx.Module):
  """(n, classes) to (n, 1, classes): a sequence of one answer."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return x[:, None, :]


class Network(nnx.Module):
  """The six layers, named as Keras names them."""

  def __init__(self, classes: int, rngs: nnx.Rngs):
    self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(ROWS, UNITS, rngs=rngs))
    self.lstm_1 = nnx.RNN(nnx.OptimizedLSTMCell(UNITS, UNITS, rngs=rngs))
    self.flatten = Flatten()
    self.dense = nnx.Linear(ROWS * UNITS, classes, rngs=rngs)
    self.activation = Softmax()
    self.reshape = Reshape()

  def __call__(self, rows: jax.Array) -> jax.Array:
    x: Any = self.lstm(rows)
    x = self.flatten(jnp.asarray(self.lstm_1(x)))
    return self.reshape(self.activation(self.dense(x)))


def rows_of(images: Images) -> jax.Array:
  """The images as sequences, shape (n, 8, 8)."""
  return jnp.reshape(jnp.asarray(images.pixels), (-1, ROWS, ROWS))


def loss(network: Network, images: Images) -> jax.Array:
  """Keras's sparse categorical cross-entropy of probabilities."""
  right = jnp.asarray(images.labels)[:, None, None]
  told = jnp.take_along_axis(network(rows_of(images)), right, axis=2)
  return -jnp.log(told + jnp.float32(1e-30)).mean()


def fit(
  network: Network,
  tx: optax.GradientTransformation,
  freeze_mask: Any,
  batches: Iterable[Images],
  tick: Tick = lambda: None,
) -> maskopt.nnx.Optimizer:
  """Compile and fit: train what is not frozen, in place."""
  optimizer = maskopt.nnx.Optimizer(network, tx, freeze_mask)

  @nnx.jit
  def step(network: Network, optimizer: maskopt.nnx.Optimizer, images: Images) -> None:
    mask = maskopt.mask_of(optimizer.opt_state)
    optimizer.update(network, maskopt.nnx.grad(loss, mask)(network, images))

  for images in batches:
    step(network, optimizer, images)
    tick()
  return optimizer


class Stage(NamedTuple):
  """What became of one stage.

  Attributes:
    name: what was trained.
    rate: of Adam.
    audit: of the frozen bits.
    right: share of the test images told right.
    state_bytes: of the optimizer.
  """

  name: str
  rate: float
  audit: Any
  right: float
  state_bytes: int


def keras_lstm(steps: Steps = 150, seed: Seed = 0, as_json: Json = False) -> None:
  """Keras: layer.trainable = False on LSTM layers; replace the head, train it, thaw the rest."""
  title = "layer.trainable, as in Keras"
  report = Report("keras-lstm", title, as_json=as_json, seed=seed, steps=steps)
  report.words("Keras", WORDS)
  images, test = _data.digits(seed)
  network = Network(5, nnx.Rngs(seed))
  with _options.progress() as bars:
    bar = bars.add_task("train", total=3 * steps, live="")
    tick = functools.partial(bars.advance, bar)
    fit(network, optax.adam(RATE), False, images.of(range(5)).batches(steps, seed), tick)
    network.dense = nnx.Linear(ROWS * UNITS, 10, rngs=nnx.Rngs(seed + 1))
    head = maskopt.build_mask(network, HEAD)
    stages = [
      _stage("the new head", RATE, network, head, images.batches(steps, seed + 1), test, tick),
      _stage("all layers", LOW_RATE, network, False, images.batches(steps, seed + 2), test, tick),
    ]
  report.step("Before: a network that told 0 to 4 apart, with a new head for all ten digits")
  report.show(maskopt.summary(network))
  report.step("layer.trainable of each layer")
  _tell_layers(report, network)
  report.step("After layers[:-3]: the head is left to train")
  report.show(maskopt.summary(network, head))
  _tell_stages(report, stages)
  ok = all(stage.audit.ok for stage in stages)
  report.finish(ok, f"The {stages[0].audit.frozen:,} frozen weights kept every bit until the thaw.")


def _stage(
  name: str,
  rate: float,
  network: Network,
  mask: Any,
  batches: Iterable[Images],
  test: Images,
  tick: Tick,
) -> Stage:
  before = maskopt.snapshot(network)
  optimizer = fit(network, optax.adam(rate), mask, batches, tick)
  answers = np.argmax(network(rows_of(test))[:, 0], axis=1)
  right, size = np.mean(answers == test.labels), _bytes(optimizer.opt_state)
  return Stage(name, rate, maskopt.audit(before, network, mask), float(right), size)


def _bytes(state: Any) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(state))


def trainable(network: Network, freeze_mask: Any) -> dict[str, Any]:
  """`layer.trainable` by the names that Keras has for the layers."""
  layers = maskopt.nnx.layers(network, freeze_mask)
  return {layer.name.partition("/")[0]: layer.trainable for layer in layers}


def _tell_layers(report: Report, network: Network) -> None:
  columns = {
    "as built": trainable(network, False),
    "all": trainable(network, True),
    "layers[:-3]": trainable(network, maskopt.build_mask(network, HEAD)),
    "lstm_1": trainable(network, maskopt.build_mask(network, [("lstm_1", True)])),
  }
  report.facts["trainable"] = columns
  report.table(
    ("frozen:", *columns),
    [(name, *(str(column[name]) for column in columns.values())) for name in columns["all"]],
  )
  report.say(
    "As in Keras, but for flatten under layers[:-3]: Keras's loop clears its flag too; a mask "
    "speaks of parameters, and flatten has none."
  )


def _tell_stages(report: Report, stages: list[Stage]) -> None:
  report.facts["stages"] = [
    {
      "trained": x.name,
      "rate": x.rate,
      "frozen": x.audit.frozen,
      "frozen_changed": x.audit.changed,
      "moved": x.audit.moved,
      "test_accuracy": round(x.right, 4),
      "optimizer_bytes": x.state_bytes,
    }
    for x in stages
  ]
  report.step("Train the new head; then thaw the rest at a low rate")
  report.table(
    ("trained", "rate", "frozen", "bits", "moved", "test", "optimizer"),
    [
      (
        x.name,
        f"{x.rate:g}",
        f"{x.audit.frozen:,}",
        "-" if not x.audit.frozen else "kept" if x.audit else f"CHANGED {x.audit.changed:,}",
        f"{x.audit.moved:,}",
        f"{x.right:.1%}",
        f"{x.state_bytes / 1e3:.1f} kB",
      )
      for x in stages
    ],
  )
