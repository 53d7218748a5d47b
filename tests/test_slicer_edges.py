"""Edges of the rules: narrow index types, clipped places, values asked for, parts of operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

import maskopt

R = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
  return jnp.asarray(R.normal(size=shape), jnp.float32)


def all_but(shape: tuple[int, ...], trains: Any) -> np.ndarray:
  mask = np.ones(shape, bool)
  mask[trains] = False
  return mask


def check(f: Callable[[Any], Any], mask: Any, params: Any) -> None:
  got, whole = maskopt.grad(f, mask)(params), jax.grad(f)(params)
  for g, w, m in zip(*(jax.tree.leaves(t) for t in (got, whole, mask)), strict=True):
    np.testing.assert_allclose(g, np.where(m, 0, w), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("dtype", "rows", "least"),
  [
    (jnp.uint8, 256, 200),
    (jnp.uint16, 65536, 65000),
    (jnp.int16, 40000, 30000),
    (jnp.int8, 500, 100),
    (jnp.uint32, 300, 200),
  ],
)
def test_rows_of_an_embedding_by_indices_of_any_type(dtype: Any, rows: int, least: int) -> None:
  """Counted from the first row that trains the others are negative, which no unsigned type is."""
  most = min(rows, int(jnp.iinfo(dtype).max))
  at = jnp.asarray(R.integers(least - 50, most, 66), dtype)
  w = normal(rows, 4)
  for frozen in (np.arange(rows) < least, np.arange(rows) % 3 > 0, np.arange(rows) < least + 1):
    check(lambda w: jnp.sum(jnp.take(w, at, axis=0) ** 2), frozen[:, None], w)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8, jnp.uint8])
def test_clipped_places(dtype: Any) -> None:
  """What lies outside is moved to the border, which may train or not."""
  w, mask = normal(12, 10), all_but((12, 10), [0, 2, 5])
  i, j = (jnp.array(at).astype(dtype) for at in ([0, 1, 2, -3], [20, 3, 11, 4]))
  check(lambda w: jnp.sum(w.at[i, j].get(mode="clip") ** 2), mask, w)
  check(lambda w: jnp.sum(w.at[i, j].add(2 * w[:4, 0], mode="clip") ** 2), mask, w)
  check(lambda w: jnp.sum(w.at[i, j].set(3 * w[:4, 1], mode="clip") ** 2), mask, w)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_largest_along_any_axis(axis: int) -> None:
  x, w = normal(6, 12), normal(4, 8)

  @jax.checkpoint
  def block(w: Any, x: Any) -> Any:
    return jnp.moveaxis(lax.top_k(x, 4, axis=axis)[0], axis, -1) @ w

  check(lambda w: jnp.sum(block(w, jnp.sin(x)) ** 2), all_but((4, 8), slice(2)), w)


def test_branches_of_platforms_are_left_as_they_are() -> None:
  """One of them may not even lower on another platform."""

  def kernel(x: Any) -> Any:
    def body(read: Any, write: Any) -> None:
      write[...] = read[...] * 2

    return pl.pallas_call(body, out_shape=jax.typeof(x))(x)

  def double(x: Any) -> Any:
    return lax.platform_dependent(x, cpu=lambda x: x * 2, tpu=kernel)

  doubled = jax.custom_vjp(double)
  doubled.defvjp(lambda x: (double(x), None), lambda _, g: (double(g),))
  x, w = normal(6, 12), normal(12, 8)
  check(lambda w: jnp.sum(doubled(x @ w) ** 2), np.arange(8) > 0, w)


@pytest.mark.parametrize("packed", [False, True])
def test_functions_that_ask_for_values_run_as_in_jax(packed: bool) -> None:
  """Eagerly an array may be printed, compared or give a size, though not one differentiated."""
  x, sizes, w = normal(8, 12), jnp.array([3, 5]), normal(12, 4)

  def f(w: Any, sizes: Any) -> Any:
    assert jnp.all(jnp.isfinite(x))
    rows = x[: int(sizes.max())] if sizes.max() > 0 else x
    return jnp.sum(jnp.tanh(rows @ w[:]) ** 2)

  masks = {"units": np.arange(4) > 0, "some": R.random((12, 4)) > 0.1, "all": True, "none": False}
  whole = np.asarray(jax.grad(f)(w, sizes))
  for mask in masks.values():
    got = maskopt.grad(f, mask, packed=packed)(w, sizes)
    got = maskopt.unpack(got, jnp.zeros_like(w), mask) if packed else got
    np.testing.assert_allclose(got, np.where(mask, 0, whole), rtol=1e-6)
  with pytest.raises(jax.errors.ConcretizationTypeError):
    jax.jit(maskopt.grad(f, masks["units"]))(w, sizes)


AUX: list[Any] = [np.array([2**40, 7]), 2**40, np.array(["a"]), np.float64(0.1), "x", None, 0.5]


@pytest.mark.parametrize("aux", AUX, ids=lambda aux: type(aux).__name__)
def test_what_is_beside_the_value_comes_back_as_it_is(aux: Any) -> None:
  got = maskopt.grad(lambda w: (w.sum(), aux), np.arange(4) > 0, has_aux=True)(jnp.ones(4))[1]
  assert got is aux


def test_arrays_and_keys_beside_the_value_come_back() -> None:
  aux = {"x": jnp.float32(0.1), "key": jax.random.key(0)}
  got = maskopt.grad(lambda w: (w.sum(), aux), np.arange(4) > 0, has_aux=True)(jnp.ones(4))[1]
  assert jax.tree.map(jax.typeof, got) == jax.tree.map(jax.typeof, aux)


def test_constant_gradients_are_arrays() -> None:
  got = maskopt.grad(lambda p: p["s"] * 1.0, {"s": False})({"s": jnp.float32(1)})["s"]
  assert isinstance(got, jax.Array) and got == 1


def flops(f: Callable[[Any], Any], mask: Any, params: Any) -> tuple[int, int]:
  check(f, mask, params)
  found = maskopt.explain(f, mask, params)
  return found.flops_sliced, found.flops_full


def test_regions_that_round_up_to_the_whole_are_computed_once() -> None:
  """A ragged product has no columns of a group: four half groups were four whole products."""
  w, x, sizes = normal(4, 64, 50), normal(256, 64), jnp.array([64] * 4, jnp.int32)
  mask = np.ones(w.shape, bool)
  for group in mask:
    group[:, R.choice(50, 22, replace=False)] = False
  sliced, full = flops(lambda w: jnp.sum(lax.ragged_dot(x, w, sizes) ** 2), mask, w)
  assert sliced <= full


def joined(p: Any) -> Any:
  """Four branches concatenated, one of which trains; the product after it is by far the largest."""
  x, wide = jnp.ones((8, 16)), jnp.full((64, 300), 0.1)
  return jnp.sum((jnp.concatenate([jnp.tanh(x @ p[k]) for k in "abcd"], 1) @ wide) ** 2)


@pytest.mark.parametrize("trains", [slice(4), (slice(None), slice(4))])
def test_a_slice_that_is_wanted_whole_reads_less(trains: Any) -> None:
  """Of the gradient of a concatenation only the branch that trains is computed."""
  p = {k: normal(16, 16) for k in "abcd"}
  mask = {"a": all_but((16, 16), trains), "b": True, "c": True, "d": True}
  sliced, _ = flops(joined, mask, p)
  kept = np.flatnonzero(~mask["a"].all(0)).size  # columns of "a" that anything needs
  forward = 2 * 8 * 16 * 16 * 4 + 2 * 8 * 64 * 300
  least = forward + 2 * 8 * 300 * kept + 2 * 8 * np.count_nonzero(~mask["a"])
  assert sliced <= 1.02 * least


@pytest.mark.parametrize("apart", [iter, jnp.unstack])
def test_layers_taken_out_of_one_array_stop_at_the_lowest_that_trains(apart: Any) -> None:
  w = normal(4, 16, 16) / 4

  def f(w: Any) -> Any:
    h = jnp.ones((8, 16))
    for layer in apart(w):
      h = jnp.tanh(h @ layer)
    return jnp.sum(h**2)

  sliced, full = flops(f, all_but(w.shape, 3), w)
  product = 2 * 8 * 16 * 16
  assert full == 11 * product and sliced == 5 * product  # forward, and the last layer's own


def test_layers_stacked_into_one_array() -> None:
  p = {k: normal(16, 16) / 4 for k in "abc"}

  def f(p: Any) -> Any:
    stacked = jax.checkpoint(lambda p: jnp.stack([p[k] for k in "abc"], 1))(p)
    return jnp.sum(jnp.tanh(jnp.einsum("bi,ikj->bkj", jnp.ones((8, 16)), stacked)) ** 2)

  mask = {"a": True, "b": all_but((16, 16), (slice(None), slice(4))), "c": True}
  sliced, full = flops(f, mask, p)
  assert sliced < 0.75 * full
