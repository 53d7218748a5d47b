"""`maskopt demo matlab-layer` against MATLAB's form of it in NumPy: Adam on masked gradients."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from recipes import facts, told
from reference import bits

import maskopt
import maskopt.nnx
from maskopt.demo import _data

recipe = sys.modules["maskopt.demo.matlab_layer"]  # the package has the command by that name


@pytest.fixture(autouse=True)
def lenient():
  """Optax and Flax promote dtypes and ranks."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture(scope="module")
def images():
  return recipe.ten_inputs(*_data.digits(0))[0]


def by_hand(weights, bias, batches, rate=0.01):
  """A row is a unit; dLdW .* mask and dLdb .* mask; Adam with MATLAB's constants, in float64.

  Written with MATLAB's indices, 1:3 and 1:2, less one.
  """
  values = [weights.astype(np.float64), bias.astype(np.float64)]
  masks = [np.ones((5, 10)), np.ones(5)]
  masks[0][0:3, :] = 0
  masks[1][0:2] = 0
  mean, square = [0.0, 0.0], [0.0, 0.0]
  for t, (x, labels) in enumerate(batches, 1):
    z = values[0] @ x.T.astype(np.float64) + values[1][:, None]  # 5 x batch
    y = np.exp(z - z.max(0))
    y = y / y.sum(0)
    y[labels, np.arange(len(labels))] -= 1
    dz = y / len(labels)
    for k, gradient in enumerate((dz @ x, dz.sum(1))):
      g = gradient * masks[k]
      mean[k] = 0.9 * mean[k] + 0.1 * g
      square[k] = 0.999 * square[k] + 0.001 * g**2
      step = mean[k] / (1 - 0.9**t) / (np.sqrt(square[k] / (1 - 0.999**t)) + 1e-8)
      values[k] = values[k] - rate * step
  return values


def test_five_epochs_equal_adam_on_masked_gradients(images):
  weights, biases = recipe.templates(images)
  layer = recipe.layer_with(weights, biases, seed=0)
  w, b = np.array(layer.kernel[...]).T, np.array(layer.bias[...])
  rng = np.random.default_rng(0)
  batches = [x for _ in range(5) for x in recipe.one_round(images, rng, 32)]
  assert len(batches) == 5 * (len(images.labels) // 32)
  recipe.fit(layer, batches)
  after_w, after_b = np.array(layer.kernel[...]).T, np.array(layer.bias[...])

  assert np.array_equal(bits(after_w[:3]), bits(weights.astype(np.float32)))
  assert np.array_equal(bits(after_b[:2]), bits(biases.astype(np.float32)))
  assert not np.any(bits(after_w[3:]) == bits(w[3:])) and not np.any(
    bits(after_b[2:]) == bits(b[2:])
  )
  expected = by_hand(w, b, batches)
  # float32 against float64 over 100 steps; one step is 0.01.
  np.testing.assert_allclose(after_w, expected[0], rtol=0, atol=2e-5)
  np.testing.assert_allclose(after_b, expected[1], rtol=0, atol=2e-5)


def test_values_are_assigned_where_matlab_has_them(images):
  weights, biases = recipe.templates(images)
  assert (weights.shape, biases.shape) == ((3, 10), (2,))
  layer = recipe.layer_with(weights, biases, seed=0)
  fresh = nnx.Linear(10, 5, rngs=nnx.Rngs(0))
  kernel = np.array(fresh.kernel[...])
  kernel[:, :3] = weights.T
  assert np.array_equal(layer.kernel[...], kernel)
  assert np.array_equal(layer.bias[...], [*biases.astype(np.float32), 0, 0, 0])


def test_the_gradient_of_the_input_flows_through_frozen_weights(images):
  layer = recipe.layer_with(*recipe.templates(images), seed=0)
  plain = nnx.Linear(10, 5, rngs=nnx.Rngs(0))
  nnx.update(plain, nnx.state(layer, nnx.Param))
  x = jnp.asarray(images.pixels[:20])
  first, second = (jax.grad(lambda x, m=m: (m(x)[:, :3] ** 2).sum())(x) for m in (layer, plain))
  np.testing.assert_allclose(first, second, rtol=1e-6, atol=1e-6)
  assert np.abs(first).min() > 0


def test_templates_are_the_nearest_mean(images):
  weights, biases = recipe.templates(images)
  some = images.of(range(2))
  scores = some.pixels @ weights[:2].T + biases
  means = np.stack([images.of([k]).pixels.mean(0) for k in range(2)])
  nearest = ((some.pixels[:, None] - means) ** 2).sum(-1).argmin(1)
  assert np.array_equal(scores.argmax(1), nearest)


def test_ten_inputs_are_the_principal_components():
  train, test = recipe.ten_inputs(*_data.digits(0))
  assert train.pixels.shape[1] == test.pixels.shape[1] == 10 and set(test.labels) == set(range(5))
  covariance = np.cov(train.pixels.T)
  off = covariance - np.diag(np.diag(covariance))
  assert np.abs(off).max() < 1e-4 * covariance.max()
  assert np.all(np.diff(np.diag(covariance)) < 0)


def test_the_story_in_json(capsys):
  said = facts(capsys, "matlab-layer", "--seed", "4", "--epochs", "2")
  assert said["ok"] and (said["epochs"], said["frozen"], said["trainable"]) == (2, 32, 23)
  assert said["slips"] == {
    "posted": ["kernel is frozen and bias trains: unit 2"],
    "misspelt": ["kernel is frozen and bias trains: units 0, 1, 2"],
    "meant": [],
  }
  assert said["test_accuracy"] > said["test_accuracy_before"]


def test_the_report_names_the_pitfalls(capsys):
  code, out = told(capsys, "matlab-layer", "--epochs", "1")
  assert code == 0
  assert "a row is an output unit" in out and "a column is an output unit" in out
  assert "from 1" in out and "from 0" in out
  assert "! kernel is frozen and bias trains: unit 2" in out
  assert "unexpected keyword argument" in out and "bias_freze_mask" in out
  assert "(5, 10)" in out and "(10, 5)" in out


def test_a_frozen_weight_that_moves_is_told(capsys, monkeypatch):
  def leaking(layer, batches):
    list(batches)
    layer.kernel[...] = layer.kernel[...].at[0, 0].add(1.0)

  monkeypatch.setattr(recipe, "fit", leaking)
  code, out = told(capsys, "matlab-layer", "--epochs", "1")
  assert code == 1
  assert "Audit FAILED: 1 of 32" in out and out.rstrip().endswith("does not.")


def test_a_whole_unit_is_one_rule(images):
  layer = recipe.layer_with(*recipe.templates(images), seed=0)
  mask = maskopt.build_mask(layer, [(..., maskopt.units(slice(3)))])
  assert not maskopt.summary(layer, mask).slips
