"""One Adam step of an nnx module: `maskopt.nnx.Optimizer` against the plain in-place path.

  python benchmarks/nnx_step.py             one large kernel, then a stack of layers

`plain` is `jax.jit` of `tx.update` and `maskopt.apply_updates` over a tree of arrays, donated;
`ours` is `nnx.jit` of `optimizer.update(model, grads)`, both donated; `cached` is the same through
`nnx.cached_partial`, `split` in `jax.jit` between `nnx.split` and `nnx.merge`; `flax`
is `nnx.Optimizer` with `optax.adam`, which trains everything, under `nnx.jit`.

`nnx.jit` handles objects in Python: about 0.4 ms for one layer and 0.15 ms for each further one,
our optimizer or Flax's. It hides behind a large step, not behind a small one; see `--dispatch`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from timing import machine, paired_minima, stepper

import maskopt
import maskopt.nnx

ADAM = optax.adam(1e-3)
LIMIT = 1.05


class Stack(nnx.Module):
  def __init__(self, layers: int, rows: int, cols: int):
    rngs = nnx.Rngs(0)
    zeros = nnx.initializers.zeros_init()
    self.layers = nnx.List(
      nnx.Linear(rows, cols, use_bias=False, kernel_init=zeros, rngs=rngs) for _ in range(layers)
    )


def mask_of(model: Stack, kind: str, share: float) -> dict[str, Any]:
  rng = np.random.default_rng(0)
  shape = model.layers[0].kernel.shape
  if kind == "rows":
    frozen = np.arange(shape[0])[:, None] >= shape[0] * share
  elif kind == "columns":
    frozen = np.arange(shape[1]) >= shape[1] * share
  else:
    frozen = rng.random(shape) >= share
  return {"layers": {str(k): {"kernel": frozen} for k in range(len(model.layers))}}


def as_variables(grads: Any) -> Any:
  """Gradients as `nnx.grad` gives them; `nnx.jit` would return variables among its arguments."""
  return jax.tree.map(nnx.Param, grads)


def plain(params: Any, grads: Any, mask: Any) -> Callable[[], Any]:
  tx = maskopt.selective_transform(ADAM, freeze_mask=mask)

  def step(p: Any, state: Any, g: Any) -> Any:
    updates, state = tx.update(g, state, p)
    return maskopt.apply_updates(p, updates), state

  return stepper(step, params, tx.init(params), grads)


def with_nnx_jit(model: Any, optimizer: Any, grads: Any) -> Callable[[], Any]:
  @nnx.jit(donate_argnums=(0, 1))
  def step(model: Any, optimizer: Any, grads: Any) -> None:
    optimizer.update(model, as_variables(grads))

  def run() -> Any:
    step(model, optimizer, grads)
    return [layer.kernel[...] for layer in model.layers]

  return run


def with_cached_partial(model: Any, optimizer: Any, grads: Any) -> Callable[[], Any]:
  @nnx.jit(donate_argnums=(0, 1))
  def step(model: Any, optimizer: Any, grads: Any) -> None:
    optimizer.update(model, as_variables(grads))

  cached = nnx.cached_partial(step, model, optimizer)

  def run() -> Any:
    cached(grads)
    return [layer.kernel[...] for layer in model.layers]

  return run


def with_split(model: Any, optimizer: Any, grads: Any) -> Callable[[], Any]:
  graphdef, *carried = nnx.split((model, optimizer))

  def step(state: Any, grads: Any) -> Any:
    model, optimizer = nnx.merge(graphdef, state)
    optimizer.update(model, as_variables(grads))
    return nnx.state((model, optimizer))

  compiled = jax.jit(step, donate_argnums=0)

  def run() -> Any:
    carried[0] = compiled(carried[0], grads)
    return carried[0]

  return run


def compare(layers: int, rows: int, cols: int, kind: str, share: float, rounds: int) -> str:
  def fresh() -> Stack:
    return Stack(layers, rows, cols)

  mask = mask_of(fresh(), kind, share)
  params = nnx.to_pure_dict(nnx.state(fresh(), nnx.Param))
  grads = jax.tree.map(jnp.ones_like, params)
  programs = {"plain": plain(params, grads, mask)}
  ways = {"ours": with_nnx_jit, "cached": with_cached_partial, "split": with_split}
  for name, run in ways.items():
    model = fresh()
    programs[name] = run(model, maskopt.nnx.Optimizer(model, ADAM, mask), grads)
  model = fresh()
  programs["flax"] = with_nnx_jit(model, nnx.Optimizer(model, ADAM, wrt=nnx.Param), grads)
  best = paired_minima(programs, rounds)
  times = " | ".join(f"{1e3 * best[name]:.2f}" for name in programs)
  ratios = [best[name] / best["plain"] for name in ways]
  verdict = "ok" if ratios[0] <= LIMIT else "MISSED"
  shown = " | ".join(f"{ratio:.3f}" for ratio in ratios)
  return f"| {layers} x ({rows}, {cols}) | {kind} {share:.0%} | {times} | {shown} | {verdict} |"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rounds", type=int, default=15)
  parser.add_argument("--size", type=int, default=8192)
  parser.add_argument("--dispatch", action="store_true", help="tiny kernels: what objects cost")
  args = parser.parse_args()
  names = ["plain", "ours", "cached", "split", "flax"]
  print(f"One Adam step of an nnx module, float32; {machine()}; limit {LIMIT}")
  print(f"| kernels | trains | {' ms | '.join(names)} ms | ours / plain | cached | split | |")
  print("| --- " * 11 + "|")
  sizes = ((1, 64), (24, 64)) if args.dispatch else ((1, args.size), (16, args.size // 4))
  for layers, size in sizes:
    for kind, share in (("rows", 0.1), ("columns", 0.1), ("scattered", 0.1), ("rows", 0.5)):
      print(compare(layers, size, size, kind, share, args.rounds), flush=True)


if __name__ == "__main__":
  main()
