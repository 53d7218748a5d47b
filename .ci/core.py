"""What must work with the core dependencies alone: one frozen step, and the proof."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax

import maskopt

for extra in ("typer", "matplotlib", "sklearn"):
  assert importlib.util.find_spec(extra) is None, f"{extra} is here: this is no core install"

params = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.full(4, -0.0)}}
mask = maskopt.build_mask(params, [("dense", maskopt.units([0, 2]))])
tx = maskopt.selective_transform(optax.adamw(0.1), freeze_mask=mask)


@jax.jit
def step(params, state):
  grads = jax.tree.map(jnp.ones_like, params)
  updates, state = tx.update(grads, state, params)
  return maskopt.apply_updates(params, updates), state


tuned, _ = step(params, tx.init(params))
report = maskopt.audit(params, tuned, mask)
report.raise_if_failed()
assert report.moved == report.trainable == 8, report
assert np.signbit(tuned["dense"]["bias"][0])
print(maskopt.summary(params, mask))
print(report)
