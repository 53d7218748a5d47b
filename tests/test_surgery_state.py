"""What a user does next: the optimizer before an operation, and the one that goes on after it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import surgery_models as models
from flax import nnx
from flax.training import train_state
from pairs import every_pair
from surgery_models import bits, by_path, mlp, paths

import maskopt
from maskopt import surgery

X = models.INPUTS["mlp"]
BOTH = {"hidden": 2, "head": 3}


@pytest.fixture(autouse=True)
def _promotion():
  """Optax's Adam itself needs promotion."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def loss(model):
  return ((model(X) - 1.0) ** 2).mean()


def selective(freeze_mask):
  return maskopt.selective_transform(optax.adam(0.1), freeze_mask=freeze_mask)


def two_rates(freeze_mask):
  labels = jax.tree.map(lambda m: np.where(m, "old", "new"), freeze_mask)
  rates = {"old": optax.adam(0.01), "new": optax.adam(0.1)}
  return maskopt.partition(rates, labels, prefer="memory")


def stepped(tx, state, model, steps=3):
  """The state after some steps; the model is trained in place."""
  for _ in range(steps):
    params = nnx.state(model, nnx.Param)
    updates, state = tx.update(nnx.grad(loss)(model), state, params)
    nnx.update(model, maskopt.apply_updates(params, updates))
  return state


def counts(state):
  return {int(x) for x in jax.tree.leaves(state) if x.dtype == jnp.int32 and x.ndim == 0}


WAYS = {
  "adam, then selective": (optax.adam(0.1), selective),
  "adam before and after": (optax.adam(0.1), None),
  "selective before and after": (selective({"hidden": np.bool_(False), "head": True}), selective),
  "adam, then two rates": (optax.adam(0.1), two_rates),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_result_goes_on_with_its_own_transform(way):
  tx, to = WAYS[way]
  model = mlp()
  state = stepped(tx, tx.init(nnx.state(model, nnx.Param)), model)
  grown = surgery.grow(model, BOTH, inputs=X, opt_state=state, tx=tx, to=to)
  params = nnx.state(grown.model, nnx.Param)
  fresh = grown.tx.init(params)
  assert jax.tree.structure(grown.opt_state) == jax.tree.structure(fresh)
  assert [x.shape for x in jax.tree.leaves(grown.opt_state)] == [
    x.shape for x in jax.tree.leaves(fresh)
  ]
  before = maskopt.snapshot(params)
  state = stepped(grown.tx, grown.opt_state, grown.model, 20)
  assert counts(state) == {23}
  if to is selective:
    assert maskopt.audit(before, nnx.state(grown.model, nnx.Param), grown.freeze_mask).ok
  if to is None:
    assert grown.tx is tx


def test_old_and_new_weights_have_their_rates_growth_after_growth():
  model = mlp()
  first = surgery.grow(model, BOTH, inputs=X, to=two_rates)
  state = stepped(first.tx, first.opt_state, first.model)
  second = surgery.grow(first.model, BOTH, inputs=X, opt_state=state, tx=first.tx, to=two_rates)
  kernel = second.opt_state.inner_states["old"].inner_state[0].nu["hidden"]["kernel"][...]
  assert kernel.shape == (3, 7) and np.all(kernel > 0)
  before = by_path(second.model)["hidden/kernel"]
  stepped(second.tx, second.opt_state, second.model, 1)
  change = np.abs(by_path(second.model)["hidden/kernel"] - before)
  assert change[:, :7].max() < 0.05 < change[:, 7:].max()


def test_a_transform_alone_starts_anew():
  grown = surgery.grow(mlp(), BOTH, inputs=X, to=selective)
  assert counts(grown.opt_state) == {0}
  assert maskopt.mask_of(grown.opt_state).freeze_mask["head"]["kernel"].shape == (7, 5)
  plain = surgery.grow(mlp(), BOTH, inputs=X)
  assert plain.opt_state is None and plain.tx is None


OPERATIONS = {
  "assign": lambda m, **k: surgery.assign(m, [("head/bias", np.s_[0], 0.5)], **k),
  "reset": lambda m, **k: surgery.reset(m, [("head", True)], **k),
  "grow": lambda m, **k: surgery.grow(m, BOTH, inputs=X, **k),
  "deepen": lambda m, **k: surgery.deepen(m, "hidden", inputs=X, **k),
  "append": lambda m, **k: surgery.append(m, nnx.Linear(2, 2, rngs=nnx.Rngs(3)), **k),
  "replace_head": lambda m, **k: surgery.replace_head(m, 2, **k),
  "transplant": lambda m, **k: surgery.transplant(m, mlp(), [("hidden", True)], **k),
}


@every_pair(
  operation=OPERATIONS,
  before=["ours", "flax"],
  after=["ours", "flax"],
)
def test_optimizers_of_nnx_go_on(operation, before, after):
  def ours(model, mask):
    return maskopt.nnx.Optimizer(model, optax.adam(0.1), mask)

  def flax(model, mask):
    del mask
    return nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

  make = {"ours": ours, "flax": flax}
  model = mlp()
  optimizer = make[before](model, False)
  for _ in range(3):
    optimizer.update(model, nnx.grad(loss)(model))
  was = maskopt.snapshot((model, optimizer.opt_state))
  done = OPERATIONS[operation](model, opt_state=optimizer, to=make[after])
  following = done.opt_state
  assert type(following) is type(make[after](mlp(), False)) and following is not optimizer
  assert int(following.step[...]) == 3 and counts(nnx.state(following.opt_state)) == {3}
  known = jax.tree.leaves(optimizer.opt_state)
  assert maskopt.audit(was, (model, optimizer.opt_state), True).ok and known
  start = maskopt.snapshot(done.model)
  for _ in range(20):
    grads = nnx.grad(lambda m: (m(X) ** 2).mean())(done.model)
    following.update(done.model, grads)
  assert int(following.step[...]) == 23
  if after == "ours":
    assert maskopt.audit(start, done.model, done.freeze_mask).ok


def test_moments_of_an_nnx_optimizer_keep_their_bits():
  model = mlp()
  old = maskopt.nnx.Optimizer(model, optax.adam(0.1), False)
  old.update(model, nnx.grad(loss)(model))
  new = surgery.grow(
    model,
    BOTH,
    inputs=X,
    opt_state=old,
    to=lambda model, mask: maskopt.nnx.Optimizer(model, optax.adam(0.1), False),
  ).opt_state
  before, after = (paths(x.opt_state.inner_state[0].nu) for x in (old, new))
  for p, x in after.items():
    x, corner = np.asarray(x), tuple(slice(n) for n in before[p].shape)
    np.testing.assert_array_equal(bits(x[corner]), bits(before[p]))
    assert x.size > before[p].size


@pytest.mark.parametrize("kind", [train_state.TrainState, maskopt.linen.TrainState])
def test_train_states_of_linen_go_on(kind):
  old, new = models.LinenMLP(), models.LinenMLP(7, 5)
  params = models._noisy(old.init(jax.random.key(0), X)["params"])

  def trained(state):
    grads = jax.grad(lambda p: ((state.apply_fn({"params": p}, X) - 1.0) ** 2).mean())
    return state.apply_gradients(grads=grads(state.params))

  state = trained(trained(kind.create(apply_fn=old.apply, params=params, tx=optax.adam(0.1))))

  def following(params, freeze_mask):
    return maskopt.linen.TrainState.create(
      apply_fn=new.apply, params=params, tx=optax.adam(0.1), freeze_mask=freeze_mask
    )

  forwards = {"inputs": X, "forward": old, "new_forward": new, "mode": "progressive"}
  done = surgery.grow(state.params, BOTH, opt_state=state, to=following, **forwards)
  after = done.opt_state
  assert isinstance(after, maskopt.linen.TrainState)
  assert (int(after.step), counts(after.opt_state), done.tx) == (2, {2}, after.tx)
  for _ in range(20):
    after = trained(after)
  assert maskopt.audit(done.model, after.params, done.freeze_mask).ok
  out, was = (new.apply({"params": p}, X) for p in (after.params, done.model))
  np.testing.assert_array_equal(bits(out[:, :2]), bits(was[:, :2]))
  # The same by hand, for who builds the state otherwise.
  hand = surgery.grow(
    state.params, BOTH, opt_state=state.opt_state, tx=state.tx, to=selective, **forwards
  )
  replaced = state.replace(
    apply_fn=new.apply, params=hand.model, tx=hand.tx, opt_state=hand.opt_state
  )
  assert int(trained(replaced).step) == 3


def test_masked_layers_carry_masks_of_the_new_shape():
  units = np.array([True, False, False, True])
  model = nnx.Sequential(
    maskopt.nnx.MaskedLinear(
      3, 4, kernel_freeze_mask=units, bias_freeze_mask=True, rngs=nnx.Rngs(0)
    ),
    maskopt.nnx.MaskedLinear(4, 2, kernel_freeze_mask=True, rngs=nnx.Rngs(1)),
  )
  grown = surgery.grow(model, {"layers/0": 2, "layers/1": 1}, inputs=X)
  carried = maskopt.nnx.freeze_mask(grown.model)["layers"]
  assert carried["0"]["kernel"].tolist() == [[True, False, False, True, False, False]]
  assert carried["0"]["bias"].tolist() == [True] * 4 + [False] * 2
  expected = np.zeros((6, 3), bool)
  expected[:4, :2] = True
  np.testing.assert_array_equal(carried["1"]["kernel"], expected)
  assert maskopt.nnx.freeze_mask(model)["layers"]["1"]["kernel"] is True
  for mask in (None, grown.freeze_mask):
    network = nnx.clone(grown.model)
    optimizer = maskopt.nnx.Optimizer(network, optax.adam(0.1), mask)
    optimizer.update(network, nnx.grad(lambda m: (m(X) ** 2).mean())(network))
    known = {"layers": carried} if mask is None else mask
    assert maskopt.audit(grown.model, network, known).ok
  for outputs in (2, 5):
    head = surgery.replace_head(model, outputs)
    own = maskopt.nnx.freeze_mask(head.model)["layers"]
    assert own["1"] == {"bias": False, "kernel": False} and own["0"]["bias"] is True
    maskopt.nnx.Optimizer(head.model, optax.adam(0.1), head.freeze_mask)


class TestBadInput:
  def grow(self, **settings):
    return surgery.grow(mlp(), BOTH, inputs=X, **settings)

  def test_a_transform_for_the_old_shapes(self):
    mask = {"hidden": {"kernel": np.arange(5) > 2, "bias": True}, "head": True}
    tx = selective(mask)
    state = tx.init(nnx.state(mlp(), nnx.Param))
    message = (
      r"at tx, expected a transform that takes the new parameters, got an error: .*at "
      r"hidden/kernel, expected bool broadcastable to \(3, 7\).*Write to=lambda freeze_mask"
    )
    with pytest.raises(ValueError, match=message):
      self.grow(opt_state=state, tx=tx)
    with pytest.raises(ValueError, match=message):
      self.grow(to=tx)

  def test_what_comes_next_is_no_transform(self):
    with pytest.raises(TypeError, match="at to, expected a transform, or a function of the mask"):
      self.grow(to=3)
    with pytest.raises(TypeError, match="at to, expected a function that returns a transform"):
      self.grow(to=lambda mask: mask)

  def test_optimizers_say_which_comes_next(self):
    optimizer = nnx.Optimizer(mlp(), optax.adam(0.1), wrt=nnx.Param)
    for to in (None, optax.adam(0.1), 3):
      with pytest.raises(
        TypeError, match=r"at to, expected a function of \(model, freeze_mask\) that returns the "
      ):
        self.grow(opt_state=optimizer, to=to)
    with pytest.raises(ValueError, match="at tx, expected no transform, got one beside that of"):
      self.grow(opt_state=optimizer, tx=optimizer.tx, to=lambda *_: optimizer)
    with pytest.raises(TypeError, match="at to, expected the next Optimizer, got GradientTransf"):
      self.grow(opt_state=optimizer, to=lambda *_: optax.adam(0.1))
    with pytest.raises(ValueError, match="a state of the same optimizer"):
      self.grow(
        opt_state=optimizer,
        to=lambda model, _: nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param),
      )
