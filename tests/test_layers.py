import copy
import functools
import pickle
from typing import NamedTuple

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import maskopt
from maskopt._complaints import Complaint
from maskopt._layers import layer_paths, module_path, owner


def frozen_layers(params, pattern, layers=None):
  """The subtrees that a layer pattern freezes, by the public function."""
  mask = maskopt.build_mask(params, [(pattern, True)], layers=layers)
  from maskopt import _tree

  flat = _tree.flatten(mask)
  return sorted(
    {p.rpartition("/")[0] for p, x in zip(flat.paths, flat.leaves, strict=True) if x is True}
  )


class Written(nnx.Module):
  """Attributes are written in no sorted order."""

  def __init__(self, rngs):
    self.stem = nnx.Linear(2, 3, rngs=rngs)
    self.drop = nnx.Dropout(0.1, rngs=rngs)
    self.norm = nnx.BatchNorm(3, rngs=rngs)
    self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(11)])
    self.body = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.relu, nnx.Linear(3, 4, rngs=rngs))
    self.token = nnx.Param(jnp.ones(3))
    self.cell = nnx.LSTMCell(3, 3, rngs=rngs)
    self.attend = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False)
    self.by_name = nnx.Dict(z=nnx.Linear(1, 1, rngs=rngs), a=nnx.Linear(1, 1, rngs=rngs))
    self.width = 3
    self.rngs = rngs


class Chain(nnx.Module):
  def __init__(self, rngs):
    self.z = nnx.Linear(2, 2, rngs=rngs)
    self.y = nnx.Linear(2, 2, rngs=rngs)
    self.a = nnx.Linear(2, 2, rngs=rngs)


WRITTEN = [
  "stem",
  "drop",
  "norm",
  *(f"blocks/{k}" for k in range(11)),
  "body/layers/0",
  "body/layers/1",
  "body/layers/2",
  "token",
  "cell",
  "attend",
  "by_name/z",
  "by_name/a",
]


def test_nnx_order_is_that_of_the_attributes():
  assert layer_paths(Written(nnx.Rngs(0))) == WRITTEN


def test_an_abstract_nnx_module_has_the_same_order():
  assert layer_paths(nnx.eval_shape(lambda: Written(nnx.Rngs(0)))) == WRITTEN


@pytest.mark.parametrize(
  "rebuild",
  [
    nnx.clone,
    copy.deepcopy,
    lambda m: pickle.loads(pickle.dumps(m)),
    lambda m: jax.tree.map(lambda x: x, m),
    lambda m: nnx.merge(*nnx.split(m)),
  ],
)
def test_a_rebuilt_nnx_module_keeps_its_order(rebuild):
  assert layer_paths(rebuild(Chain(nnx.Rngs(0)))) == ["z", "y", "a"]


def test_an_nnx_module_keeps_its_order_in_and_after_jit():
  model, seen = Chain(nnx.Rngs(0)), []

  @nnx.jit
  def step(model):
    seen.append(layer_paths(model))
    model.y.bias[...] += 1.0

  step(model)
  assert seen == [["z", "y", "a"]] and layer_paths(model) == ["z", "y", "a"]


def test_an_edited_nnx_module_has_its_new_layer_last():
  model = Chain(nnx.Rngs(0))
  del model.z
  model.b = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  assert layer_paths(nnx.clone(model)) == ["y", "a", "b"]


def test_a_rebuilt_module_that_lost_its_order_is_an_error():
  class Loose(nnx.Module, pytree=False):
    def __init__(self, rngs):
      self.z = nnx.Linear(2, 2, rngs=rngs)
      self.a = nnx.Linear(2, 2, rngs=rngs)

  model = Loose(nnx.Rngs(0))
  assert layer_paths(model) == ["z", "a"]
  with pytest.raises(ValueError, match="got a rebuilt Loose .pytree=False., whose attributes are"):
    maskopt.build_mask(nnx.clone(model), [(-1, True)])
  assert frozen_layers(nnx.clone(model), -1, layers=["z", "a"]) == ["a"]


def test_an_nnx_state_takes_its_order_from_the_module():
  model = Written(nnx.Rngs(0))
  state = nnx.state(model, nnx.Param)
  assert frozen_layers(state, 13, layers=model) == ["blocks/10"]
  with pytest.raises(ValueError, match="a bare tree without numbers: .*layers=the nnx"):
    maskopt.build_mask(state, [(13, True)])


def test_a_shared_nnx_module_counts_once_where_it_is_first_written():
  class Tied(nnx.Module):
    def __init__(self, rngs):
      self.z = nnx.Linear(2, 2, rngs=rngs)
      self.m = nnx.Linear(2, 2, rngs=rngs)
      self.a = self.z  # the state knows the shared layer as `a`

  assert layer_paths(Tied(nnx.Rngs(0))) == ["a", "m"]
  assert frozen_layers(Tied(nnx.Rngs(0)), 0) == ["a"]


def test_a_shared_nnx_parameter_belongs_to_the_path_the_state_gives_it():
  class Tied(nnx.Module):
    def __init__(self, rngs):
      self.embed = nnx.Embed(5, 2, rngs=rngs)
      self.head = nnx.Linear(2, 5, use_bias=False, rngs=rngs)
      self.scale = nnx.Param(jnp.ones(2))
      self.again = self.scale

  assert layer_paths(Tied(nnx.Rngs(0))) == ["embed", "head", "again"]


def test_a_lone_layer_is_its_own_only_layer():
  assert layer_paths(nnx.Linear(2, 3, rngs=nnx.Rngs(0))) == [""]
  found = maskopt.build_multipliers(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), [(0, 0.5)])
  assert jax.tree.leaves(found) == [0.5, 0.5]


class Called(nn.Module):
  """Parts are called in no sorted order, and set up in another one still."""

  def setup(self):
    self.a = nn.Dense(3)
    self.b = nn.Conv(3, (3, 3))
    self.never = nn.Dense(2)

  def __call__(self, x, train):
    x = nn.relu(self.b(x))
    return self.a(x)


class Network(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.Conv(3, (3, 3), name="z_conv")(x)
    x = nn.Dropout(0.5, deterministic=not train)(x)
    x = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2), nn.softmax])(x)
    x = nn.remat(nn.Dense)(2)(x)
    x = nn.BatchNorm(use_running_average=not train)(x)
    scale = self.param("scale", nn.initializers.ones, (2,))
    x = nn.RNN(nn.LSTMCell(4))(x[:, 0] * scale[None, None])
    x = nn.MultiHeadDotProductAttention(2)(x, x)
    return nn.Dense(2, name="a_head")(x)


NETWORK = [
  "scale",  # a parameter of the network itself stands where the network is called
  "z_conv",
  "Dropout_0",
  "Dense_0",
  "Sequential_0/layers_1",
  "Dense_1",
  "Sequential_0/layers_3",
  "CheckpointDense_0",
  "BatchNorm_0",
  "LSTMCell_0",
  "MultiHeadDotProductAttention_0",
  "a_head",
]
IMAGE = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)


def abstract(module, *inputs):
  return jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x, True), *inputs)


def test_linen_order_is_that_of_the_calls():
  variables = abstract(Network(), IMAGE)
  assert layer_paths(variables, (Network(), IMAGE, True)) == NETWORK
  partial = functools.partial(Network(), train=False)
  assert layer_paths(variables["params"], (partial, IMAGE)) == NETWORK
  # The running statistics of the layer come along.
  got = frozen_layers(variables, -4, layers=(Network(), IMAGE, True))
  assert got == ["batch_stats/BatchNorm_0", "params/BatchNorm_0"]


def test_linen_order_takes_any_method_as_a_call():
  class Encoder(nn.Module):
    @nn.compact
    def encode(self, x):
      return nn.Dense(3, name="z")(nn.Dense(3, name="a")(x))

  class Coder(nn.Module):
    def setup(self):
      self.out = nn.Dense(3)
      self.embed = nn.Embed(5, 3)
      self.encoder = Encoder()

    def __call__(self, x):
      _ = self.embed.embedding  # seen, which sets it up, but not called yet
      return self.embed.attend(self.out(self.encoder.encode(x)))

  x = jax.ShapeDtypeStruct((1, 3), jnp.float32)
  params = jax.eval_shape(Coder().init, jax.random.key(0), x)
  assert layer_paths(params, (Coder(), x)) == ["encoder/a", "encoder/z", "out", "embed"]


def test_linen_scan_is_one_layer_for_each_in_its_body():
  class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return nn.Dense(3)(nn.LayerNorm()(x)), None

  class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Dense(3)(x)
      scan = nn.scan(Block, length=3, variable_axes={"params": 0}, split_rngs={"params": True})
      return scan()(x, None)[0]

  x = jax.ShapeDtypeStruct((1, 3), jnp.float32)
  params = jax.eval_shape(Stack().init, jax.random.key(0), x)
  expected = ["Dense_0", "ScanBlock_0/LayerNorm_0", "ScanBlock_0/Dense_0"]
  assert layer_paths(params, (Stack(), x)) == expected


def test_a_linen_layer_that_is_never_called_is_an_error():
  x = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)
  params = {"params": {k: {"kernel": np.ones((2, 2))} for k in ("a", "b", "never")}}
  with pytest.raises(
    ValueError, match="a layer for every parameter, got none for params/never/ker"
  ):
    maskopt.build_mask(params, [(0, True)], layers=(Called(), x, True))


def test_a_linen_module_without_inputs_is_an_error():
  with pytest.raises(TypeError, match=r"\(layers=...\)`.*Network without inputs.*\*example_inputs"):
    maskopt.build_mask({"a": np.ones(2)}, [(0, True)], layers=Network())


KEY = jax.random.key(0)


class Equinox(eqx.Module):
  stem: eqx.nn.Conv2d
  token: jax.Array
  layers: tuple
  act: object = eqx.field(static=True)
  body: eqx.nn.MLP
  alone: eqx.nn.MultiheadAttention

  def __init__(self):
    self.stem = eqx.nn.Conv2d(1, 2, 3, key=KEY)
    self.token = jnp.ones(3)
    self.layers = (eqx.nn.Linear(2, 3, key=KEY), jax.nn.relu, eqx.nn.Dropout(0.1))
    self.act = jax.nn.relu
    self.body = eqx.nn.MLP(2, 3, 4, 1, key=KEY)
    self.alone = eqx.nn.MultiheadAttention(2, 4, key=KEY)


def test_equinox_order_is_that_of_the_fields():
  expected = "stem token layers/0 layers/1 layers/2 body/layers/0 body/layers/1 alone".split()
  assert layer_paths(Equinox()) == expected
  # Functions and numbers filtered out leave their places.
  assert layer_paths(eqx.filter(Equinox(), eqx.is_inexact_array)) == expected
  assert frozen_layers(eqx.filter(Equinox(), eqx.is_inexact_array), 2) == ["layers/0"]


@pytest.mark.parametrize(
  ("tree", "expected"),
  [
    ({f"Dense_{k}": {"w": 1.0} for k in (10, 2, 1)}, ["Dense_1", "Dense_2", "Dense_10"]),
    ({f"dense{k}": {"w": 1.0} for k in ("", "_2", "_10")}, ["dense", "dense_2", "dense_10"]),
    ({"params": {"Block_1": {"a": {}}, "Block_0": {"b": {}}}}, ["Block_0", "Block_1"]),
    ({"params": {"Dense_0": {"w": 1.0, "b": 1.0}}, "stats": {}}, ["Dense_0"]),
    ({"net": [np.ones(1)] * 11}, [f"net/{k}" for k in range(11)]),
    ([(1.0, 1.0), (), (1.0, 1.0)], ["0", "1", "2"]),
    ({"mlp/~/linear_1": {"w": 1.0}, "mlp/~/linear_0": {"w": 1.0}}, None),
  ],
)
def test_numbered_siblings_of_a_bare_tree(tree, expected):
  expected = expected or ["mlp/~/linear_0", "mlp/~/linear_1"]
  assert layer_paths(tree) == expected


class Fields(NamedTuple):
  z: object
  a: object


@flax.struct.dataclass
class Struct:
  z: object
  a: object


@pytest.mark.parametrize("kind", [Fields, Struct])
def test_fields_are_layers_as_written_if_they_are_subtrees(kind):
  assert layer_paths(kind({"w": np.ones(2)}, {"w": np.ones(2)})) == ["z", "a"]
  assert layer_paths([kind(np.ones(2), np.ones(2)), ()]) == ["0", "1"]


@pytest.mark.parametrize(
  "tree",
  [
    Fields(np.ones(2), np.ones(2)),
    {"conv": {"w": 1.0}, "dense": {"w": 1.0}},
    {"conv_0": {"w": 1.0}, "dense_0": {"w": 1.0}},
    {"dense_1": {"w": 1.0}, "dense1": {"w": 1.0}},
    {"w": np.ones(2), "b": np.ones(2)},
    np.ones(3),
  ],
)
def test_an_index_on_a_bare_tree_without_numbers_is_an_error(tree):
  match = (
    "at rules\\[0\\] -1, expected a layer order, which an index needs, got a bare tree.*layers="
  )
  with pytest.raises(ValueError, match=match):
    maskopt.build_mask(tree, [(-1, True)])


KERAS = {k: {"kernel": np.ones((2, 2))} for k in ("conv", "dense", "dense_1")}
NAMES = ["input", "conv", "dense", "flatten", "dense_1", "softmax", "reshape"]


def test_names_without_parameters_are_layers():
  # Keras: for layer in model.layers[:-3]: layer.trainable = False
  assert frozen_layers(KERAS, slice(None, -3), layers=NAMES) == ["conv", "dense"]
  assert frozen_layers(KERAS, -3, layers=NAMES) == ["dense_1"]
  variables = {"params": KERAS}
  assert frozen_layers(variables, slice(None, -3), layers=NAMES) == ["params/conv", "params/dense"]
  full = [f"params/{name}" for name in NAMES]
  assert frozen_layers(variables, 1, layers=full) == ["params/conv"]


def test_the_innermost_of_nested_names_owns_a_parameter():
  layers = ["a", "a/b", "ab"]
  assert [owner(layers, p, {}) for p in ("a/w", "a/b/w", "ab/w", "c")] == [0, 1, 2, None]


def test_only_linen_variables_have_a_collection_in_front():
  assert module_path("params/a/w", {"params": {"a": {}}}) == "a/w"
  assert module_path("a/w", {"a": {"w": 1.0}}) == "a/w"


@pytest.mark.parametrize(
  ("layers", "kind", "match"),
  [
    (["conv", "dense"], ValueError, "a layer for every parameter, got none for dense_1/kernel"),
    (["conv", "dens", "dense_1"], ValueError, "got none for dense/kernel"),
    (["conv", "conv", "dense", "dense_1"], ValueError, "each layer once, got conv more than once"),
    ("conv", TypeError, "layer names or a module, got str 'conv'"),
    ([], TypeError, "layer names or a module"),
    (3, TypeError, "layer names or a module, got int 3"),
  ],
)
def test_wrong_layers_are_an_error_even_if_no_rule_counts(layers, kind, match):
  with pytest.raises(kind, match=r"`maskopt.build_mask\(layers=...\)`: at layers, .*" + match):
    maskopt.build_mask(KERAS, [("conv", True)], layers=layers)


def test_layers_out_of_range_and_without_parameters():
  known = "The layers are 0 input, 1 conv, 2 dense, 3 flatten, 4 dense_1, 5 softmax, 6 reshape"
  with pytest.raises(ValueError, match=rf"a layer index in \[-7, 6\], got 7. {known}"):
    maskopt.build_mask(KERAS, [(7, True)], layers=NAMES)
  with pytest.raises(ValueError, match=rf"hold a parameter, got reshape, without param.*{known}"):
    maskopt.build_mask(KERAS, [(-1, True)], layers=NAMES)
  with pytest.raises(ValueError, match=r"rules\[0\] layers\[:-7\], .* got none. The layers"):
    maskopt.build_mask(KERAS, [(slice(None, -7), True)], layers=NAMES)
  with pytest.raises(TypeError, match=r"a slice of integers, got layers\[conv:\]"):
    maskopt.build_mask(KERAS, [(slice("conv", None), True)], layers=NAMES)


def test_a_complaint_reads_as_a_sentence():
  with pytest.raises(
    Complaint, match="expected a layer order.*, got a bare tree.*Give the network"
  ):
    layer_paths({"a": {"w": 1.0}})
