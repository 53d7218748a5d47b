"""maskopt.explain: numbers of the program, and the place where an update lost its way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import maskopt


@pytest.fixture(autouse=True)
def _optax_promotes():
  # Optax computes decay**count, a float to an int: not ours to be strict about.
  with jax.numpy_dtype_promotion("standard"):
    yield


ROWS = np.arange(16) > 1
MASK = {"low": True, "top": {"kernel": ROWS, "bias": ROWS}}


def params():
  r = np.random.default_rng(0)
  return {
    "low": {"kernel": jnp.asarray(r.normal(size=(16, 16)), np.float32)},
    "top": {"kernel": jnp.asarray(r.normal(size=(16, 16)), np.float32), "bias": jnp.zeros(16)},
  }


def loss(p, x):
  x = jnp.tanh(x @ p["low"]["kernel"])
  return ((x @ p["top"]["kernel"] + p["top"]["bias"][None]) ** 2).mean()


X = np.ones((4, 16), np.float32)
ONE = 2 * 4 * 16 * 16
TX = maskopt.selective_transform(optax.adam(1e-3), freeze_mask=MASK, prefer="memory")


def step_with(between):
  def step(p, state, x):
    g = maskopt.grad(loss, maskopt.mask_of(state))(p, x)
    updates, state = TX.update(g, state, p)
    return maskopt.apply_updates(p, between(updates)), state

  return step


def explained(between):
  p = params()
  return maskopt.explain(step_with(between), MASK, p, TX.init(p), X)


def test_a_loss():
  found = maskopt.explain(loss, MASK, params(), X)
  # JAX: two forward, two dW, one dx. Ours: two forward and two columns of one dW.
  assert (found.flops_full, found.flops_sliced) == (5 * ONE, 2 * ONE + ONE * 2 // 16)
  assert {leaf.path: leaf.gradient for leaf in found.leaves} == {
    "low/kernel": "none",
    "top/bias": "blocks",
    "top/kernel": "blocks",
  }
  assert found.stops == () and "42% of" not in str(found)
  assert "top/kernel" in str(found) and "<table>" in found._repr_html_()


def test_a_step_in_place():
  found = explained(lambda u: u)
  assert {leaf.update for leaf in found.leaves} == {"untouched", "in place"}
  assert not any(leaf.lost for leaf in found.leaves)


def test_a_transform_between_is_named_with_its_line():
  found = explained(lambda u: jax.tree.map(lambda v: v * 0.5, u))
  lost = {leaf.path: leaf.lost for leaf in found.leaves}
  assert lost["low/kernel"] == ""
  assert "mul at" in lost["top/kernel"] and "test_explain.py" in lost["top/kernel"]
  assert "inside selective_transform" in lost["top/kernel"]


def test_a_boundary_between_is_named():
  found = explained(jax.jit(lambda u: u))
  lost = {leaf.path: leaf.lost for leaf in found.leaves}
  assert "it left a jit at" in lost["top/kernel"] and "same side" in lost["top/kernel"]


def test_updates_from_elsewhere_are_named():
  p = params()
  updates, _ = TX.update(jax.tree.map(jnp.ones_like, p), TX.init(p), p)

  def step(p, updates, x):
    maskopt.grad(loss, MASK)(p, x)
    return maskopt.apply_updates(p, updates)

  found = maskopt.explain(step, MASK, p, updates, X)
  assert all("another trace" in leaf.lost for leaf in found.leaves if leaf.path != "low/kernel")


def test_what_stops_a_demand_is_counted():
  def sorted_loss(p, x):
    return (jnp.sort(p["w"].T @ x, axis=0) ** 2).sum()

  found = maskopt.explain(sorted_loss, {"w": np.arange(8) > 0}, {"w": jnp.ones((4, 8))}, X[:4])
  assert found.flops_sliced <= found.flops_full
  assert all(stop.count >= 1 and stop.primitive and stop.line for stop in found.stops)


def test_nothing_is_run():
  def never(p, x):
    jax.debug.callback(lambda: pytest.fail("explain ran the loss"))
    return loss(p, x)

  maskopt.explain(never, MASK, jax.eval_shape(params), jax.ShapeDtypeStruct(X.shape, X.dtype))
  jax.effects_barrier()


def test_a_step_without_our_gradient_is_refused():
  with pytest.raises(ValueError, match="expected a scalar loss, or a step that calls maskopt.grad"):
    maskopt.explain(lambda p, x: p["low"]["kernel"] * 2, MASK, params(), X)
