"""metrics: the numbers are NumPy's, in and out of jit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import maskopt


def make():
  rng = np.random.default_rng(0)
  params = {
    "a": rng.normal(size=(300, 300)).astype(np.float32),
    "b": rng.normal(size=(6, 4)).astype(np.float32),
    "c": rng.normal(size=5).astype(jnp.bfloat16),
    "d": rng.normal(size=(8, 8)).astype(np.float32),
    "n": np.arange(3),
  }
  mask = {
    "a": rng.random((300, 300)) < 0.97,
    "b": np.array([True, True, True, False]),
    "c": True,
    "d": rng.random((8, 8)) < 0.5,
    "n": True,
  }
  return jax.tree.map(jnp.asarray, params), mask


def oracle(tree, mask):
  trained = frozen = 0.0
  for path, leaf in tree.items():
    x, m = np.asarray(leaf).astype(np.float64), np.broadcast_to(mask[path], leaf.shape)
    if path != "n":
      trained, frozen = trained + (x[~m] ** 2).sum(), frozen + (x[m] ** 2).sum()
  return np.sqrt(trained), np.sqrt(frozen)


def test_numbers_agree_with_numpy_and_can_be_written_down():
  params, mask = make()
  numbers = maskopt.metrics(params, mask)
  trained, frozen = oracle(params, mask)
  np.testing.assert_allclose(numbers["param_norm_trainable"], trained, rtol=1e-5)
  np.testing.assert_allclose(numbers["param_norm_frozen"], frozen, rtol=1e-5)
  report = maskopt.summary(params, mask)
  assert numbers["trainable_parameters"] == report.trainable
  assert numbers["optimizer_bytes"] == report.optimizer_bytes
  np.testing.assert_allclose(numbers["frozen_share"], report.frozen / report.parameters)
  assert json.loads(json.dumps(numbers)) == numbers


def test_inside_jit_with_the_mask_of_a_state():
  params, mask = make()
  state = maskopt.selective_transform(optax.adam(1e-3), freeze_mask=mask).init(params)
  inside = jax.jit(lambda p, s: maskopt.metrics(p, maskopt.mask_of(s)))(params, state)
  outside = maskopt.metrics(params, mask)
  assert inside.keys() == outside.keys()
  for name, value in outside.items():
    np.testing.assert_allclose(inside[name], value, rtol=1e-6)


def test_counts_are_static_inside_jit():
  def f(w):
    numbers = maskopt.metrics({"w": w}, {"w": np.array([True, False])})
    assert isinstance(numbers["frozen_share"], float)
    assert isinstance(numbers["trainable_parameters"], int)
    return numbers

  assert jax.jit(f)(jnp.array([3.0, 4.0]))["param_norm_trainable"] == 4


def test_huge_counts_leave_jit():
  mask = {"w": np.arange(65_536) < 10}
  w = jax.ShapeDtypeStruct((65_536, 65_536), jnp.bfloat16)
  out = jax.eval_shape(lambda p: maskopt.metrics(p, mask), {"w": w})
  assert out["trainable_parameters"].dtype == jnp.float32


@pytest.mark.parametrize("count", [None, 2])
def test_runtime_masks(count):
  def f(w, m):
    return maskopt.metrics({"w": w}, {"w": maskopt.runtime(m, count)}, per_leaf=True)

  w, m = jnp.array([3.0, 4.0, 12.0, 0.0]), jnp.array([True, False, True, False])
  for numbers in (f(w, m), jax.jit(f)(w, m)):
    assert numbers["trainable_parameters"] == 2 and numbers["frozen_share"] == 0.5
    assert numbers["param_norm_trainable"] == 4
    np.testing.assert_allclose(numbers["param_norm_frozen/w"], 153**0.5, rtol=1e-6)
  assert isinstance(f(w, m)["trainable_parameters"], int)


def test_a_nan_that_trains_leaves_the_frozen_norm_alone():
  numbers = maskopt.metrics({"w": jnp.array([jnp.nan, 2.0])}, {"w": np.array([False, True])})
  assert np.isnan(numbers["param_norm_trainable"]) and numbers["param_norm_frozen"] == 2


def test_low_precision_is_summed_in_float32():
  w = jnp.full((4096,), 0.01, jnp.bfloat16)
  numbers = maskopt.metrics({"w": w}, False)
  np.testing.assert_allclose(numbers["param_norm_trainable"], float(w[0]) * 64, rtol=1e-4)


def test_complex_norms_are_real():
  assert maskopt.metrics({"w": jnp.array([3 + 4j])}, True)["param_norm_frozen"] == 5


def test_more_trees_dense_and_packed():
  params, mask = make()
  del params["n"], mask["n"]
  grads = jax.tree.map(lambda x: 2 * x, params)
  numbers = maskopt.metrics(
    params, mask, grad=grads, packed=maskopt.pack(grads, mask), per_leaf=True
  )
  trained, frozen = oracle(grads, mask)
  np.testing.assert_allclose(numbers["grad_norm_trainable"], trained, rtol=1e-4)
  np.testing.assert_allclose(numbers["grad_norm_frozen"], frozen, rtol=1e-4)
  np.testing.assert_allclose(numbers["packed_norm_trainable"], trained, rtol=1e-4)
  assert numbers["packed_norm_frozen"] == 0 and numbers["frozen_share/c"] == 1
  assert numbers["param_norm_trainable/c"] == 0


def test_another_tree_that_does_not_fit_is_named():
  with pytest.raises(ValueError, match=r"maskopt.metrics\(grad=...\)`: at w, expected a leaf"):
    maskopt.metrics({"w": jnp.ones(2)}, True, grad={"v": jnp.ones(2)})
  with pytest.raises(ValueError, match=r"maskopt.metrics\(freeze_mask=...\)`: at v"):
    maskopt.metrics({"w": jnp.ones(2)}, {"w": True, "v": True})


def test_modules_and_bare_arrays():
  model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  assert maskopt.metrics(model, {"kernel": True, "bias": False})["trainable_parameters"] == 3
  assert maskopt.metrics(jnp.array([3.0]), True, per_leaf=True)["param_norm_frozen/root"] == 3


def _partitioned(prefer):
  """Leaves of two optimizers, the first with frozen elements, then one of one and one of none."""
  rng = np.random.default_rng(0)
  params, _ = make()
  del params["n"]
  labels = {
    "a": rng.choice(["old", "new", "no"], size=(300, 300), p=[0.03, 0.05, 0.92]),
    "b": np.array(["old", "new", "new", "old"]),
    "c": "new",
    "d": "no",
  }
  rates = {"old": optax.adam(0.1), "new": optax.adam(0.01), "no": None}
  state = maskopt.partition(rates, labels, prefer=prefer).init(params)
  mask = {k: np.broadcast_to(v == "no", params[k].shape) for k, v in labels.items()}
  return params, labels, mask, state


@pytest.mark.parametrize("prefer", ["time", "memory"])
def test_a_partition_counts_what_each_optimizer_holds(prefer):
  params, _, mask, state = _partitioned(prefer)
  layouts = maskopt.mask_of(state)
  trained, frozen = oracle(params, mask)
  numbers = maskopt.metrics(params, layouts, per_leaf=True, grad=params)
  for name in ("param", "grad"):
    np.testing.assert_allclose(numbers[f"{name}_norm_trainable"], trained, rtol=1e-5)
    np.testing.assert_allclose(numbers[f"{name}_norm_frozen"], frozen, rtol=1e-5)
  np.testing.assert_allclose(numbers["frozen_share/a"], mask["a"].mean())
  assert numbers["trainable_parameters"] == sum(int((~m).sum()) for m in mask.values())
  held = sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim)
  assert numbers["optimizer_bytes"] == held
  report = maskopt.summary(params, layouts)
  assert report.optimizer_bytes == held and report.trainable == numbers["trainable_parameters"]
  assert [row.layout for row in report.rows][1:] == ["Joint", "Full", "Frozen"]
  again = jax.jit(lambda p, s: maskopt.metrics(p, maskopt.mask_of(s)))(params, state)
  for name, value in again.items():
    np.testing.assert_allclose(value, numbers[name], rtol=1e-6)


def test_packed_gradients_of_a_partition():
  params, _, mask, state = _partitioned("memory")
  layouts = maskopt.mask_of(state)
  numbers = maskopt.metrics(params, layouts, grad=maskopt.pack(params, layouts))
  np.testing.assert_allclose(
    numbers["grad_norm_trainable"], numbers["param_norm_trainable"], rtol=1e-6
  )
  assert numbers["grad_norm_frozen"] == 0


def test_slips_and_pictures_of_a_partition():
  """Units and blocks of a leaf in parts: frozen where no part trains."""
  params = {"kernel": jnp.ones((3, 6)), "bias": jnp.ones(6)}
  labels = {"kernel": np.array([*"aabbnn"]), "bias": np.array([*"aabbbb"])}
  rates = {"a": optax.adam(0.1), "b": optax.adam(0.2), "n": None}
  layouts = maskopt.mask_of(maskopt.partition(rates, labels).init(params))
  report = maskopt.summary(params, layouts)
  assert [slip.units for slip in report.slips] == [(4, 5)]
  assert maskopt.audit(params, params, layouts).ok
  pytest.importorskip("matplotlib")
  import matplotlib.pyplot as plt

  plt.close(maskopt.plot(params, layouts))


def test_the_mask_of_a_partition_is_a_tree_like_any():
  _, _, mask, state = _partitioned("time")
  layouts = maskopt.mask_of(state)
  copy = jax.tree.map(jnp.array, layouts)
  assert jax.tree.structure(copy) == jax.tree.structure(layouts)
  for name, frozen in jax.jit(lambda x: x.freeze_mask)(layouts).items():
    assert np.array_equal(np.broadcast_to(frozen, mask[name].shape), mask[name])
