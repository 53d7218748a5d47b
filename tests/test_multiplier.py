"""`scale_by_multiplier`: which factors and updates it takes, and where its state goes."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import maskopt

P = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
WHERE = r"`maskopt.scale_by_multiplier\(multipliers=...\)"


@pytest.mark.parametrize(
  ("factor", "kind", "got"),
  [
    (jnp.nan, ValueError, "expected finite factors, got nan"),
    (np.float32("inf"), ValueError, "expected finite factors, got inf"),
    (-np.inf, ValueError, "expected finite factors, got -inf"),
    (np.array([1.0, np.nan, 0.0]), ValueError, r"got float64 of shape \(3,\) with NaN or infinity"),
    (
      jnp.array([1, jnp.inf, 0], jnp.bfloat16),
      ValueError,
      r"bfloat16 of shape \(3,\) with NaN or infinity",
    ),
    (1j, TypeError, "expected a real factor, got complex 1j"),
    (np.ones(3, np.complex64), TypeError, r"a real factor, got complex64 of shape \(3,\)"),
    (True, TypeError, "a real factor, got bool True"),
  ],
)
def test_a_factor_is_real_and_finite(factor, kind, got):
  tx = maskopt.scale_by_multiplier({"w": 1.0, "b": factor})
  with pytest.raises(kind, match=rf"{WHERE}`: at b, .*{got}. Build the tree with"):
    tx.init(P)


@pytest.mark.parametrize("factor", [0, 2, -0.5, np.float32(0.5), np.array([1, 0, 3])])
def test_any_finite_real_factor_multiplies(factor):
  tx = maskopt.scale_by_multiplier({"w": 1.0, "b": factor})
  updates, _ = tx.update(P, tx.init(P))
  np.testing.assert_array_equal(updates["b"], np.broadcast_to(factor, 3).astype(np.float32))
  np.testing.assert_array_equal(updates["w"], P["w"])


def test_a_traced_factor_is_taken_as_it_comes():
  def step(factor):
    tx = maskopt.scale_by_multiplier({"w": factor, "b": 1.0})
    return tx.update(P, tx.init(P))[0]["w"]

  assert jnp.isnan(jax.jit(step)(jnp.nan)).all()


def test_updates_of_other_leaves_are_named():
  tx = maskopt.scale_by_multiplier({"w": 1.0, "b": 1.0})
  state = tx.init(P)
  match = rf"{WHERE}.update`: at b, expected an update, got none; at c, expected no update.*init"
  with pytest.raises(ValueError, match=match):
    tx.update({"w": P["w"], "c": P["b"]}, state)
  with pytest.raises(ValueError, match=r"at the root, expected the state .* returned, got a dict"):
    tx.update(P, P)
  holes = tx.update({"w": P["w"], "b": None}, state)[0]
  assert holes["b"] is None
  bare = maskopt.scale_by_multiplier(2.0)
  assert bare.update(P["b"], bare.init(P["b"]))[0].tolist() == [2.0] * 3


def test_its_state_is_restored_and_lives_in_an_nnx_optimizer():
  tx = maskopt.scale_by_multiplier({"w": 2.0, "b": 0.0})
  fresh = jax.tree.map(jnp.zeros_like, tx.init(P))
  state = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(tx.init(P)))
  assert tx.update(P, state)[0]["w"].tolist() == [[2.0] * 3] * 2
  model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  before = nnx.to_pure_dict(nnx.state(model))
  factors = {"kernel": 0.5, "bias": 0.0}
  chained = optax.chain(optax.sgd(1.0), maskopt.scale_by_multiplier(factors))
  optimizer = nnx.Optimizer(model, chained, wrt=nnx.Param)
  optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model)))
  after = nnx.to_pure_dict(nnx.state(model))
  np.testing.assert_array_equal(after["kernel"], before["kernel"] - 0.5)
  np.testing.assert_array_equal(after["bias"], before["bias"])
