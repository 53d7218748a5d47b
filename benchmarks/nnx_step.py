"""One Adam step of an nnx module: `maskopt.nnx.Optimizer` against the plain in-place path.

  python benchmarks/nnx_step.py             the update alone: a large kernel, a stack of layers
  python benchmarks/nnx_step.py --train     training steps: gradient and update
  python benchmarks/nnx_step.py --dispatch  tiny kernels: what objects cost

`plain` is `jax.jit` of `tx.update` and `maskopt.apply_updates` over a tree of arrays, donated;
`ours` is `nnx.jit` of `optimizer.update(model, grads)`, both donated; `tree` is the same in tree
mode (`graph=False`), `cached` through `nnx.cached_partial`; `flax` is `nnx.Optimizer` with
`optax.adam`, which trains everything, under `nnx.jit` as `ours`.

What `nnx.jit` compiles is the plain step (a test holds bytes and operations to 1.01), so what it
takes longer is the handling of objects in Python, before and after the step. It does not grow with
the arrays: `--dispatch` shows it alone, where Flax's optimizer costs what ours does.
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

  def __call__(self, x: Any) -> Any:
    for layer in self.layers:
      x = nnx.relu(layer(x)) + x
    return x


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


def with_nnx_jit(
  model: Any, optimizer: Any, grads: Any, graph: bool | None = None
) -> Callable[[], Any]:
  @nnx.jit(donate_argnums=(0, 1), graph=graph)
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


def compare(layers: int, rows: int, cols: int, kind: str, share: float, rounds: int) -> str:
  def fresh() -> Stack:
    return Stack(layers, rows, cols)

  mask = mask_of(fresh(), kind, share)
  params = nnx.to_pure_dict(nnx.state(fresh(), nnx.Param))
  grads = jax.tree.map(jnp.ones_like, params)
  programs = {"plain": plain(params, grads, mask)}
  for name, graph in (("ours", None), ("tree", False)):
    model = fresh()
    optimizer = maskopt.nnx.Optimizer(model, ADAM, mask, graph=graph)
    programs[name] = with_nnx_jit(model, optimizer, grads, graph)
  model = fresh()
  optimizer = maskopt.nnx.Optimizer(model, ADAM, mask)
  programs["cached"] = with_cached_partial(model, optimizer, grads)
  model = fresh()
  programs["flax"] = with_nnx_jit(model, nnx.Optimizer(model, ADAM, wrt=nnx.Param), grads)
  best = paired_minima(programs, rounds)
  times = " | ".join(f"{1e3 * best[name]:.2f}" for name in programs)
  ratios = [best[name] / best["plain"] for name in ("ours", "tree", "cached")]
  verdict = "ok" if ratios[0] <= LIMIT else "MISSED"
  shown = " | ".join(f"{ratio:.3f}" for ratio in ratios)
  return f"| {layers} x ({rows}, {cols}) | {kind} {share:.0%} | {times} | {shown} | {verdict} |"


def loss(model: Any, x: Any) -> Any:
  return (model(x) ** 2).mean()


def plain_training(model: Any, mask: Any, x: Any) -> Callable[[], Any]:
  tx = maskopt.selective_transform(ADAM, freeze_mask=mask)
  graphdef, params = nnx.split(model, nnx.Param)

  def step(p: Any, state: Any, x: Any) -> Any:
    grads = maskopt.grad(lambda p: loss(nnx.merge(graphdef, p), x), mask)(p)
    updates, state = tx.update(grads, state, p)
    return maskopt.apply_updates(p, updates), state

  return stepper(step, nnx.as_pure(params), tx.init(nnx.as_pure(params)), x)


def nnx_training(model: Any, optimizer: Any, gradient: Any, x: Any) -> Callable[[], Any]:
  @nnx.jit(donate_argnums=(0, 1))
  def step(model: Any, optimizer: Any, x: Any) -> None:
    optimizer.update(model, gradient(model, x))

  def run() -> Any:
    step(model, optimizer, x)
    return [layer.kernel[...] for layer in model.layers]

  return run


def train(layers: int, size: int, kind: str, share: float, rounds: int) -> str:
  def fresh() -> Stack:
    return Stack(layers, size, size)

  x = jnp.asarray(np.random.default_rng(1).standard_normal((256, size), np.float32))
  mask = mask_of(fresh(), kind, share)
  programs = {"plain": plain_training(fresh(), mask, x)}
  model = fresh()
  ours = maskopt.nnx.Optimizer(model, ADAM, mask)
  programs["ours"] = nnx_training(model, ours, maskopt.nnx.grad(loss, mask), x)
  model = fresh()
  flax = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
  programs["flax"] = nnx_training(model, flax, nnx.grad(loss), x)
  best = paired_minima(programs, rounds)
  ratio = best["ours"] / best["plain"]
  times = " | ".join(f"{1e3 * best[name]:.2f}" for name in programs)
  verdict = "ok" if ratio <= LIMIT else "MISSED"
  return f"| {layers} x ({size}, {size}) | {kind} {share:.0%} | {times} | {ratio:.3f} | {verdict} |"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rounds", type=int, default=15)
  parser.add_argument("--size", type=int, default=8192)
  parser.add_argument("--dispatch", action="store_true", help="tiny kernels: what objects cost")
  parser.add_argument("--train", action="store_true", help="gradient and update")
  args = parser.parse_args()
  shares = (("rows", 0.1), ("columns", 0.1), ("scattered", 0.1), ("rows", 0.5))
  if args.train:
    print(f"One training step of an nnx module, batch 256, float32; {machine()}; limit {LIMIT}")
    print("| kernels | trains | plain ms | ours ms | flax ms | ours / plain | |")
    print("| --- " * 7 + "|")
    for kind, share in shares:
      for layers, size in ((8, args.size // 8), (4, args.size // 2)):
        print(train(layers, size, kind, share, args.rounds), flush=True)
    return
  names = ["plain", "ours", "tree", "cached", "flax"]
  print(f"One Adam step of an nnx module, float32; {machine()}; limit {LIMIT}")
  print(f"| kernels | trains | {' ms | '.join(names)} ms | ours / plain | tree | cached | |")
  print("| --- " * 11 + "|")
  sizes = ((1, args.size), (4, args.size // 2), (16, args.size // 4))
  if args.dispatch:
    sizes = ((1, 64), (24, 64))
  for layers, size in sizes:
    for kind, share in shares:
      print(compare(layers, size, size, kind, share, args.rounds), flush=True)


if __name__ == "__main__":
  main()
