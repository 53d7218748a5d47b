"""`maskopt.nnx.freeze_statistics`: frozen units infer in every mode, and stay still."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import maskopt
import maskopt.nnx

RNG = np.random.default_rng(0)
X = RNG.standard_normal((16, 4)).astype(np.float32) * 3 + 2


@pytest.fixture(autouse=True)
def lenient():
  """Flax promotes dtypes and ranks."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


class Net(nnx.Module):
  def __init__(self, rngs, **options):
    self.first = nnx.Linear(4, 6, rngs=rngs)
    self.norm = nnx.BatchNorm(6, rngs=rngs, **options)
    self.second = nnx.Linear(6, 2, rngs=rngs)

  def __call__(self, x):
    return self.second(self.norm(self.first(x)))


def stats(model):
  return {"/".join(map(str, p)): np.array(x[...])
          for p, x in nnx.to_flat_state(nnx.state(model, nnx.BatchStat))}  # fmt: skip


def same_bits(a, b):
  return a.view(np.uint32) == b.view(np.uint32)


def normalised(norm, x):
  """Inference mode by hand."""
  mean, var, scale, bias = (np.array(v[...]) for v in (norm.mean, norm.var, norm.scale, norm.bias))
  return (x - mean) / np.sqrt(var + norm.epsilon) * scale + bias


@pytest.mark.parametrize("jit", [False, True])
def test_frozen_layer_infers_and_is_still_even_in_training_mode(jit):
  model = Net(nnx.Rngs(0))
  model(X)  # gives the statistics something to be
  mask = {"first": True, "norm": True, "second": False}
  assert maskopt.nnx.freeze_statistics(model, mask) is model
  assert isinstance(model.norm, nnx.BatchNorm)
  model.train()
  before, h = stats(model), model.first(X)
  expected = normalised(model.norm, np.asarray(h))
  optimizer = maskopt.nnx.Optimizer(model, optax.adam(0.1), mask)

  def step(model, optimizer):
    grads = maskopt.nnx.grad(lambda m: (m(X) ** 2).mean(), mask)(model)
    optimizer.update(model, grads)
    return model.norm(model.first(X), use_running_average=False)

  for _ in range(3):
    out = (nnx.jit(step) if jit else step)(model, optimizer)
    model.train()
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
  for path, x in before.items():
    assert same_bits(x, stats(model)[path]).all()


@pytest.mark.parametrize("axis", [-1, 1])
def test_units_one_by_one(axis):
  frozen = np.array([True, False, True, False, False, True])
  model, plain = Net(nnx.Rngs(0), axis=axis), Net(nnx.Rngs(0), axis=axis)
  mask = {"first": False, "norm": {"scale": frozen, "bias": frozen}, "second": False}
  maskopt.nnx.freeze_statistics(model, mask)
  model.train(), plain.train()
  h = RNG.standard_normal((8, 6, 5) if axis == 1 else (8, 6)).astype(np.float32) + 1
  before, infers = stats(model), nnx.clone(plain.norm)
  for _ in range(2):
    live = plain.norm(h)
    out = np.asarray(model.norm(h))
    shape = (6, 1) if axis == 1 else (6,)
    expected = np.where(frozen.reshape(shape), infers(h, use_running_average=True), live)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
  for path, x in before.items():
    assert same_bits(x, stats(model)[path])[frozen].all()
    np.testing.assert_allclose(stats(model)[path][~frozen], stats(plain)[path][~frozen], rtol=1e-5)
    assert not same_bits(x, stats(model)[path])[~frozen].any()
  model.eval(), plain.eval()
  model.norm.mean[...], model.norm.var[...] = plain.norm.mean[...], plain.norm.var[...]
  np.testing.assert_array_equal(model.norm(h), plain.norm(h))


def test_scale_frozen_and_bias_not_is_a_layer_that_trains():
  model = Net(nnx.Rngs(0))
  mask = {"first": True, "norm": {"scale": True, "bias": False}, "second": True}
  maskopt.nnx.freeze_statistics(model, mask)
  assert type(model.norm) is nnx.BatchNorm
  before = stats(model)
  model(X)
  assert not same_bits(before["norm/mean"], stats(model)["norm/mean"]).any()


@pytest.mark.parametrize("frozen", [True, False])
def test_layer_without_parameters_follows_the_module_around_it(frozen):
  class Block(nnx.Module):
    def __init__(self, rngs):
      self.first = nnx.Linear(4, 6, rngs=rngs)
      self.norm = nnx.BatchNorm(6, use_scale=False, use_bias=False, rngs=rngs)

  model = nnx.Dict(a=Block(nnx.Rngs(0)), b=nnx.Linear(6, 2, rngs=nnx.Rngs(1)))
  maskopt.nnx.freeze_statistics(model, {"a": frozen, "b": False})
  model["a"].norm(model["a"].first(X))
  assert bool(np.any(model["a"].norm.mean[...])) is not frozen


def test_thawing_sets_the_statistics_free_and_masks_are_read_from_modules():
  model = Net(nnx.Rngs(0))
  paths = list(stats(model))
  maskopt.nnx.freeze_statistics(model, True)
  assert list(stats(model)) == paths
  maskopt.nnx.freeze_statistics(model)  # no module carries a mask: everything trains
  assert type(model.norm) is nnx.BatchNorm and not hasattr(model.norm, "still")
  model(X)
  assert np.any(model.norm.mean[...])


def test_statistics_of_other_modules_and_shared_ones():
  class Counted(nnx.Module):
    def __init__(self, stat=None):
      self.w = nnx.Param(jnp.ones(3))
      self.seen = nnx.BatchStat(jnp.zeros(3)) if stat is None else stat

    def __call__(self, x):
      self.seen[...] = self.seen[...] + x
      self.seen[0] = 9.0
      return x * self.w

  a = Counted()
  model = nnx.Dict(a=a, b=Counted(a.seen))
  mask = {"a": {"w": np.array([True, False, True])}, "b": False}
  with pytest.warns(
    UserWarning, match=r"at a \(Counted\), the statistics of frozen units are still"
  ):
    maskopt.nnx.freeze_statistics(model, mask)
  assert model["a"].seen is model["b"].seen and isinstance(a.seen, nnx.BatchStat)
  nnx.jit(lambda m: m["b"](jnp.ones(3)))(model)
  assert a.seen[...].tolist() == [0.0, 1.0, 0.0]
  maskopt.nnx.freeze_statistics(model, {"a": False, "b": False})
  assert type(a.seen) is nnx.BatchStat and model["b"].seen is a.seen
  model["a"](jnp.ones(3))
  assert a.seen[...].tolist() == [9.0, 2.0, 1.0]


class Doubling(nnx.BatchNorm):
  def __call__(self, x, use_running_average=None, *, mask=None):
    return super().__call__(2 * x, use_running_average, mask=mask)


class Renamed(nnx.BatchNorm):
  pass


@pytest.mark.parametrize("units", [np.array([True, False, False, True, False, True]), True])
@pytest.mark.parametrize("kind, factor", [(Doubling, 2), (Renamed, 1)])
def test_subclasses_that_call_the_library_are_held_as_it_is(kind, factor, units):
  model = Net(nnx.Rngs(0))
  model.norm = kind(6, rngs=nnx.Rngs(0))
  frozen = np.broadcast_to(units, 6)
  mask = {"first": False, "norm": {"scale": units, "bias": units}, "second": False}
  h = RNG.standard_normal((8, 6)).astype(np.float32) + 1
  expected = normalised(model.norm, factor * h)
  before = stats(model)
  maskopt.nnx.freeze_statistics(model, mask)
  model.train()
  assert isinstance(model.norm, kind)
  copied = copy.deepcopy(model)
  for m in (model, copied):
    out = np.asarray(nnx.jit(lambda m: m.norm(h))(m))
    np.testing.assert_allclose(out[:, frozen], expected[:, frozen], rtol=1e-5, atol=1e-6)
    for path, x in before.items():
      assert np.array_equal(same_bits(x, stats(m)[path]), frozen)
  maskopt.nnx.freeze_statistics(model, False)
  assert type(model.norm) is kind and not hasattr(model.norm, "still")
  model.norm(h)
  assert not same_bits(before["norm/mean"], stats(model)["norm/mean"]).any()


def test_subclasses_that_normalise_by_themselves_are_named():
  class Own(nnx.BatchNorm):
    def __call__(self, x):
      self.mean[...] = x.mean(0)
      return x - x.mean(0)

  model = nnx.Dict(norm=Own(4, rngs=nnx.Rngs(0)))
  with pytest.warns(UserWarning, match=r"at norm \(Own\).*derive it from nnx.BatchNorm and normal"):
    maskopt.nnx.freeze_statistics(model, True)
  model["norm"](X)
  assert not np.any(model["norm"].mean[...])
  maskopt.nnx.freeze_statistics(model, False)
  model["norm"](X)
  assert np.all(model["norm"].mean[...])


class Centred(nnx.Module):
  """Statistics of one's own, used as Flax's layers use theirs."""

  def __init__(self):
    self.centre, self.scale = nnx.BatchStat(jnp.zeros(4)), nnx.Param(jnp.ones(4))
    self.use_running_average = False

  def __call__(self, x):
    if not self.use_running_average:
      self.centre[...] = x.mean(0)
    return (x - self.centre[...]) * self.scale[...]


def test_a_layer_that_asks_for_its_mode_is_told_to_infer_if_all_of_it_is_frozen():
  model = nnx.Dict(a=Centred(), b=Centred())
  maskopt.nnx.freeze_statistics(model, {"a": True, "b": False})
  model.train()
  assert isinstance(model["a"], Centred) and type(model["b"]) is Centred
  for m in (model, nnx.clone(model)):
    np.testing.assert_array_equal(nnx.jit(lambda m: m["a"](X))(m), X)
    m["b"](X)
    assert not np.any(m["a"].centre[...]) and np.all(m["b"].centre[...])
  maskopt.nnx.freeze_statistics(model, False)
  assert type(model["a"]) is Centred and model["a"].use_running_average is False
  some = {"a": {"scale": np.arange(4) < 2}, "b": False}
  with pytest.warns(UserWarning, match=r"at a \(Centred\)"):
    maskopt.nnx.freeze_statistics(model, some)
  model["a"](X)
  assert np.array_equal(model["a"].centre[...] == 0, np.arange(4) < 2)


def test_loading_a_state_sets_them_and_they_are_still_again():
  model, other = Net(nnx.Rngs(0)), Net(nnx.Rngs(1))
  other(X)
  maskopt.nnx.freeze_statistics(model, True)
  nnx.update(model, nnx.state(other))
  loaded = stats(model)
  assert same_bits(loaded["norm/mean"], stats(other)["norm/mean"]).all()
  model(X)
  assert same_bits(loaded["norm/mean"], stats(model)["norm/mean"]).all()


def test_copies_keep_it():
  model = maskopt.nnx.freeze_statistics(Net(nnx.Rngs(0)), True)
  for copied in (nnx.clone(model), copy.deepcopy(model), nnx.merge(*nnx.split(model))):
    copied(X)
    assert not np.any(copied.norm.mean[...])


def test_runtime_masks_and_strangers_are_refused():
  model = Net(nnx.Rngs(0))
  mask = {"first": True, "second": True, "norm": {"scale": jnp.arange(6) < 3, "bias": True}}
  with pytest.raises(ValueError, match="at norm/scale, expected a static mask, got a runtime mask"):
    maskopt.nnx.freeze_statistics(model, mask)
  with pytest.raises(ValueError, match="at third, expected a parameter, got none of that path"):
    maskopt.nnx.freeze_statistics(
      model, {"first": True, "second": True, "norm": True, "third": 1 > 0}
    )
  with pytest.raises(TypeError, match="expected an nnx module, got dict"):
    maskopt.nnx.freeze_statistics({}, True)
