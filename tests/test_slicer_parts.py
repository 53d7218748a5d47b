"""Elements of sums that devices share: right for every way to cut the operands, and cheap."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from pairs import every_pair
from test_slicer import QUICK

from maskopt._slicer import _sums
from maskopt._slicer._parts import pick_shared

R = np.random.default_rng(0)
DEVICES = np.array(jax.devices())

pytestmark = pytest.mark.skipif(len(DEVICES) != 8, reason="needs eight devices (see conftest)")

# Meshes whose axes run through the devices from last to first, and inside out.
MESHES = {
  "two axes": Mesh(DEVICES.reshape(4, 2), ("a", "b")),
  "turned": Mesh(DEVICES[::-1].reshape(2, 4).T, ("a", "b")),
  "three axes": Mesh(DEVICES.reshape(2, 2, 2), ("a", "c", "b")),
}


def normal(*shape: int) -> Any:
  return jnp.asarray(R.normal(size=shape), jnp.float32)


def product(x: Any, y: Any) -> Any:
  return lax.dot_general(x, y, (((0,), (0,)), ((), ())))


def picking(fun: Callable[..., Any], operands: Sequence[Any]) -> tuple[Any, Any, np.ndarray]:
  """(the function for some elements, their positions, what they are); its last equation counts."""
  eqn = jax.make_jaxpr(fun)(*operands).eqns[-1]
  total = _sums._SUMS[eqn.primitive.name](eqn)
  full = np.asarray(fun(*operands))
  where = np.sort(R.choice(full.size, full.size // 10, replace=False)).astype(np.int32)
  return (
    lambda at, *xs: pick_shared(total, full.shape, at, *xs),
    jnp.asarray(where),
    full.ravel()[where],
  )


def compiled(fun: Any, where: Any, operands: Sequence[Any], mesh: Mesh, specs: Sequence[P]) -> Any:
  where = jax.device_put(where, NamedSharding(mesh, P()))
  placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(operands, specs, strict=True)]
  run = jax.jit(fun, compiler_options=QUICK).lower(where, *placed).compile()
  return run(where, *placed), run.as_text()


def collectives(text: str) -> list[str]:
  return re.findall(r"(\S+) (?:all-reduce|all-gather|all-to-all|collective-permute)\(", text)


SPECS = [P(), P("a"), P("a", "b"), P(None, "a"), P(("a", "b")), P(None, ("b", "a"))]


@every_pair(name=MESHES, of_x=SPECS, of_y=SPECS)
def test_however_operands_are_cut(name: str, of_x: P, of_y: P) -> None:
  operands = normal(16, 24), normal(16, 32)
  pick, where, expected = picking(product, operands)
  got, _ = compiled(pick, where, operands, MESHES[name], (of_x, of_y))
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("specs", "count"),
  [((P("a"), P("a")), 1), ((P(("a", "b")),) * 2, 1), ((P("a", "b"), P("a")), 1), ((P(), P()), 0)],
)
def test_only_picked_elements_travel(specs: Any, count: int) -> None:
  operands = normal(16, 24), normal(16, 32)
  pick, where, _ = picking(product, operands)
  _, text = compiled(pick, where, operands, MESHES["two axes"], specs)
  assert [s.split("{")[0] for s in collectives(text)] == [f"f32[{len(where)}]"] * count


@pytest.mark.parametrize("rows", [15, 9, 7, 1])
def test_a_batch_that_devices_cannot_share_evenly(rows: int) -> None:
  x, y = normal(16, 24), normal(16, 32)
  mesh = MESHES["two axes"]
  spread = NamedSharding(mesh, P(("a", "b")))
  pick, where, expected = picking(lambda x, y: product(x, y), (x[:rows], y[:rows]))

  def uneven(where: Any, x: Any, y: Any) -> Any:
    # What lies past the end must never count, whatever it holds.
    cut = [lax.with_sharding_constraint(1 / v[:rows], spread) for v in (x, y)]
    return pick(where, *(1 / v for v in cut))

  got, _ = compiled(uneven, where, (x, y), mesh, (P(("a", "b")),) * 2)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 4), (2, 8)])
def test_a_batch_reshaped_across_a_mesh_axis(shape: tuple[int, int]) -> None:
  x, y = normal(16, 24), normal(16, 32)
  mesh = Mesh(DEVICES, ("a",))

  def both(x: Any, y: Any) -> Any:
    return lax.dot_general(x, y, (((0, 1), (0, 1)), ((), ())))

  operands = x.reshape(*shape, 24), y.reshape(*shape, 32)
  pick, where, expected = picking(both, operands)

  def reshaped(where: Any, x: Any, y: Any) -> Any:
    return pick(where, x.reshape(*shape, 24), y.reshape(*shape, 32))

  got, text = compiled(reshaped, where, (x, y), mesh, (P("a"), P("a")))
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
  assert [s.split("{")[0] for s in collectives(text)] == [f"f32[{len(where)}]"]


def kernel_gradient(groups: int) -> Any:
  numbers = ("NHWC", "HWIO", "NHWC")
  image, kernel = normal(8, 6, 6, 8), normal(3, 3, 8 // groups, 16)

  def forward(kernel: Any, image: Any) -> Any:
    return lax.conv_general_dilated(
      image, kernel, (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )

  out, pull = jax.vjp(lambda k: forward(k, image), kernel)
  grad = jax.make_jaxpr(pull)(jnp.ones_like(out))
  eqn = next(e for e in grad.eqns if e.primitive.name == "conv_general_dilated")
  return lambda x, y: eqn.primitive.bind(x, y, **eqn.params), (image, normal(*out.shape))


def rows_added(at: Any, values: Any) -> Any:
  numbers = lax.ScatterDimensionNumbers((1,), (0,), (0,))
  return lax.scatter_add(jnp.zeros((40, 24)), at, values, numbers, mode="drop")


def summed(x: Any) -> Any:
  return lax.reduce_sum_p.bind(x, axes=(0,), **_OUT)


_OUT = {k: v for k, v in jax.make_jaxpr(lambda x: jnp.sum(x, 0))(jnp.ones((2, 2))).eqns[0]
        .params.items() if k != "axes"}  # fmt: skip
POSITIONS = jnp.asarray(R.integers(0, 50, (16, 1)), jnp.int32)
OTHERS: dict[str, Any] = {
  "batches": (
    lambda x, y: lax.dot_general(x, y, (((1,), (1,)), ((0,), (0,)))),
    (normal(4, 16, 6), normal(4, 16, 8)),
    (P("b", "a"), P("b", "a")),
  ),
  "convolution": (*kernel_gradient(1), (P("a"), P("a", None, None, "b"))),
  "grouped convolution": (*kernel_gradient(4), (P("a"), P("a"))),
  "depthwise convolution": (*kernel_gradient(8), (P("a"), P("a"))),
  "rows": (rows_added, (POSITIONS, normal(16, 24)), (P("a"), P("a", "b"))),
  "sum": (summed, (normal(16, 6, 8),), (P("a", None, "b"),)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_sums(name: str) -> None:
  fun, operands, specs = OTHERS[name]
  if name == "rows":  # the array added to is read by itself
    eqn = jax.make_jaxpr(fun)(*operands).eqns[-1]
    total, full = _sums._scatter_add(eqn), np.asarray(fun(*operands))
    where = np.arange(0, full.size, 7, dtype=np.int32)
    expected = full.ravel()[where]
    got, text = compiled(
      lambda at, *xs: pick_shared(total, full.shape, at, *xs),
      where, operands, MESHES["two axes"], specs,
    )  # fmt: skip
  else:
    pick, where, expected = picking(fun, operands)
    got, text = compiled(pick, where, operands, MESHES["two axes"], specs)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
  assert collectives(text) and all(f"[{len(where)}]" in s for s in collectives(text))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_other_devices_do_not_see_what_is_not_theirs(bad: float) -> None:
  x, y = normal(16, 24).at[3, 5].set(bad), normal(16, 32)
  pick, where, expected = picking(product, (x, y))
  got, _ = compiled(pick, where, (x, y), MESHES["two axes"], (P("a", "b"), P("a")))
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
  assert not np.isfinite(expected).all() and np.isfinite(expected).any()
