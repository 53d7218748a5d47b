"""`maskopt demo multipliers` against a network, its gradients and Adam written out in NumPy."""

import itertools
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from recipes import facts, told
from reference import moved

import maskopt
from maskopt.demo import _data

recipe = sys.modules["maskopt.demo.multipliers"]  # the package has the command by that name


@pytest.fixture(autouse=True)
def lenient():
  """Optax and Flax promote dtypes and ranks."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture(scope="module")
def images():
  return _data.digits(0)[0]


def weights(params):
  """[(kernel, bias)] of the three linear layers."""
  layers = nnx.to_pure_dict(params)["layers"]
  return [(np.array(layers[k]["kernel"]), np.array(layers[k]["bias"])) for k in (0, 2, 4)]


def in_numpy(layers, batches, factors, rate):
  """Adam in float64 on all layers; each layer's step times its factor."""
  layers = [[x.astype(np.float64) for x in layer] for layer in layers]
  mu, nu = ([[np.zeros_like(x) for x in layer] for layer in layers] for _ in range(2))
  for t, (pixels, labels) in enumerate(batches, 1):
    inputs = [pixels.astype(np.float64)]
    for kernel, bias in layers[:2]:
      inputs.append(np.maximum(inputs[-1] @ kernel + bias, 0))
    scores = np.exp(inputs[-1] @ layers[2][0] + layers[2][1])
    error = (scores / scores.sum(1, keepdims=True) - np.eye(10)[labels]) / len(labels)
    grads = []
    for k in (2, 1, 0):
      grads.insert(0, (inputs[k].T @ error, error.sum(0)))
      error = (error @ layers[k][0].T) * (inputs[k] > 0)
    for k, part in itertools.product(range(3), range(2)):
      g = grads[k][part]
      mu[k][part] = 0.9 * mu[k][part] + 0.1 * g
      nu[k][part] = 0.999 * nu[k][part] + 0.001 * g * g
      step = mu[k][part] / (1 - 0.9**t) / (np.sqrt(nu[k][part] / (1 - 0.999**t)) + 1e-8)
      layers[k][part] = layers[k][part] - rate * factors[k] * step
  return layers


@pytest.mark.parametrize(
  ("rules", "factors"),
  [(recipe.LAST, (0, 0, 1)), (recipe.SLOWER, (0.1, 0.3, 1)), (recipe.ALL, (1, 1, 1))],
)
def test_every_layer_follows_adam_at_its_own_rate(images, rules, factors):
  network = recipe.chain(0)
  learner, batches = recipe.Learner(network, rules), list(images.batches(5, 0))
  before = weights(learner.params)
  for batch in batches:
    learner.step(batch)
  after, expected = weights(learner.params), in_numpy(before, batches, factors, 1e-3)
  for k, part in itertools.product(range(3), range(2)):
    assert moved(before[k][part], after[k][part], factors[k] == 0) == []
    assert (factors[k] == 0) == np.array_equal(before[k][part], after[k][part])
    # float32 against float64; a step is 1e-3 times its factor.
    np.testing.assert_allclose(after[k][part], expected[k][part], rtol=0, atol=2e-6)


def test_minus_two_is_the_linear_layer_before_the_softmax():
  mask = nnx.to_pure_dict(recipe.freeze_mask(recipe.chain(0), recipe.LAST))["layers"]
  assert {k: tuple(v.values()) for k, v in mask.items()} == {
    0: (True, True), 2: (True, True), 4: (False, False),
  }  # fmt: skip


def test_the_other_order_is_an_error_that_says_why():
  with pytest.raises(
    ValueError, match=r"at rules\[1\] -2, .*rules\[0\] \.\.\. came first for all 2"
  ):
    maskopt.build_multipliers(recipe.chain(0), recipe.LAST[::-1])


class Clock:
  """A second passes with every look."""

  def __init__(self):
    self.now = -1.0

  def __call__(self):
    self.now += 1.0
    return self.now


class Idle:
  """A learner whose validation losses are given, and that notes what it is shown."""

  def __init__(self, losses):
    self.params, self.seen, self._losses = 0, [], iter(losses)

  def step(self, images):
    self.seen.append(images)
    self.params += 1

  def tell(self, params, held):
    self.held = held
    return next(self._losses)


SOME = _data.Images(np.arange(200.0).reshape(200, 1), np.arange(200))


@pytest.mark.parametrize(
  ("seconds", "rounds", "expected"),
  [(100, 3, (3, 6, "rounds")), (5, None, (2, 5, "time")), (1, 3, (0, 1, "time"))],
)
def test_training_ends_by_rounds_or_by_time_whichever_comes_first(seconds, rounds, expected):
  learner = Idle([4.0, 3.0, 2.0, 1.0])
  trained = recipe.net_train(learner, SOME, seconds=seconds, rounds=rounds, clock=Clock())
  assert (trained.rounds, trained.steps, trained.ended_by) == expected
  assert len(learner.seen) == expected[1]


def test_the_best_round_of_the_validation_set_is_returned():
  learner = Idle([5.0, 3.0, 1.0, 2.0, 4.0])
  trained = recipe.net_train(learner, SOME, seconds=100, rounds=4, clock=Clock())
  assert trained.params == 4  # after two rounds of two batches
  assert trained.losses == [5.0, 3.0, 1.0, 2.0, 4.0]


def test_what_is_held_out_is_a_tenth_and_never_trained_on():
  learner = Idle([1.0] * 3)
  recipe.net_train(learner, SOME, seconds=100, rounds=2, clock=Clock())
  held, seen = set(learner.held.labels), [set(x.labels) for x in learner.seen]
  assert len(held) == 20 and not held & set.union(*seen)
  assert [len(x) for x in seen] == [64] * 4
  assert not seen[0] & seen[1] and seen[0] != seen[2]


def test_the_story_in_json_and_in_words(capsys):
  said = facts(capsys, "multipliers", "--rounds", "2", "--seconds", "600", "--seed", "3")
  assert said["ok"] and (said["rounds"], said["seed"]) == (2, 3)
  last, slower, every, timed = said["runs"]
  frozen = 64 * 128 + 128 + 128 * 64 + 64
  assert [run["frozen"] for run in said["runs"]] == [frozen, 0, 0, frozen]
  assert {run["ended_by"] for run in (last, slower, every)} == {"rounds"}
  assert timed["ended_by"] == "time"
  assert every["test_accuracy"] > every["test_accuracy_before"] + 0.1

  code, out = told(capsys, "multipliers", "--rounds", "1", "--seconds", "0.01")
  assert code == 0
  assert "LearningRateMultipliers -> {-2 -> 1, _ -> None}" in out
  assert "[(-2, 1.0), (..., None)]" in out and "came first for all 2" in out
