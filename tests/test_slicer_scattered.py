"""Scattered elements on several devices: gathered first, and only they are reduced."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from pairs import every_pair
from test_slicer import QUICK
from test_slicer_sharded import D, N, mesh, reduced_by

import maskopt
from maskopt._slicer import has_devices

R = np.random.default_rng(0)

pytestmark = pytest.mark.skipif(N < 2, reason="needs several devices (see conftest)")


def embedding(p: Any, x: Any) -> Any:
  rows = p[0].at[x].get(out_sharding=jax.typeof(x).sharding if is_explicit(x) else None)
  return jnp.mean(jnp.sin(rows) ** 2)


def convolution(p: Any, x: Any) -> Any:
  numbers = ("NHWC", "HWIO", "NHWC")
  y = lax.conv_general_dilated(x, p[0], (1, 1), "SAME", dimension_numbers=numbers)
  return jnp.mean(jnp.tanh(y) ** 2)


def depthwise(p: Any, x: Any) -> Any:
  numbers, groups = ("NHWC", "HWIO", "NHWC"), x.shape[-1]
  y = lax.conv_general_dilated(
    x, p[0], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
  )
  return jnp.mean(jnp.tanh(y) ** 2)


def positions(p: Any, x: Any) -> Any:
  return jnp.mean(jnp.tanh((x + p[0][None]) @ p[1]) ** 2)


def two_kernels(p: Any, x: Any) -> Any:
  return jnp.mean(jnp.tanh(jnp.tanh(x @ p[0]) @ p[1]) ** 2)


def recurrent(p: Any, x: Any) -> Any:
  def turn(h: Any, row: Any) -> Any:
    return jnp.tanh(h @ p[0] + row @ p[1]), None

  return jnp.mean(lax.scan(turn, jnp.zeros_like(x[:, 0]), jnp.swapaxes(x, 0, 1))[0] ** 2)


def is_explicit(x: Any) -> bool:
  return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def normal(*shape: int) -> Any:
  return jnp.asarray(R.normal(size=shape) / 8, jnp.float32)


SCATTERED: dict[str, Any] = {
  "kernels": lambda: (two_kernels, [normal(D, D), normal(D, D)], normal(2 * N, D)),
  "sequences": lambda: (two_kernels, [normal(D, D), normal(D, D)], normal(N, 3, D)),
  "checkpoint": lambda: (jax.checkpoint(two_kernels), [normal(D, D)] * 2, normal(N, D)),
  "embedding": lambda: (embedding, [normal(96, D)], jnp.asarray(R.integers(0, 96, (N, 5)))),
  "convolution": lambda: (convolution, [normal(3, 3, 8, 16)], normal(N, 6, 6, 8)),
  "depthwise": lambda: (depthwise, [normal(5, 5, 1, 64)], normal(N, 6, 6, 64)),
  "positions": lambda: (positions, [normal(12, D), normal(D, D)], normal(N, 12, D)),
  "recurrent": lambda: (recurrent, [normal(D, D), normal(D, D)], normal(N, 4, D)),
}
MODES = [(AxisType.Auto, 0.05, False), (AxisType.Auto, 0.1, True), (AxisType.Explicit, 0.1, False)]


@pytest.mark.parametrize(("kind", "share", "packed"), MODES)
@pytest.mark.parametrize("name", SCATTERED)
def test_scattered_elements_are_gathered_before_they_are_reduced(
  name: str, kind: AxisType, share: float, packed: bool
) -> None:
  f, p, x = SCATTERED[name]()
  if name == "recurrent" and kind is AxisType.Explicit and jax.__version__ >= "0.11":
    pytest.skip("jax.grad itself refuses a scan over an Explicit batch there")
  mask = [R.random(w.shape) >= share for w in p]
  check_scattered(f, p, x, mask, mesh(kind), packed)


def check_scattered(f: Any, p: Any, x: Any, mask: Any, m: Mesh, packed: bool) -> None:
  p = jax.device_put(p, NamedSharding(m, P()))
  x = jax.device_put(x, NamedSharding(m, P("data")))
  gradients = [jax.grad(f), maskopt.grad(f, mask, packed=packed)]
  programs = [jax.jit(g, compiler_options=QUICK).lower(p, x).compile() for g in gradients]
  dense, got = (reduced_by(c.as_text()) for c in programs)
  trains = sum(np.count_nonzero(~k) for k in mask)
  assert dense == 4 * sum(w.size for w in p)
  assert 0 < got <= 1.15 * 4 * trains
  full, sliced = (c(p, x) for c in programs)
  for a, b, frozen in zip(full, sliced, mask, strict=True):
    expected = np.asarray(a)[~frozen] if packed else np.where(frozen, 0, a)
    np.testing.assert_allclose(b.values if packed else b, expected, rtol=1e-4, atol=1e-6)


def test_few_scattered_elements_are_sampled_and_reduced_at_once() -> None:
  m, side = mesh(AxisType.Auto), 512
  frozen = R.random((side, side)) >= 0.006  # more than one chunk of products
  w = jax.device_put(normal(side, side), NamedSharding(m, P()))
  x = jax.device_put(normal(N, side), NamedSharding(m, P("data")))

  def f(w: Any, x: Any) -> Any:
    return jnp.mean(jnp.tanh(x @ w) ** 2)

  grad = jax.jit(maskopt.grad(f, frozen, packed=True), compiler_options=QUICK)
  compiled = grad.lower(w, x).compile()
  assert reduced_by(compiled.as_text()) == 4 * np.count_nonzero(~frozen)
  expected = np.asarray(jax.grad(f)(w, x))[~frozen]
  np.testing.assert_allclose(compiled(w, x).values, expected, rtol=1e-4, atol=1e-8)


def test_runtime_and_state_masks_are_gathered_before_they_are_reduced() -> None:
  f, p, x = SCATTERED["kernels"]()
  frozen, m = R.random((D, D)) >= 0.1, mesh(AxisType.Auto)
  p, x = jax.device_put(p, NamedSharding(m, P())), jax.device_put(x, NamedSharding(m, P("data")))
  count = int(np.count_nonzero(~frozen))
  held = jax.device_put(jnp.asarray(frozen), NamedSharding(m, P()))
  runtime = maskopt.runtime(held, count=count)
  tx = maskopt.selective_transform(optax.sgd(1.0), freeze_mask=[frozen, runtime], prefer="memory")

  def step(p: Any, state: Any, x: Any) -> Any:
    g = maskopt.grad(f, maskopt.mask_of(state))(p, x)
    updates, state = tx.update(g, state, p)
    return maskopt.apply_updates(p, updates)

  compiled = jax.jit(step, compiler_options=QUICK).lower(p, tx.init(p), x).compile()
  assert reduced_by(compiled.as_text()) <= 1.15 * 4 * 2 * count
  for old, new, g in zip(p, compiled(p, tx.init(p), x), jax.grad(f)(p, x), strict=True):
    np.testing.assert_allclose(new, np.where(frozen, old, old - g), rtol=1e-4, atol=1e-6)


def test_one_device_has_nothing_to_share() -> None:
  f, p, x = SCATTERED["kernels"]()
  mask = [R.random(w.shape) >= 0.05 for w in p]
  one = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])
  many = mesh(AxisType.Auto)
  text = [
    str(jax.make_jaxpr(maskopt.grad(f, mask))(*jax.device_put((p, x), where)))
    for where in (jax.devices()[0], NamedSharding(one, P()), NamedSharding(many, P()))
  ]
  assert ["custom_partitioning" in t for t in text] == [False, False, True]


@pytest.mark.parametrize(
  ("backend", "kind", "is_shared"),
  [("cpu", "cpu", True), ("tpu", "TPU v5 lite", False), ("cpu", "TPU v5 lite", False)],
  ids=["cpu", "at hand", "compiled ahead of time"],
)
def test_tpus_reduce_first(
  backend: str, kind: str, is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  device = SimpleNamespace(device_kind=kind)
  m = SimpleNamespace(empty=False, size=N, axis_types=(AxisType.Auto,), abstract_device=device)
  assert has_devices(SimpleNamespace(sharding=SimpleNamespace(mesh=m))) == is_shared


def test_scattered_elements_of_batched_and_second_derivatives() -> None:
  f, p, x = SCATTERED["kernels"]()
  frozen = [R.random(w.shape) >= 0.05 for w in p]
  m = mesh(AxisType.Auto)
  p = jax.device_put(p, NamedSharding(m, P()))
  x = jax.device_put(jnp.stack([x, 2 * x]), NamedSharding(m, P(None, "data")))

  def zeroed(p: Any, x: Any) -> Any:
    return [jnp.where(k, 0, g) for k, g in zip(frozen, jax.grad(f)(p, x), strict=True)]

  def square(g: Any) -> Any:
    return lambda p: sum(jnp.sum(v**2) for v in g(p, x[0]))

  pair = maskopt.grad(f, frozen), zeroed
  for wrap in (
    lambda g: lambda: jax.vmap(g, (None, 0))(p, x),
    lambda g: lambda: jax.jvp(lambda q: g(q, x[0]), (p,), (p,))[1],
    lambda g: lambda: jax.grad(square(g))(p),
  ):
    got, expected = (jax.jit(wrap(g), compiler_options=QUICK)() for g in pair)
    for a, b in zip(got, expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("specs", [
  (P(None, "model"), P("model", None)), (P(None, "model"), P(None, "model")),
  (P("data", None), P("data", "model")),
])  # fmt: skip
def test_scattered_elements_of_sharded_kernels(specs: Any) -> None:
  f, p, x = SCATTERED["kernels"]()
  mask = [R.random(w.shape) >= 0.1 for w in p]
  m = jax.make_mesh((N // 2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  p = [jax.device_put(w, NamedSharding(m, s)) for w, s in zip(p, specs, strict=True)]
  x = jax.device_put(x, NamedSharding(m, P("data")))
  gradients = [jax.grad(f), maskopt.grad(f, mask, packed=True)]
  dense, got = (jax.jit(g, compiler_options=QUICK).lower(p, x).compile() for g in gradients)
  for a, b, frozen in zip(dense(p, x), got(p, x), mask, strict=True):
    np.testing.assert_allclose(b.values, np.asarray(a)[~frozen], rtol=1e-4, atol=1e-6)
  assert matmul_flops(got.as_text()) <= matmul_flops(dense.as_text())


def matmul_flops(text: str) -> int:
  """Output elements times summed length of every dot of one device's program."""
  shapes = dict(re.findall(r"(%[\w.-]+) = f32\[([\d,]*)\]", text))
  total = 0
  for out, lhs, summed in re.findall(
    r"= f32\[([\d,]*)\]\S* dot\((?:\S+ )?(%[\w.-]+),.*?lhs_contracting_dims=\{([\d,]*)\}", text
  ):
    sizes = [int(n) for n in shapes[lhs].split(",")]
    total += math.prod(map(int, out.split(","))) * math.prod(
      sizes[int(d)] for d in summed.split(",")
    )
  assert total
  return total


def test_kernels_that_a_scan_takes_apart_are_gathered_after() -> None:
  def f(p: Any, x: Any) -> Any:
    return jnp.mean(lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p)[0] ** 2)

  m, frozen = mesh(AxisType.Auto), R.random((3, D, D)) >= 0.1
  p = jax.device_put(normal(3, D, D), NamedSharding(m, P()))
  x = jax.device_put(normal(N, D), NamedSharding(m, P("data")))
  got = jax.jit(maskopt.grad(f, frozen))(p, x)
  np.testing.assert_allclose(got, np.where(frozen, 0, jax.grad(f)(p, x)), rtol=1e-4, atol=1e-6)
  stops = maskopt.explain(f, frozen, p, x).stops
  assert any(s.primitive == "scan" and "scattered" in s.reason for s in stops)


@every_pair(
  name=["kernels", "checkpoint", "recurrent"],
  share=[0.005, 0.1],
  check=[True, False],
)
def test_scattered_elements_inside_shard_map(name: str, share: float, check: bool) -> None:
  body, p, x = SCATTERED[name]()
  m, mask = mesh(AxisType.Auto), [R.random(w.shape) >= share for w in p]
  f = jax.shard_map(
    lambda p, x: lax.psum(body(p, x), "data"),
    mesh=m, in_specs=(P(), P("data")), out_specs=P(), check_vma=check,
  )  # fmt: skip
  p, x = jax.device_put(p, NamedSharding(m, P())), jax.device_put(x, NamedSharding(m, P("data")))
  gradients = [jax.grad(f), maskopt.grad(f, mask)]
  dense, got = (jax.jit(g, compiler_options=QUICK).lower(p, x).compile() for g in gradients)
  trains, scalar = sum(np.count_nonzero(~k) for k in mask), 4
  assert reduced_by(dense.as_text()) >= 4 * sum(w.size for w in p)
  assert reduced_by(got.as_text()) <= 1.15 * 4 * trains + scalar
  for a, b, frozen in zip(dense(p, x), got(p, x), mask, strict=True):
    np.testing.assert_allclose(b, np.where(frozen, 0, a), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec", [P(None, "data"), P("data", None)], ids=["columns", "rows"])
def test_scattered_elements_of_a_kernel_sharded_in_shard_map(spec: P) -> None:
  m = mesh(AxisType.Auto)

  def local(w: Any, x: Any) -> Any:
    return lax.psum(jnp.sum(jnp.tanh(x[:, : w.shape[0]] @ w) ** 2), "data")

  f = jax.shard_map(local, mesh=m, in_specs=(spec, P()), out_specs=P())
  w = jax.device_put(normal(D, D), NamedSharding(m, spec))
  x = jax.device_put(normal(4, D), NamedSharding(m, P()))
  frozen = R.random((D, D)) >= 0.1
  got = jax.jit(maskopt.grad(f, frozen))(w, x)
  np.testing.assert_allclose(got, np.where(frozen, 0, jax.grad(f)(w, x)), rtol=1e-4, atol=1e-6)
  stops = maskopt.explain(f, frozen, w, x).stops
  assert any(s.primitive == "shard_map" and "scattered" in s.reason for s in stops)
