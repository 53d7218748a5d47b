"""The README is true: its blocks run when pasted and print what it shows; its tables hold.

A block under a `###` heading sees the first block of its `##` section, and no other.
"""

import contextlib
import dataclasses
import io
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import maskopt

README = Path(__file__).parent.parent / "README.md"
_PARTS = re.compile(r"^(##+) ([^\n]*)$|^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Block:
  """A python block, what stands before it in its section, and what it is shown to print."""

  name: str
  prelude: str
  code: str
  shown: str | None
  place: tuple[int, int] | None  # of the shown text in the file


def blocks(text):
  found, section, heading, prelude = [], "", "", ""
  for match in _PARTS.finditer(text):
    level, title, language, body = match.groups()
    if level == "##":
      section, heading, prelude = title, "", ""
    elif level:
      heading = title
    elif language == "text":
      assert found and found[-1].shown is None, f"a text block without its code in {heading}"
      found[-1] = dataclasses.replace(found[-1], shown=body, place=match.span(4))
    elif language == "python":
      found.append(Block(f"{heading or section} {len(found)}", prelude, body, None, None))
      if not heading:
        prelude += body
  return found


def printed(block):
  names = {}
  run(block.prelude, block.name, names)
  return run(block.code, block.name, names)


def run(code, name, names):
  """What the code prints."""
  out = io.StringIO()
  with (  # as users have it, and not as strict as our own tests
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
    contextlib.redirect_stdout(out),
  ):
    exec(compile(code, name, "exec"), names)
  return out.getvalue()


@pytest.mark.parametrize("block", blocks(README.read_text()), ids=lambda block: block.name)
def test_blocks_run_and_print_what_is_shown(block):
  assert printed(block) == (block.shown or "")


def test_guides_print_the_same_when_pasted_one_after_another():
  names = {}
  for block in blocks(README.read_text()):
    assert run(block.code, block.name, names) == (block.shown or ""), block.name


def test_the_set_up_is_two_commands():
  consoles = re.findall(r"^```console\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
  assert consoles == [
    "pip install -e '.[demo]' && maskopt demo\n",
    "pip install -e '.[test]' && pytest\n",
  ]


def test_pictures_exist():
  for picture in re.findall(r"!\[.*?\]\((.*?)\)", README.read_text()):
    assert (README.parent / picture).stat().st_size < 300_000


def test_a_wrong_output_would_be_found():
  text = "## A\n```python\nx = 1\n```\n### B\n```python\nprint(x)\n```\n```text\n2\n```\n"
  (_, block) = blocks(text)
  assert printed(block) == "1\n" != block.shown


# The table of what people use today: one kernel, 10 of its 1,000 units trainable, ten steps.

WEIGHTS = np.random.default_rng(0).normal(size=(1000, 1000)).astype(np.float32)
UNITS = np.arange(1000) >= 10
FROZEN = np.broadcast_to(UNITS, WEIGHTS.shape)
MEGABYTE = 1_000_000


def adamw():
  return optax.adamw(1e-2, weight_decay=0.1)


def sine(params):
  return {"kernel": jnp.sin(params["kernel"])}


def trained(tx, apply_updates=optax.apply_updates, gradient=sine):
  """Frozen elements that changed, and bytes of state."""

  @jax.jit
  def step(params, state):
    updates, state = tx.update(gradient(params), state, params)
    return apply_updates(params, updates), state

  params = {"kernel": jnp.asarray(WEIGHTS)}
  with jax.numpy_dtype_promotion("standard"):
    state = tx.init(params)
    for _ in range(10):
      params, state = step(params, state)
  moved = np.asarray(params["kernel"]).view(np.uint32) != WEIGHTS.view(np.uint32)
  assert np.any(moved & ~FROZEN)
  return np.count_nonzero(moved & FROZEN), sum(x.nbytes for x in jax.tree.leaves(state))


def zeroed():
  return optax.stateless(lambda grads, _: {"kernel": jnp.where(UNITS, 0.0, grads["kernel"])})


@pytest.mark.parametrize(
  "transform",
  [
    optax.freeze,
    lambda mask: optax.masked(adamw(), mask),
    lambda mask: optax.selective_transform(adamw(), freeze_mask=mask),
  ],
  ids=["freeze", "masked", "selective_transform"],
)
def test_optax_takes_no_array_as_a_mask(transform):
  with pytest.raises(ValueError, match="ambiguous"):
    transform({"kernel": FROZEN}).init({"kernel": jnp.asarray(WEIGHTS)})


@pytest.mark.parametrize(
  ("transform", "changed", "megabytes"),
  [
    (lambda: optax.selective_transform(adamw(), freeze_mask={"kernel": True, "b": False}), 0, 0),
    (lambda: optax.chain(adamw(), optax.freeze({"kernel": True, "b": False})), 0, 8),
    (lambda: optax.chain(optax.freeze({"kernel": True, "b": False}), adamw()), 1_000_000, 8),
    (lambda: optax.masked(adamw(), {"kernel": False, "b": True}), 1_000_000, 0),
  ],
  ids=["selective_transform", "freeze last", "freeze first", "masked"],
)
def test_optax_on_a_whole_frozen_leaf(transform, changed, megabytes):
  tx, params = transform(), {"kernel": jnp.asarray(WEIGHTS), "b": jnp.ones(2)}
  with jax.numpy_dtype_promotion("standard"):
    state = tx.init(params)
    updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
    tuned = optax.apply_updates(params, updates)
  moved = np.asarray(tuned["kernel"]).view(np.uint32) != WEIGHTS.view(np.uint32)
  assert np.count_nonzero(moved) == pytest.approx(changed, rel=1e-3)
  assert round(sum(x.nbytes for x in jax.tree.leaves(state)) / MEGABYTE) == megabytes


def test_zeroed_gradients_leak():
  changed, state = trained(optax.chain(zeroed(), adamw()))
  assert changed == 990_000
  assert 8.0 * MEGABYTE <= state < 8.1 * MEGABYTE


def test_zeroed_updates_keep_values_at_full_cost():
  changed, state = trained(optax.chain(adamw(), zeroed()))
  assert changed == 0
  assert 8.0 * MEGABYTE <= state < 8.1 * MEGABYTE


def test_zeroed_updates_count_in_a_clip():
  def first_update(tx):
    grads = {"kernel": jnp.where(UNITS, 1e3, jnp.ones((1000, 1000)))}
    updates, _ = tx.update(grads, tx.init(grads), grads)
    return abs(float(updates["kernel"][0, 0]))

  clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
  ours = maskopt.selective_transform(clipped, freeze_mask={"kernel": UNITS})
  assert first_update(optax.chain(clipped, zeroed())) < 1e-3 * first_update(ours)


def test_stop_gradient_leaks():
  def gradient(params):
    def loss(params):
      kernel = params["kernel"]
      kernel = jnp.where(UNITS, jax.lax.stop_gradient(kernel), kernel)
      return jnp.sum(jnp.cos(kernel))

    return jax.grad(loss)(params)

  changed, state = trained(adamw(), gradient=gradient)
  assert changed == 990_000
  assert 8.0 * MEGABYTE <= state < 8.1 * MEGABYTE


def test_maskopt_keeps_bits_at_the_cost_of_what_trains():
  ours = maskopt.selective_transform(adamw(), freeze_mask={"kernel": UNITS})
  changed, state = trained(ours, maskopt.apply_updates)
  assert changed == 0
  assert 0.08 * MEGABYTE <= state < 0.085 * MEGABYTE


def test_nnx_filters_keep_parameters_and_not_statistics():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.norm = nnx.BatchNorm(3, rngs=rngs)
      self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
      return self.head(self.norm(x))

  model, head = Model(nnx.Rngs(0)), nnx.All(nnx.Param, nnx.PathContains("head"))
  inputs = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
  before = maskopt.snapshot(model)
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    optimizer = nnx.Optimizer(model, adamw(), wrt=head)
    grads = nnx.grad(lambda model: model(inputs).sum(), argnums=nnx.DiffState(0, head))(model)
    optimizer.update(model, grads)
  report = maskopt.audit(before, model, {"norm": True, "head": False})
  assert report.ok and report.moved > 0
  assert report.drifted == ("norm/mean", "norm/var")
  held = [x.shape for x in jax.tree.leaves(nnx.state(optimizer, nnx.optimizer.OptState))]
  assert (3, 2) in held and (3,) not in held  # the head's moments, and none of the norm's


def test_equinox_partition_takes_no_array_as_a_spec():
  with pytest.raises(ValueError, match="booleans"):
    eqx.partition({"kernel": WEIGHTS}, {"kernel": FROZEN})


def test_equinox_partition_keeps_whole_leaves():
  params = {"frozen": jnp.asarray(WEIGHTS), "b": jnp.ones(2)}
  trains, still = eqx.partition(params, {"frozen": False, "b": True})
  tx = adamw()
  state = tx.init(trains)
  with jax.numpy_dtype_promotion("standard"):
    grads = jax.grad(lambda t: sum(map(jnp.sum, jax.tree.leaves(eqx.combine(t, still)))))(trains)
    updates, state = tx.update(grads, state, trains)
  tuned = eqx.combine(eqx.apply_updates(trains, updates), still)
  assert tuned["frozen"] is params["frozen"] and not np.array_equal(tuned["b"], params["b"])
  assert sum(x.nbytes for x in jax.tree.leaves(state)) < 100
