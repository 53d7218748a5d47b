"""`maskopt demo keras-lstm` against its LSTM written out with Optax on the trainable leaves alone.

tests/test_peer_keras.py compares the same recipe with Keras itself.
"""

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
import maskopt.nnx
from maskopt.demo import _data

recipe = sys.modules["maskopt.demo.keras_lstm"]  # the package has the command by that name
CASES = {
  "nothing": ((), []),
  "layers[:-3]": (("lstm", "lstm_1"), recipe.HEAD),
  "lstm_1": (("lstm_1",), [("lstm_1", True)]),
}


@pytest.fixture(autouse=True)
def lenient():
  """Optax and Flax promote dtypes and ranks."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def arrays(network):
  flat = nnx.to_flat_state(nnx.state(network, nnx.Param))
  return {"/".join(path): np.array(x[...]) for path, x in flat}


def lstm(p, name, x):
  """Hochreiter's cell, step by step: gates in the order input, forget, candidate, output."""
  h = c = jnp.zeros((len(x), 32))
  out = []
  for t in range(x.shape[1]):
    y = x[:, t] @ p[f"{name}/cell/dense_i/kernel"] + h @ p[f"{name}/cell/dense_h/kernel"]
    i, f, g, o = jnp.split(y + p[f"{name}/cell/dense_h/bias"], 4, axis=1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    out.append(h)
  return jnp.stack(out, axis=1)


def alone(p, frozen, batches, tx):
  """Optax on a tree that has no frozen leaves at all."""
  rest = {k: x for k, x in p.items() if k.partition("/")[0] in frozen}
  trained = {k: jnp.asarray(x) for k, x in p.items() if k not in rest}

  @jax.jit
  @jax.grad
  def gradient(trained, images):
    p = trained | rest
    x = lstm(p, "lstm_1", lstm(p, "lstm", images.pixels.reshape(-1, 8, 8)))
    scores = x.reshape(len(x), -1) @ p["dense/kernel"] + p["dense/bias"]
    return -jax.nn.log_softmax(scores)[jnp.arange(len(x)), images.labels].mean()

  state = tx.init(trained)
  for images in batches:
    updates, state = tx.update(gradient(trained, images), state, trained)
    trained = optax.apply_updates(trained, updates)
  return trained | rest


@pytest.mark.parametrize(
  "case", [pytest.param("nothing", marks=pytest.mark.slow), "layers[:-3]", "lstm_1"]
)
def test_frozen_layers_stay_and_the_others_train_as_if_alone(case):
  frozen, rules = CASES[case]
  network, tx = recipe.Network(10, nnx.Rngs(0)), optax.adamw(3e-3, weight_decay=0.1)
  before, batches = arrays(network), list(_data.digits(0)[0].batches(4, 0))
  recipe.fit(network, tx, maskopt.build_mask(network, rules), batches)
  after, expected = arrays(network), alone(before, frozen, batches, tx)
  assert set(after) == set(expected)
  for path, x in after.items():
    still = path.partition("/")[0] in frozen
    assert moved(before[path], x, still) == [], path
    assert still == np.array_equal(before[path], x), path
    # Two programs in float32; a step is 3e-3.
    np.testing.assert_allclose(x, expected[path], rtol=0, atol=3e-5, err_msg=path)


def test_trainable_false_on_all_layers_moves_nothing():
  network = recipe.Network(10, nnx.Rngs(0))
  before = maskopt.snapshot(network)
  recipe.fit(network, optax.adamw(0.1), True, _data.digits(0)[0].batches(2, 0))
  assert maskopt.audit(before, network, True).ok
  assert not any(recipe.trainable(network, True).values())


def test_layers_are_named_and_counted_as_in_keras():
  network = recipe.Network(10, nnx.Rngs(0))
  network.dense = nnx.Linear(256, 10, rngs=nnx.Rngs(1))  # the order outlives a replaced head
  names = ["lstm", "lstm_1", "flatten", "dense", "activation", "reshape"]
  assert list(recipe.trainable(network, False)) == names
  head = recipe.trainable(network, maskopt.build_mask(network, recipe.HEAD))
  assert [name for name, trains in head.items() if not trains] == ["lstm", "lstm_1"]
  named = recipe.trainable(network, maskopt.build_mask(network, [("lstm_1", True)]))
  assert (named["lstm"], named["lstm_1"], named["dense"]) == (True, False, True)


def test_the_answer_is_a_sequence_of_probabilities():
  images = _data.digits(0)[1]
  told = np.asarray(recipe.Network(10, nnx.Rngs(0))(recipe.rows_of(images)))
  assert told.shape == (len(images.labels), 1, 10)
  np.testing.assert_allclose(told.sum(-1), 1, atol=1e-6)


def test_the_story_in_json(capsys):
  said = facts(capsys, "keras-lstm", "--steps", "3", "--seed", "1")
  assert said["ok"] and said["steps"] == 3
  head, rest = said["stages"]
  lstms = (8 + 32 + 1) * 128 + (32 + 32 + 1) * 128
  assert (head["frozen"], head["frozen_changed"], rest["frozen"]) == (lstms, 0, 0)
  assert head["optimizer_bytes"] == pytest.approx(8 * (256 * 10 + 10), abs=16)
  assert rest["rate"] < head["rate"]
  assert said["trainable"]["lstm_1"]["lstm_1"] is False
  assert said["trainable"]["lstm_1"]["lstm"] is True


def test_the_report_has_both_languages(capsys, monkeypatch):
  audit = maskopt.audit({"w": np.ones(2)}, {"w": np.ones(2)}, True)
  monkeypatch.setattr(recipe, "fit", lambda *_: None)
  monkeypatch.setattr(recipe, "_stage", lambda *_: recipe.Stage("head", 0.1, audit, 0.5, 8))
  code, out = told(capsys, "keras-lstm", "--steps", "1")
  assert code == 0
  assert "for layer in model.layers[:-3]: ..." in out and "(slice(None, -3), True)" in out
  assert out.count("lstm_1/cell/dense_h/kernel") == 2  # the summary before, and after
