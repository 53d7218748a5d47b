"""MATLAB's freezeWeights on the first layers of a convolutional network.

There, a layer is frozen by setting the learning-rate factors of its weights, of its biases or of
both to zero. Here, a rule names the same parameters:

| MATLAB | maskopt |
| --- | --- |
| `freezeWeights(net, "conv_1", "both")` | `("conv_1", True)` |
| `freezeWeights(net, "conv_1", "weights")` | `("conv_1/kernel", True)` |
| `freezeWeights(net, "conv_1", "biases")` | `("conv_1/bias", True)` |
| `WeightLearnRateFactor = 0` | the same: a factor of 0 is frozen |
| `WeightLearnRateFactor = 10` | `maskopt.build_multipliers(params, [("fc", 10.0)])` |
| `net.Layers(1:2)`, counted from 1 | `slice(0, 2)`, counted from 0 |
| `replaceLayer(net, "fc", ...)` | `network.fc = nnx.Linear(...)` |
| `trainnet(...)` with `"adam"` | `maskopt.nnx.Optimizer(network, optax.adam(...), freeze_mask)` |

A frozen element keeps its bits, whatever the optimizer adds to its gradient: weight decay,
momentum, noise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

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

What = Literal["weights", "biases", "both"]
FIRST = ("conv_1", "conv_2")
PARTS: dict[What, str] = {"weights": "/kernel", "biases": "/bias", "both": ""}
FEW = 60
WORDS = [
  ('freezeWeights(net, "conv_1", "both")', '("conv_1", True)'),
  ('freezeWeights(net, "conv_1", "weights")', '("conv_1/kernel", True)'),
  ('freezeWeights(net, "conv_1", "biases")', '("conv_1/bias", True)'),
  ("WeightLearnRateFactor = 10", 'build_multipliers(params, [("fc", 10.0)])'),
  ("net.Layers(1:2), from 1", "slice(0, 2), from 0"),
  ('replaceLayer(net, "fc", ...)', "network.fc = nnx.Linear(...)"),
  ('trainnet(...), "adam"', "maskopt.nnx.Optimizer(network, optax.adam(...), freeze_mask)"),
]


class Network(nnx.Module):
  """Two convolutions, a maximum over patches, one output per class."""

  def __init__(self, classes: int, rngs: nnx.Rngs):
    self.conv_1 = nnx.Conv(1, 8, (3, 3), rngs=rngs)
    self.conv_2 = nnx.Conv(8, 16, (3, 3), rngs=rngs)
    self.fc = nnx.Linear(4 * 4 * 16, classes, rngs=rngs)

  def __call__(self, pixels: jax.Array) -> jax.Array:
    x = jnp.reshape(pixels, (len(pixels), 8, 8, 1))
    x = nnx.relu(self.conv_2(nnx.relu(self.conv_1(x))))
    return self.fc(nnx.max_pool(x, (2, 2), (2, 2)).reshape(len(pixels), -1))


def rules(layers: Sequence[str], what: What = "both") -> list[tuple[str, bool]]:
  """Return the rules that freeze the weights, the biases or both of some layers."""
  return [(layer + PARTS[what], True) for layer in layers]


def optimizer() -> optax.GradientTransformation:
  """The optimizer of every run; its weight decay is what a leak would show."""
  return optax.adamw(2e-3, weight_decay=0.01)


def train(
  network: Network,
  freeze_mask: Any,
  batches: Iterable[Images],
  tick: Callable[[], None] = lambda: None,
) -> maskopt.nnx.Optimizer:
  """Train what is not frozen, in place."""
  trainer = maskopt.nnx.Optimizer(network, optimizer(), freeze_mask)

  @nnx.jit
  def step(network: Network, trainer: maskopt.nnx.Optimizer, images: Images) -> None:
    mask = maskopt.mask_of(trainer.opt_state)
    trainer.update(network, maskopt.nnx.grad(loss, mask)(network, images))

  for images in batches:
    step(network, trainer, images)
    tick()
  return trainer


def loss(network: Network, images: Images) -> jax.Array:
  """The mean cross-entropy."""
  scores = network(jnp.asarray(images.pixels))
  return optax.softmax_cross_entropy_with_integer_labels(scores, images.labels).mean()


class Outcome(NamedTuple):
  """What became of one run.

  Attributes:
    name: what was frozen.
    audit: of its bits.
    right: share of the test images told right.
    state_bytes: of the optimizer.
  """

  name: str
  audit: Any
  right: float
  state_bytes: int


def freeze_weights(steps: Steps = 150, seed: Seed = 0, as_json: Json = False) -> None:
  """MATLAB: freezeWeights(net, layer, "biases" | "weights" | "both") on the first layers."""
  report = Report(
    "freeze-weights", "freezeWeights, as in MATLAB", as_json=as_json, seed=seed, steps=steps
  )
  report.words("MATLAB", WORDS)
  images, test = _data.digits(seed)
  with _options.progress() as bars:
    bar = bars.add_task("train", total=5 * steps, live="")

    def tick() -> None:
      bars.advance(bar)

    network = Network(5, nnx.Rngs(seed))
    train(network, False, images.of(range(5)).batches(steps, seed), tick)
    network.fc = nnx.Linear(4 * 4 * 16, 10, rngs=nnx.Rngs(seed + 1))  # replaceLayer
    few = Images(*(x[:FEW] for x in images))
    cases: list[tuple[str, Any]] = [("nothing", False)]
    cases += [(what, maskopt.build_mask(network, rules(FIRST, what))) for what in PARTS]
    outcomes = [
      _outcome(name, copy.deepcopy(network), mask, few.batches(steps, seed + 1), test, tick)
      for name, mask in cases
    ]
  report.step("A network that knows the digits 0 to 4 gets a new fc, for all ten")
  report.step('Freeze conv_1 and conv_2: "both"')
  report.show(maskopt.summary(network, dict(cases)["both"]))
  report.step('The same with "weights": the summary points at the biases left to train')
  report.show(maskopt.summary(network, dict(cases)["weights"]))
  _conclude(report, outcomes, len(few.labels))


def _outcome(
  name: str,
  network: Network,
  mask: Any,
  batches: Iterable[Images],
  test: Images,
  tick: Callable[[], None],
) -> Outcome:
  before = maskopt.snapshot(network)
  trainer = train(network, mask, batches, tick)
  right = np.mean(np.argmax(network(jnp.asarray(test.pixels)), axis=1) == test.labels)
  size = sum(x.nbytes for x in jax.tree.leaves(trainer.opt_state))
  return Outcome(name, maskopt.audit(before, network, mask), float(right), size)


def _conclude(report: Report, outcomes: list[Outcome], few: int) -> None:
  report.step(f"Train on {few} images of all ten digits")
  report.table(
    ("frozen", "elements", "bits", "moved", "test", "optimizer"),
    [
      (
        x.name,
        f"{x.audit.frozen:,}",
        "-" if not x.audit.frozen else "kept" if x.audit else f"CHANGED {x.audit.changed:,}",
        f"{x.audit.moved:,} of {x.audit.trainable:,}",
        f"{x.right:.1%}",
        f"{x.state_bytes / 1e3:.1f} kB",
      )
      for x in outcomes
    ],
  )
  report.facts["runs"] = [
    {
      "frozen": x.name,
      "frozen_elements": x.audit.frozen,
      "frozen_elements_changed": x.audit.changed,
      "trainable_elements": x.audit.trainable,
      "test_accuracy": round(x.right, 4),
      "optimizer_bytes": x.state_bytes,
    }
    for x in outcomes
  ]
  ok = all(x.audit.ok for x in outcomes)
  frozen = sum(x.audit.frozen for x in outcomes)
  report.finish(ok, f"All {frozen:,} frozen elements of the three runs kept every bit.")
