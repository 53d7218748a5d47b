"""Parameters that devices share: every layout keeps the sharding, and gathers nothing in a loop."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pairs import every_pair
from test_slicer_sharded import N, mesh

import maskopt

pytestmark = pytest.mark.skipif(N < 2, reason="needs several devices (see conftest)")


@pytest.fixture(autouse=True)
def _as_optax_asks():
  with jax.numpy_dtype_promotion("standard"):
    yield


R = np.random.default_rng(0)
SHAPE = (2 * N, 3 * N)


def all_but(trains: Any) -> np.ndarray:
  mask = np.ones(SHAPE, bool)
  mask[trains] = False
  return mask


MASKS: dict[str, Any] = {
  "columns": all_but((slice(None), [0, 3])),
  "rows": all_but([3, 4, 9]),
  "block": all_but((slice(2, 5), slice(3, 7))),
  "union": all_but([0]) & all_but((slice(2, 5), slice(3, 7))),
  "few": R.random(SHAPE) > 0.02,
  "half": R.random(SHAPE) > 0.5,
  "runtime": jnp.asarray(R.random(SHAPE) > 0.3),
  "frozen": True,
  "trainable": False,
}


def eager(f: Callable[[Any], Any]) -> Any:
  return f


def cond(f: Callable[[Any], Any]) -> Any:
  return lambda w: lax.cond(True, f, jnp.zeros_like, w)


@every_pair(name=MASKS, spec=[P("data", None), P(None, "data")], way=[eager, jax.jit, cond])
def test_gradients_and_steps_keep_the_sharding(name: str, spec: P, way: Any) -> None:
  m, mask = mesh(AxisType.Explicit), MASKS[name]
  w = jax.device_put(jnp.asarray(R.normal(size=SHAPE) / 16, jnp.float32), NamedSharding(m, spec))
  x = jnp.asarray(R.normal(size=(4, SHAPE[0])), jnp.float32)

  def f(w: Any) -> Any:
    return jnp.sum(jnp.tanh(jnp.einsum("ij,jk->ik", x, w, out_sharding=P(None, None))) ** 2)

  with jax.set_mesh(m):
    expected = np.where(mask, 0, jax.grad(f)(w))
    gradient = way(maskopt.grad(f, mask))
    np.testing.assert_allclose(gradient(w), expected, atol=1e-5)
    assert jax.typeof(gradient(w)) == jax.typeof(w)

    tx = maskopt.selective_transform(optax.adam(0.1), freeze_mask=mask, prefer="memory")

    def step(w: Any) -> Any:
      updates, _ = tx.update(gradient(w), tx.init(w), w)
      return maskopt.apply_updates(w, updates)

    new = (jax.jit(step) if way is jax.jit else step)(w)
    assert jax.typeof(new) == jax.typeof(w)
    assert maskopt.audit(w, new, mask).ok
    moved = np.asarray(new) != np.asarray(w)
    np.testing.assert_array_equal(moved, ~np.broadcast_to(mask, SHAPE))


def test_scattered_elements_of_an_embedding_train() -> None:
  """JAX looks rows up on Auto axes, and casts back: what is gathered in between is cast as well."""
  m = mesh(AxisType.Explicit)
  w = jax.device_put(jnp.asarray(R.normal(size=SHAPE), jnp.float32), NamedSharding(m, P()))
  at = jax.device_put(jnp.arange(2 * N) % SHAPE[0], NamedSharding(m, P("data")))
  mask = R.random(SHAPE) > 0.1

  def f(w: Any) -> Any:
    return jnp.sum(w.at[at].get(out_sharding=jax.typeof(at).sharding) ** 2)

  tx = maskopt.selective_transform(optax.adam(0.1), freeze_mask=mask, prefer="memory")

  @jax.jit
  def step(w: Any, state: Any) -> Any:
    updates, state = tx.update(maskopt.grad(f, mask)(w), state, w)
    return maskopt.apply_updates(w, updates), state

  new, _ = step(w, tx.init(w))
  assert jax.typeof(new) == jax.typeof(w)
  np.testing.assert_array_equal(np.asarray(new) != np.asarray(w), ~mask)


@pytest.mark.parametrize("name", ["rows", "columns", "few"])
def test_what_devices_share_is_written_where_it_is(name: str) -> None:
  """The compiler cannot cut a loop along what it walks over: every turn would gather the leaf."""
  m, mask = mesh(AxisType.Auto), MASKS[name]
  w = jax.device_put(jnp.ones(SHAPE), NamedSharding(m, P("data")))
  tx = maskopt.selective_transform(optax.adam(0.1), freeze_mask=mask, prefer="memory")
  state = tx.init(w)

  def step(w: Any, state: Any) -> Any:
    updates, state = tx.update(jnp.full_like(w, 0.1), state, w)
    return maskopt.apply_updates(w, updates), state

  program = jax.jit(step).lower(w, state).compile()
  assert not re.search(r"all-gather|all-to-all|collective-permute", program.as_text())
  new, _ = program(w, state)
  assert new.sharding.is_equivalent_to(w.sharding, w.ndim)
  np.testing.assert_array_equal(np.asarray(new) != 1, ~mask)
