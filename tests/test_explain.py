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


def _few(shape, share):
  frozen = np.ones(shape, bool)
  frozen.flat[np.random.default_rng(0).choice(frozen.size, round(share * frozen.size), False)] = (
    False
  )
  return frozen


def _embedding(w, x):
  return jnp.sum(jnp.sin(w[jnp.arange(3)])) * x.sum()


def _convolution(w, x):
  kernel = w.reshape(1, 32, 32)
  image = jnp.broadcast_to(x[None], (2, 8, 32))
  dims = ("NWC", "WIO", "NWC")
  return jax.lax.conv_general_dilated(image, kernel, (1,), "SAME", dimension_numbers=dims).sum()


def _batched(w, x):
  return jnp.sin(jnp.einsum("ni,nio->no", x[:4], w.reshape(4, 32, 8))).sum()


def _stacked(w, x):
  return jax.lax.scan(lambda h, k: (jnp.tanh(h @ k), None), x[:, :8], w.reshape(16, 8, 8))[0].sum()


@pytest.mark.parametrize(
  ("fun", "primitive"),
  [
    (_embedding, "scatter-add"),
    (_convolution, "conv_general_dilated"),
    (_batched, "dot_general"),
    (_stacked, "scan"),
  ],
)
def test_scattered_elements_gathered_from_the_whole_are_named(fun, primitive):
  w, x = jnp.ones((32, 32)), jnp.ones((8, 32))
  found = maskopt.explain(fun, _few(w.shape, 0.009), w, x)
  reasons = {stop.primitive: stop.reason for stop in found.stops}
  assert reasons[primitive] == "scattered elements are gathered from the whole"
  assert f"{primitive} at" in str(found) and "gathered from the whole" in str(found)
  frozen = _few(w.shape, 0.009)
  g = maskopt.grad(fun, frozen, packed=True)(w, x)
  np.testing.assert_allclose(g.values, np.asarray(jax.grad(fun)(w, x))[~frozen], rtol=1e-5)


def test_leaves_say_what_is_computed_of_them():
  p = {name: jnp.ones((32, 32)) for name in ("few", "many", "most", "some", "union")}
  union = np.arange(32)[:, None] + 0 * np.arange(32) > 1
  union[:, 5] = False
  mask = {
    "few": _few((32, 32), 0.009),
    "many": _few((32, 32), 0.1),
    "most": np.arange(32) > 20,
    "some": np.arange(32) > 2,
    "union": union,
  }
  found = maskopt.explain(
    lambda p, x: sum((x @ w).sum() for w in p.values()), mask, p, X[:, :16].repeat(2, 1)
  )
  assert {leaf.path: leaf.gradient for leaf in found.leaves} == {
    "few": "elements",
    "many": "whole",
    "most": "whole",
    "some": "blocks",
    "union": "blocks",
  }


def test_nothing_is_run():
  def never(p, x):
    jax.debug.callback(lambda: pytest.fail("explain ran the loss"))
    return loss(p, x)

  maskopt.explain(never, MASK, jax.eval_shape(params), jax.ShapeDtypeStruct(X.shape, X.dtype))
  jax.effects_barrier()


def test_a_step_that_has_run_is_explained_again_and_traced_no_more_for_it():
  tx = maskopt.selective_transform(optax.adam(0.1), freeze_mask=MASK, prefer="memory")
  traces = []

  @jax.jit
  def step(p, state, x):
    traces.append(1)
    value, grads = jax.jit(maskopt.value_and_grad(loss, MASK))(p, x)
    updates, state = tx.update(grads, state, p)
    return value, maskopt.apply_updates(p, updates), state

  p = params()
  state = tx.init(p)
  step(p, state, X)
  first, again = (maskopt.explain(step, MASK, p, state, X) for _ in range(2))
  assert first == again and first.flops_sliced < first.flops_full
  assert len(traces) == 3
  step(p, state, X)
  assert len(traces) == 3


def test_a_step_without_our_gradient_is_refused():
  with pytest.raises(ValueError, match="expected a scalar loss, or a step that calls maskopt.grad"):
    maskopt.explain(lambda p, x: p["low"]["kernel"] * 2, MASK, params(), X)


def test_what_is_no_function_is_refused():
  with pytest.raises(TypeError, match=r"maskopt.explain\(.*a loss or a training step, got int 3"):
    maskopt.explain(3, True, jnp.ones(2))
