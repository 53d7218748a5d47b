"""On several devices: slices inside shard_map, fewer bytes on the wire, Explicit meshes."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


@pytest.mark.parametrize("demand", [COLUMNS, ROWS], ids=["columns", "rows"])
def test_checkpoint_inside_shard_map(demand: Any) -> None:
  def local(w: Any, x: Any) -> Any:
    return lax.psum(jax.checkpoint(loss)(w, x), "data")

  f = jax.shard_map(local, mesh=mesh(AxisType.Auto), in_specs=(P(), P("data")), out_specs=P())
  report = assert_sliced(jax.grad(f), [demand], W, X)
  assert report.flops_sliced < report.flops_full
