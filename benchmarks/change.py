"""What it costs to change the mask: migrating a state, and a schedule that lives in the graph.

python benchmarks/change.py               100M parameters for the migration, 4M to 64M for schedules
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import machine

import maskopt

ADAM = optax.adam(1e-3)


def rows(n: int, first: int, last: int) -> np.ndarray:
  return ~((np.arange(n) >= first) & (np.arange(n) < last))[:, None]


def migrations(n: int) -> dict[str, tuple[Any, Any]]:
  """Name -> the masks before and after, over a leaf of shape (n, n)."""
  rng = np.random.default_rng(0)
  few, more = (rng.random((n, n)) >= share for share in (0.01, 0.02))
  return {
    "frozen head, then all": (rows(n, 0, n // 10), False),
    "all, then half the rows": (False, rows(n, 0, n // 2)),
    "rows, then more rows": (rows(n, n // 2, n), rows(n, n // 4, n)),
    "rows, then other rows": (rows(n, 0, n // 2), rows(n, n // 4, 3 * n // 4)),
    "1% scattered, then 3%": (few, few & more),
    "1% scattered, then another 1%": (few, np.roll(few, 1)),
    "the same mask": (rows(n, 0, n // 2), rows(n, 0, n // 2)),
    "plain Optax, then half the rows": (None, rows(n, 0, n // 2)),
  }


def transform(mask: Any) -> optax.GradientTransformation:
  return ADAM if mask is None else maskopt.selective_transform(ADAM, freeze_mask=mask)


def seconds(run: Callable[[], Any], rounds: int) -> float:
  best = float("inf")
  for _ in range(rounds + 1):
    start = time.perf_counter()
    out = jax.block_until_ready(run())
    best = min(best, time.perf_counter() - start)
    del out
  return best


def migration_rows(n: int, rounds: int) -> Iterator[str]:
  p = jnp.ones((n, n), jnp.float32)
  whole = ADAM.init(p)
  copy_whole = seconds(lambda s=whole: jax.tree.map(jnp.copy, s), rounds)
  del whole
  for name, (before, after) in migrations(n).items():
    a, b = transform(before), transform(after)
    state = a.init(p)
    biggest = max((state, b.init(p)), key=lambda s: sum(x.nbytes for x in jax.tree.leaves(s)))
    copy = seconds(lambda s=biggest: jax.tree.map(jnp.copy, s), rounds)
    del biggest
    init = seconds(lambda b=b: b.init(p), rounds)
    total = seconds(lambda s=state, b=b: maskopt.migrate(s, p, to=b), rounds)
    yield (
      f"| {name} | {1e3 * total:.0f} | {1e3 * init:.0f} | {1e3 * copy:.0f} "
      f"| {total / copy:.2f} | {total / copy_whole:.2f} |"
    )


def schedules(n: int) -> dict[str, list[Any]]:
  """Name -> five masks over a leaf of shape (n, n)."""
  scattered = np.random.default_rng(0).random((n, n)) >= 0.01
  return {
    "10% of the rows": [rows(n, k * n // 5, k * n // 5 + n // 10) for k in range(5)],
    "1% scattered": [np.roll(scattered, k) for k in range(5)],
    "whole leaf on and off (dense)": [False, True, False, True, False],
  }


def updating(mask: Any) -> tuple[Any, Any, list[int]]:
  """A compiled step under a mask, its transform, and a list that grows with each trace."""
  tx, traces = maskopt.selective_transform(ADAM, freeze_mask=mask), []

  def step(p: Any, state: Any, g: Any) -> Any:
    traces.append(1)
    updates: Any
    updates, state = tx.update(g, state, p)
    return maskopt.apply_updates(p, updates), state

  return jax.jit(step, donate_argnums=(0, 1)), tx, traces


def schedule_rows(n: int, rounds: int, places: int) -> Iterator[str]:
  """Five masks in the graph against one runtime mask of the same count, no boundary in between.

  Where in memory its arrays happen to lie makes a step up to a tenth faster or slower, so every
  program gets new arrays several times: the ratio is the median over these. The fixed mask's
  program runs twice, and what its two results differ by is noise.
  """
  rng = np.random.default_rng(0)
  p = jnp.asarray(rng.standard_normal((n, n), np.float32))
  for name, masks in schedules(n).items():
    first = np.broadcast_to(masks[0], (n, n))
    count = None if masks[0] is False else int((~first).sum())
    fixed = updating(maskopt.runtime(jnp.asarray(first[:, :1] if count is None else first), count))
    turning = updating(
      maskopt.unfreeze_schedule({1_000_000 * k: m for k, m in enumerate(masks)}, mode="runtime")
    )
    steps = {"fixed": fixed, "again": fixed, "schedule": turning}
    best = []
    for _ in range(places):
      runs = {key: running(step, p, tx.init(p)) for key, (step, tx, _) in steps.items()}
      best.append(shuffled_minima(runs, rounds, rng))
      del runs
    ratio = statistics.median(2 * t["schedule"] / (t["fixed"] + t["again"]) for t in best)
    noise = statistics.median(t["again"] / t["fixed"] for t in best)
    fastest = {key: min(1e3 * t[key] for t in best) for key in steps}
    yield (
      f"| {n * n / 2**20:.0f}M, {name} | {fastest['fixed']:.2f} | {fastest['schedule']:.2f} "
      f"| {ratio:.3f} | {noise:.3f} | {len(turning[2])} |"
    )


def running(step: Any, p: Any, state: Any) -> Callable[[], Any]:
  """A run of a step that carries a copy of the parameters and the state along."""
  carried = [p.copy(), state]

  def run() -> Any:
    carried[:] = step(*carried, p)
    return carried[0]

  return run


def shuffled_minima(runs: dict[str, Any], rounds: int, rng: Any) -> dict[str, float]:
  """The seconds of each program's fastest round; whose turn comes after whose is drawn anew."""
  best = dict.fromkeys(runs, float("inf"))
  for turn in range(rounds + 2):
    for name in rng.permutation(list(runs)):
      start = time.perf_counter()
      jax.block_until_ready(runs[name]())
      if turn >= 2:
        best[name] = min(best[name], time.perf_counter() - start)
  return best


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--side", type=int, default=10_000)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--schedule-sides", type=int, nargs="+", default=[2048, 4096, 8192])
  parser.add_argument("--only", choices=("migrate", "schedule"))
  args = parser.parse_args()
  print(f"Adam, float32 ({args.side}, {args.side}); {machine()}")
  if args.only != "migrate":
    print("| runtime schedule of 5 masks | fixed mask ms | schedule ms | ratio | noise | traces |")
    print("| --- " * 6 + "|")
    for side in args.schedule_sides:
      for row in schedule_rows(side, 100 * 2048 // side, places=7):
        print(row, flush=True)
  if args.only == "schedule":
    return
  print(
    "| migrate | ms | of it `to.init` ms | copy of the larger state ms | ratio | of a dense copy |"
  )
  print("| --- " * 6 + "|")
  for row in migration_rows(args.side, args.rounds):
    print(row, flush=True)


if __name__ == "__main__":
  main()
