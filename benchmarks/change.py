"""What it costs to change the mask: migrating a state, and a schedule that lives in the graph.

python benchmarks/change.py               100M parameters for the migration, 4M for the schedule
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import machine, paired_minima, stepper

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


def schedule_rows(n: int, rounds: int) -> Iterator[str]:
  """Five masks in the graph against one runtime mask of the same count, no boundary in between.

  Some 25 us a step are fixed, so the share of a short step says little without many rounds.
  """
  rng = np.random.default_rng(0)
  p = jnp.asarray(rng.standard_normal((n, n), np.float32))
  kinds = {
    "10% of the rows": [rows(n, k * n // 5, k * n // 5 + n // 10) for k in range(5)],
    "1% scattered": [rng.permutation(n * n).reshape(n, n) >= n * n // 100 for _ in range(5)],
    "whole leaf on and off (dense)": [False, True, False, True, False],
  }
  for name, masks in kinds.items():
    schedule = maskopt.unfreeze_schedule(
      {1_000_000 * k: m for k, m in enumerate(masks)}, mode="runtime"
    )
    first = np.broadcast_to(masks[0], (n, n))
    count = None if masks[0] is False else int((~first).sum())
    fixed = maskopt.runtime(jnp.asarray(first[:1] if count is None else first), count)
    runs, traces = {}, {}
    for key, mask in {"fixed": fixed, "schedule": schedule}.items():
      tx = maskopt.selective_transform(ADAM, freeze_mask=mask)
      traces[key] = []

      def step(p: Any, state: Any, g: Any, tx: Any = tx, seen: Any = traces[key]) -> Any:
        seen.append(1)
        updates, state = tx.update(g, state, p)
        return maskopt.apply_updates(p, updates), state

      runs[key] = stepper(step, p, tx.init(p), p)
    best = paired_minima(runs, rounds)
    ratio = best["schedule"] / best["fixed"]
    yield (
      f"| {name} | {1e3 * best['fixed']:.2f} | {1e3 * best['schedule']:.2f} | {ratio:.3f} "
      f"| {len(traces['schedule'])} |"
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--side", type=int, default=10_000)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--schedule-side", type=int, default=2048)
  parser.add_argument("--only", choices=("migrate", "schedule"))
  args = parser.parse_args()
  print(f"Adam, float32 ({args.side}, {args.side}); {machine()}")
  if args.only != "migrate":
    print("| runtime schedule of 5 masks | fixed mask ms | schedule ms | ratio | traces |")
    print("| --- " * 5 + "|")
    for row in schedule_rows(args.schedule_side, 300):
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
