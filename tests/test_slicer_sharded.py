"""On several devices: slices inside shard_map, fewer bytes on the wire, Explicit meshes."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from test_slicer import assert_sliced

from maskopt._slicer import region, slice_program

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
  text = jax.jit(f).lower(*args).compile().as_text()
  shapes = re.findall(r"f32\[([\d,]*)\]\S* all-reduce\(", text)
  return sum(4 * int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes)


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
  share = sum(np.prod([n if d is None else len(d) for d, n in zip(r, W.shape)]) for r in demand)  # noqa: B905
  got = reduced_bytes(lambda w, x: slice_program(grad, [demand], w, x)[0], W, X)
  assert got <= 1.15 * dense * share / W.size


@pytest.mark.parametrize("demand", [COLUMNS, ROWS], ids=["columns", "rows"])
def test_data_parallel_jit(demand: Any) -> None:
  m = mesh(AxisType.Auto)
  w, x = jax.device_put(W, NamedSharding(m, P())), jax.device_put(X, NamedSharding(m, P("data")))
  grad = jax.grad(loss)
  assert_sliced(grad, [demand], w, x)
  dense = reduced_bytes(grad, w, x)
  got = reduced_bytes(lambda w, x: slice_program(grad, [demand], w, x)[0], w, x)
  assert got < 0.25 * dense


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
