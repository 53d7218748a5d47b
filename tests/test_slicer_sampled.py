"""Scattered elements: a sampled product equals the gathered dense gradient and is far cheaper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from maskopt._slicer import NONE, Sampled, _sampled, count_flops, region, slice_program

D = 48
RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(D, D)) / 7, jnp.float32)
X = jnp.asarray(RNG.normal(size=(12, D)), jnp.float32)
FEW = jnp.asarray(np.sort(RNG.choice(D * D, 20, replace=False)), jnp.int32)


@pytest.fixture(autouse=True)
def on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")


def mlp(w: Any, x: Any) -> Any:
  return jnp.sum(jnp.tanh(jnp.tanh(x @ w)) ** 2)


def shared(w: Any, x: Any) -> Any:
  return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w.T) ** 2)


def tokens(w: Any, x: Any) -> Any:
  y = jnp.einsum("bte,ehd->bthd", x.reshape(3, 4, D), w.reshape(D, 4, D // 4))
  return jnp.sum(jnp.sin(y))


def recurrent(w: Any, x: Any) -> Any:
  return jnp.sum(lax.scan(lambda h, row: (jnp.tanh(h @ w + row), None), x, jnp.ones((5, 12, D)))[0])


def half(w: Any, x: Any) -> Any:
  return jnp.sum(jnp.tanh(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32))


LOSSES = [mlp, shared, tokens, recurrent, half]


@pytest.mark.parametrize(
  "wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "remat"]
)
@pytest.mark.parametrize("loss", LOSSES)
def test_sampled_equals_gathered_gradient(loss: Callable[..., Any], wrap: Any) -> None:
  grad = jax.grad(wrap(loss))

  def sampled(w: Any, x: Any, indices: Any) -> Any:
    return slice_program(grad, [Sampled(indices)], w, x)[0][0]

  expected = np.ravel(grad(W, X))[np.asarray(FEW)]
  tol = 2e-2 if loss is half else 2e-5
  np.testing.assert_allclose(jax.jit(sampled)(W, X, FEW), expected, rtol=tol, atol=tol)
  full = count_flops(jax.make_jaxpr(grad)(W, X))
  got = count_flops(jax.make_jaxpr(sampled)(W, X, FEW))
  products = {mlp: 1, shared: 2, tokens: 1, recurrent: 5, half: 1}[loss]
  assert full - got == products * 2 * 12 * D * D  # not one dense dW is left


def test_dense_mask_takes_the_dense_product() -> None:
  many = jnp.asarray(np.sort(RNG.choice(D * D, 600, replace=False)), jnp.int32)

  def sampled(w: Any, x: Any, indices: Any) -> Any:
    return slice_program(jax.grad(mlp), [Sampled(indices)], w, x)[0][0]

  np.testing.assert_allclose(sampled(W, X, many), np.ravel(jax.grad(mlp)(W, X))[many], rtol=1e-4)
  full = count_flops(jax.make_jaxpr(jax.grad(mlp))(W, X))
  assert count_flops(jax.make_jaxpr(sampled)(W, X, many)) == full


def test_accelerators_take_the_dense_product(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert not _sampled._is_worth_it(10, 1_000_000, 256)


def test_chunks_of_a_long_pick() -> None:
  n, size = 2 * _sampled.CHUNK + 7, 512
  w = jnp.zeros((size, size))
  x = jnp.asarray(RNG.normal(size=(4, size)), jnp.float32)
  indices = jnp.asarray(np.sort(RNG.choice(size * size, n, replace=False)), jnp.int32)
  grad = jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w) * x))
  got = slice_program(grad, [Sampled(indices)], w, x)[0][0]
  np.testing.assert_allclose(got, np.ravel(grad(w, x))[indices], rtol=1e-4, atol=1e-6)


def test_sampled_beside_regions_and_none() -> None:
  grad = jax.grad(lambda p, x: mlp(p[0], x @ p[1] @ p[2]))
  demands = [Sampled(FEW), (region((D, D), None, [1, 7]),), NONE]
  out, _ = slice_program(grad, demands, [W, W, W], X)
  full = grad([W, W, W], X)
  np.testing.assert_allclose(out[0], np.ravel(full[0])[FEW], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(out[1][0], full[1][:, np.array([1, 7])], rtol=1e-4, atol=1e-5)
  assert out[2] is None


def test_embedding_and_convolution_are_gathered_after() -> None:
  ids = jnp.asarray([1, 5, 5, 7])
  grad = jax.grad(lambda t: jnp.sum(jnp.sin(t[ids])))
  out, _ = slice_program(grad, [Sampled(FEW)], W)
  np.testing.assert_allclose(out[0], np.ravel(grad(W))[FEW], rtol=1e-5)
