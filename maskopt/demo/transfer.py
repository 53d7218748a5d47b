"""How far do features transfer? The experiment of Yosinski et al. on two halves of the digits.

Five digits, chosen at random, are task A; the other five are task B. A network of L hidden layers
and an output learns A, and another learns B. Then the first n layers of one of them get new layers
on top, and the whole learns B again:

| run | layers 1 to n | layers after them | layers 1 to n are |
| --- | --- | --- | --- |
| `baseB` | new | new | trained |
| `BnB` | from `baseB` | new | frozen |
| `BnB+` | from `baseB` | new | fine-tuned |
| `AnB` | from `baseA` | new | frozen |
| `AnB+` | from `baseA` | new | fine-tuned |

`BnB` against `baseB` says whether layers had adapted to each other, so that new ones on top do not
find back; `AnB` against `BnB` says how specific the layers are to their task. New
layers come from `maskopt.surgery.reset`; frozen ones are a slice in the mask,
`(slice(None, n), True)`, and cost neither gradients nor optimizer memory.

Every run is stored when it ends; the same command goes on where it was interrupted.

References:
  Yosinski, Clune, Bengio, Lipson: How transferable are features in deep neural networks?
  arXiv 1411.1792
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from rich.text import Text

import maskopt

from . import _curves, _data, _options, _transfer_picture
from ._curves import KINDS, Curves
from ._data import Images
from ._ledger import Ledger
from ._options import Json, Out, Seed, Steps
from ._report import Report

LAYERS, WIDTH, CLASSES, BATCH = 5, 24, 5, 64
RATE, DECAY = 3e-3, 0.01

Params = list[dict[str, Any]]
Seeds = Annotated[int, typer.Option(min=1, help="Number of random splits, from --seed on.")]


class Run(NamedTuple):
  """One training.

  Attributes:
    seed: of the split, the networks and the batches.
    kind: "baseA", "baseB", or one of `KINDS`.
    n: number of layers that come from a base; 0 for a base.
  """

  seed: int
  kind: str
  n: int = 0

  @property
  def task(self) -> str:
    """What it learns, A or B."""
    return self.kind.removesuffix("+")[-1]

  @property
  def key(self) -> Any:
    """Of its new layers: the same for the four runs of a seed and an n."""
    number = self.n + 1 if self.n else "AB".index(self.task)
    return jax.random.fold_in(jax.random.key(self.seed), number)

  @property
  def frozen(self) -> int:
    """Number of frozen layers."""
    return 0 if self.kind.endswith("+") else self.n

  @property
  def base(self) -> Run:
    """The run whose layers it takes."""
    return Run(self.seed, f"base{self.kind[0]}")

  @property
  def name(self) -> str:
    """As the paper writes it, with its number: A3B+."""
    return f"{self.kind[0]}{self.n}{self.kind[2:]}" if self.n else self.kind

  @property
  def file(self) -> str:
    """The name of its file."""
    return f"seed-{self.seed}-{self.name}"


class Task(NamedTuple):
  """One half of the digits; labels are positions in `classes`."""

  classes: list[int]
  train: Images
  test: Images


def plan(seeds: range) -> list[Run]:
  """Every run; what a run needs stands before it."""
  return [
    run
    for seed in seeds
    for run in (
      Run(seed, "baseA"),
      Run(seed, "baseB"),
      *(Run(seed, kind, n) for n in range(1, LAYERS + 1) for kind in KINDS),
    )
  ]


def tasks(seed: int) -> dict[str, Task]:
  """The digits in two halves, A and B, that share no class.

  A quarter of the images trains and three quarters examine, not the other way round: few images to
  learn from make layers matter, and with many to examine one image is 0.15 points.
  """
  test, train = _data.digits(seed)
  order = np.random.default_rng(seed).permutation(10)
  halves = {"A": np.sort(order[:CLASSES]), "B": np.sort(order[CLASSES:])}
  return {
    name: Task(classes.tolist(), _of(train, classes), _of(test, classes))
    for name, classes in halves.items()
  }


def _of(images: Images, classes: np.ndarray) -> Images:
  chosen = images.of(classes.tolist())
  return Images(chosen.pixels, np.searchsorted(classes, chosen.labels).astype(np.int32))


def blank() -> Params:
  """The network before any layer began: 64 pixels, `LAYERS` hidden layers, five outputs."""
  sizes = [64, *[WIDTH] * LAYERS, CLASSES]
  return [
    {"kernel": np.zeros((n, units), np.float32), "bias": np.zeros(units, np.float32)}
    for n, units in zip(sizes[:-1], sizes[1:], strict=True)
  ]


def above_anew(params: Params, n: int, key: Any) -> Params:
  """The first n layers as they are, and new layers above them; the same ones for the same key."""
  init = jax.nn.initializers.he_normal()
  return maskopt.surgery.reset(params, [(slice(n, None), True)], init=init, key=key).model


def first_are_frozen(n: int) -> Any:
  """The mask that freezes the first n layers."""
  return maskopt.build_mask(blank(), [(slice(None, n), True)] if n else [])


def outputs(params: Params, pixels: Any) -> jax.Array:
  """One output for each class, shape (images, 5)."""
  *hidden, last = params
  x = pixels
  for layer in hidden:
    x = jax.nn.relu(x @ layer["kernel"] + jnp.expand_dims(layer["bias"], 0))
  return x @ last["kernel"] + jnp.expand_dims(last["bias"], 0)


def cross_entropy(params: Params, images: Images) -> jax.Array:
  """The loss of a batch."""
  scores = outputs(params, images.pixels)
  return optax.softmax_cross_entropy_with_integer_labels(scores, images.labels).mean()


@functools.cache
def trainer(frozen: int) -> Callable[[Params, Images], tuple[Params, jax.Array]]:
  """A training with so many frozen layers, in one `jit` for all runs that have as many.

  Returns:
    A function of parameters and of batches, stacked, that returns parameters and every step's loss.
  """
  freeze_mask = first_are_frozen(frozen)
  tx = maskopt.selective_transform(optax.adamw(RATE, weight_decay=DECAY), freeze_mask=freeze_mask)
  value_and_grad = maskopt.value_and_grad(cross_entropy, freeze_mask)

  def step(carry: Any, images: Images) -> Any:
    params, state = carry
    loss, grads = value_and_grad(params, images)
    updates: Any  # Optax counts Python numbers among updates, which these are not
    updates, state = tx.update(grads, state, params)
    return (maskopt.apply_updates(params, updates), state), loss

  @jax.jit
  def train(params: Params, batches: Images) -> tuple[Params, jax.Array]:
    (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), batches)
    return params, losses

  return train


class Split:
  """What the runs of one seed share: the tasks, and the batches of each."""

  def __init__(self, seed: int, steps: int):
    self._tasks = tasks(seed)
    self._batches = {
      name: _stacked(task.train.batches(steps, seed, BATCH)) for name, task in self._tasks.items()
    }

  def train(self, run: Run, params: Params) -> dict[str, Any]:
    """Train from these parameters; return what there is to store."""
    before, task = maskopt.snapshot(params), self._tasks[run.task]
    after, losses = trainer(run.frozen)(params, self._batches[run.task])
    audit = maskopt.audit(before, after, first_are_frozen(run.frozen))
    answers = np.argmax(np.asarray(outputs(after, task.test.pixels)), axis=1)
    result: dict[str, Any] = {
      "right": int(np.sum(answers == task.test.labels)),
      "of": len(task.test.labels),
      "last_loss": float(losses[-1]),
      "trainable": audit.trainable,
      "frozen": audit.frozen,
      "frozen_changed": audit.changed,
    }
    if not run.n:
      result |= {"classes": task.classes, "layers": jax.tree.map(np.asarray, after)}
    return result


def _stacked(batches: Iterable[Images]) -> Images:
  pixels, labels = zip(*batches, strict=True)
  return Images(np.stack(pixels), np.stack(labels))


def perform(
  runs: list[Run], steps: int, ledger: Ledger, tick: Callable[[Run, float], None]
) -> dict[Run, dict[str, Any]]:
  """The result of every run; what the ledger does not have yet is done now, and stored at once."""
  stored = ledger.read(run.file for run in runs)
  split = functools.lru_cache(maxsize=1)(functools.partial(Split, steps=steps))
  for run in runs:
    if run.file not in stored:
      params = above_anew(stored[run.base.file]["layers"] if run.n else blank(), run.n, run.key)
      stored[run.file] = split(run.seed).train(run, params)
      ledger.write(run.file, stored[run.file])
    tick(run, accuracy(stored[run.file]))
  return {run: stored[run.file] for run in runs}


def accuracy(result: dict[str, Any]) -> float:
  """Per cent of the test images told right."""
  return 100 * result["right"] / result["of"]


def transfer(
  steps: Steps = 500,
  seed: Seed = 0,
  seeds: Seeds = 20,
  out: Out = Path("maskopt-demo"),
  as_json: Json = False,
) -> None:
  """Yosinski et al. 2014: do layers of five digits serve the other five? Goes on if interrupted."""
  begin, runs = time.perf_counter(), plan(range(seed, seed + seeds))
  ledger = _ledger(out / f"transfer-{steps}-steps", steps, runs)
  title = "How far do the layers of one half of the digits serve the other?"
  report = Report("transfer", title, as_json=as_json, seed=seed, seeds=seeds, steps=steps)
  report.facts["stored_before"] = sum(ledger.path(run.file).exists() for run in runs)
  with _options.progress() as bars:
    bar = bars.add_task("train", total=len(runs), live="")

    def tick(run: Run, right: float) -> None:
      bars.update(bar, advance=1, live=f"seed {run.seed}: {run.name} {right:.1f}%")

    try:
      results = perform(runs, steps, ledger, tick)
    except KeyboardInterrupt:
      bars.stop()
      done = sum(ledger.path(run.file).exists() for run in runs)
      said = (
        f"Stopped: {done} of {len(runs)} runs are in {ledger.folder}; the same command goes on."
      )
      typer.echo(said, err=True)
      raise typer.Exit(130) from None
  curves = _found(results, seeds)
  picture = _transfer_picture.save(curves, out / "transfer.png")
  report.facts |= {"picture": str(picture), "seconds": round(time.perf_counter() - begin, 1)}
  _tell(report, results, curves)
  changed = sum(result["frozen_changed"] for result in results.values())
  report.finish(not changed, "Every frozen layer kept its bits in every run.")


def _ledger(folder: Path, steps: int, runs: list[Run]) -> Ledger:
  """The finished runs in a folder, all of which can be read."""
  try:
    folder.mkdir(exist_ok=True)
    settings = {"steps": steps, "layers": LAYERS, "width": WIDTH, "batch": BATCH}
    ledger = Ledger(folder, {"demo": "transfer", **settings, "rate": RATE, "decay": DECAY})
    ledger.read(run.file for run in runs)
  except OSError as error:
    said = f"cannot make the directory {folder}: {error.strerror}"
    raise typer.BadParameter(said, param_hint="--out") from error
  except ValueError as error:
    raise typer.BadParameter(str(error), param_hint="--out") from error
  return ledger


def _found(results: dict[Run, dict[str, Any]], seeds: int) -> Curves:
  """The accuracies on B of every kind, n and seed."""
  base = [accuracy(x) for run, x in results.items() if run.kind == "baseB"]
  kinds = {
    kind: np.array([accuracy(x) for run, x in results.items() if run.kind == kind])
    for kind in KINDS
  }
  # The runs of a seed stand together, and in them n rises.
  return Curves(np.array(base), {kind: x.reshape(seeds, LAYERS) for kind, x in kinds.items()})


def _tell(report: Report, results: dict[Run, dict[str, Any]], curves: Curves) -> None:
  classes = {run.seed: x["classes"] for run, x in results.items() if run.kind == "baseA"}
  report.facts |= {"classes_of_A": [classes[seed] for seed in sorted(classes)]}
  report.facts |= _curves.as_dict(curves)
  first, counts = min(classes), [x["of"] for run, x in results.items() if run.kind == "baseB"]
  report.step(
    "The runs",
    f"{len(results)} trainings of {LAYERS} hidden layers of {WIDTH} units and an output. In split "
    f"{first}, A is {', '.join(map(str, classes[first]))}; {counts[0]} images of B examine.",
  )
  trainable = [x["trainable"] for run, x in results.items() if run.kind == "AnB"]
  _curves.tell(report, curves, trainable[:LAYERS])
  report.show(Text(f"Picture: {report.facts['picture']}", no_wrap=True, overflow="ignore"))
