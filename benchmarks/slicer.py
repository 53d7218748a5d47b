"""Time the sliced backward pass against the whole gradient, sliced after, in the same jit.

    python benchmarks/slicer.py wall      time, least FLOPs and temporary memory at several shares
    python benchmarks/slicer.py trace     tracing, lowering and compiling deep models
    python benchmarks/slicer.py sampled   scattered elements: sampled product against dense + gather

Runs are interleaved and the minimum of each is compared: one program timed against itself differs
by up to 1.27 on a shared machine.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from timing import machine, paired_minima

from maskopt._slicer import NONE, Sampled, _sampled, analyze, region, slice_program
from maskopt._slicer._take import take

R = np.random.default_rng(0)


def normal(*shape: int, scale: float = 1.0) -> jax.Array:
  return jnp.asarray(R.normal(size=shape) * scale, jnp.float32)


def columns(shape: Sequence[int], share: float, axis: int = -1) -> Any:
  n = shape[axis]
  wanted = np.sort(R.choice(n, max(1, round(share * n)), replace=False))
  dims: list[Any] = [None] * len(shape)
  dims[axis] = wanted
  return (region(shape, *dims),)


# --- models: (loss, params, batch, demands of a share) -------------------------------------------
def mlp(axis: int) -> Any:
  d, layers = 512, 8
  params = [normal(d, d, scale=d**-0.5) for _ in range(layers)]

  def loss(p: Any, x: Any) -> Any:
    for w in p:
      x = jax.nn.relu(x @ w)
    return jnp.mean(x**2)

  return loss, params, normal(256, d), lambda s: [columns(w.shape, s, axis) for w in params]


def cnn() -> Any:
  c = 64
  params = [normal(3, 3, c, c, scale=0.05) for _ in range(3)]

  def loss(p: Any, x: Any) -> Any:
    for w in p:
      x = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
      x = jax.nn.relu(x)
    return jnp.mean(x**2)

  return loss, params, normal(8, 24, 24, c), lambda s: [columns(w.shape, s) for w in params]


def transformer() -> Any:
  e, h, layers = 256, 8, 2
  params = [
    {
      "qkv": normal(e, 3 * e, scale=e**-0.5),
      "out": normal(e, e, scale=e**-0.5),
      "up": normal(e, 4 * e, scale=e**-0.5),
      "down": normal(4 * e, e, scale=e**-0.5),
    }
    for _ in range(layers)
  ]

  def norm(x: Any) -> Any:
    return (x - jnp.mean(x, -1, keepdims=True)) * lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-6)

  def block(p: Any, x: Any) -> Any:
    b, t, _ = x.shape
    q, k, v = (a.reshape(b, t, h, e // h) for a in jnp.split(norm(x) @ p["qkv"], 3, -1))
    scores = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / (e // h) ** 0.5)
    x = x + jnp.einsum("bhts,bshd->bthd", scores, v).reshape(b, t, e) @ p["out"]
    return x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]

  def loss(p: Any, x: Any) -> Any:
    for layer in p:
      x = block(layer, x)
    return jnp.mean(x**2)

  def demands(share: float) -> list[Any]:
    return [columns(w.shape, share) for w in jax.tree.leaves(params)]

  return loss, params, normal(4, 128, e), demands


def embedding() -> Any:
  vocabulary, d = 20_000, 256
  params = {"table": normal(vocabulary, d), "top": normal(d, d, scale=d**-0.5)}

  def loss(p: Any, ids: Any) -> Any:
    return jnp.mean(jnp.tanh(p["table"][ids] @ p["top"]) ** 2)

  ids = jnp.asarray(R.integers(0, vocabulary, (32, 64)))
  return loss, params, ids, lambda s: [columns((vocabulary, d), s), NONE]


def lstm() -> Any:
  d = 256
  params = {"h": normal(d, 4 * d, scale=d**-0.5), "x": normal(d, 4 * d, scale=d**-0.5)}

  def loss(p: Any, xs: Any) -> Any:
    def step(state: Any, x: Any) -> Any:
      c, hidden = state
      i, f, g, o = jnp.split(x @ p["x"] + hidden @ p["h"], 4, -1)
      c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
      return (c, jax.nn.sigmoid(o) * jnp.tanh(c)), None

    zero = jnp.zeros((xs.shape[1], d))
    return jnp.mean(lax.scan(step, (zero, zero), xs)[0][1] ** 2)

  return loss, params, normal(24, 32, d), lambda s: [columns((d, 4 * d), s)] * 2


MODELS = {
  "mlp columns": lambda: mlp(-1),
  "mlp rows": lambda: mlp(0),
  "cnn out channels": cnn,
  "transformer columns": transformer,
  "embedding columns": embedding,
  "lstm gate columns": lstm,
}


# --- measures ------------------------------------------------------------------------------------
def wall() -> None:
  print(machine())
  print("| model | trainable | FLOPs sliced/full | time sliced/full | temporary memory |")
  print("| --- | --- | --- | --- | --- |")
  for name, model in MODELS.items():
    loss, params, batch, demands = model()
    grad = jax.grad(loss)
    for share in (0.01, 0.1, 0.25, 0.5, 0.75):
      wanted = demands(share)
      whole, sliced, report = _programs(grad, wanted, params, batch)
      compiled = {"whole": whole, "sliced": sliced}
      runs = {name: functools.partial(f, params, batch) for name, f in compiled.items()}
      a, b = paired_minima(runs, 15).values()
      memory = [f.memory_analysis().temp_size_in_bytes for f in (whole, sliced)]
      flops = report.flops_sliced / report.flops_full
      print(f"| {name} | {share:.0%} | {flops:.3f} | {b / a:.2f} | {memory[1] / memory[0]:.2f} |")


def _programs(grad: Any, wanted: list[Any], *args: Any) -> tuple[Any, Any, Any]:
  def whole(*args: Any) -> Any:
    leaves = jax.tree.leaves(grad(*args))
    return [
      [take(g, region(g.shape), r) for r in d]
      for g, d in zip(leaves, wanted, strict=True)
      if d is not NONE
    ]

  report = None

  def sliced(*args: Any) -> Any:
    nonlocal report
    out, report = slice_program(grad, wanted, *args)
    return [x for x in out if x is not None]

  compiled = [jax.jit(f).lower(*args).compile() for f in (whole, sliced)]
  return compiled[0], compiled[1], report


def deep_mlp(layers: int = 100) -> Any:
  params = [(normal(64, 64), jnp.zeros(64)) for _ in range(layers)]

  def loss(p: Any, x: Any) -> Any:
    for w, b in p:
      x = jax.nn.relu(x @ w + b)
    return jnp.mean(x**2)

  demands: list[Any] = []
  for _ in range(layers):  # the same units of a layer's kernel and bias
    kernel = columns((64, 64), 0.1)
    demands += [kernel, (type(kernel[0])(kernel[0][1:]),)]
  return loss, params, normal(4, 64), demands


def deep_transformer(layers: int = 100, wrap: Any = lambda f: f) -> Any:
  sys.path.insert(0, "tests")
  import slicer_programs

  slicer_programs.WRAPS["deep"] = wrap
  case = slicer_programs.transformer("heads", "deep", layers)
  return case.grad, *case.args, case.demands


def trace() -> None:
  print("| model | trace | of which analysis | lower | compile | (sliced / JAX, seconds) |")
  for name, grad, params, x, demands in (
    ("100-layer MLP", jax.grad(deep_mlp()[0]), *deep_mlp()[1:]),
    ("100-block transformer", *deep_transformer()),
    ("100-block transformer, jit per block", *deep_transformer(wrap=jax.jit)),
    ("100-block transformer, checkpoint per block", *deep_transformer(wrap=jax.checkpoint)),
  ):
    _trace(name, grad, params, x, demands)
  loss, *rest = deep_mlp(20)
  _compile("20-layer MLP", jax.grad(loss), *rest)
  _compile("6-block transformer", *deep_transformer(6))


def _pair(grad: Any, demands: list[Any], slices: bool = False) -> tuple[Any, Any]:
  """(JAX's gradient, the sliced one); `slices`: JAX's returns the same blocks."""

  def whole(*args: Any) -> Any:
    leaves = zip(jax.tree.leaves(grad(*args)), demands, strict=True)
    wanted = [(g, d) for g, d in leaves if d is not NONE]
    return [[take(g, region(g.shape), r) for r in d] if slices else g for g, d in wanted]

  def sliced(*args: Any) -> Any:
    return [x for x in slice_program(grad, demands, *args)[0] if x is not None]

  return whole, sliced


def _trace(name: str, grad: Any, params: Any, x: Any, demands: list[Any]) -> None:
  best = [float("inf")] * 2
  for _ in range(3):
    for k, f in enumerate(_pair(grad, demands)):
      jax.clear_caches()
      start = time.perf_counter()
      jax.jit(f).trace(params, x)
      best[k] = min(best[k], time.perf_counter() - start)
  closed = jax.make_jaxpr(grad)(params, x)
  start = time.perf_counter()
  analyze(closed, demands)
  took = time.perf_counter() - start
  print(f"| {name} | {best[1] / best[0]:.2f} ({best[0]:.2f} s) | {took:.2f} s |")


def _compile(name: str, grad: Any, params: Any, x: Any, demands: list[Any]) -> None:
  programs = [_pair(grad, demands)[0], *_pair(grad, demands, slices=True)]
  lower, compile_ = [float("inf")] * 3, [float("inf")] * 3
  for _ in range(4):
    for k, f in enumerate(programs):
      jax.clear_caches()
      traced = jax.jit(f).trace(params, x)
      start = time.perf_counter()
      lowered = traced.lower()
      middle = time.perf_counter()
      lowered.compile()
      lower[k] = min(lower[k], middle - start)
      compile_[k] = min(compile_[k], time.perf_counter() - middle)
  for what, t in (("lower", lower), ("compile", compile_)):
    print(
      f"| {name} | {what} | {t[2] / t[0]:.2f} of the gradient alone | "
      f"{t[2] / t[1]:.2f} of the gradient, sliced after | {t[0]:.2f} s |"
    )


def sampled() -> None:
  print("| summed | kernel | density | time sampled / (dense, gathered) |")
  limits = _sampled.SAMPLE_BELOW
  for rows in (256, 2048):
    for d in (1024, 2048):
      w, x = normal(d, d, scale=d**-0.5), normal(rows, d)
      grad = jax.grad(lambda w, x: jnp.mean(jnp.sin(x @ w)))
      for density in (0.001, 0.003, 0.01, 0.02, 0.03):
        n = int(density * d * d)
        indices = jnp.asarray(np.sort(R.choice(d * d, n, replace=False)), jnp.int32)
        compiled = []
        for always in (0.0, 1.0):
          _sampled.SAMPLE_BELOW = ((float("inf"), always),)  # pyright: ignore
          f = jax.jit(lambda w, x, i: slice_program(grad, [Sampled(i)], w, x)[0])  # noqa: B023
          compiled.append(f.lower(w, x, indices).compile())
        runs = {str(k): functools.partial(f, w, x, indices) for k, f in enumerate(compiled)}
        a, b = paired_minima(runs).values()
        print(f"| {rows} | {d} x {d} | {density:.1%} | {b / a:.2f} |")
  _sampled.SAMPLE_BELOW = limits  # pyright: ignore


if __name__ == "__main__":
  {"wall": wall, "trace": trace, "sampled": sampled}[sys.argv[1]]()
