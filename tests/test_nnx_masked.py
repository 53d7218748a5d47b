"""Masked layers: zero gradients that cost nothing, everything else as in Flax's own layers."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from pairs import every_pair

import maskopt
import maskopt.nnx
from maskopt._slicer import count_flops

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def lenient():
  """Flax promotes dtypes and ranks."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def data(*shape):
  return RNG.standard_normal(shape).astype(np.float32)


UNITS = np.array([True, False, True, True, False, True])
SCATTERED = RNG.random((4, 6)) < 0.6
LSHAPE = ~((np.arange(4)[:, None] < 1) | (np.arange(6) >= 4))  # two blocks train

LINEAR = [
  (True, False),
  (False, True),
  (UNITS, UNITS),
  (np.arange(4)[:, None] < 2, False),
  (SCATTERED, np.array([True] * 5 + [False])),
  (LSHAPE, True),
  (np.ones((4, 6), bool), False),
]


def layer_and_plain(name, kernel, bias):
  rngs = {"rngs": nnx.Rngs(0)}
  masks = {"kernel_freeze_mask": kernel, "bias_freeze_mask": bias}
  if name == "linear":
    return (
      maskopt.nnx.MaskedLinear(4, 6, **masks, rngs=nnx.Rngs(0)),
      nnx.Linear(4, 6, **rngs),
      data(5, 4),
    )
  if name == "conv":
    return (
      maskopt.nnx.MaskedConv(4, 6, (3, 3), 2, **masks, rngs=nnx.Rngs(0)),
      nnx.Conv(4, 6, (3, 3), 2, **rngs),
      data(2, 6, 6, 4),
    )
  raise AssertionError(name)


def loss(m, x):
  return (m(x) ** 2).sum()


@every_pair(jit=[False, True], name=["linear", "conv"], masks=range(len(LINEAR)))
def test_gradients_are_flax_own_and_zero_where_frozen(name, masks, jit):
  masks = LINEAR[masks]
  masked, plain, x = layer_and_plain(name, *masks)
  wrap = nnx.jit if jit else lambda f: f
  (value, (g, dx)), (expected, (e, dxe)) = (
    wrap(nnx.value_and_grad(loss, argnums=(0, 1)))(m, jnp.asarray(x)) for m in (masked, plain)
  )
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(dx, dxe, rtol=1e-4, atol=1e-5)
  for key, mask in zip(("kernel", "bias"), masks, strict=True):
    frozen = np.broadcast_to(mask, g[key].shape)
    assert not np.any(np.array(g[key][...])[frozen])
    np.testing.assert_allclose(g[key][...], np.where(frozen, 0, e[key][...]), rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(masked(x), plain(x))


@pytest.mark.parametrize("mask", [np.arange(7)[:, None] < 5, np.arange(3) < 1, True])
def test_embedding_and_its_transpose(mask):
  masked = maskopt.nnx.MaskedEmbed(7, 3, embedding_freeze_mask=mask, rngs=nnx.Rngs(0))
  plain = nnx.Embed(7, 3, rngs=nnx.Rngs(0))
  i = jnp.array([[0, 6], [5, 6]])

  def fun(m):
    return (m.attend(m(i)) ** 2).sum()

  g, e = nnx.jit(nnx.grad(fun))(masked)["embedding"], nnx.grad(fun)(plain)["embedding"]
  np.testing.assert_allclose(g[...], np.where(mask, 0, e[...]), rtol=1e-4, atol=1e-5)


def test_lstm_in_a_scan():
  units = np.array([True, False, True])
  options = {
    "kernel_freeze_mask": units,
    "recurrent_kernel_freeze_mask": {"f": True, "g": units},
    "bias_freeze_mask": {"o": units},
  }
  masked = nnx.RNN(maskopt.nnx.MaskedLSTMCell(4, 3, **options, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
  plain = nnx.RNN(nnx.LSTMCell(4, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
  x = data(2, 5, 4)
  g, e = nnx.jit(nnx.grad(loss))(masked, x), nnx.grad(loss)(plain, x)
  mask = maskopt.nnx.freeze_mask(masked)
  assert mask["cell"]["hf"]["kernel"] is True and mask["cell"]["hi"]["kernel"] is False
  assert mask["cell"]["if_"]["kernel"].tolist() == [units.tolist()]
  for path, x in nnx.to_flat_state(e):
    frozen = mask[path[0]][path[1]][path[2]]
    got = g[path[0]][path[1]][path[2]]
    np.testing.assert_allclose(got[...], np.where(frozen, 0, x[...]), rtol=1e-3, atol=1e-5)


def test_attention_heads():
  heads = np.array([[True], [False], [True]])
  options = {"decode": False, "rngs": nnx.Rngs(0)}
  masked = maskopt.nnx.MaskedMultiHeadAttention(
    3, 12, kernel_freeze_mask={"query": heads, "value": heads, "out": heads[..., None]},
    bias_freeze_mask=True, decode=False, rngs=nnx.Rngs(0),
  )  # fmt: skip
  plain = nnx.MultiHeadAttention(3, 12, **options)
  x = data(2, 5, 12)
  g, e = nnx.jit(nnx.grad(loss))(masked, x), nnx.grad(loss)(plain, x)
  mask = maskopt.nnx.freeze_mask(masked)
  for path, x in nnx.to_flat_state(e):
    frozen, got = mask[path[0]][path[1]], g[path[0]][path[1]]
    np.testing.assert_allclose(got[...], np.where(frozen, 0, x[...]), rtol=1e-3, atol=1e-4)
  assert mask["key"]["kernel"] is False and mask["out"]["bias"] is True


def flops(fun, model, x):
  graphdef, state = nnx.split(model)

  def run(s, x):
    return nnx.as_pure(fun(nnx.merge(graphdef, s), x))

  compiled = jax.jit(run).lower(state, x).compile()
  return count_flops(jax.make_jaxpr(run)(state, x)), compiled.cost_analysis()["flops"]


def test_a_tenth_of_the_units_costs_a_tenth():
  """Within 2% of forward + dW of the trainable tenth, by the program and by the compiler."""
  batch, width, out = 64, 500, 640
  x = jnp.asarray(data(batch, width))
  mask = np.arange(out) >= out // 10
  masked = maskopt.nnx.MaskedLinear(
    width, out, kernel_freeze_mask=mask, bias_freeze_mask=mask, rngs=nnx.Rngs(0)
  )
  plain = nnx.Linear(width, out, rngs=nnx.Rngs(0))
  one = 2 * batch * width * out
  assert flops(nnx.grad(loss), plain, x)[0] == 2 * one
  counted, compiled = flops(nnx.grad(loss), masked, x)
  assert counted == one + one // 10
  plain_compiled = flops(nnx.grad(loss), plain, x)[1]
  assert plain_compiled - compiled >= 0.9 * one * 0.98
  # Scattered units, and a layer below that trains: dx is whole, as it must be.
  mask = RNG.permutation(mask)
  masked.kernel_freeze_mask = masked.bias_freeze_mask = mask
  below = nnx.Linear(width, width, rngs=nnx.Rngs(1))
  stack = nnx.Sequential(below, masked)
  counted, _ = flops(nnx.grad(loss), stack, x)
  square = 2 * batch * width * width
  assert counted == 2 * square + 2 * one + one // 10


def test_wholly_frozen_layer_passes_only_the_input_gradient():
  frozen = maskopt.nnx.MaskedLinear(
    32, 32, kernel_freeze_mask=True, bias_freeze_mask=True, rngs=nnx.Rngs(0)
  )
  stack = nnx.Sequential(nnx.Linear(32, 32, rngs=nnx.Rngs(1)), frozen)
  one = 2 * 8 * 32 * 32
  assert flops(nnx.grad(loss), stack, jnp.ones((8, 32)))[0] == 4 * one  # two forward, dx, one dW


def test_slices_once_more_through_our_gradient():
  """With `maskopt.nnx.grad` what lies below a frozen stack is not differentiated at all."""
  layer = maskopt.nnx.MaskedLinear(32, 40, kernel_freeze_mask=np.arange(40) >= 4, rngs=nnx.Rngs(0))
  stack = nnx.Sequential(nnx.Linear(32, 32, rngs=nnx.Rngs(1)), layer)
  mask = maskopt.union(maskopt.nnx.freeze_mask(stack), {"layers": {"0": True, "1": False}})
  x = jnp.ones((8, 32))
  assert flops(maskopt.nnx.grad(loss, mask), stack, x)[0] == (
    2 * 8 * 32 * 32 + 2 * 8 * 32 * 40 + 2 * 8 * 32 * 4
  )


def test_optimizer_reads_the_masks_and_plain_adamw_decays():
  def trained(make):
    layer = maskopt.nnx.MaskedLinear(
      4, 6, kernel_freeze_mask=UNITS, bias_freeze_mask=UNITS, rngs=nnx.Rngs(0)
    )
    before, optimizer = np.array(layer.kernel[...]), make(layer)
    for _ in range(3):
      optimizer.update(layer, nnx.grad(loss)(layer, data(5, 4)))
    return before.view(np.uint32) == np.array(layer.kernel[...]).view(np.uint32)

  adamw = optax.adamw(0.1, weight_decay=0.1)
  same = trained(lambda m: maskopt.nnx.Optimizer(m, adamw))
  assert same[:, UNITS].all() and not same[:, ~UNITS].any()
  assert not trained(lambda m: nnx.Optimizer(m, adamw, wrt=nnx.Param))[:, UNITS].any()


def test_contradicting_masks_are_an_error_and_stricter_ones_are_not():
  model = nnx.Dict(
    a=maskopt.nnx.MaskedLinear(4, 6, kernel_freeze_mask=UNITS, rngs=nnx.Rngs(0)),
    b=maskopt.nnx.MaskedLinear(4, 6, bias_freeze_mask=True, rngs=nnx.Rngs(0)),
  )
  message = (
    "at a/kernel, expected 16 elements frozen, as the module's own mask says, got a mask that "
    "trains some; at b/bias, expected 6 elements.*maskopt.union"
  )
  for call in (
    lambda mask: maskopt.nnx.Optimizer(model, optax.sgd(0.1), mask),
    lambda mask: maskopt.nnx.grad(lambda m: m["a"](jnp.ones((1, 4))).sum(), mask)(model),
    lambda mask: maskopt.nnx.layers(model, mask),
  ):
    with pytest.raises(ValueError, match=message):
      call(False)
    call(True)
    call(
      maskopt.union(
        maskopt.nnx.freeze_mask(model), {"a": False, "b": {"kernel": True, "bias": False}}
      )
    )
  optimizer = maskopt.nnx.Optimizer(model, optax.sgd(0.1))
  assert maskopt.mask_of(optimizer.opt_state).freeze_mask["b"]["bias"] is True
  assert [x.trainable for x in maskopt.nnx.layers(model)] == ["partial", "partial"]


def test_masks_travel_with_the_module():
  layer = maskopt.nnx.MaskedLinear(4, 6, kernel_freeze_mask=SCATTERED, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(layer)
  hash(graphdef)
  copies = [nnx.clone(layer), copy.deepcopy(layer), nnx.merge(graphdef, state)]
  copies.append(nnx.merge(pickle.loads(pickle.dumps(graphdef)), state))
  abstract = nnx.eval_shape(
    lambda: maskopt.nnx.MaskedLinear(4, 6, kernel_freeze_mask=SCATTERED, rngs=nnx.Rngs(0))
  )
  nnx.update(abstract, nnx.state(nnx.Linear(4, 6, rngs=nnx.Rngs(0))))
  for other in [*copies, abstract]:
    assert np.array_equal(maskopt.nnx.freeze_mask(other)["kernel"], SCATTERED)
    assert not np.any(nnx.grad(loss)(other, data(5, 4))["kernel"][...][SCATTERED])
  assert [x.shape for x in jax.tree.leaves(state)] == [(6,), (4, 6)]  # no mask among the arrays


def test_orbax_restores_into_a_module_with_its_masks(tmp_path):
  import orbax.checkpoint as ocp

  layer = maskopt.nnx.MaskedLinear(4, 6, kernel_freeze_mask=UNITS, rngs=nnx.Rngs(0))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "layer", nnx.state(layer))
    checkpointer.wait_until_finished()
    other = maskopt.nnx.MaskedLinear(4, 6, kernel_freeze_mask=UNITS, rngs=nnx.Rngs(1))
    nnx.update(other, checkpointer.restore(tmp_path / "layer", nnx.state(other)))
  assert np.array_equal(other.kernel[...], layer.kernel[...])
  assert np.array_equal(maskopt.nnx.freeze_mask(other)["kernel"], UNITS[None])


def test_vmap_and_bfloat16():
  layer = maskopt.nnx.MaskedLinear(
    4, 6, kernel_freeze_mask=UNITS, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
  )
  x = jnp.asarray(data(3, 5, 4))
  graphdef, state = nnx.split(layer)
  g = jax.vmap(
    jax.grad(lambda s, x: loss(nnx.merge(graphdef, s), x).astype(jnp.float32)), (None, 0)
  )
  kernel = g(state, x)["kernel"][...]
  assert kernel.shape == (3, 4, 6) and not np.any(kernel[..., UNITS])
  assert np.all(kernel[..., ~UNITS])


def test_mask_can_be_set_and_bad_ones_are_named():
  layer = maskopt.nnx.MaskedLinear(4, 6, use_bias=False, rngs=nnx.Rngs(0))
  layer.kernel_freeze_mask = UNITS
  assert not np.any(nnx.grad(loss)(layer, data(5, 4))["kernel"][...][:, UNITS])
  for mask, error, message in (
    (np.ones(5, bool), ValueError, r"`MaskedLinear\(kernel_freeze_mask=...\)`: at kernel, "
     r"expected bool broadcastable to \(4, 6\), got bool of shape \(5,\)"),
    (jnp.ones(6, bool), TypeError, "expected a bool or NumPy bools.*A layer's own mask is part"),
    (np.ones(6), TypeError, "expected bool broadcastable"),
    ("all", TypeError, "expected a bool or NumPy bools"),
  ):  # fmt: skip
    with pytest.raises(error, match=message):
      layer.kernel_freeze_mask = mask
  with pytest.raises(ValueError, match="at bias, expected a parameter, got none"):
    layer.bias_freeze_mask = True
  with pytest.raises(ValueError, match="at q, expected one of query, key, value, out"):
    maskopt.nnx.MaskedMultiHeadAttention(
      2, 4, kernel_freeze_mask={"q": True}, decode=False, rngs=nnx.Rngs(0)
    )
  with pytest.raises(ValueError, match=r"`MaskedLinear\(bias_freeze_mask=...\)`.*expected bool"):
    maskopt.nnx.MaskedLSTMCell(2, 3, bias_freeze_mask=np.ones(4, bool), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_expanded_layers_keep_the_old_units(kind):
  if kind == "linear":
    old, x = nnx.Linear(4, 6, rngs=nnx.Rngs(0)), data(5, 4)
    new = maskopt.nnx.ExpandedLinear(old, 3, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(1))
  else:
    old, x = nnx.Conv(4, 6, (3,), padding="VALID", rngs=nnx.Rngs(0)), data(2, 7, 4)
    new = maskopt.nnx.ExpandedConv(old, 3, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(1))
  optimizer = maskopt.nnx.Optimizer(new, optax.adamw(0.1))
  assert np.all(new.kernel[..., 6:] == 1)
  for _ in range(2):
    optimizer.update(new, nnx.grad(loss)(new, x))
  for key in ("kernel", "bias"):
    before, after = (np.array(getattr(m, key)[...]) for m in (old, new))
    assert np.array_equal(before.view(np.uint32), after[..., :6].view(np.uint32))
  assert not np.any(new.kernel[..., 6:] == 1)
  np.testing.assert_allclose(new(x)[..., :6], old(x), rtol=1e-5, atol=1e-6)


def test_expanded_layers_refuse_what_they_cannot_grow():
  old = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
  with pytest.raises(
    ValueError, match="at new_features, expected a positive number of units, got 0"
  ):
    maskopt.nnx.ExpandedLinear(old, 0, rngs=nnx.Rngs(0))
  with pytest.raises(TypeError, match="at layer, expected an nnx.Conv, got Linear"):
    maskopt.nnx.ExpandedConv(old, 1, rngs=nnx.Rngs(0))
  grouped = nnx.Conv(4, 6, (3,), feature_group_count=2, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="without feature groups or weight mask, got 2 groups"):
    maskopt.nnx.ExpandedConv(grouped, 2, rngs=nnx.Rngs(0))


def test_freeze_mask_of_shared_layers_and_of_no_module():
  class Tied(nnx.Module):
    def __init__(self):
      self.a = maskopt.nnx.MaskedLinear(3, 3, kernel_freeze_mask=np.arange(3) < 1, rngs=nnx.Rngs(0))
      self.b = maskopt.nnx.MaskedLinear(3, 3, kernel_freeze_mask=np.arange(3) > 1, rngs=nnx.Rngs(0))
      self.b.kernel = self.a.kernel

  mask = maskopt.nnx.freeze_mask(Tied())
  assert mask["a"]["kernel"].tolist() == [[True, False, True]] and "kernel" not in mask["b"]
  with pytest.raises(TypeError, match="expected an nnx module, got dict"):
    maskopt.nnx.freeze_mask({})
  assert maskopt.nnx.freeze_mask(nnx.Dict()) == {}


def test_second_derivatives_and_batches_are_those_of_the_library_where_something_trains():
  mask = np.arange(12).reshape(4, 3) % 3 > 0
  layer = maskopt.nnx.MaskedLinear(4, 3, kernel_freeze_mask=mask, rngs=nnx.Rngs(0))
  plain = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4)), jnp.float32)

  def of(layer):
    graphdef, state = nnx.split(layer)

    def loss(kernel, x):
      state["kernel"] = state["kernel"].replace(kernel)
      return (nnx.merge(graphdef, state)(x) ** 3).sum()

    return loss

  kernel = plain.kernel[...]
  for k in (0, 1):
    ours, theirs = (jax.hessian(of(m), argnums=k)(kernel, x) for m in (layer, plain))
    if k == 0:  # the gradient's frozen elements are zero, whatever moves
      theirs = np.where(mask[:, :, None, None], 0, theirs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
  batched = jax.vmap(jax.grad(of(layer)), (None, 0))(kernel, x)
  expected = jax.vmap(jax.grad(of(plain)), (None, 0))(kernel, x)
  np.testing.assert_allclose(batched, np.where(mask, 0, expected), rtol=1e-5, atol=1e-5)
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(lambda x: of(layer)(kernel, x), (x,), (x,))
