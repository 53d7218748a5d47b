"""On several devices: slices inside shard_map, fewer bytes on the wire, Explicit meshes."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import slicer_programs as programs
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from test_slicer import QUICK, assert_sliced

import maskopt
from maskopt._slicer import NONE, region, slice_program

N = jax.device_count()
R = np.random.default_rng(0)
W = jnp.asarray(R.normal(size=(16, 8 * N)), jnp.float32)
X = jnp.asarray(R.normal(size=(2 * N, 16)), jnp.float32)
COLUMNS = (region(W.shape, None, [1, 2, 7]),)
ROWS = (region(W.shape, [1, 2, 7]),)

pytestmark = pytest.mark.skipif(N < 2, reason="needs several devices (see conftest)")


def mesh(kind: AxisType) -> Mesh:
  return jax.make_mesh((N,), ("data",), axis_types=(kind,))


def loss(w: Any, x: Any) -> Any:
  return jnp.sum(jax.nn.softmax(x @ w) ** 2)


def reduced_bytes(f: Any, *args: Any) -> int:
  """Bytes of every all-reduce in the compiled program, which must have no other collective."""
  return reduced_by(jax.jit(f, compiler_options=QUICK).lower(*args).compile().as_text())


def reduced_by(text: str) -> int:
  assert not re.search(r"(all-gather|reduce-scatter|all-to-all|collective-permute)[-\w]*\(", text)
  # Several arrays may travel in one all-reduce, whose result is then a tuple.
  results = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
  shapes = [s for result in results for s in re.findall(r"f32\[([\d,]*)\]", result)]
  return sum(4 * math.prod(int(n) for n in s.split(",") if n) for s in shapes)


def volume(demand: Any, shape: tuple[int, ...]) -> int:
  sizes = ([n if d is None else len(d) for d, n in zip(r, shape, strict=True)] for r in demand)
  return sum(map(math.prod, sizes))


def mapped(specs: Any, **kwargs: Any) -> Any:
  def local(w: Any, x: Any) -> Any:
    return lax.psum(loss(w, x), "data")

  return jax.shard_map(local, mesh=mesh(AxisType.Auto), in_specs=specs, out_specs=P(), **kwargs)


@pytest.mark.parametrize("demand", [COLUMNS, ROWS], ids=["columns", "rows"])
@pytest.mark.parametrize("check", [True, False])
def test_data_parallel_shard_map(demand: Any, check: bool) -> None:
  grad = jax.grad(mapped((P(), P("data")), check_vma=check))
  report = assert_sliced(grad, [demand], W, X)
  assert not report.stops
  assert report.flops_sliced < 0.7 * report.flops_full
  dense = reduced_bytes(grad, W, X)
  got = reduced_bytes(lambda w, x: slice_program(grad, [demand], w, x)[0], W, X)
  assert got <= 1.15 * dense * volume(demand, W.shape) / W.size


D, LAYERS = 8 * N, 2


def network(p: Any, x: Any) -> Any:
  for layer in p:
    x = jnp.tanh(x @ layer["w"] + layer["b"][None])
  return jnp.mean(x**2)


def masks() -> dict[str, Any]:
  """Freeze masks of one layer; about a tenth trains."""
  scattered, contiguous = np.ones(D, bool), np.arange(D) >= D // 10
  scattered[R.choice(D, D // 10, replace=False)] = False
  cross = np.where(contiguous[:, None], scattered, False)
  return {
    "columns": {"w": scattered, "b": scattered},
    "contiguous columns": {"w": contiguous, "b": contiguous},
    "rows": {"w": scattered[:, None], "b": True},
    "block": {"w": contiguous[:, None] | contiguous, "b": contiguous},
    "scattered block": {"w": scattered[:, None] | scattered, "b": scattered},
    "union": {"w": cross, "b": True},
    "biases": {"w": True, "b": scattered},
  }


@pytest.mark.parametrize(
  ("kind", "packed"), [(AxisType.Auto, False), (AxisType.Auto, True), (AxisType.Explicit, False)]
)
@pytest.mark.parametrize("name", masks())
def test_data_parallel_jit_reduces_what_trains(name: str, kind: AxisType, packed: bool) -> None:
  m, mask = mesh(kind), [masks()[name]] * LAYERS
  layer = {"w": jnp.asarray(R.normal(size=(D, D)) / D**0.5, jnp.float32), "b": jnp.zeros(D)}
  with jax.set_mesh(m):
    p = jax.device_put([layer] * LAYERS, NamedSharding(m, P()))
    x = jnp.asarray(R.normal(size=(2 * N, D)), jnp.float32)
    x = jax.device_put(x, NamedSharding(m, P("data")))
    dense = reduced_bytes(jax.value_and_grad(network), p, x)
    got = reduced_bytes(maskopt.value_and_grad(network, mask, packed=packed), p, x)
  sizes = [leaf.size for leaf in jax.tree.leaves(p)]
  trains = sum(
    np.count_nonzero(~np.broadcast_to(frozen, leaf.shape))
    for frozen, leaf in zip(jax.tree.leaves(mask), jax.tree.leaves(p), strict=True)
  )
  loss = 4
  assert dense == 4 * sum(sizes) + loss
  assert got <= 1.15 * 4 * trains + loss


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


CASES = {
  "mlp checkpoint": lambda: programs.mlp("raw", "columns", "checkpoint"),
  "mlp scan": lambda: programs.mlp_scan("rows"),
  "cnn out": lambda: programs.cnn("out"),
  "cnn in": lambda: programs.cnn("in"),
  "transformer": lambda: programs.transformer("heads", "jit"),
  "embedding rows": lambda: programs.embedding("rows"),
  "embedding columns": lambda: programs.embedding("columns"),
  "tied logits": lambda: programs.tied_logits(),
}


@pytest.mark.parametrize("name", CASES)
def test_data_parallel_models_reduce_what_trains(name: str) -> None:
  case, m = CASES[name](), mesh(AxisType.Auto)
  params, x = case.args
  x = jnp.concatenate([x] * N)
  p, x = (
    jax.device_put(params, NamedSharding(m, P())),
    jax.device_put(x, NamedSharding(m, P("data"))),
  )
  wanted = [d is not NONE for d in case.demands]

  def whole(p: Any, x: Any) -> Any:
    leaves = zip(jax.tree.leaves(case.grad(p, x)), wanted, strict=True)
    return [g for g, is_wanted in leaves if is_wanted]

  def sliced(p: Any, x: Any) -> Any:
    return [g for g in slice_program(case.grad, case.demands, p, x)[0] if g is not None]

  leaves = [
    (volume(d, leaf.shape), leaf.size)
    for d, leaf in zip(case.demands, jax.tree.leaves(params), strict=True)
    if d is not NONE
  ]
  trains, size = map(sum, zip(*leaves, strict=True))
  assert reduced_bytes(sliced, p, x) <= 1.15 * trains / size * reduced_bytes(whole, p, x)


@pytest.mark.parametrize("demand", [COLUMNS, ROWS], ids=["columns", "rows"])
@pytest.mark.parametrize("spec", [P(None, "data"), P("data", None)], ids=["columns", "rows"])
def test_sharded_kernel_in_shard_map(spec: P, demand: Any) -> None:
  def local(w: Any, x: Any) -> Any:
    return lax.psum(jnp.sum(jnp.tanh(x[:, : w.shape[0]] @ w) ** 2), "data")

  f = jax.shard_map(local, mesh=mesh(AxisType.Auto), in_specs=(spec, P()), out_specs=P())
  assert_sliced(jax.grad(f), [demand], W, X)


@pytest.mark.parametrize("demand", [COLUMNS, ROWS], ids=["columns", "rows"])
@pytest.mark.parametrize(
  ("of_w", "of_x"), [(P(None, "data"), P()), (P("data", None), P()), (P(), P("data"))]
)
def test_explicit_mesh(of_w: P, of_x: P, demand: Any) -> None:
  m = mesh(AxisType.Explicit)
  with jax.set_mesh(m):
    w, x = jax.device_put(W, NamedSharding(m, of_w)), jax.device_put(X, NamedSharding(m, of_x))
    out = P(of_x[0] if of_x else None, of_w[1] if of_w else None)

    def f(w: Any, x: Any) -> Any:
      y = jnp.einsum("bi,io->bo", x, w, out_sharding=out)
      y = jnp.reshape(jnp.tanh(y), y.shape)
      return jnp.sum(y * jnp.sum(y, axis=0, keepdims=True))

    assert_sliced(jax.grad(f), [demand], w, x)
    assert_sliced(jax.grad(jax.jit(f)), [demand], w, x)


@pytest.mark.parametrize("spec", [P("data", None), P(None, "data")], ids=["rows", "columns"])
def test_explicit_mesh_packs_unions_of_a_sharded_kernel(spec: P) -> None:
  m, freeze_mask = mesh(AxisType.Explicit), np.ones(W.shape, bool)
  freeze_mask[:1] = freeze_mask[:, [2, 9]] = False

  def f(w: Any, x: Any) -> Any:
    return jnp.sum(jnp.tanh(jnp.einsum("bi,io->bo", x, w, out_sharding=P(None, spec[1]))) ** 2)

  with jax.set_mesh(m):
    w, x = jax.device_put(W, NamedSharding(m, spec)), jax.device_put(X, NamedSharding(m, P()))
    full = np.asarray(jax.jit(jax.grad(f))(w, x))
    packed = jax.jit(maskopt.grad(f, freeze_mask, packed=True))(w, x)
    dense = jax.jit(maskopt.grad(f, freeze_mask))(w, x)
  np.testing.assert_allclose(packed.values, full[~freeze_mask], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(dense, np.where(freeze_mask, 0, full), rtol=1e-5, atol=1e-5)


def test_jit_with_layouts_is_sliced_inside() -> None:
  m = mesh(AxisType.Auto)
  w, x = NamedSharding(m, P()), NamedSharding(m, P("data"))
  f = jax.jit(loss, in_shardings=(w, x), out_shardings=w)
  report = assert_sliced(jax.grad(f), [COLUMNS], W, X)
  assert not report.stops
  assert report.flops_sliced < 0.7 * report.flops_full


def test_pmap_inside() -> None:
  def f(w: Any, x: Any) -> Any:
    per = jax.pmap(lambda w, x: lax.pmean(loss(w, x), "i"), axis_name="i", in_axes=(None, 0))
    return jnp.sum(per(w, x))

  assert_sliced(jax.grad(f), [COLUMNS], W, X.reshape(N, 2, 16))
