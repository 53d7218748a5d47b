"""`maskopt.linen`: the train state, masked layers, batch statistics of frozen layers."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, serialization
from flax.core import freeze
from flax.training import train_state
from pairs import every_pair

import maskopt
import maskopt.linen
from maskopt._slicer import count_flops

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def lenient():
  """Optax and Flax promote dtypes and ranks."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def data(*shape):
  return RNG.standard_normal(shape).astype(np.float32)


X, Y = data(6, 4), data(6, 3)
UNITS = np.array([True, False, True, True, False, True])


class Net(nn.Module):
  axis: int = -1

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(6)(x)
    x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
    return nn.Dense(3, name="head")(nn.relu(x))


MASK = {
  "Dense_0": {"kernel": UNITS, "bias": True},
  "norm": {"scale": UNITS, "bias": UNITS},
  "head": {"kernel": RNG.random((6, 3)) < 0.7, "bias": False},
}


def variables():
  return Net().init(jax.random.key(0), X)


def loss(params, stats):
  y, changed = Net().apply(
    {"params": params, "batch_stats": stats}, X, train=True, mutable=["batch_stats"]
  )
  return ((y - Y) ** 2).mean(), changed["batch_stats"]


def same_bits(a, b):
  return np.asarray(a).view(np.uint32) == np.asarray(b).view(np.uint32)


@pytest.mark.parametrize("containers", [dict, freeze])
@pytest.mark.parametrize("packed", [None, False, True])
def test_frozen_bits_and_the_trajectory_of_the_rest(containers, packed):
  v = variables()
  # Frozen bits that an addition would change: a negative zero, a number too small to be normal.
  kernel = np.array(v["params"]["Dense_0"]["kernel"])
  kernel[0, 0], kernel[1, 0] = -0.0, 1e-40
  v["params"]["Dense_0"]["kernel"] = jnp.asarray(kernel)
  params, stats = containers(v["params"]), v["batch_stats"]
  make = {"apply_fn": Net().apply, "params": params, "tx": optax.adamw(0.1, weight_decay=0.1)}
  state = maskopt.linen.TrainState.create(**make, freeze_mask=MASK)
  assert isinstance(state, train_state.TrainState)

  @jax.jit
  def step(state):
    if packed is None:
      gradient = jax.grad(loss, has_aux=True)
    else:
      mask = maskopt.mask_of(state.opt_state)
      gradient = maskopt.grad(loss, mask, has_aux=True, packed=packed)
    grads, _ = gradient(state.params, stats)
    return state.apply_gradients(grads=grads)

  # The reference: Optax on the trainable elements as flat vectors.
  flat, treedef = jax.tree.flatten(v["params"])
  masks = [np.broadcast_to(m, x.shape) for x, m in zip(flat, jax.tree.leaves(MASK), strict=True)]
  values = [x[~m] for x, m in zip(flat, masks, strict=True)]
  tx = make["tx"]
  tx_state, expected = tx.init(values), flat
  for _ in range(3):
    state = step(state)
    grads = jax.tree.leaves(jax.grad(loss, has_aux=True)(treedef.unflatten(expected), stats)[0])
    updates, tx_state = tx.update(
      [g[~m] for g, m in zip(grads, masks, strict=True)], tx_state, values
    )
    values = optax.apply_updates(values, updates)
    expected = [x.at[~m].set(u) for x, m, u in zip(expected, masks, values, strict=True)]
  assert state.step == 3 and type(state.params) is type(params)
  for got, want, start, m in zip(jax.tree.leaves(state.params), expected, flat, masks, strict=True):
    assert same_bits(got, start)[m].all()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_without_a_mask_it_is_flax_own():
  v = variables()
  make = {"apply_fn": None, "params": v["params"], "tx": optax.adam(0.1)}
  ours, theirs = maskopt.linen.TrainState.create(**make), train_state.TrainState.create(**make)
  assert jax.tree.structure(ours.opt_state) == jax.tree.structure(theirs.opt_state)
  grads = jax.tree.map(jnp.ones_like, v["params"])
  ours, theirs = ours.apply_gradients(grads=grads), theirs.apply_gradients(grads=grads)
  for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
    assert same_bits(a, b).all()


def test_subclass_with_batch_stats_serialises():
  class State(maskopt.linen.TrainState):
    batch_stats: object = None

  v = variables()
  make = {"apply_fn": None, "tx": optax.adam(0.1), "freeze_mask": MASK}
  state = State.create(**make, params=v["params"], batch_stats=v["batch_stats"])
  grads = jax.tree.map(jnp.ones_like, v["params"])
  state = state.apply_gradients(grads=grads, batch_stats={"norm": {"mean": 1, "var": 2}})
  assert state.batch_stats["norm"]["var"] == 2
  again = State.create(**make, params=v["params"], batch_stats=v["batch_stats"])
  again = serialization.from_bytes(again, serialization.to_bytes(state))
  a, b = state.apply_gradients(grads=grads), again.apply_gradients(grads=grads)
  for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
    assert same_bits(x, y).all()


def test_parameters_that_gradients_overwrite():
  from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT as overwrite

  params = {"params": {"w": jnp.ones(3)}, overwrite: {"scale": jnp.ones(1)}}
  state = maskopt.linen.TrainState.create(
    apply_fn=None, params=params, tx=optax.sgd(0.5), freeze_mask={"w": np.arange(3) < 1}
  )
  state = state.apply_gradients(
    grads={"params": {"w": jnp.ones(3)}, overwrite: {"scale": jnp.full(1, 7.0)}}
  )
  assert state.params["params"]["w"].tolist() == [1.0, 0.5, 0.5]
  assert state.params[overwrite]["scale"].tolist() == [7.0]


def test_wrong_masks_are_named():
  make = {"apply_fn": None, "params": variables()["params"], "tx": optax.sgd(0.1)}
  with pytest.raises(ValueError, match="at tail, expected a parameter, got none of that path"):
    maskopt.linen.TrainState.create(**make, freeze_mask={**MASK, "tail": True})


@pytest.mark.parametrize("jit", [False, True])
def test_statistics_of_frozen_units_are_still_and_used(jit):
  v = variables()
  stats = {"norm": {"mean": jnp.asarray(data(6)), "var": jnp.asarray(data(6) ** 2 + 0.5)}}
  v = {"params": v["params"], "batch_stats": stats}
  apply = maskopt.linen.freeze_statistics(Net().apply, MASK)
  options = {"mutable": ["batch_stats", "intermediates"], "capture_intermediates": True}

  def run(apply, v, train):
    return apply(v, X, train=train, **options)

  wrap = (lambda f: jax.jit(f, static_argnums=(0, 2))) if jit else lambda f: f
  (_, ours), (_, live), (_, infers) = (
    wrap(run)(a, v, t) for a, t in ((apply, True), (Net().apply, True), (Net().apply, False))
  )
  for name in ("mean", "var"):
    got, before = ours["batch_stats"]["norm"][name], stats["norm"][name]
    assert same_bits(got, before)[UNITS].all()
    np.testing.assert_allclose(got[~UNITS], live["batch_stats"]["norm"][name][~UNITS], rtol=1e-6)
  got, a, b = (c["intermediates"]["norm"]["__call__"][0] for c in (ours, live, infers))
  np.testing.assert_allclose(got, np.where(UNITS, b, a), rtol=1e-5, atol=1e-6)
  y, changed = maskopt.linen.freeze_statistics(Net().apply, True)(
    v, X, train=True, mutable=["batch_stats"]
  )
  np.testing.assert_array_equal(y, Net().apply(v, X))
  assert same_bits(changed["batch_stats"]["norm"]["mean"], stats["norm"]["mean"]).all()
  train = {"train": True, "mutable": ["batch_stats"]}
  thawed = maskopt.linen.freeze_statistics(Net().apply, False)(v, X, **train)[0]
  np.testing.assert_array_equal(thawed, Net().apply(v, X, **train)[0])


def test_statistics_without_parameters_and_bad_masks():
  class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
      norm = nn.BatchNorm(use_running_average=False, use_scale=False, use_bias=False)
      return norm(nn.Dense(6)(x))

  class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
      return Block(name="b")(Block(name="a")(x))

  v = Two().init(jax.random.key(0), X)
  apply = maskopt.linen.freeze_statistics(Two().apply, {"a": True, "b": False})
  _, changed = apply(v, X, mutable=["batch_stats"])
  assert not np.any(changed["batch_stats"]["a"]["BatchNorm_0"]["mean"])
  assert np.any(changed["batch_stats"]["b"]["BatchNorm_0"]["mean"])
  with pytest.raises(ValueError, match="at c, expected a parameter, got none of that path"):
    maskopt.linen.freeze_statistics(Two().apply, {"a": True, "b": True, "c": True})(v, X)
  runtime = {"a": True, "b": {"Dense_0": {"kernel": jnp.arange(6) < 1, "bias": True}}}
  with pytest.raises(ValueError, match="at b/Dense_0/kernel, expected a static mask"):
    maskopt.linen.freeze_statistics(Two().apply, runtime)(v, X)


class Doubling(nn.BatchNorm):
  def __call__(self, x, use_running_average=None):
    return super().__call__(2 * x, use_running_average=use_running_average)


class Centred(nn.Module):
  """Statistics of one's own."""

  @nn.compact
  def __call__(self, x, use_running_average=None):
    centre = self.variable("batch_stats", "mean", lambda: jnp.zeros(6))
    scale = self.param("scale", nn.initializers.ones, (6,))
    if not use_running_average and not self.is_initializing():
      centre.value = x.mean(0)
    return (x - centre.value) * scale


class Normed(nn.Module):
  kind: type

  @nn.compact
  def __call__(self, x, train=True):
    return self.kind(name="norm")(nn.Dense(6, name="dense")(x), use_running_average=not train)


@pytest.mark.parametrize("containers", [dict, freeze])
@pytest.mark.parametrize("units", [UNITS, True])
@pytest.mark.parametrize("kind", [nn.BatchNorm, Doubling, Centred])
def test_statistics_of_subclasses_and_of_other_modules(kind, units, containers):
  """The mode is given at the call."""
  model, frozen = Normed(kind), np.broadcast_to(units, 6)
  v = containers(model.init(jax.random.key(0), X))
  mask = {"dense": False, "norm": dict.fromkeys(v["params"]["norm"], units)}
  apply = maskopt.linen.freeze_statistics(model.apply, mask)
  if kind is Centred:
    with pytest.warns(UserWarning, match="at norm/mean, the statistics of frozen units are still"):
      _, changed = apply(v, X, mutable=["batch_stats"])
  else:
    y, changed = apply(v, X, mutable=["batch_stats"])
    inferred = model.apply(v, X, train=False)
    np.testing.assert_allclose(y[:, frozen], inferred[:, frozen], rtol=1e-5, atol=1e-6)
  assert type(changed) is type(model.apply(v, X, mutable=["batch_stats"])[1])
  old, new = v["batch_stats"]["norm"]["mean"], changed["batch_stats"]["norm"]["mean"]
  assert np.array_equal(same_bits(old, new), frozen)
  apply(v, X, train=False, mutable=["batch_stats"])  # in inference mode there is nothing to say


SCATTERED = RNG.random((4, 6)) < 0.6


FROZEN = {"kernel": (True, False), "units": (UNITS, UNITS), "scattered": (SCATTERED, True)}


@every_pair(
  kind=["dense", "conv"],
  frozen=FROZEN,
  jit=[False, True],
)
def test_masked_layers_have_flax_gradients_and_zeros(kind, frozen, jit):
  masks = dict(zip(("kernel_freeze_mask", "bias_freeze_mask"), FROZEN[frozen], strict=True))
  if kind == "dense":
    masked, plain, x = maskopt.linen.MaskedDense(6, **masks), nn.Dense(6), data(5, 4)
  else:
    masked, plain = maskopt.linen.MaskedConv(6, (3, 3), **masks), nn.Conv(6, (3, 3))
    x = data(2, 5, 5, 4)
  v = masked.init(jax.random.key(0), x)
  for a, b in zip(
    *(jax.tree.leaves(u) for u in (v, plain.init(jax.random.key(0), x))), strict=True
  ):
    assert same_bits(a, b).all()
  hash(masked)

  def gradients(m):
    f = jax.grad(lambda v, x: (m.apply(v, x) ** 2).sum(), argnums=(0, 1))
    return (jax.jit(f) if jit else f)(v, jnp.asarray(x))

  (g, dx), (e, dxe) = gradients(masked), gradients(plain)
  np.testing.assert_allclose(dx, dxe, rtol=1e-4, atol=1e-5)
  for name, mask in zip(("kernel", "bias"), FROZEN[frozen], strict=True):
    got, want = g["params"][name], e["params"][name]
    assert not np.any(np.array(got)[np.broadcast_to(mask, got.shape)])
    np.testing.assert_allclose(got, np.where(mask, 0, want), rtol=1e-4, atol=1e-4)


def test_masked_embedding_attends_too():
  words = np.arange(7)[:, None] < 5
  masked, plain = maskopt.linen.MaskedEmbed(7, 3, embedding_freeze_mask=words), nn.Embed(7, 3)
  i = jnp.array([[0, 6], [5, 6]])
  v = masked.init(jax.random.key(0), i)

  def fun(m):
    return jax.grad(lambda v: (m.apply(v, m.apply(v, i), method="attend") ** 2).sum())(v)

  got, want = (fun(m)["params"]["embedding"] for m in (masked, plain))
  np.testing.assert_allclose(got, np.where(words, 0, want), rtol=1e-4, atol=1e-5)


def test_masked_layers_inside_a_network_cost_less():
  mask = np.arange(640) >= 64

  class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Dense(500, use_bias=False)(x)
      return maskopt.linen.MaskedDense(640, kernel_freeze_mask=mask, bias_freeze_mask=mask)(x)

  x = jnp.asarray(data(16, 300))
  v = Two().init(jax.random.key(0), x)
  run = jax.grad(lambda v: (Two().apply(v, x) ** 2).sum())
  first, second = 2 * 16 * 300 * 500, 2 * 16 * 500 * 640
  assert count_flops(jax.make_jaxpr(run)(v)) == 2 * first + 2 * second + second // 10


def test_bad_masks_of_layers_are_named_at_once():
  x = data(5, 4)
  layer = maskopt.linen.MaskedDense(6, kernel_freeze_mask=np.ones(5, bool))
  message = (
    r"`MaskedDense\(kernel_freeze_mask=...\)`: at kernel, expected bool broadcastable to \(4, 6\)"
  )
  with pytest.raises(ValueError, match=message):
    layer.init(jax.random.key(0), x)
  with pytest.raises(TypeError, match="expected a bool or NumPy bools"):
    maskopt.linen.MaskedDense(6, kernel_freeze_mask=jnp.ones(6, bool)).init(jax.random.key(0), x)
  with pytest.raises(ValueError, match="at bias, expected a parameter, got none"):
    maskopt.linen.MaskedDense(6, use_bias=False, bias_freeze_mask=True).init(jax.random.key(0), x)
  again = copy.deepcopy(maskopt.linen.MaskedDense(6, kernel_freeze_mask=UNITS))
  assert again == maskopt.linen.MaskedDense(6, kernel_freeze_mask=UNITS)


class Carrying(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = maskopt.linen.MaskedDense(6, kernel_freeze_mask=UNITS, name="body")(x)
    x = nn.Dropout(0.1, deterministic=not train)(x)
    return nn.Sequential([nn.relu, maskopt.linen.MaskedDense(3, bias_freeze_mask=True)])(x)


def test_masks_that_modules_carry_are_collected():
  model = Carrying()
  expected = model.init(jax.random.key(0), X)["params"]
  for inputs, options in (((X,), {}), ((jax.ShapeDtypeStruct(X.shape, X.dtype),), {"train": True})):
    mask = maskopt.linen.freeze_mask(model, *inputs, **options)
    assert np.array_equal(mask["body"].pop("kernel"), UNITS) and mask["body"] == {"bias": False}
    assert mask["MaskedDense_0"] == {"kernel": False, "bias": True}
    assert set(mask) == set(expected)
  assert maskopt.linen.freeze_mask(nn.Dense(2), X) == {
    "kernel": False, "bias": False,
  }  # fmt: skip
  with pytest.raises(TypeError, match="linen.freeze_mask.*expected a linen module, got dict"):
    maskopt.linen.freeze_mask(expected)


CARRYING = Carrying()


def carrying_step(tx=None, **options):
  params = CARRYING.init(jax.random.key(0), X)["params"]
  state = maskopt.linen.TrainState.create(
    apply_fn=CARRYING.apply, params=params, tx=tx or optax.adamw(0.1, weight_decay=0.1), **options
  )

  @jax.jit
  def step(state):
    grads = jax.grad(lambda p: state.apply_fn({"params": p}, X).sum())(state.params)
    return state.apply_gradients(grads=grads)

  return params, step(state)


def test_a_train_state_takes_the_masks_that_modules_carry():
  mask = maskopt.linen.freeze_mask(Carrying(), X)
  params, state = carrying_step(freeze_mask=mask)
  assert maskopt.audit(params, state.params, mask).ok
  again = carrying_step(freeze_mask=mask)[1].apply_fn
  assert again == state.apply_fn and hash(again) == hash(state.apply_fn)
  tx = maskopt.selective_transform(optax.adamw(0.1), freeze_mask=mask)
  params, state = carrying_step(tx=tx)
  assert maskopt.audit(params, state.params, mask).ok
  carrying_step(freeze_mask=True)


@pytest.mark.parametrize("options", [{}, {"freeze_mask": False}])
def test_a_train_state_that_trains_what_a_module_freezes(options):
  with pytest.raises(
    ValueError,
    match="TrainState.create.*at body/kernel, expected 16 elements frozen, as the module's own "
    "mask says, got a mask that trains some. Give freeze_mask=maskopt.linen.freeze_mask",
  ):
    carrying_step(**options)


def test_only_the_contradiction_is_named():
  mask = {"body": {"kernel": UNITS & (np.arange(6) > 0), "bias": False}, "MaskedDense_0": True}
  with pytest.raises(ValueError, match="at body/kernel, expected 4 elements frozen"):
    carrying_step(freeze_mask=mask)
