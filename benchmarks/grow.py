"""What growing a network saves: steps to equal loss, with and without the optimizer's moments.

python benchmarks/grow.py                 eight seeds, three tables, a minute or two

A small network (64 pixels, a few units, ten digits) is trained with Adam; L is its loss on held-out
images then. It grows to 64 units, which changes none of its outputs, and all of it trains on.
Counted are the steps until the held-out loss is first at or below L, 3/4 L and 1/2 L. It is looked
at after every step; a network that has just grown stands at L. Batches are the same for every way,
and so is every new weight but those of the network trained from scratch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import machine

import maskopt
from maskopt.demo import _data
from maskopt.demo._data import Images

LARGE, CLASSES = 64, 10
SHARES = (1.0, 0.75, 0.5)
Start = tuple[Any, Any]  # parameters and optimizer state


class Small(NamedTuple):
  """The network that grows: its units, its Adam's rate, its steps, and the rates that follow."""

  units: int
  rate: float
  steps: int
  then: tuple[float, ...]


SMALL = {
  "early": Small(16, 1e-3, 300, (1e-3, 1e-2)),  # it would have gone on learning by itself
  "late": Small(6, 1e-2, 1000, (1e-2,)),  # it is as good as it gets
}


class Setting(NamedTuple):
  """One seed, ready to grow.

  Attributes:
    seed: of everything.
    held_out: images to look at.
    params: of the small network.
    state: of its Adam.
    loss: of the small network on the held-out images.
    batches: what comes next.
  """

  seed: int
  held_out: Images
  params: Any
  state: Any
  loss: float
  batches: Images


def forward(params: Any, pixels: Any) -> jax.Array:
  hidden = jax.nn.relu(pixels @ params["hidden"]["kernel"] + params["hidden"]["bias"])
  return hidden @ params["head"]["kernel"] + params["head"]["bias"]


def loss_of(params: Any, images: Images) -> jax.Array:
  logits = forward(params, images.pixels)
  return optax.softmax_cross_entropy_with_integer_labels(logits, images.labels).mean()


def network(seed: int, units: int) -> dict[str, Any]:
  """Return weights of variance 1 / fan-in, as `grow` draws new ones."""
  keys = jax.random.split(jax.random.key(seed))

  def layer(key: Any, n: int, m: int) -> dict[str, Any]:
    return {"kernel": jax.random.normal(key, (n, m)) / np.sqrt(n), "bias": jnp.zeros(m)}

  return {"hidden": layer(keys[0], 64, units), "head": layer(keys[1], units, CLASSES)}


def adam(rate: float) -> optax.GradientTransformation:
  # Its state holds no rate: it may go on under another.
  return optax.adam(rate)


def train(rate: float, start: Start, batches: Images, held_out: Images) -> tuple[Any, Any, Any]:
  """Train on every batch; return parameters, state, and the held-out loss after each step."""
  return _train(jnp.float32(rate), *start, batches, held_out)


@jax.jit
def _train(rate: Any, params: Any, state: Any, batches: Images, held_out: Images) -> Any:
  def step(start: Start, batch: Images) -> tuple[Start, Any]:
    params, state = start
    updates, state = adam(rate).update(jax.grad(loss_of)(params, batch), state)
    params: Any = optax.apply_updates(params, updates)
    return (params, state), loss_of(params, held_out)

  (params, state), losses = jax.lax.scan(step, (params, state), batches)
  return params, state, losses


def stacked(images: Images, steps: int, seed: int) -> Images:
  batches = list(images.batches(steps, seed))
  return Images(np.stack([x.pixels for x in batches]), np.stack([x.labels for x in batches]))


def setting(small: Small, seed: int, after: int) -> Setting:
  images, held_out = _data.digits(seed)
  params = network(seed, small.units)
  start = params, adam(small.rate).init(params)
  params, state, losses = train(small.rate, start, stacked(images, small.steps, seed), held_out)
  batches = stacked(images, after, seed + 1000)
  return Setting(seed, held_out, params, state, float(losses[-1]), batches)


def starts(given: Setting) -> dict[str, Start]:
  """Name -> parameters and state to go on from."""
  tx, small = adam(1.0), given.params["hidden"]["bias"].size
  look = given.held_out.pixels[:8]

  def grown(to: Any = None) -> Any:
    return maskopt.surgery.grow(
      *(given.params, "hidden", LARGE - small),
      inputs=look,
      forward=forward,
      key=jax.random.key(given.seed),
      opt_state=given.state,
      tx=tx,
      to=to,
    )

  def old_only(mask: Any) -> Any:
    return maskopt.selective_transform(tx, freeze_mask=maskopt.invert(mask))

  kept = grown()
  first = Images(given.batches.pixels[0], given.batches.labels[0])
  grads = jax.grad(loss_of)(kept.model, first)
  # The old elements' moments; those of the new ones come from a gradient, as of a thaw.
  seeded = maskopt.migrate(grown(old_only).opt_state, kept.model, to=tx, grads=grads)
  reset = maskopt.migrate(kept.opt_state, kept.model, to=tx, moments="reset")
  anew = network(given.seed + 500, LARGE)
  return {
    "grown, moments kept": (kept.model, kept.opt_state),
    "grown, kept, those of new weights seeded": (kept.model, seeded),
    "grown, moments zero, Adam's count goes on": (kept.model, reset),
    "grown, moments dropped": (kept.model, tx.init(kept.model)),
    "not grown": (given.params, given.state),
    "from scratch": (anew, tx.init(anew)),
  }


def first_at(losses: np.ndarray, limit: float) -> float:
  """How many steps it took; infinity if they did not suffice."""
  reached = np.flatnonzero(losses <= limit)
  return float(reached[0] + 1) if len(reached) else np.inf


def measured(small: Small, rate: float, seeds: int, after: int) -> tuple[dict[str, Any], list[Any]]:
  """Name -> per seed the steps to each target and the lowest loss; and every L."""
  found: dict[str, Any] = {}
  limits = []
  for seed in range(seeds):
    given = setting(small, seed, after)
    limits.append(given.loss)
    for name, start in starts(given).items():
      losses = np.asarray(train(rate, start, given.batches, given.held_out)[2])
      steps = [first_at(losses, share * given.loss) for share in SHARES]
      # Growth in mode "zero" changes no output: it stands at L before its first step.
      if name != "from scratch":
        steps[0] = 0.0
      found.setdefault(name, []).append([*steps, losses.min()])
  return {name: np.array(rows) for name, rows in found.items()}, limits


def middle(values: np.ndarray) -> str:
  """The median, and the least and the most."""
  low, mid, high = np.min(values), np.median(values), np.max(values)
  if low == mid == high:
    return _count(mid)
  return f"{_count(mid)} ({_count(low)} to {_count(high)})"


def _count(steps: float) -> str:
  return f"{steps:.0f}" if np.isfinite(steps) else "never"


def rows(found: dict[str, Any], small: Small) -> Iterator[str]:
  share = small.units / LARGE  # FLOPs of a small step: both kernels have so many fewer units
  for name, values in found.items():
    cost = values[:, 2] + (0 if name == "from scratch" else share * small.steps)
    if name == "not grown":
      cost = share * (values[:, 2] + small.steps)
    cells = [middle(values[:, k]) for k in range(len(SHARES))]
    yield f"| {name} | {' | '.join(cells)} | {middle(cost)} | {np.median(values[:, 3]):.3f} |"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--seeds", type=int, default=8)
  parser.add_argument("--after", type=int, default=2000, help="steps at most after growing")
  parser.add_argument("--only", choices=tuple(SMALL))
  args = parser.parse_args()
  print(f"{args.seeds} seeds: median (least to most); {machine()}")
  for name, small in SMALL.items():
    for rate in small.then if args.only in (None, name) else ():
      found, limits = measured(small, rate, args.seeds, args.after)
      print(
        f"\nGrown {name}: {small.units} units, Adam({small.rate:g}), {small.steps} steps, "
        f"L = {np.median(limits):.2f}; from there Adam({rate:g})"
      )
      print("| | steps to L | to 3/4 L | to 1/2 L | and all before it, FLOPs | lowest loss |")
      print("| --- " * 6 + "|")
      for row in rows(found, small):
        print(row, flush=True)


if __name__ == "__main__":
  main()
