"""Networks of many kinds grow, keep what they compute, and train what is new alone."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import surgery_models as models
from flax import linen as nn, nnx
from surgery_kinds import IMAGES, KEY, KINDS, Dropped, EqxTokens, Normed
from surgery_models import bits, by_path, paths

import maskopt
from maskopt import surgery


@pytest.fixture(autouse=True)
def _promotion():
  """Equinox and Optax need promotion."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


every_kind = pytest.mark.parametrize("kind", KINDS, ids=[k.name for k in KINDS])


def arrays(model):
  if isinstance(model, nnx.Module):
    return by_path(model)
  return {p: np.asarray(x) for p, x in paths(eqx.filter(model, eqx.is_inexact_array)).items()}


def outputs_of(kind, model, like):
  """Old outputs, which come first on the last axis."""
  return np.asarray(model(kind.inputs))[..., : like.shape[-1]]


def trained(kind, done, steps=20):
  """The arrays after some steps under the mask."""
  model = done.model
  if isinstance(model, nnx.Module):
    graph, params, rest = nnx.split(nnx.clone(model), nnx.Param, ...)
  else:
    params, graph = eqx.partition(model, eqx.is_inexact_array)
    rest = None

  def loss(p):
    full = eqx.combine(p, graph) if rest is None else nnx.merge(graph, p, rest, copy=True)
    return ((full(kind.inputs) - 1.0) ** 2).mean()

  tx = maskopt.selective_transform(
    optax.adamw(0.05, weight_decay=0.1), freeze_mask=done.freeze_mask
  )

  @jax.jit
  def step(p, state):
    updates, state = tx.update(jax.grad(loss)(p), state, p)
    return maskopt.apply_updates(p, updates), state

  after, state = params, tx.init(params)
  for _ in range(steps):
    after, state = step(after, state)
  return maskopt.audit(params, after, done.freeze_mask)


@functools.cache
def grown(kind, mode):
  return surgery.grow(kind.build(), kind.layers, inputs=kind.inputs, mode=mode, **kind.settings)


@every_kind
@pytest.mark.parametrize("mode", ["zero", pytest.param("copy", marks=pytest.mark.slow)])
def test_it_grows_and_computes_what_it_did(kind, mode):
  model = kind.build()
  if (kind.name, mode) == ("tokens and the stream", "copy"):
    # A table that makes and reads the units cannot share what it reads.
    with pytest.raises(ValueError, match='at embed, mix, expected the same .*: mode="zero" can'):
      surgery.grow(model, kind.layers, inputs=kind.inputs, mode=mode)
    return
  done = grown(kind, mode)
  old, new, mask = arrays(model), arrays(done.model), paths(done.freeze_mask)
  assert {p: new[p].shape for p in kind.shapes} == kind.shapes
  before = np.asarray(model(kind.inputs))
  np.testing.assert_allclose(outputs_of(kind, done.model, before), before, rtol=2e-5, atol=2e-6)
  assert done.report.difference <= 1e-5
  for p, x in new.items():
    frozen = np.broadcast_to(mask[p], x.shape)
    assert frozen.sum() == old[p].size
    if mode == "zero":
      np.testing.assert_array_equal(bits(x[frozen]), bits(old[p].reshape(-1)))


@every_kind
def test_training_moves_what_is_new_alone(kind):
  audit = trained(kind, grown(kind, "zero"))
  assert audit.ok and audit.trainable > 0
  # New tokens that no input shows get no gradient, but decay.
  assert audit.moved > 0.5 * audit.trainable


def test_group_norms_remember_their_groups():
  for groups, more, expected in ((4, {"conv": 2}, (6, 1)), (2, {"conv": 2}, (3, 2))):
    model = Normed(nnx.Rngs(0), groups)
    settings = {"consumers": ["norm", "last"], "mode": "init", "inputs": IMAGES}
    norm = surgery.grow(model, more, **settings).model.norm
    assert (norm.num_groups, norm.group_size) == expected
  one = surgery.grow(Normed(nnx.Rngs(0), 1), "conv", 2, inputs=IMAGES, mode="init").model
  assert (one.norm.num_groups, one.norm.group_size) == (1, 6)


class TestErrorsNameTheConsumer:
  def test_groups_that_would_be_cut(self):
    message = (
      r"at conv, expected units that stay whole, got a reshape of 4 positions to \(2, 2\) that cuts"
      r" units in two \(in normalization\.py:.*GroupNorm.*of= says how many groups there are"
    )
    with pytest.raises(ValueError, match=message):
      surgery.grow(Normed(nnx.Rngs(0), 2), "conv", 2, inputs=IMAGES)

    class Net(nn.Module):
      @nn.compact
      def __call__(self, x):
        return nn.GroupNorm(2, name="norm")(nn.Conv(4, (3, 3), name="conv")(x))

    variables = Net().init(KEY, IMAGES)
    with pytest.raises(ValueError, match=r"at conv, .* cuts units in two \(in norm\)"):
      surgery.grow(variables, "conv", 2, inputs=IMAGES, forward=Net())

  def test_filters_in_groups(self):
    model = nnx.Sequential(
      nnx.Conv(2, 4, (3, 3), rngs=nnx.Rngs(0)),
      nnx.Conv(4, 4, (3, 3), feature_group_count=2, rngs=nnx.Rngs(1)),
    )
    with pytest.raises(
      ValueError, match=r"at layers/0, .* a convolution in groups \(in linear\.py:.*Conv\.__call__"
    ):
      surgery.grow(model, "layers/0", 2, inputs=IMAGES)

  def test_a_sum_with_an_input(self):
    params = {"a": models.normal(0, (3, 3)), "b": models.normal(1, (3, 2))}
    with pytest.raises(ValueError, match="at a, expected consumers .*input 0 of the forward"):
      surgery.grow(
        params, "a", 1, inputs=models.INPUTS["mlp"], forward=lambda p, x: (x + x @ p["a"]) @ p["b"]
      )

  def test_dropout_that_is_on(self):
    model, x = Dropped(nnx.Rngs(0)), models.INPUTS["mlp"]
    with pytest.raises(ValueError, match=r"at hidden, .* dropout\) cannot be compared: give one"):
      surgery.grow(model, "hidden", 2, inputs=x)
    model.eval()
    assert surgery.grow(model, "hidden", 2, inputs=x).report.difference <= 1e-6

  def test_runs_of_units_that_nobody_told_of(self):
    params = {"up": models.normal(0, (3, 8)), "down": models.normal(1, (4, 2))}

    def forward(p, x):
      a, b = jnp.split(x @ p["up"], 2, -1)
      return (a * b) @ p["down"]

    with pytest.raises(ValueError, match=r"at up, expected a forward that takes .*; or parts=, if"):
      surgery.grow(params, "up", 2, inputs=models.INPUTS["mlp"], forward=forward)

  def test_a_linen_forward_of_another_size(self):
    old, x = models.LinenMLP(), models.INPUTS["mlp"]
    variables = old.init(KEY, x)
    for forward, new_forward in ((old, models.LinenMLP(6)), (old.apply, None)):
      with pytest.raises(ValueError, match="at hidden, expected a forward .* error: For parameter"):
        surgery.grow(variables, "hidden", 2, inputs=x, forward=forward, new_forward=new_forward)

  def test_heads_that_equinox_counts_itself(self):
    with pytest.raises(ValueError, match="at attention/query_proj, expected the same old outputs"):
      surgery.grow(EqxTokens(KEY), "attention/query_proj", 1, inputs=jnp.arange(5), of=2)


class TestEquinox:
  """What trees allow; layers come and go with `eqx.tree_at` and `transplant`."""

  def model(self):
    return eqx.nn.MLP(3, 2, 4, 2, key=KEY)

  def test_the_state_of_its_arrays_comes_along(self):
    model, adam = self.model(), optax.adam(0.1)
    params = eqx.filter(model, eqx.is_inexact_array)
    _, state = adam.update(jax.tree.map(jnp.cos, params), adam.init(params), params)

    def to(mask):
      return maskopt.selective_transform(adam, freeze_mask=mask)

    done = surgery.grow(
      model, {"layers/0": 2, "layers/1": 1}, inputs=jnp.ones(3), opt_state=state, tx=adam, to=to
    )
    new = eqx.filter(done.model, eqx.is_inexact_array)
    updates, _ = done.tx.update(jax.tree.map(jnp.cos, new), done.opt_state, new)
    assert maskopt.audit(new, maskopt.apply_updates(new, updates), done.freeze_mask).ok
    wide = surgery.grow(model, "layers/0", 2, inputs=jnp.ones(3), opt_state=state, tx=adam)
    np.testing.assert_array_equal(
      bits(wide.opt_state[0].nu.layers[0].weight[:4]), bits(state[0].nu.layers[0].weight)
    )

  def test_assign_reset_and_replace_the_head(self):
    model = self.model()
    done = surgery.assign(model, [("layers/0/bias", 0.5)])
    assert done.model.layers[0].bias.tolist() == [0.5] * 4
    fresh = surgery.reset(model, [("layers/0", True)])
    assert not np.array_equal(fresh.model.layers[0].weight, model.layers[0].weight)
    head = surgery.replace_head(model, 7)
    assert head.model.layers[2].weight.shape == (7, 4) and head.model.layers[2].bias.shape == (7,)
    assert head.model(jnp.ones(3)).shape == (7,)

  def test_a_larger_one_takes_the_weights_over(self):
    done = surgery.transplant(self.model(), eqx.nn.MLP(3, 2, 6, 2, key=jax.random.key(1)))
    np.testing.assert_array_equal(
      done.model.layers[1].weight[:4, :4], self.model().layers[1].weight
    )
    assert done.freeze_mask.layers[2].bias is True

  def test_parts_that_it_cannot_lose_or_get(self):
    with pytest.raises(
      ValueError, match=r"at layers/2, expected a dict, .*MLP, which cannot lose layers/2/weight"
    ):
      surgery.take(self.model(), 2)
    with pytest.raises(ValueError, match=r"at layers, .* none\. .*eqx\.tree_at.*transplant"):
      surgery.deepen(self.model(), "layers/0")
    with pytest.raises(ValueError, match=r"at layers, .* none\. .*eqx\.tree_at"):
      surgery.take(self.model(), "layers/0")
    with pytest.raises(TypeError, match=r"layers\[0\], expected .* a MLP to append to"):
      surgery.append(self.model(), eqx.nn.Linear(2, 2, key=KEY))
