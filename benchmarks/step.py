"""One Adam step on a large leaf: maskopt against `optax.adam` + `where`, side by side in one run.

python benchmarks/step.py                 the table of the README, ratios and limits
python benchmarks/step.py --layouts       every layout at every share: what the thresholds rest on
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import machine, paired_minima, stepper

import maskopt

ADAM = optax.adam(1e-3)
# Share -> largest allowed ratio to dense Adam + where.
LIMITS = {
  "scattered": {0.001: 0.06, 0.01: 0.4, 0.1: 1.0, 0.5: 1.15, 0.9: 1.15},
  "rows": {0.01: 0.04, 0.1: 0.3, 0.5: 1.15, 0.9: 1.15},
  "block": {0.01: 0.15, 0.1: None, 0.5: 1.15},
  "columns": {0.01: None, 0.1: None, 0.5: 1.15},
}


def mask(kind: str, share: float, shape: tuple[int, int]) -> np.ndarray:
  """A freeze mask that trains the share, in one structure; broadcastable where it can be."""
  rng, (rows, cols) = np.random.default_rng(0), shape
  if kind == "scattered":
    return rng.random(shape) >= share
  if kind == "rows":
    return ~np.isin(np.arange(rows), rng.permutation(rows)[: int(rows * share)])[:, None]
  if kind == "columns":
    return ~np.isin(np.arange(cols), rng.permutation(cols)[: int(cols * share)])
  frozen = np.ones(shape, bool)
  side = share**0.5
  frozen[64 : 64 + int(rows * side), 64 : 64 + int(cols * side)] = False
  return frozen


def dense_step(frozen: np.ndarray) -> tuple[Callable, Any]:
  """Adam on the whole leaf, then a select: what a user writes today."""

  def step(p: Any, state: Any, g: Any) -> Any:
    adam_state, m = state
    updates, adam_state = ADAM.update(g, adam_state, p)
    return jnp.where(m, p, p + updates), (adam_state, m)

  return step, lambda p: (ADAM.init(p), jnp.asarray(np.broadcast_to(frozen, p.shape)))


def our_step(frozen: np.ndarray, prefer: Any = "time") -> tuple[Callable, Any]:
  tx = maskopt.selective_transform(ADAM, freeze_mask=frozen, prefer=prefer)

  def step(p: Any, state: Any, g: Any) -> Any:
    updates, state = tx.update(g, state, p)
    return maskopt.apply_updates(p, updates), state

  return step, tx.init


def state_bytes(state: Any) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(state))


def rows_of(kinds: list[str], shape: tuple[int, int], rounds: int, layouts: bool) -> Iterator[str]:
  rng = np.random.default_rng(1)
  p = jnp.asarray(rng.standard_normal(shape, np.float32))
  g = jnp.asarray(rng.standard_normal(shape, np.float32))
  for kind in kinds:
    for share, limit in LIMITS[kind].items():
      frozen = mask(kind, share, shape)
      steps = {"dense": dense_step(frozen), "ours": our_step(frozen)}
      if layouts:
        steps["packed"] = our_step(frozen, "memory")
      states = {name: init(p) for name, (_, init) in steps.items()}
      layout = maskopt.mask_of(states["ours"]).items()[0][1].kind
      size = {name: state_bytes(s) for name, s in states.items()}
      runs = {name: stepper(step, p, states.pop(name), g) for name, (step, _) in steps.items()}
      best = paired_minima(runs, rounds)
      ratio = best["ours"] / best["dense"]
      verdict = "" if limit is None else f"{limit:.2f} {'ok' if ratio <= limit else 'MISSED'}"
      packed = f" | {best['packed'] / best['dense']:.3f}" if layouts else ""
      yield (
        f"| {kind} | {share:.1%} | {layout} | {1e3 * best['dense']:.1f} | {1e3 * best['ours']:.2f} "
        f"| {ratio:.3f} | {verdict} | {size['ours'] / size['dense']:.3f}{packed} |"
      )
      del runs


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rows", type=int, default=8192)
  parser.add_argument("--cols", type=int, default=8192)
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--kinds", nargs="*", default=list(LIMITS))
  parser.add_argument("--layouts", action="store_true", help="also time the packed layout")
  args = parser.parse_args()
  if args.layouts:
    for kind in LIMITS:
      LIMITS[kind] = dict.fromkeys((0.001, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8))
  print(f"One Adam step, float32 ({args.rows}, {args.cols}); {machine()}")
  extra = " packed ratio |" if args.layouts else ""
  print(f"| trains | share | layout | dense ms | ours ms | ratio | limit | state ratio |{extra}")
  print("| --- " * (9 if args.layouts else 8) + "|")
  for row in rows_of(args.kinds, (args.rows, args.cols), args.rounds, args.layouts):
    print(row, flush=True)


if __name__ == "__main__":
  main()
