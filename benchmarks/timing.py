"""Interleaved timing: every round runs every program once, and each keeps its best round.

On a shared machine one program timed twice differs by up to 1.27, so programs take turns and the
minima are compared.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import jax


def paired_minima(programs: dict[str, Callable[[], Any]], rounds: int = 7) -> dict[str, float]:
  """Return the seconds of each program's fastest round; two rounds warm up."""
  best = dict.fromkeys(programs, float("inf"))
  for turn in range(rounds + 2):
    for name, run in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      if turn >= 2:
        best[name] = min(best[name], time.perf_counter() - start)
  return best


def machine() -> str:
  """Name the machine and the versions, for the head of a table."""
  device = jax.devices()[0]
  where = device.device_kind if device.platform != "cpu" else f"{os.cpu_count()} CPU cores"
  return f"{where}, {platform.machine()}, Python {platform.python_version()}, jax {jax.__version__}"


def stepper(step: Callable[..., Any], params: Any, state: Any, grads: Any) -> Callable[[], Any]:
  """Return a run of one donated training step that carries parameters and state along."""
  compiled = jax.jit(step, donate_argnums=(0, 1))
  carried = [jax.tree.map(lambda x: x.copy(), params), state]

  def run() -> Any:
    carried[0], carried[1] = compiled(carried[0], carried[1], grads)
    return carried[0]

  return run
