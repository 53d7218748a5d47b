"""The Keras recipe against Keras 3 itself, on JAX, from the same weights: `pytest -m peer`."""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference import bits

import maskopt
import maskopt.nnx
from maskopt.demo import _data

# Keras writes its arrays for NumPy 1.
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore:__array__ implementation")]
recipe = sys.modules["maskopt.demo.keras_lstm"]


@pytest.fixture(scope="module")
def keras():
  os.environ["KERAS_BACKEND"] = "jax"
  keras = pytest.importorskip("keras")
  assert keras.backend.backend() == "jax"
  return keras


@pytest.fixture(autouse=True)
def lenient():
  """Keras, Optax and Flax promote dtypes and ranks."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def model_of(keras, classes):
  """The recipe's six layers as one writes them in Keras, which names them itself."""
  keras.utils.clear_session()
  keras.utils.set_random_seed(0)
  layers = keras.layers
  return keras.Sequential(
    [
      layers.Input((8, 8)),
      layers.LSTM(32, return_sequences=True),
      layers.LSTM(32, return_sequences=True),
      layers.Flatten(),
      layers.Dense(classes),
      layers.Activation("softmax"),
      layers.Reshape((1, classes)),
    ]
  )


def weights_of(model):
  """Keras's weights by our paths: kernel, recurrent kernel and bias of an LSTM, then the head."""
  found = {}
  for name in ("lstm", "lstm_1"):
    parts = ("dense_i/kernel", "dense_h/kernel", "dense_h/bias")
    values = model.get_layer(name).get_weights()
    found |= {f"{name}/cell/{part}": x for part, x in zip(parts, values, strict=True)}
  kernel, bias = model.get_layer("dense").get_weights()
  return found | {"dense/kernel": kernel, "dense/bias": bias}


def arrays(network):
  flat = nnx.to_flat_state(nnx.state(network, nnx.Param))
  return {"/".join(path): np.array(x[...]) for path, x in flat}


def copied(model, network):
  """Give the network the weights of the Keras model."""
  weights = weights_of(model)
  for path, x in nnx.to_flat_state(nnx.state(network, nnx.Param)):
    assert x.shape == weights["/".join(path)].shape
    x[...] = jnp.asarray(weights["/".join(path)])


def keras_adam(rate, b1=0.9, b2=0.999, eps=1e-7):
  """Adam as Keras computes it: its epsilon is not corrected for bias, unlike Optax's."""

  def init(params):
    return jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, (params, params))

  def update(grads, state, params=None):
    del params
    t, (mu, nu) = state[0] + 1, state[1]
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mu, grads)
    nu = jax.tree.map(lambda n, g: b2 * n + (1 - b2) * g * g, nu, grads)
    scale = rate * jnp.sqrt(1 - b2**t) / (1 - b1**t)
    return jax.tree.map(lambda m, n: -scale * m / (jnp.sqrt(n) + eps), mu, nu), (t, (mu, nu))

  return optax.GradientTransformation(init, update)


def pair(keras, name, rate):
  """The same optimizer in both."""
  if name == "adam":
    return keras.optimizers.Adam(rate), keras_adam(rate)
  return keras.optimizers.SGD(rate, momentum=0.9), optax.sgd(rate, momentum=0.9)


def fit(model, optimizer, batches):
  model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
  for images in batches:
    model.train_on_batch(images.pixels.reshape(-1, 8, 8), images.labels[:, None])


def compare(model, network, before, frozen):
  theirs, ours = weights_of(model), arrays(network)
  assert set(theirs) == set(ours)
  for path, x in ours.items():
    still = path.partition("/")[0] in frozen
    assert np.array_equal(bits(x), bits(before[path])) == still, path
    assert np.array_equal(bits(theirs[path]), bits(before[path])) == still, path
    # Two programs in float32; a step of Adam is 3e-3 in the tests below.
    np.testing.assert_allclose(x, theirs[path], rtol=0, atol=2e-5, err_msg=path)


@pytest.fixture(scope="module")
def images():
  return _data.digits(0)[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("case", ["nothing", "layers[:-3]", "lstm_1"])
def test_trainable_false_is_the_same_trajectory(keras, images, case, optimizer):
  model, network = model_of(keras, 10), recipe.Network(10, nnx.Rngs(0))
  names = [layer.name for layer in model.layers]
  assert names == list(recipe.trainable(network, False))
  copied(model, network)
  frozen = {"nothing": [], "layers[:-3]": model.layers[:-3], "lstm_1": [model.get_layer("lstm_1")]}
  rules = {"nothing": [], "layers[:-3]": recipe.HEAD, "lstm_1": [("lstm_1", True)]}[case]
  for layer in frozen[case]:
    layer.trainable = False
  mask = maskopt.build_mask(network, rules)
  ours = recipe.trainable(network, mask)
  # A mask speaks of parameters; Keras's loop takes the flag of a layer without any, too.
  differ = {x.name for x in model.layers if ours[x.name] != x.trainable}
  assert differ == ({"flatten"} if case == "layers[:-3]" else set())
  assert maskopt.summary(network, mask).trainable == sum(
    int(np.prod(w.shape)) for w in model.trainable_weights
  )

  before, batches = arrays(network), list(images.batches(6, 0))
  theirs, tx = pair(keras, optimizer, 0.1 if optimizer == "sgd" else 3e-3)
  fit(model, theirs, batches)
  recipe.fit(network, tx, mask, batches)
  compare(model, network, before, [x.name for x in frozen[case]])


def test_a_model_that_is_frozen_as_a_whole_has_no_trainable_layer(keras):
  model = model_of(keras, 10)
  model.trainable = False
  ours = recipe.trainable(recipe.Network(10, nnx.Rngs(0)), True)
  assert ours == {x.name: x.trainable for x in model.layers}


def test_a_new_head_and_then_the_thaw(keras, images):
  old = model_of(keras, 5)
  fit(old, keras.optimizers.Adam(3e-3), images.of(range(5)).batches(3, 0))
  model = model_of(keras, 10)
  for name in ("lstm", "lstm_1"):
    model.get_layer(name).set_weights(old.get_layer(name).get_weights())
  network = recipe.Network(10, nnx.Rngs(0))
  copied(model, network)

  for layer in model.layers[:-3]:
    layer.trainable = False
  before, head = arrays(network), list(images.batches(4, 1))
  theirs, tx = pair(keras, "adam", 3e-3)
  fit(model, theirs, head)
  recipe.fit(network, tx, maskopt.build_mask(network, recipe.HEAD), head)
  compare(model, network, before, ["lstm", "lstm_1"])

  for layer in model.layers:
    layer.trainable = True
  before, rest = arrays(network), list(images.batches(4, 2))
  copied(model, network)  # from the same weights again, so that differences do not add up
  theirs, tx = pair(keras, "adam", 3e-4)
  fit(model, theirs, rest)
  recipe.fit(network, tx, False, rest)
  compare(model, network, before, [])
