"""`maskopt.nnx.grad`: `nnx.grad` where elements train, zero elsewhere, and less computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import maskopt
import maskopt.nnx
from maskopt._slicer import count_flops

RNG = np.random.default_rng(0)
X = RNG.standard_normal((6, 4)).astype(np.float32)


@pytest.fixture(autouse=True)
def lenient():
  """Flax promotes dtypes and ranks."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


class Net(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(4, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.drop = nnx.Dropout(0.3, rngs=rngs)
    self.second = nnx.Linear(8, 3, rngs=rngs)
    self.calls = nnx.Variable(jnp.array(0))

  def __call__(self, x):
    self.calls[...] += 1
    self.seen = nnx.Intermediate(x.mean())
    return self.second(nnx.relu(self.drop(self.norm(self.first(x)))))


MASK = {
  "first": {"kernel": np.arange(8) < 6, "bias": True},
  "norm": {"scale": np.arange(8) < 3, "bias": False},
  "second": {"kernel": RNG.random((8, 3)) < 0.7, "bias": False},
}


def loss(model, x=X):
  return (model(x) ** 2).mean()


def by_path(state):
  return {"/".join(map(str, p)): x.get_raw_value() for p, x in nnx.to_flat_state(nnx.state(state))}


def expected_zeros(path, g, mask=MASK):
  layer, name = path.split("/")
  return np.where(np.broadcast_to(mask[layer][name], g.shape), 0, g)


@pytest.mark.parametrize("jit", [False, True])
def test_same_as_nnx_grad_and_modules_change_alike(jit):
  wrap = nnx.jit if jit else lambda f: f
  ours, theirs = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
  for _ in range(2):
    value, g = wrap(maskopt.nnx.value_and_grad(loss, MASK))(ours, X)
    expected_value, expected = wrap(nnx.value_and_grad(loss))(theirs, X)
  np.testing.assert_allclose(value, expected_value, rtol=1e-5)
  g, expected = by_path(g), by_path(expected)
  assert list(g) == list(expected)
  for path, x in expected.items():
    np.testing.assert_allclose(g[path], expected_zeros(path, x), rtol=1e-4, atol=1e-6)
  ours, theirs = by_path(ours), by_path(theirs)
  assert list(ours) == list(theirs) and "seen" in ours and ours["calls"] == 2
  for path, x in theirs.items():
    data = jax.random.key_data if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else (lambda v: v)
    np.testing.assert_allclose(data(ours[path]), data(x), rtol=1e-5)


def test_packed_gradients_hold_trainable_values_only():
  g = maskopt.nnx.grad(loss, MASK, packed=True)(Net(nnx.Rngs(0)))
  assert g["first"]["kernel"].get_raw_value().values.shape == (4, 2)
  assert g["first"]["bias"].get_raw_value().values is None
  whole = maskopt.unpack(nnx.as_pure(g), nnx.as_pure(nnx.state(Net(nnx.Rngs(0)), nnx.Param)), MASK)
  assert whole["first"]["kernel"].shape == (4, 8)


def test_module_in_aux_and_among_other_arguments():
  student, teacher = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), Net(nnx.Rngs(1))

  def fun(x, student, *, teacher):
    y = teacher(x)
    return ((student(x) - y) ** 2).mean(), {"new": nnx.Linear(1, 1, rngs=nnx.Rngs(0)), "name": "n"}

  mask = {"kernel": np.arange(3) < 1, "bias": False}
  ((_, aux), g) = maskopt.nnx.value_and_grad(fun, mask, argnums=1, has_aux=True)(
    X, student, teacher=teacher
  )
  assert isinstance(aux["new"], nnx.Linear) and aux["name"] == "n"
  assert teacher.calls[...] == 1
  y = Net(nnx.Rngs(1))(X)
  expected = nnx.grad(lambda m: ((m(X) - y) ** 2).mean())(student)
  np.testing.assert_allclose(
    g["kernel"][...], np.where(mask["kernel"], 0, expected["kernel"][...]), rtol=1e-5
  )


def test_several_arguments_and_a_plain_array():
  a, b = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(1))

  def fun(a, x, b):
    return (a(x) * b(x)).sum()

  masks = ({"kernel": True, "bias": False}, np.arange(4) < 2, None)
  ga, gx, gb = maskopt.nnx.grad(fun, masks, argnums=(0, 1, 2))(a, jnp.asarray(X), b)
  ea, ex, eb = nnx.grad(fun, argnums=(0, 1, 2))(a, jnp.asarray(X), b)
  assert not np.any(ga["kernel"][...])
  np.testing.assert_allclose(ga["bias"][...], ea["bias"][...], rtol=1e-5)
  np.testing.assert_allclose(gx, np.where(np.arange(4) < 2, 0, ex), rtol=1e-5)
  np.testing.assert_allclose(gb["kernel"][...], eb["kernel"][...], rtol=1e-5)
  g = maskopt.nnx.grad(fun, argnums=(2,))(a, X, b)
  assert isinstance(g, tuple) and len(g) == 1


def test_variable_shared_between_arguments_has_one_gradient():
  a = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
  b = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(1))
  b.kernel = a.kernel

  def fun(a, b):
    return (b(a(X)) ** 2).sum()

  g = maskopt.nnx.grad(fun, {"kernel": np.arange(4) < 2})(a, b)
  expected = jax.grad(lambda k: ((X @ k @ k) ** 2).sum())(a.kernel[...])
  expected = np.where(np.arange(4) < 2, 0, expected)
  np.testing.assert_allclose(g["kernel"][...], expected, rtol=1e-4, atol=1e-5)


def test_diff_state_and_its_filter():
  model = nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0))
  wrt = nnx.DiffState(0, nnx.LoRAParam)
  g = maskopt.nnx.grad(
    lambda m: (m(X) ** 2).sum(), {"lora": {"lora_a": True, "lora_b": False}}, wrt
  )
  e = nnx.grad(lambda m: (m(X) ** 2).sum(), argnums=wrt)
  g, e = by_path(g(model)), by_path(e(model))
  assert list(g) == list(e) == ["lora/lora_a", "lora/lora_b"]
  np.testing.assert_allclose(g["lora/lora_b"], e["lora/lora_b"], rtol=1e-5)
  with pytest.raises(ValueError, match="at kernel, expected a variable that wrt=LoRAParam selects"):
    maskopt.nnx.grad(lambda m: m(X).sum(), {"kernel": True, "lora": False}, wrt)(model)


def test_mask_from_the_optimizer():
  import optax

  model = Net(nnx.Rngs(0))
  optimizer = maskopt.nnx.Optimizer(model, optax.adam(0.1), MASK)

  @nnx.jit
  def step(model, optimizer):
    grads = maskopt.nnx.grad(loss, maskopt.mask_of(optimizer.opt_state), packed=True)(model)
    optimizer.update(model, grads)

  before = np.array(model.first.kernel[...])
  step(model, optimizer)
  moved = (before != np.array(model.first.kernel[...])).any(axis=0)
  assert moved.tolist() == [False] * 6 + [True] * 2


def test_frozen_layers_cost_no_backward_flops():
  layers = nnx.List([nnx.Linear(32, 32, rngs=nnx.Rngs(k)) for k in range(4)])
  x = jnp.ones((8, 32))

  class Deep(nnx.Module):
    def __init__(self):
      self.layers = layers

    def __call__(self, x):
      for layer in self.layers:
        x = layer(x)
      return x

  mask = {
    "layers": {"0": True, "1": True, "2": True, "3": {"kernel": np.arange(32) < 24, "bias": True}}
  }
  graphdef, state = nnx.split(Deep())

  def flops(transform):
    def run(s):
      return nnx.as_pure(transform(lambda m: m(x).sum())(nnx.merge(graphdef, s)))

    return count_flops(jax.make_jaxpr(run)(state))

  one = 2 * 8 * 32 * 32
  assert flops(nnx.grad) == 10 * one  # three activations, three dx, four dW
  assert flops(lambda f: maskopt.nnx.grad(f, mask)) == 3 * one + one // 4


def test_state_and_containers_of_modules_as_arguments():
  model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(model)
  mask = {"kernel": np.arange(3) < 1, "bias": True}
  expected = nnx.grad(loss)(model)["kernel"][...]
  expected = np.where(mask["kernel"], 0, expected)
  of_state = maskopt.nnx.grad(lambda s: loss(nnx.merge(graphdef, s)), mask)(state)
  np.testing.assert_allclose(of_state["kernel"][...], expected, rtol=1e-5)
  of_dict = maskopt.nnx.grad(lambda d: loss(d["m"]), {"m": mask})({"m": model})
  np.testing.assert_allclose(of_dict["m"]["kernel"][...], expected, rtol=1e-5)


def test_errors_name_argument_and_module():
  model = Net(nnx.Rngs(0))
  with pytest.raises(ValueError, match="expected argnums below 1, got 1"):
    maskopt.nnx.grad(loss, argnums=1)(model)
  with pytest.raises(ValueError, match=r"expected each of argnums once, got \[0, -1\]"):
    maskopt.nnx.grad(loss, argnums=(0, -1))(model)
  with pytest.raises(ValueError, match="expected a tuple of 2 masks, got one of 1"):
    maskopt.nnx.grad(lambda a, b: a(X).sum(), (True,), argnums=(0, 1))(model, model)
  with pytest.raises(ValueError, match="`maskopt.nnx.grad.*at third, expected a parameter"):
    maskopt.nnx.grad(loss, {"first": True, "norm": True, "second": True, "third": True})(model)


def test_mask_and_loss_in_the_wrong_order():
  model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  for mask in ({"kernel": True}, nnx.state(model)):
    with pytest.raises(TypeError, match="expected a function .* the mask comes second"):
      maskopt.nnx.grad(mask, lambda m: m(jnp.ones((1, 2))).sum())
