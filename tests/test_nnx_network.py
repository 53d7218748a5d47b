"""`maskopt.nnx.layers`, `trainable_state`, `assign`, `freeze_mask`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import maskopt
import maskopt.nnx

RNG = np.random.default_rng(0)


class Net(nnx.Module):
  """Written in another order than its state is sorted."""

  def __init__(self, rngs):
    self.stem = nnx.Linear(4, 8, rngs=rngs)
    self.act = nnx.Dropout(0.1, rngs=rngs)
    self.body = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(11)])
    self.again = self.stem
    self.a_head = nnx.Linear(8, 2, rngs=rngs)


def test_layers_in_network_order_with_what_trains():
  mask = {"stem": {"kernel": np.arange(8) < 4, "bias": True}, "body": True, "a_head": False}
  found = maskopt.nnx.layers(Net(nnx.Rngs(0)), mask)
  names = ["stem", "act", *(f"body/{k}" for k in range(11)), "a_head"]
  # The state files a shared module under the first of its names in sorted order.
  assert [x.name for x in found][1:] == names[1:]
  assert [x.trainable for x in found] == ["partial", True] + [False] * 11 + [True]
  assert isinstance(found[-1].module, nnx.Linear) and found[-1].module.out_features == 2
  assert all(x.trainable for x in maskopt.nnx.layers(Net(nnx.Rngs(0))) if x.name != "act")


def test_layers_of_a_sequential_and_of_one_layer():
  rngs = nnx.Rngs(0)
  model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.relu, nnx.Linear(3, 1, rngs=rngs))
  found = maskopt.nnx.layers(model, True)
  assert found[1].module is nnx.relu and not any(x.trainable for x in found)
  mask = {"layers": {"0": True, "2": False}}
  assert [x.trainable for x in maskopt.nnx.layers(model, mask)] == [False, True, True]
  (only,) = maskopt.nnx.layers(
    model.layers[0], {"kernel": maskopt.runtime(jnp.arange(3) < 1), "bias": True}
  )
  assert only.name == "" and only.module is model.layers[0] and only.trainable == "partial"


def test_layers_without_parameters_follow_the_module_around_them():
  """As in Keras, where `trainable` is a flag that only freezing something larger takes away."""

  class Block(nnx.Module):
    def __init__(self, rngs):
      self.drop, self.dense = nnx.Dropout(0.1, rngs=rngs), nnx.Linear(2, 2, rngs=rngs)

  model = nnx.List([Block(nnx.Rngs(0)), Block(nnx.Rngs(1))])
  net = nnx.Dict(blocks=model)
  found = {
    x.name: x.trainable for x in maskopt.nnx.layers(net, {"blocks": {"0": True, "1": False}})
  }
  assert found == {
    "blocks/0/drop": False, "blocks/0/dense": False, "blocks/1/drop": True, "blocks/1/dense": True,
  }  # fmt: skip
  nothing = nnx.Sequential(nnx.relu, nnx.Dropout(0.1, rngs=nnx.Rngs(0)))
  assert all(x.trainable is True for x in maskopt.nnx.layers(nothing))


class Tied(nnx.Module):
  """The state files the shared embedding under `decoder`, which is first in sorted order."""

  def __init__(self, rngs):
    self.encoder = nnx.Embed(5, 3, rngs=rngs)
    self.middle = nnx.Linear(3, 3, rngs=rngs)
    self.decoder = nnx.Linear(3, 5, rngs=rngs)
    self.decoder.kernel = self.encoder.embedding


RULES = [
  ("encoder", True),
  ("decoder/kernel", True),
  ("enc*/embedding", True),
  (0, True),
  (nnx.PathContains("encoder"), True),
  (re.compile("embedding"), True),
  (lambda path, leaf: path == "encoder/embedding", True),
]


@pytest.mark.parametrize("rule", RULES)
def test_rules_name_shared_weights_by_any_of_their_paths(rule):
  mask = nnx.to_pure_dict(maskopt.build_mask(Tied(nnx.Rngs(0)), [rule]))
  assert mask["decoder"] == {"bias": False, "kernel": True}
  assert mask["middle"] == {"bias": False, "kernel": False}


def test_rules_on_shared_weights_that_can_never_apply():
  model = Tied(nnx.Rngs(0))
  with pytest.raises(
    ValueError, match="a parameter left for this rule, got none: rules.0. 'encode"
  ):
    maskopt.build_mask(model, [("encoder", True), ("decoder/kernel", False)])
  with pytest.raises(ValueError, match=r"none \(near paths: encoder, decoder\)"):
    maskopt.build_mask(model, [("encodr", True)])
  factors = nnx.to_pure_dict(maskopt.build_multipliers(model, [("encoder", 0.5)]))
  assert factors["decoder"] == {"bias": 1.0, "kernel": 0.5}


@pytest.mark.parametrize(
  "mask",
  [
    {"encoder": True, "middle": False, "decoder": {"bias": False}},
    {"decoder": {"kernel": True, "bias": False}, "middle": False},
    {"encoder": {"embedding": True}, "middle": False, "decoder": {"kernel": True, "bias": False}},
  ],
)
def test_every_look_at_shared_weights_takes_a_mask_by_any_of_their_names(mask):
  model = Tied(nnx.Rngs(0))
  layers = {x.name: x.trainable for x in maskopt.nnx.layers(model, mask)}
  assert layers == {"encoder": False, "middle": True, "decoder": "partial"}
  report = maskopt.summary(model, mask)
  assert report.parameters == 32 and report.frozen == 15
  assert report.shared == (("encoder/embedding", "decoder/kernel"),)
  assert "Shared, counted once: encoder/embedding is decoder/kernel" in str(report)
  before = maskopt.snapshot(model)
  model.encoder.embedding[...] = model.encoder.embedding[...].at[0, 0].set(7.0)
  audit = maskopt.audit(before, model, mask)
  assert [leaf.path for leaf in audit.leaves if leaf.changed] == ["decoder/kernel"]
  assert maskopt.metrics(model, mask)["trainable_parameters"] == 17
  state = maskopt.nnx.trainable_state(model, mask)
  assert "kernel" not in state["decoder"] and "encoder" not in state


def test_shared_layers_count_in_each_that_shares():
  mask = {"encoder": False, "middle": True, "decoder": {"bias": True}}
  found = {x.name: x.trainable for x in maskopt.nnx.layers(Tied(nnx.Rngs(0)), mask)}
  assert found == {"encoder": True, "middle": False, "decoder": "partial"}
  with pytest.raises(
    ValueError, match="summary.*at encoder, expected the mask of decoder/kernel, w"
  ):
    maskopt.summary(Tied(nnx.Rngs(0)), {"encoder": True, "middle": False, "decoder": False})


def test_layers_with_a_wrong_mask():
  with pytest.raises(ValueError, match="`maskopt.nnx.layers.*at tail, expected a parameter"):
    maskopt.nnx.layers(Net(nnx.Rngs(0)), {"stem": True, "body": True, "a_head": True, "tail": True})
  with pytest.raises(TypeError, match="expected an nnx module, got dict"):
    maskopt.nnx.layers({})


def test_trainable_state_is_what_update_puts_back():
  model = Net(nnx.Rngs(0))
  mask = maskopt.build_mask(
    model, [("a_head/bias", False), ("body/10", maskopt.train_only(maskopt.units(0))), (..., True)]
  )
  state = maskopt.nnx.trainable_state(model, mask)
  paths = ["/".join(map(str, p)) for p, _ in nnx.to_flat_state(state)]
  assert paths == ["a_head/bias", "body/10/bias", "body/10/kernel"]
  state = jax.tree.map(jnp.copy, state)  # as of nnx.state, its variables were the model's own
  before = np.array(model.body[10].kernel[...])
  model.body[10].kernel[...] = jnp.zeros((8, 8))
  nnx.update(model, state)
  assert np.array_equal(model.body[10].kernel[...], before)
  assert not nnx.to_flat_state(maskopt.nnx.trainable_state(model, True))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_assign_writes_the_chosen_and_keeps_the_bits_of_the_rest(dtype):
  layer = nnx.Linear(4, 5, param_dtype=dtype, rngs=nnx.Rngs(0))
  view = np.uint32 if dtype == jnp.float32 else np.uint16
  kernel = np.array(layer.kernel[...])
  kernel.view(view)[0, 0] = 0x7F81 if dtype == jnp.bfloat16 else 0x7FA00001
  layer.kernel[...] = jnp.asarray(kernel)
  kernel = np.array(layer.kernel[...])
  for where, values in (
    (np.s_[:, 1], [1.0, 2.0, 3.0, 4.0]),
    (np.s_[:, [3, 2]], np.arange(8.0).reshape(4, 2)),
    (np.s_[[3, 1], [4, 4]], [7.0, 8.0]),
    (np.s_[-1], 2),
    (np.arange(5) == 3, -0.0),
    ((np.arange(20).reshape(4, 5) % 3 == 1), 6.5),
    (np.s_[..., 4:], jnp.full((4, 1), jnp.nan)),
  ):
    expected = kernel.copy()
    expected[np.broadcast_to(where, (4, 5)) if isinstance(where, np.ndarray) else where] = values
    maskopt.nnx.assign(layer, "kernel", where, values)
    assert np.array_equal(np.array(layer.kernel[...]).view(view), expected.view(view))
    kernel = expected


def test_assign_in_a_nested_module_under_jit():
  model = Net(nnx.Rngs(0))
  write = nnx.jit(lambda m, v: maskopt.nnx.assign(m, "body/3/bias", [0, 2], v))
  write(model, jnp.array([5.0, 6.0]))
  assert model.body[3].bias[...].tolist() == [5.0, 0.0, 6.0] + [0.0] * 5


def test_assign_refuses_what_does_not_fit():
  layer = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
  before = np.array(layer.kernel[...])
  for where, values, error, message in (
    (np.s_[:, 5], 0.0, ValueError, r"at kernel, expected indices of axis 1 in \[-5, 4\], got 5"),
    (np.s_[:, [0, -6]], 0.0, ValueError, r"indices of axis 1 in \[-5, 4\], got -6"),
    (np.s_[:, 0], [1.0, 2.0], ValueError, r"expected values that broadcast to \(4,\), got float64"),
    (np.s_[0, 0, 0], 0.0, ValueError, r"expected an index for shape \(4, 5\)"),
    (np.ones(3, bool), 0.0, ValueError, r"expected bools that broadcast to \(4, 5\)"),
    ("units", 0.0, TypeError, "expected an index of ints, slices and lists of ints"),
    (np.s_[:, 0], "x", TypeError, "expected numbers for float32"),
  ):
    with pytest.raises(error, match=message):
      maskopt.nnx.assign(layer, "kernel", where, values)
  with pytest.raises(
    ValueError, match=r"expected the path of a variable, got 'kernle' \(there are bias"
  ):
    maskopt.nnx.assign(layer, "kernle", 0, 0.0)
  with pytest.raises(TypeError, match="expected an nnx module, got State"):
    maskopt.nnx.assign(nnx.state(layer), "kernel", 0, 0.0)
  assert np.array_equal(before, layer.kernel[...])
  counts = nnx.Dict(n=nnx.Variable(jnp.arange(3)))
  with pytest.raises(TypeError, match="expected numbers for int32, got float64"):
    maskopt.nnx.assign(counts, "n", 0, 0.5)
  with jax.numpy_dtype_promotion("strict"):
    maskopt.nnx.assign(counts, "n", 0, 7)
  assert counts["n"][...].tolist() == [7, 1, 2]
