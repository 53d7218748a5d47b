"""The main demonstration: learn 0 to 4, freeze the neurons that know them, then learn 5 to 9.

Three quarters of the hidden units are kept for the old digits. The others are spare: they start
anew, with no way into the kept ones. With the kept neurons frozen bit for bit, the outputs of the
old digits cannot change, whatever the spare neurons learn.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from rich.progress import Progress

import maskopt

from . import _compare, _data, _options, _picture, _training
from ._compare import Comparison, Exam
from ._options import Json, Out, Seed, Steps
from ._training import Run

OLD, NEW = list(range(5)), list(range(5, 10))
HIDDEN = 256
KEPT = HIDDEN * 3 // 4
LOOKS = 50


class Network(nnx.Module):
  """Pixels, two hidden layers, one output per digit."""

  def __init__(self, rngs: nnx.Rngs):
    self.hidden_1 = nnx.Linear(64, HIDDEN, rngs=rngs)
    self.hidden_2 = nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)
    self.output = nnx.Linear(HIDDEN, 10, rngs=rngs)

  def activities(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    first = nnx.relu(self.hidden_1(pixels))
    return first, nnx.relu(self.hidden_2(first))

  def __call__(self, pixels: jax.Array) -> jax.Array:
    return self.output(self.activities(pixels)[-1])


def digits(
  steps: Steps = 500,
  seed: Seed = 0,
  out: Out = Path("maskopt-demo"),
  as_json: Json = False,
) -> None:
  """Learn digits 0 to 4, freeze the neurons that know them, learn 5 to 9 in three ways, compare."""
  begin = time.perf_counter()
  comparison = three_ways(steps, seed)
  picture = _picture.save(comparison, out / "digits.png")
  facts = {"demo": "digits", "seed": seed, "steps": steps, "picture": str(picture)}
  facts["seconds"] = round(time.perf_counter() - begin, 1)
  _compare.show(comparison, facts, as_json=as_json)
  if not comparison.outcomes[-1].audit:
    raise typer.Exit(1)


def three_ways(steps: int, seed: int) -> Comparison:
  """Train on the old digits, then on the new ones: without freezing, with a leak, with maskopt."""
  train, test = _data.digits(seed)
  network = Network(nnx.Rngs(seed))
  with _options.progress() as bars:
    learn(network, train.of(OLD).batches(steps, seed), bars, steps)
    kept_1, kept_2 = kept_units(network, train.of(OLD).pixels)
    renew_spare(network, Network(nnx.Rngs(seed + 1)), kept_1, kept_2)

    graph, params = nnx.split(network, nnx.Param)
    freeze_mask = maskopt.build_mask(
      params,
      [
        ("hidden_1", maskopt.units(kept_1)),
        ("hidden_2", maskopt.units(kept_2)),
        ("output", maskopt.units(OLD)),
      ],
    )
    ours = maskopt.selective_transform(optimizer(), freeze_mask=freeze_mask, prefer="memory")
    grad = functools.partial(maskopt.grad, freeze_mask=freeze_mask)
    runs = [
      _training.start("no freezing", graph, params, optimizer()),
      _training.start("zeroed gradients", graph, params, zeroed_first(freeze_mask)),
      _training.start("maskopt", graph, params, ours, maskopt.apply_updates, grad),
    ]
    before, exam = maskopt.snapshot(params), Exam(graph, test, OLD, NEW)
    tune(runs, train.of(NEW).batches(steps, seed + 1), exam, bars, steps)
  return _compare.compare(runs, before, freeze_mask, exam, train)


def optimizer() -> optax.GradientTransformation:
  """The optimizer of every run."""
  return optax.adamw(3e-3, weight_decay=0.01)


def zeroed_first(freeze_mask: Any) -> optax.GradientTransformation:
  """The usual attempt, in the wrong place of the chain: AdamW decays what got no gradient."""

  def zero(grads: Any, params: Any) -> Any:
    del params
    return jax.tree.map(lambda g, frozen: jnp.where(frozen, 0.0, g), grads, freeze_mask)

  return optax.chain(optax.stateless(zero), optimizer())


def kept_units(network: Network, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The units of each hidden layer that carry most: mean activity times outgoing weight."""
  first, second = (np.asarray(a).mean(axis=0) for a in network.activities(jnp.asarray(pixels)))
  into_old = np.abs(np.asarray(network.output.kernel[...])[:, OLD]).sum(axis=1)
  kept_2 = _largest(second * into_old)
  into_kept = np.abs(np.asarray(network.hidden_2.kernel[...])[:, kept_2]).sum(axis=1)
  return _largest(first * into_kept), kept_2


def _largest(scores: np.ndarray) -> np.ndarray:
  return np.sort(np.argsort(-scores, kind="stable")[:KEPT])


def renew_spare(network: Network, fresh: Network, kept_1: np.ndarray, kept_2: np.ndarray) -> None:
  """Give spare units fresh weights, and none into a kept unit or the output of an old digit."""
  spare_1, spare_2 = (np.setdiff1d(np.arange(HIDDEN), kept) for kept in (kept_1, kept_2))
  for name, spare in (("hidden_1", spare_1), ("hidden_2", spare_2)):
    layer, other = getattr(network, name), getattr(fresh, name)
    layer.kernel[...] = layer.kernel[...].at[:, spare].set(other.kernel[...][:, spare])
    layer.bias[...] = layer.bias[...].at[spare].set(other.bias[...][spare])
  for layer, spare, outputs in (
    (network.hidden_2, spare_1, kept_2),
    (network.output, spare_2, np.array(OLD)),
  ):
    layer.kernel[...] = layer.kernel[...].at[np.ix_(spare, outputs)].set(0.0)


def learn(network: Network, batches: Any, bars: Progress, steps: int) -> None:
  """Train the whole network, in place."""
  graph, params = nnx.split(network, nnx.Param)
  run = _training.start("", graph, params, optimizer())
  bar = bars.add_task("learn 0 to 4", total=steps, live="")
  _training.train([run], batches, tick=lambda _: bars.advance(bar))
  nnx.update(network, run.params)


def tune(runs: list[Run], batches: Any, exam: Exam, bars: Progress, steps: int) -> None:
  """Train every run on the new digits, and look at it in between."""
  bar = bars.add_task("learn 5 to 9", total=steps, live="")
  every = max(steps // LOOKS, 1)

  def tick(count: int) -> None:
    bars.advance(bar)
    if count % every and count != steps:
      return
    for run in runs:
      run.curve.append((count, exam.scores(run.params)))
    bars.update(bar, live="0 to 4: " + ", ".join(f"{x.curve[-1][1].old:.0%}" for x in runs))

  for run in runs:
    run.curve.append((0, exam.scores(run.params)))
  _training.train(runs, batches, tick=tick)
