"""MATLAB's custom MaskedFullyConnectedLayer: single weights and biases frozen at assigned values.

There, one writes a layer whose backward function multiplies the gradients by masks. Here, the layer
exists, and the optimizer reads its masks:

| MATLAB | maskopt |
| --- | --- |
| `MaskedFullyConnectedLayer(10, 5, ...)` | `maskopt.nnx.MaskedLinear(10, 5, ...)` |
| `Weights`, 5 x 10: a row is an output unit | `kernel`, (10, 5): a column is an output unit |
| `Weights(2, :)`, counted from 1 | `kernel[:, 1]`, counted from 0 |
| `layer.Weights(1:3, :) = W` | `maskopt.nnx.assign(layer, "kernel", np.s_[:, :3], W.T)` |
| `layer.Bias(1:2) = b` | `maskopt.nnx.assign(layer, "bias", np.s_[:2], b)` |
| `dLdW .* mask`, 0 = frozen | `kernel_freeze_mask=`, True = frozen; nothing is multiplied |
| `trainingOptions("adam", MaxEpochs=5)` | `maskopt.nnx.Optimizer(layer, optax.adam(...))` |

Four things go wrong easily on the way:

1. Kernels are transposed, so a mask of rows becomes one of columns: (5,) here, and not (5, 1).
2. Indices start at 0.
3. The weights of three units are frozen and the biases of two: the third unit still moves.
4. A misspelt mask leaves the bias to train. A keyword is refused; a mask that is not given is not
   missed by anybody, but `summary` points at the units.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx

import maskopt
import maskopt.nnx

from . import _data, _options
from ._data import Images
from ._options import Json, Seed
from ._report import Report
from ._ways import Tick, one_round

INPUTS, OUTPUTS = 10, 5
ROWS, BIASES = 3, 2  # of so many units the weights are frozen, of so many the bias
RATE, BATCH = 0.01, 32
WORDS = [
  ("MaskedFullyConnectedLayer(10, 5, ...)", "maskopt.nnx.MaskedLinear(10, 5, ...)"),
  ("Weights, 5 x 10: a row is an output unit", "kernel, (10, 5): a column is an output unit"),
  ("Weights(2, :), from 1", "kernel[:, 1], from 0"),
  ("layer.Weights(1:3, :) = W", 'maskopt.nnx.assign(layer, "kernel", np.s_[:, :3], W.T)'),
  ("layer.Bias(1:2) = b", 'maskopt.nnx.assign(layer, "bias", np.s_[:2], b)'),
  ("dLdW .* mask, 0 = frozen", "kernel_freeze_mask=, True = frozen"),
  ('trainingOptions("adam", MaxEpochs=5)', "maskopt.nnx.Optimizer(layer, optax.adam(...))"),
]


def ten_inputs(train: Images, test: Images) -> tuple[Images, Images]:
  """The digits 0 to 4 in the ten directions along which they differ most."""
  train, test = train.of(range(OUTPUTS)), test.of(range(OUTPUTS))
  mean = train.pixels.mean(axis=0)
  directions = np.linalg.svd(train.pixels - mean, full_matrices=False)[2][:INPUTS].T
  turned = (Images((x.pixels - mean) @ directions, x.labels) for x in (train, test))
  first, second = turned
  return first, second


def templates(images: Images) -> tuple[np.ndarray, np.ndarray]:
  """Weights and biases known beforehand: which of the means of 0, 1 and 2 is nearest.

  Returns:
    (W, b) as MATLAB has them: one row per output unit, shapes (3, 10) and (2,).
  """
  means = np.stack([images.of([k]).pixels.mean(axis=0) for k in range(ROWS)])
  return means, -0.5 * (means**2).sum(axis=1)[:BIASES]


def layer_with(weights: np.ndarray, biases: np.ndarray, seed: int) -> maskopt.nnx.MaskedLinear:
  """The layer, with these rows of weights and these biases frozen at these values."""
  units = np.arange(OUTPUTS)
  layer = maskopt.nnx.MaskedLinear(
    INPUTS,
    OUTPUTS,
    kernel_freeze_mask=units < ROWS,
    bias_freeze_mask=units < BIASES,
    rngs=nnx.Rngs(seed),
  )
  maskopt.nnx.assign(layer, "kernel", np.s_[:, :ROWS], weights.T)
  maskopt.nnx.assign(layer, "bias", np.s_[:BIASES], biases)
  return layer


def loss(layer: nnx.Linear, images: Images) -> jax.Array:
  """The mean cross-entropy: a softmaxLayer and a classificationLayer."""
  scores = layer(jnp.asarray(images.pixels))
  return optax.softmax_cross_entropy_with_integer_labels(scores, images.labels).mean()


def fit(layer: nnx.Linear, batches: Iterable[Images]) -> maskopt.nnx.Optimizer:
  """Train what the layer's own masks leave, by Flax's own gradients."""
  optimizer = maskopt.nnx.Optimizer(layer, optax.adam(RATE))

  @nnx.jit
  def step(layer: nnx.Linear, optimizer: maskopt.nnx.Optimizer, images: Images) -> None:
    optimizer.update(layer, nnx.grad(loss)(layer, images))

  for images in batches:
    step(layer, optimizer, images)
  return optimizer


def right(layer: nnx.Linear, images: Images) -> float:
  """Share of the images told right."""
  answers = np.argmax(layer(jnp.asarray(images.pixels)), axis=1)
  return round(float(np.mean(answers == images.labels)), 4)


def matlab_layer(
  epochs: Annotated[int, typer.Option(min=1, help="MaxEpochs.")] = 5,
  seed: Seed = 0,
  as_json: Json = False,
) -> None:
  """MATLAB: a fully connected layer, 10 to 5, with frozen rows of weights and elements of bias."""
  title = "MaskedFullyConnectedLayer, as in MATLAB"
  report = Report("matlab-layer", title, as_json=as_json, seed=seed, epochs=epochs)
  report.words("MATLAB", WORDS)
  train, test = ten_inputs(*_data.digits(seed))
  layer = layer_with(*templates(train), seed)
  before, scores = maskopt.snapshot(layer), [right(layer, test)]
  rng = np.random.default_rng(seed)
  with _options.progress() as bars:
    tick = functools.partial(bars.advance, bars.add_task("epochs", total=epochs, live=""))
    fit(layer, _epochs(train, rng, epochs, tick))
  scores.append(right(layer, test))
  mask = maskopt.nnx.freeze_mask(layer)
  audit = maskopt.audit(before, layer, mask)
  _tell_masks(report, layer, mask)
  report.step(f"Adam, {epochs} epochs, digits 0 to 4 in ten inputs")
  _tell_units(report, before, layer)
  report.show(audit)
  report.say(f"Right on the test images: {scores[0]:.1%} before, {scores[1]:.1%} after.")
  report.facts |= {
    "frozen": audit.frozen,
    "frozen_changed": audit.changed,
    "trainable": audit.trainable,
    "test_accuracy_before": scores[0],
    "test_accuracy": scores[1],
  }
  report.finish(audit.ok, "The assigned weights and biases have the bits they were given.")


def _epochs(images: Images, rng: np.random.Generator, epochs: int, tick: Tick) -> Iterable[Images]:
  for _ in range(epochs):
    yield from one_round(images, rng, BATCH)
    tick()


def _tell_masks(report: Report, layer: nnx.Linear, mask: dict[str, Any]) -> None:
  """The masks as posted, misspelt and as meant; the summary sees the slips."""
  misspelt: Any = {**mask, "bias": False}
  meant = maskopt.build_mask(layer, [(..., maskopt.units(slice(ROWS)))])
  summaries = {
    "posted": maskopt.summary(layer, mask),
    "misspelt": maskopt.summary(layer, misspelt),
    "meant": maskopt.summary(layer, meant),
  }
  report.facts["slips"] = {name: [str(s) for s in x.slips] for name, x in summaries.items()}
  report.step("A mask the way MATLAB keeps its weights, 5 x 10, is refused")
  rows = np.repeat(np.arange(OUTPUTS)[:, None] < ROWS, INPUTS, axis=1)
  report.say(_refused(kernel_freeze_mask=rows), style="yellow")
  report.step("Weights of units 0 to 2, biases of 0 and 1: the third unit still moves")
  report.show(summaries["posted"])
  report.step("A misspelt mask leaves the bias to train", "As a keyword it is refused:")
  report.say(_refused(bias_freze_mask=True), style="yellow")
  report.say("Where nobody gives one, the summary sees it:")
  report.show(summaries["misspelt"])
  report.step("Most often whole units are meant, one rule: [(..., maskopt.units(slice(3)))]")
  report.show(summaries["meant"])


def _refused(**options: Any) -> str:
  """What a layer says of masks that cannot be meant."""
  try:
    maskopt.nnx.MaskedLinear(INPUTS, OUTPUTS, rngs=nnx.Rngs(0), **options)
  except (TypeError, ValueError) as error:
    return str(error)
  return "nothing"


def _tell_units(report: Report, before: Any, layer: nnx.Linear) -> None:
  """How far each unit moved."""
  was, now = nnx.to_pure_dict(before.tree), nnx.to_pure_dict(nnx.state(layer, nnx.Param))
  change = {name: np.abs(np.asarray(now[name]) - np.asarray(was[name])) for name in now}
  rows = [
    (f"{j}", f"{j + 1}", *(_moved(change[name][..., j].max()) for name in ("kernel", "bias")))
    for j in range(OUTPUTS)
  ]
  report.table(("unit", "MATLAB's row", "kernel[:, unit] moved", "bias[unit] moved"), rows)


def _moved(change: float) -> str:
  return f"{change:.3f}" if change else "kept"
