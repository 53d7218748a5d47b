"""Mathematica's NetTrain with LearningRateMultipliers, a time goal and a validation set.

There, a list of rules gives parts of a network factors on the learning rate, and None freezes.
Here, the same ordered rules build the factors and the freeze mask:

| Mathematica | maskopt |
| --- | --- |
| `LearningRateMultipliers -> {-2 -> 1, _ -> None}` | `[(-2, 1.0), (..., None)]` |
| `-2`, the last layer but one | `-2`, and layers without parameters count in both |
| `1`, the first layer | `0`, for indices start at 0 |
| `_` | `...` |
| `None`, or `0` | `None`, or `0`: frozen, and every bit is kept |
| `"dense" -> 0.1` | `("dense", 0.1)` |
| `{"dense", "Biases"} -> None` | `("dense/bias", None)` |
| `TimeGoal -> Quantity[10, "Seconds"]` | the loop asks the clock: `net_train(seconds=10)` |
| `MaxTrainingRounds -> 20` | `net_train(rounds=20)` |
| `ValidationSet -> Scaled[0.1]` | `net_train(validation=0.1)`: the best round is returned |

In both the first rule that matches wins, so `_` stands last.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx

import maskopt

from . import _data, _options
from ._data import Images
from ._options import Json, Seed
from ._report import Report
from ._ways import Tick, chosen, one_round

Rules = Sequence[tuple[Any, float | None]]
LAST: Rules = [(-2, 1.0), (..., None)]
SLOWER: Rules = [(0, 0.1), (2, 0.3), (..., 1.0)]
ALL: Rules = [(..., 1.0)]
WORDS = [
  ("LearningRateMultipliers -> {-2 -> 1, _ -> None}", "[(-2, 1.0), (..., None)]"),
  ("layer 1, the first; -1, the last", "layer 0, the first; -1, the last"),
  ("_ -> None", "(..., None), and every bit is kept"),
  ('"dense" -> 0.1', '("dense", 0.1)'),
  ('TimeGoal -> Quantity[10, "Seconds"]', "net_train(seconds=10), below"),
  ("MaxTrainingRounds -> 20", "net_train(rounds=20)"),
  ("ValidationSet -> Scaled[0.1]", "net_train(validation=0.1): the best round is returned"),
]


def chain(seed: int) -> nnx.Sequential:
  """NetChain[{LinearLayer[128], Ramp, LinearLayer[64], Ramp, LinearLayer[10], SoftmaxLayer[]}]."""
  rngs = nnx.Rngs(seed)
  return nnx.Sequential(
    nnx.Linear(64, 128, rngs=rngs),
    nnx.relu,
    nnx.Linear(128, 64, rngs=rngs),
    nnx.relu,
    nnx.Linear(64, 10, rngs=rngs),
    nnx.softmax,
  )


def freeze_mask(network: nnx.Sequential, rules: Rules) -> Any:
  """Return what these rules freeze: True where the factor is None or 0."""
  return maskopt.build_mask(network, [(pattern, not factor) for pattern, factor in rules])


class Learner:
  """A network in training: Adam, its updates multiplied by the factors of the rules.

  Attributes:
    params: now.
    state: of the optimizer.
  """

  def __init__(self, network: nnx.Sequential, rules: Rules, rate: float = 1e-3):
    self._graph, params = nnx.split(network, nnx.Param)
    self.params: Any = params
    factors = maskopt.build_multipliers(network, rules)
    tx = optax.chain(
      maskopt.selective_transform(optax.adam(rate), freeze_mask=freeze_mask(network, rules)),
      maskopt.scale_by_multiplier(factors),
    )
    self.state = tx.init(self.params)

    @jax.jit
    def step(params: Any, state: Any, images: Images) -> tuple[Any, Any]:
      updates: Any
      grads = maskopt.grad(self.loss, maskopt.mask_of(state))(params, images)
      updates, state = tx.update(grads, state, params)
      return maskopt.apply_updates(params, updates), state

    self._step, self.tell = step, jax.jit(self.loss)

  def probabilities(self, params: Any, images: Images) -> jax.Array:
    """What the SoftmaxLayer says, shape (n, 10)."""
    return nnx.merge(self._graph, params)(jnp.asarray(images.pixels))

  def loss(self, params: Any, images: Images) -> jax.Array:
    """The mean cross-entropy of the probabilities."""
    told = jnp.take_along_axis(
      self.probabilities(params, images), jnp.asarray(images.labels)[:, None], axis=1
    )
    return -jnp.log(told + jnp.float32(1e-30)).mean()

  def step(self, images: Images) -> None:
    """Train on one batch."""
    self.params, self.state = self._step(self.params, self.state, images)


class Trained(NamedTuple):
  """What `net_train` returns.

  Attributes:
    params: of the round with the lowest validation loss.
    rounds: how many were finished.
    steps: how many batches were seen.
    ended_by: "time" or "rounds".
    losses: of the validation set, before the first and after every round.
  """

  params: Any
  rounds: int
  steps: int
  ended_by: Literal["time", "rounds"]
  losses: list[float]


def net_train(
  learner: Learner,
  images: Images,
  *,
  seconds: float,
  rounds: int | None = None,
  validation: float = 0.1,
  seed: int = 0,
  clock: Callable[[], float] = time.perf_counter,
  tick: Tick = lambda: None,
) -> Trained:
  """Train until the time is up or the rounds are done; keep the best round.

  Args:
    learner: what learns.
    images: to learn from.
    seconds: the time goal, compilation included; looked at after every batch.
    rounds: passes over the images, or None for as many as there is time for.
    validation: the share of the images that is held out.
    seed: of the share and of every round's order.
    clock: returns seconds.
    tick: called after every round.
  Returns:
    A `Trained`. A round that the time goal cuts short counts as steps and not as a round.
  """
  begin, rng = clock(), np.random.default_rng(seed)
  held, rest = _split(images, validation, rng)
  best, losses, steps = learner.params, [float(learner.tell(learner.params, held))], 0

  def look() -> None:
    nonlocal best
    losses.append(float(learner.tell(learner.params, held)))
    best = learner.params if losses[-1] <= min(losses) else best

  while rounds is None or len(losses) <= rounds:
    for batch in one_round(rest, rng):
      learner.step(batch)
      steps += 1
      if clock() - begin >= seconds:
        finished = len(losses) - 1
        look()
        return Trained(best, finished, steps, "time", losses)
    look()
    tick()
  return Trained(best, len(losses) - 1, steps, "rounds", losses)


def _split(images: Images, share: float, rng: np.random.Generator) -> tuple[Images, Images]:
  order = rng.permutation(len(images.labels))
  held = round(share * len(order))
  return chosen(images, order[:held]), chosen(images, order[held:])


@dataclasses.dataclass(frozen=True)
class Case:
  """One call of NetTrain: its rules, its bounds, and how Mathematica writes the former."""

  written: str
  rules: Rules
  rounds: int | None
  seconds: float


def multipliers(
  rounds: Annotated[int, typer.Option(min=1, help="MaxTrainingRounds of each training.")] = 20,
  seconds: Annotated[float, typer.Option(min=0.01, help="TimeGoal of each training.")] = 10.0,
  seed: Seed = 0,
  as_json: Json = False,
) -> None:
  """Mathematica: NetTrain, LearningRateMultipliers -> {-2 -> 1, _ -> None}, TimeGoal and rounds."""
  title = "LearningRateMultipliers, as in Mathematica's NetTrain"
  facts = {"seed": seed, "rounds": rounds, "seconds": seconds}
  report = Report("multipliers", title, as_json=as_json, **facts)
  report.words("Mathematica", WORDS)
  images, test = _data.digits(seed)
  network = chain(seed)
  cases = [
    Case("{-2 -> 1, _ -> None}", LAST, rounds, seconds),
    Case("{1 -> 0.1, 3 -> 0.3, _ -> 1}", SLOWER, rounds, seconds),
    Case("{_ -> 1}", ALL, rounds, seconds),
    Case("{-2 -> 1, _ -> None}", LAST, None, min(seconds / 10, 1.0)),
  ]
  with _options.progress() as bars:
    bar = bars.add_task("train", total=4 * rounds, live="")
    tick = functools.partial(bars.advance, bar)
    first = net_train(
      Learner(network, ALL), images.of(range(5)), seconds=seconds, rounds=rounds, tick=tick
    )
    nnx.update(network, first.params)
    rows = [_row(case, network, images, test, seed, tick) for case in cases]
  report.step("Layers, counted as in NetChain, under {-2 -> 1, _ -> None}")
  _tell_layers(report, network)
  report.step("The other order, {_ -> None, -2 -> 1}, freezes everything: an error here")
  report.say(_refused(network), style="yellow")
  _tell_rows(report, rows)
  ok = all(row["frozen_changed"] == 0 for row in rows)
  report.finish(ok, "Every layer under None kept every bit.")


def _refused(network: nnx.Sequential) -> str:
  """What the rules say in the wrong order."""
  try:
    maskopt.build_multipliers(network, LAST[::-1])
  except ValueError as error:
    return str(error)
  return "nothing"


def _no_tick() -> None:
  pass


def _row(
  case: Case, network: nnx.Sequential, images: Images, test: Images, seed: int, tick: Tick
) -> dict[str, Any]:
  learner = Learner(network, case.rules)
  bounds: dict[str, Any] = {"seconds": case.seconds, "rounds": case.rounds}
  if case.rounds is None:
    tick = _no_tick  # nobody knows how many there will be
  trained = net_train(learner, images, seed=seed, tick=tick, **bounds)
  mask = freeze_mask(network, case.rules)
  audit = maskopt.audit(nnx.state(network, nnx.Param), trained.params, mask)
  answers = np.argmax(learner.probabilities(trained.params, test), axis=1)
  before = np.argmax(network(jnp.asarray(test.pixels)), axis=1)
  return {
    "rules": case.written,
    "frozen": audit.frozen,
    "frozen_changed": audit.changed,
    "rounds": trained.rounds,
    "steps": trained.steps,
    "ended_by": trained.ended_by,
    "validation_loss": round(min(trained.losses), 4),
    "test_accuracy_before": round(float(np.mean(before == test.labels)), 4),
    "test_accuracy": round(float(np.mean(answers == test.labels)), 4),
  }


def _tell_layers(report: Report, network: nnx.Sequential) -> None:
  factors: Any = maskopt.build_multipliers(network, LAST)
  shown = nnx.to_pure_dict(factors)["layers"]
  count, rows = len(network.layers), []
  for k, layer in enumerate(network.layers):
    name = getattr(layer, "__name__", type(layer).__name__)
    factor = shown[k]["kernel"] if k in shown else None
    text = "" if factor is None else "frozen" if factor == 0 else f"x {factor:g}"
    rows.append((f"layers/{k}", name, f"{k + 1} or {k - count}", f"{k} or {k - count}", text))
  report.table(("path", "layer", "Mathematica", "here", "factor"), rows)
  report.show(maskopt.summary(network, freeze_mask(network, LAST)))


def _tell_rows(report: Report, rows: list[dict[str, Any]]) -> None:
  report.facts["runs"] = rows
  start = rows[0]["test_accuracy_before"]
  report.step(f"A chain that learnt 0 to 4 ({start:.0%} right on all ten) learns all ten")
  report.table(
    ("multipliers", "frozen", "bits", "rounds", "ended by", "loss", "test"),
    [
      (
        row["rules"],
        f"{row['frozen']:,}",
        "-" if not row["frozen"] else "CHANGED" if row["frozen_changed"] else "kept",
        f"{row['rounds']}",
        row["ended_by"],
        f"{row['validation_loss']:.3f}",
        f"{row['test_accuracy']:.1%}",
      )
      for row in rows
    ],
  )
  report.say("Loss: the lowest of the validation set, whose round is the one that is tested.")
