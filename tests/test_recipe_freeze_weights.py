"""`maskopt demo freeze-weights` against plain JAX and Optax on the trainable leaves alone."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from recipes import facts, told
from reference import moved

import maskopt
from maskopt.demo import _data

recipe = sys.modules["maskopt.demo.freeze_weights"]  # the package has the command by that name
FROZEN = {
  "weights": {"conv_1/kernel", "conv_2/kernel"},
  "biases": {"conv_1/bias", "conv_2/bias"},
  "both": {"conv_1/kernel", "conv_1/bias", "conv_2/kernel", "conv_2/bias"},
}


@pytest.fixture(autouse=True)
def lenient():
  """Flax and Optax promote dtypes and ranks."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def arrays(network):
  flat = nnx.to_flat_state(nnx.state(network, nnx.Param))
  return {"/".join(path): np.array(x[...]) for path, x in flat}


def forward(p, pixels):
  """The network, written out."""
  x = pixels.reshape(-1, 8, 8, 1)
  for name in ("conv_1", "conv_2"):
    x = jax.lax.conv_general_dilated(
      x, p[f"{name}/kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jax.nn.relu(x + p[f"{name}/bias"])
  # Windows and not a reshape: of equal pixels, which are many here, the first takes the gradient.
  window = (1, 2, 2, 1)
  x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
  return x.reshape(len(pixels), -1) @ p["fc/kernel"] + p["fc/bias"]


def alone(p, frozen, batches):
  """Optax on a tree that has no frozen leaves at all."""
  rest = {k: p[k] for k in frozen}
  trained = {k: jnp.asarray(x) for k, x in p.items() if k not in frozen}

  def loss(trained, images):
    scores = jax.nn.log_softmax(forward(trained | rest, images.pixels))
    return -scores[jnp.arange(len(images.labels)), images.labels].mean()

  tx = optax.adamw(2e-3, weight_decay=0.01)
  state, gradient = tx.init(trained), jax.jit(jax.grad(loss))
  for images in batches:
    updates, state = tx.update(gradient(trained, images), state, trained)
    trained = optax.apply_updates(trained, updates)
  return trained | rest


@pytest.mark.parametrize("what", ["weights", "biases", "both"])
def test_what_is_named_stays_and_the_rest_trains_as_if_alone(what):
  network = recipe.Network(10, nnx.Rngs(0))
  images, _ = _data.digits(0)
  before, batches = arrays(network), list(images.batches(4, 0))
  recipe.train(network, maskopt.build_mask(network, recipe.rules(recipe.FIRST, what)), batches)
  after, expected = arrays(network), alone(before, FROZEN[what], batches)
  assert set(after) == set(expected)
  for path, x in after.items():
    assert moved(before[path], x, path in FROZEN[what]) == [], path
    # Two compilations of the same float32 sums: 2e-5 is a hundredth of one Adam step.
    np.testing.assert_allclose(x, expected[path], rtol=0, atol=2e-5, err_msg=path)
    assert (path in FROZEN[what]) == np.array_equal(x, before[path])


def test_the_story_in_json(capsys):
  said = facts(capsys, "freeze-weights", "--steps", "3", "--seed", "2")
  assert (said["demo"], said["seed"], said["steps"], said["ok"]) == ("freeze-weights", 2, 3, True)
  counts = {run["frozen"]: run["frozen_elements"] for run in said["runs"]}
  kernels, biases = 3 * 3 * 1 * 8 + 3 * 3 * 8 * 16, 8 + 16
  assert counts == {
    "nothing": 0, "weights": kernels, "biases": biases, "both": kernels + biases,
  }  # fmt: skip
  assert all(run["frozen_elements_changed"] == 0 for run in said["runs"])
  fc = 4 * 4 * 16 * 10 + 10
  assert said["runs"][-1]["trainable_elements"] == fc
  assert said["runs"][-1]["optimizer_bytes"] == pytest.approx(8 * fc, abs=16)  # and Adam's count


def test_the_report_has_both_languages_and_names_the_slip(capsys):
  code, out = told(capsys, "freeze-weights", "--steps", "1")
  assert code == 0
  assert 'freezeWeights(net, "conv_1", "biases")' in out and '("conv_1/bias", True)' in out
  assert "conv_1/kernel is frozen and bias trains: all 8 units" in out
  assert "kept" in out and "CHANGED" not in out
