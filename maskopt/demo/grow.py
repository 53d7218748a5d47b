"""Ten digits arrive in five pairs; for each the network grows, and only what is new trains.

Each pair brings 32 hidden units and two outputs. `maskopt.surgery.grow` returns the grown network,
the mask "old frozen, new trainable", the optimizer and its state. With `mode="progressive"` new
units lead to new outputs only: their weights to the old ones are zero and frozen, so the old
outputs keep their bits.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import maskopt

from . import _continual, _data, _grow_picture, _options, _training
from ._data import Images
from ._grown import Learnt, Outcome, Way
from ._options import Json, Out, Seed, Steps
from ._report import Report

PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
PIXELS, UNITS = 64, 32  # units for each pair
Transform = Callable[[Any], optax.GradientTransformation]


# The first three are drawn.
WAYS = [
  Way("old units frozen", freezes=True),
  Way("nothing frozen"),
  Way("joint training", revisits=True),
  Way("old units frozen, own pair", freezes=True, own=True),
  Way("nothing frozen, own pair", own=True),
]


class Network(nnx.Module):
  """Pixels, a hidden layer, an output per digit so far."""

  def __init__(self, rngs: nnx.Rngs):
    self.hidden = nnx.Linear(PIXELS, UNITS, rngs=rngs)
    self.head = nnx.Linear(UNITS, len(PAIRS[0]), rngs=rngs)
    self.first = 0  # the first output that is asked

  def __call__(self, pixels: jax.Array) -> jax.Array:
    return self.head(nnx.relu(self.hidden(pixels)))[:, self.first :]


class Stage(NamedTuple):
  """A network and how it is trained.

  Attributes:
    network: as large as it is now.
    freeze_mask: over its parameters.
    tx: the optimizer under the mask.
    state: of the optimizer.
    difference: relative change of old outputs in growing; 0.0 is every bit kept.
  """

  network: Network
  freeze_mask: Any
  tx: optax.GradientTransformation
  state: Any
  difference: float = 0.0


def grow(
  steps: Steps = 300,
  seed: Seed = 0,
  out: Out = Path("maskopt-demo"),
  as_json: Json = False,
) -> None:
  """Ten digits arrive in pairs: grow hidden layer and head for each, train only what is new."""
  begin = time.perf_counter()
  report = Report("grow", "A network that grows with its tasks", as_json=as_json, seed=seed)
  train, test = _data.digits(seed)
  with _options.progress() as bars:
    bar = bars.add_task("grow", total=len(WAYS) * len(PAIRS) * steps, live="")

    def tick(way: Way, pair: list[int]) -> Callable[[int], None]:
      bars.update(bar, live=f"{way.name}: {_named(pair)}")
      return lambda _: bars.advance(bar)

    outcomes = [learn(way, train, test, steps, seed, tick) for way in WAYS]
  ours = outcomes[0]
  report.facts |= {"steps": steps, "runs": [facts(x) for x in outcomes]}
  _tell_pairs(report, ours, outcomes[1])
  _tell_accuracy(report, outcomes)
  picture = _grow_picture.save(outcomes, train, out / "grow.png")
  report.facts |= {"picture": str(picture), "seconds": round(time.perf_counter() - begin, 1)}
  report.say(f"Picture: {picture}   ({report.facts['seconds']} s)", style="dim")
  frozen = [x for outcome in outcomes if outcome.way.freezes for x in outcome.learnt]
  verdict = "Frozen units kept every bit in every task, and so did the old outputs."
  report.finish(all(x.ok for x in frozen), verdict)


def learn(
  way: Way, train: Images, test: Images, steps: int, seed: int, tick: Callable[..., Any]
) -> Outcome:
  """Learn the pairs one after the other, and look at all of them after each."""
  transform = masked if way.freezes else unmasked
  network = Network(nnx.Rngs(seed))
  stage = Stage(network, False, transform(False), transform(False).init(_params(network)))
  aware, among_all, learnt = [], [], []
  for k, pair in enumerate(PAIRS):
    if k:
      stage = grown(stage, transform, test.pixels[:32], jax.random.key(seed + k))
    images = train.of(range(pair[-1] + 1) if way.revisits else pair)
    before = outputs(stage.network, test)
    was = maskopt.snapshot(_params(stage.network))
    stage, state_bytes = trained(stage, way, pair, images.batches(steps, seed + k), tick)
    after, params = outputs(stage.network, test), _params(stage.network)
    learnt.append(
      Learnt(
        pair,
        (stage.network.hidden.out_features, stage.network.head.out_features),
        sum(x.size for x in jax.tree.leaves(params)),
        state_bytes,
        maskopt.audit(was, params, stage.freeze_mask),
        np.array_equal(_bits(before[:, : pair[0]]), _bits(after[:, : pair[0]])),
        stage.difference,
      )
    )
    aware.append(_continual.task_aware(after, test.labels, PAIRS))
    among_all.append(_continual.class_incremental(after, test.labels, PAIRS))
  final = nnx.to_pure_dict(_params(stage.network))
  return Outcome(way, np.array(aware), np.array(among_all), learnt, final)


def grown(stage: Stage, transform: Transform, pixels: np.ndarray, key: jax.Array) -> Stage:
  """Return the network with more units and two more outputs, its mask and its optimizer state."""
  done = maskopt.surgery.grow(
    stage.network,
    {"hidden": UNITS, "head": len(PAIRS[0])},
    mode="progressive",
    inputs=jnp.asarray(pixels),
    key=key,
    opt_state=stage.state,
    tx=stage.tx,
    to=transform,
  )
  return Stage(done.model, done.freeze_mask, done.tx, done.opt_state, done.report.difference)


def masked(freeze_mask: Any) -> optax.GradientTransformation:
  """The optimizer of what is new."""
  return maskopt.selective_transform(unmasked(), freeze_mask=freeze_mask, prefer="memory")


def unmasked(freeze_mask: Any = None) -> optax.GradientTransformation:
  """The optimizer of everything."""
  del freeze_mask
  return optax.adamw(3e-3, weight_decay=0.01)


def trained(
  stage: Stage, way: Way, pair: list[int], batches: Any, tick: Callable[..., Any]
) -> tuple[Stage, int]:
  """Train the network in place; return its stage and the bytes of the optimizer's state."""
  network, first = stage.network, pair[0] if way.own else 0
  network.first = first
  graph, params = nnx.split(network, nnx.Param)
  network.first = 0
  if way.freezes:
    grad = functools.partial(maskopt.grad, freeze_mask=stage.freeze_mask)
    run = _training.start(way.name, graph, params, stage.tx, maskopt.apply_updates, grad)
    run.state = stage.state
  else:
    # Its best: with the moments of the pair before, `nothing frozen` forgot 15 points and not 3.
    run = _training.start(way.name, graph, params, stage.tx)
  asked = (Images(x.pixels, x.labels - np.int32(first)) for x in batches)
  _training.train([run], asked, tick=tick(way, pair))
  nnx.update(network, run.params)
  return stage._replace(state=run.state), run.state_bytes


def outputs(network: Network, images: Images) -> np.ndarray:
  """The outputs for every image, shape (n, digits so far)."""
  return np.asarray(network(jnp.asarray(images.pixels)))


def _params(network: Network) -> Any:
  return nnx.state(network, nnx.Param)


def _bits(x: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(x).view(np.uint32)


def _named(pair: list[int]) -> str:
  return " and ".join(str(digit) for digit in pair)


def facts(outcome: Outcome) -> dict[str, Any]:
  """The numbers of one way, for JSON; NaN is null there."""
  told = {}
  for name in ("task_aware", "class_incremental"):
    matrix = getattr(outcome, name)
    told[name] = {
      "accuracy": _nullable(matrix),
      "average": _nullable(_continual.average(matrix)),
      "forgetting": _nullable(_continual.forgetting(matrix)),
    }
  return {
    "name": outcome.way.name,
    "freezes": outcome.way.freezes,
    "images": "all so far" if outcome.way.revisits else "the pair's",
    "loss_over": "the pair" if outcome.way.own else "all digits so far",
    **told,
    "tasks": [
      {
        "digits": x.digits,
        "hidden_units": x.shape[0],
        "parameters": x.total,
        "trainable": x.audit.trainable if outcome.way.freezes else x.total,
        "optimizer_bytes": x.state_bytes,
        "old_elements": x.audit.frozen,
        "old_elements_changed": x.audit.changed,
        "old_outputs_bit_equal": x.outputs_kept,
        "old_outputs_changed_by_growing": x.difference,
      }
      for x in outcome.learnt
    ],
  }


def _nullable(matrix: np.ndarray) -> Any:
  return [
    _nullable(x) if np.ndim(x) else None if np.isnan(x) else round(float(x), 4) for x in matrix
  ]


def _tell_pairs(report: Report, ours: Outcome, other: Outcome) -> None:
  report.step(
    "Every pair brings 32 hidden units and two outputs; what was there holds still",
    "Old: weights, biases, and the zeros from new units to old outputs.",
  )
  report.table(
    ("pair", "units", "trained", "of all", "Adam", "unfrozen", "old weights", "old outputs"),
    [
      (
        _named(x.digits),
        f"{x.shape[0]} + {x.shape[1]}",
        f"{x.audit.trainable:,}",
        f"{x.audit.trainable / x.total:.0%}",
        f"{x.state_bytes / 1e3:.1f} kB",
        f"{y.state_bytes / 1e3:.1f} kB",
        _verdict(x),
        "-" if x.digits == PAIRS[0] else "kept" if x.outputs_kept else "CHANGED",
      )
      for x, y in zip(ours.learnt, other.learnt, strict=True)
    ],
  )
  worst = max(x.difference for x in ours.learnt)
  told = "changed no bit of an old output" if worst == 0 else f"rounded old outputs by {worst:.0e}"
  report.say(f"Kept: every bit, on all test images. Growing itself {told}.")


def _verdict(learnt: Learnt) -> str:
  audit = learnt.audit
  if not audit.frozen:
    return "-"
  return f"CHANGED {audit.changed:,}" if audit.changed else f"{audit.frozen:,} kept"


def _moved(outcome: Outcome) -> str:
  changed = outcome.learnt[-1].audit.changed
  if outcome.way.freezes:
    return f"CHANGED {changed:,}" if changed else "kept"
  return f"{changed:,}"


def _tell_accuracy(report: Report, outcomes: list[Outcome]) -> None:
  report.step(
    "What is known of all five pairs in the end, and what was forgotten",
    "Of two: the pair is told (task-aware). Of ten: nobody tells it (class-incremental).",
  )
  report.table(
    ("way", "loss over", "of two", "forgotten", "of ten", "forgotten", "moved"),
    [
      (
        x.way.name.split(",")[0],
        "own pair" if x.way.own else "so far",
        *(
          f"{what(matrix)[-1]:.1%}"
          for matrix in (x.task_aware, x.class_incremental)
          for what in (_continual.average, _continual.forgetting)
        ),
        _moved(x),
      )
      for x in outcomes
    ],
  )
  report.say("Forgotten: best accuracy so far less that in the end, mean of the old pairs")
  report.say("(Chaudhry et al. 2018). Moved: old weights, in the last task.")
  report.say("Joint training sees all images so far again: the upper bound.")
  report.say(
    "Freezing keeps what old outputs say: while the pair is told, nothing is forgotten. It cannot "
    "teach new outputs about old digits, which they never saw: where all ten compete, freezing "
    "does not help, old images do.",
    style="dim",
  )
