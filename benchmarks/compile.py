"""Compiling one Adam step over a tree of 200 leaves: maskopt against `optax.adam` + `where`.

python benchmarks/compile.py              CPU time of tracing, lowering and compiling; some minutes

XLA:CPU compiles equal loops once, so leaves of one shape are cheap to it, and leaves that each
train another number of elements are not; beside them stand trees whose leaves all differ in shape.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import machine

import maskopt

ADAM = optax.adam(1e-3)
SHAPES = ((64, 128), (256, 512), (1024, 512))
LIMIT = 3.0


def mask(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
  """A freeze mask under which some 10% of a leaf train; broadcastable where it can be."""
  rows, cols = shape
  if kind == "rows":
    return (np.arange(rows) % 10 > 0)[:, None]
  if kind == "columns":
    return np.arange(cols) % 20 > 0
  if kind == "block":
    return (np.arange(rows) >= rows // 10)[:, None]
  frozen = np.ones(rows * cols, bool)
  few = rows * cols // 20
  count = few if kind == "scattered, equal counts" else few + int(rng.integers(few // 10))
  frozen[rng.permutation(rows * cols)[:count]] = False
  return frozen.reshape(shape)


KINDS = ("block", "rows", "columns", "scattered, equal counts", "scattered")


def dense(masks: dict[str, np.ndarray]) -> tuple[Callable[..., Any], Any]:
  def step(params: Any, state: Any, grads: Any) -> Any:
    adam_state, frozen = state
    updates, adam_state = ADAM.update(grads, adam_state, params)
    new = jax.tree.map(lambda p, u, m: jnp.where(m, p, p + u), params, updates, frozen)
    return new, (adam_state, frozen)

  return step, lambda params: (ADAM.init(params), jax.tree.map(jnp.asarray, masks))


def ours(masks: dict[str, np.ndarray]) -> tuple[Callable[..., Any], Any]:
  tx = maskopt.selective_transform(ADAM, freeze_mask=masks)

  def step(params: Any, state: Any, grads: Any) -> Any:
    updates, state = tx.update(grads, state, params)
    return maskopt.apply_updates(params, updates), state

  return step, tx.init


def seconds(step: Callable[..., Any], init: Any, params: Any, rounds: int) -> float:
  """CPU time, for compilation runs on as many threads as there are cores."""
  shaped = jax.eval_shape(lambda: params)
  state, best = jax.tree.map(jnp.asarray, init(params)), float("inf")
  for _ in range(rounds):
    jax.clear_caches()
    start = time.process_time()
    jax.jit(step, donate_argnums=(0, 1)).lower(shaped, state, shaped).compile()
    best = min(best, time.process_time() - start)
  return best


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--leaves", type=int, default=200)
  parser.add_argument("--rounds", type=int, default=2)
  args = parser.parse_args()
  print(f"{args.leaves} leaves, CPU time; {machine()}")
  print(f"| leaves | trains | dense s | ours s | ratio | limit {LIMIT:.0f} |")
  print("| --- " * 6 + "|")
  for shape in SHAPES:
    for differ in (False, True):
      for kind in KINDS:
        if differ and kind == "scattered, equal counts":
          continue
        rng = np.random.default_rng(0)
        shapes = [(shape[0] + k * differ, shape[1]) for k in range(args.leaves)]
        masks = {f"leaf{k:03}": mask(kind, s, rng) for k, s in enumerate(shapes)}
        params = {f"leaf{k:03}": jnp.ones(s) for k, s in enumerate(shapes)}
        took = [seconds(*make(masks), params, args.rounds) for make in (dense, ours)]
        ratio = took[1] / took[0]
        name = f"{shape}, {'all different' if differ else 'all alike'}"
        verdict = "ok" if ratio <= LIMIT else "MISSED"
        print(f"| {name} | {kind} | {took[0]:.1f} | {took[1]:.1f} | {ratio:.2f} | {verdict} |")


if __name__ == "__main__":
  main()
