"""Time the sliced backward pass against the whole gradient, sliced after, in the same jit.

    python benchmarks/slicer.py wall      time, least FLOPs and temporary memory at several shares
    python benchmarks/slicer.py trace     tracing deep models
    python benchmarks/slicer.py compile   lowering and compiling deep models: gradients, whole steps
    python benchmarks/slicer.py sampled   scattered elements: sampled product against dense + gather

Runs are interleaved and the minimum of each is compared: one program timed against itself differs
by up to 1.27 on a shared machine. Compiling is measured in CPU time, threads included.
"""

from __future__ import annotations

import argparse
import functools
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from timing import machine, paired_minima

import maskopt
from maskopt._slicer import NONE, Sampled, _index, _sampled, analyze, region, slice_program
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


def transformer(layers: int = 2) -> Any:
  e, h = 256, 8
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


def deep_mlp(layers: int = 100, width: int = 64, axis: int = -1) -> Any:
  scale = width**-0.5
  params = [(normal(width, width, scale=scale), jnp.zeros(width)) for _ in range(layers)]

  def loss(p: Any, x: Any) -> Any:
    for w, b in p:
      x = jax.nn.relu(x @ w + b)
    return jnp.mean(x**2)

  demands: list[Any] = []
  for _ in range(layers):  # the same units of a layer's kernel and bias; a row has no bias
    kernel = columns((width, width), 0.1, axis)
    demands += [kernel, NONE if axis == 0 else (type(kernel[0])(kernel[0][1:]),)]
  return loss, params, normal(32, width), demands


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


def compile_() -> None:
  print("| model | program | lower | compile | (CPU time, as shares of the first) |")
  for axis, what in ((-1, "columns"), (0, "rows")):
    for width in (64, 1024):
      _compile(f"100 layers of {width}, {what}", *deep_mlp(100, width, axis))
  loss, params, x, demands = transformer(12)
  _compile("12-block transformer, columns", loss, params, x, demands(0.1))


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


def _compile(name: str, loss: Any, params: Any, x: Any, demands: list[Any]) -> None:
  whole, sliced_after = (_pair(jax.grad(loss), demands, slices=k)[0] for k in (False, True))
  gradients = {
    "gradient": (whole, (params, x)),
    "gradient, sliced after": (sliced_after, (params, x)),
    "sliced gradient": (_pair(jax.grad(loss), demands)[1], (params, x)),
  }
  for programs in (gradients, _steps(loss, params, x, demands)):
    best = {program: np.full(2, np.inf) for program in programs}
    for _ in range(3):
      for program, (f, args) in programs.items():
        best[program] = np.minimum(best[program], _compiling(f, args))
    first = next(iter(best.values()))
    for program, took in best.items():
      lower, compile_ = took / first
      print(f"| {name} | {program} | {lower:.2f} | {compile_:.2f} ({took[1]:.2f} s) |", flush=True)


def _compiling(f: Any, args: Any) -> tuple[float, float]:
  """CPU seconds to lower and to compile; whole steps donate, gradients have nothing to donate."""
  jax.clear_caches()
  traced = jax.jit(f, donate_argnums=(0, 1) if len(args) == 3 else ()).trace(*args)
  start = _cpu_seconds()
  lowered = traced.lower()
  middle = _cpu_seconds()
  lowered.compile()
  return middle - start, _cpu_seconds() - middle


def _cpu_seconds() -> float:
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime


def _steps(loss: Any, params: Any, x: Any, demands: list[Any]) -> dict[str, Any]:
  """Whole training steps with Adam: JAX's, ours, and ours after JAX's gradient."""
  leaves, treedef = jax.tree.flatten(params)
  mask = treedef.unflatten([_frozen(w.shape, d) for w, d in zip(leaves, demands, strict=True)])
  adam = optax.adam(1e-3)
  tx = maskopt.selective_transform(adam, freeze_mask=mask)

  def dense(p: Any, state: Any, x: Any) -> Any:
    updates, state = adam.update(jax.grad(loss)(p, x), state, p)
    return optax.apply_updates(p, updates), state

  def masked(p: Any, state: Any, x: Any) -> Any:
    updates, state = adam.update(jax.grad(loss)(p, x), state, p)
    new = optax.apply_updates(p, updates)
    return jax.tree.map(jnp.where, mask, p, new), state

  def sliced(p: Any, state: Any, x: Any) -> Any:
    g = maskopt.grad(loss, maskopt.mask_of(state))(p, x)
    updates: Any
    updates, state = tx.update(g, state, p)
    return maskopt.apply_updates(p, updates), state

  def whole(p: Any, state: Any, x: Any) -> Any:
    updates: Any
    updates, state = tx.update(jax.grad(loss)(p, x), state, p)
    return maskopt.apply_updates(p, updates), state

  dense_state, state = adam.init(params), tx.init(params)
  return {
    "step of Optax": (dense, (params, dense_state, x)),
    "step of Optax, frozen by where": (masked, (params, dense_state, x)),
    "step of maskopt": (sliced, (params, state, x)),
    "step of maskopt with jax.grad": (whole, (params, state, x)),
  }


def _frozen(shape: tuple[int, ...], demand: Any) -> Any:
  if demand is NONE:
    return True
  frozen = np.ones(shape, bool)
  for r in demand:
    frozen[np.ix_(*map(_index.positions, r, shape))] = False
  return frozen


def _sampling(grad: Any) -> Any:
  return jax.jit(lambda w, x, i: slice_program(grad, [Sampled(i)], w, x)[0])


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
          compiled.append(_sampling(grad).lower(w, x, indices).compile())
        runs = {str(k): functools.partial(f, w, x, indices) for k, f in enumerate(compiled)}
        a, b = paired_minima(runs).values()
        print(f"| {rows} | {d} x {d} | {density:.1%} | {b / a:.2f} |")
  _sampled.SAMPLE_BELOW = limits  # pyright: ignore


if __name__ == "__main__":
  RUNS = {"wall": wall, "trace": trace, "compile": compile_, "sampled": sampled}
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("run", choices=RUNS)
  RUNS[parser.parse_args().run]()
