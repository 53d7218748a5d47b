"""Every container: the same mask, the same paths, the same training."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import flax.core
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import linen, nnx
from flax.core import meta

import maskopt
from maskopt import _tree


class Layer(NamedTuple):
  kernel: Any
  bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
  kernel: Any
  bias: Any


@flax.struct.dataclass
class Struct:
  kernel: Any
  bias: Any


class Module(nnx.Module):
  def __init__(self, kernel, bias):
    self.kernel, self.bias = nnx.Param(kernel), nnx.Param(bias)
    self.calls = nnx.BatchStat(jnp.zeros(()))  # no parameter


class Eqx(eqx.Module):
  kernel: Any
  bias: Any


class Callable(eqx.Module):
  kernel: Any
  bias: Any

  def __call__(self, x):
    return x @ self.kernel + self.bias


def _values(tree):
  return tree[...] if isinstance(tree, nnx.Variable) else tree


BUILD = {
  "dict": lambda k, b: {"kernel": k, "bias": b},
  "FrozenDict": lambda k, b: flax.core.freeze({"kernel": k, "bias": b}),
  "nnx.State": lambda k, b: nnx.State({"kernel": nnx.Param(k), "bias": nnx.Param(b)}),
  "nnx.Module": Module,
  "Equinox": Eqx,
  "callable Equinox": Callable,
  "NamedTuple": Layer,
  "dataclass": Data,
  "flax.struct": Struct,
}
UNITS = np.array([True, False, True, False])
RNG = np.random.default_rng(0)
KERNEL = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
BIAS = jnp.asarray(RNG.normal(size=4), jnp.float32)


def _get(tree, name):
  return _values(tree[name] if isinstance(tree, (dict, flax.core.FrozenDict, nnx.State)) else
                 getattr(tree, name))  # fmt: skip


def _trained(container, mask):
  """Three steps of momentum on the container; its kernel and bias afterwards."""
  params = BUILD[container](KERNEL, BIAS)
  tx = maskopt.selective_transform(optax.sgd(0.1, momentum=0.9), freeze_mask=mask)
  if isinstance(params, nnx.Module):
    params = nnx.state(params, nnx.Param)
  state = tx.init(params)

  @jax.jit
  def step(params, state):
    grads = jax.tree.map(lambda x: 2 * x, params)
    updates, state = tx.update(grads, state, params)
    return maskopt.apply_updates(params, updates), state

  for _ in range(3):
    params, state = step(params, state)
  return _get(params, "kernel"), _get(params, "bias")


@pytest.mark.parametrize("container", BUILD)
@pytest.mark.parametrize("mask_container", ["dict", "own", "prefix"])
def test_every_container_trains_alike(container, mask_container):
  build = BUILD["dict" if mask_container == "dict" else container]
  mask = True if mask_container == "prefix" else build(UNITS, UNITS)
  if mask_container == "own" and container in ("nnx.State", "nnx.Module"):
    mask = jax.tree.map(lambda _: UNITS, nnx.state(build(KERNEL, BIAS), nnx.Param)
                        if container == "nnx.Module" else build(KERNEL, BIAS))  # fmt: skip
  expected = (KERNEL, BIAS) if mask is True else _trained("dict", {"kernel": UNITS, "bias": UNITS})
  got = _trained(container, mask)
  for x, y, before in zip(got, expected, (KERNEL, BIAS), strict=True):
    assert reference.same_bits(x, y)
    assert reference.moved(before, x, UNITS) == []
    assert mask is True or (np.asarray(x) != np.asarray(before))[..., ~UNITS].all()


@pytest.mark.parametrize("container", BUILD)
def test_algebra_accepts_every_container(container):
  params = BUILD[container](KERNEL, BIAS)
  mask = BUILD["dict"](UNITS, True)
  packed = maskopt.pack(params, maskopt.union(maskopt.invert(mask), mask))
  assert all(x is None or x.size == 0 for x in jax.tree.leaves(packed))


@pytest.mark.parametrize("container", BUILD)
def test_paths_are_those_of_a_dict(container):
  flat = _tree.flatten(BUILD[container](KERNEL, BIAS))
  assert sorted(flat.paths) == ["bias", "kernel"]
  assert [np.shape(_values(x)) for x in flat.leaves] == [
    (4,) if p == "bias" else (3, 4) for p in flat.paths
  ]


def test_paths_through_sequences_and_boxes():
  boxed = meta.Partitioned(jnp.ones(2), names=("a",))
  tree = {"layers": [{"w": jnp.ones(1)}, (jnp.ones(2), None)], "box": boxed}
  assert _tree.flatten(tree).paths == ("box", "layers/0/w", "layers/1/0", "layers/1/1")
  assert _tree.flatten(jnp.ones(2)).paths == ("",)


def test_lists_and_tuples_of_layers():
  params = [{"w": jnp.ones(2)}, {"w": jnp.ones(2)}]
  tx = maskopt.selective_transform(optax.sgd(0.5), freeze_mask=[True, {"w": False}])
  updates, _ = tx.update(params, tx.init(params), params)
  after = maskopt.apply_updates(params, updates)
  assert after[0]["w"].tolist() == [1, 1] and after[1]["w"].tolist() == [0.5, 0.5]


def test_modules_hold_more_than_parameters():
  """BatchNorm statistics are no parameters: a mask says nothing of them and updates skip them."""

  class Net(nnx.Module):
    def __init__(self, rngs):
      self.linear = nnx.Linear(2, 3, rngs=rngs)
      self.norm = nnx.BatchNorm(3, rngs=rngs)

  net = Net(nnx.Rngs(0))
  assert set(_tree.flatten(net).paths) == {
    *("linear/kernel", "linear/bias"),
    *("norm/scale", "norm/bias"),
  }


def test_linen_variables():
  variables = linen.Dense(4).init(jax.random.key(0), jnp.ones((1, 3)))
  tx = maskopt.selective_transform(
    optax.sgd(0.1), freeze_mask={"params": {"kernel": UNITS, "bias": UNITS}}
  )
  updates, _ = tx.update(variables, tx.init(variables), variables)
  after = maskopt.apply_updates(variables, updates)
  kernel = variables["params"]["kernel"]
  assert reference.moved(kernel, after["params"]["kernel"], UNITS) == []


def test_equinox_modules_with_functions_among_their_leaves():
  mlp = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
  mask = jax.tree.map(lambda x: True if eqx.is_array(x) else None, mlp)
  tx = maskopt.selective_transform(optax.sgd(0.1), freeze_mask=mask)
  grads = jax.tree.map(lambda x: jnp.ones_like(x) if eqx.is_array(x) else None, mlp)
  updates, _ = tx.update(eqx.filter(grads, eqx.is_array), tx.init(mlp), mlp)
  after = maskopt.apply_updates(mlp, updates)
  assert eqx.tree_equal(after, mlp)


def test_a_path_written_in_another_container_is_the_same_path():
  problems = {"dense": {"kernel": UNITS}}
  with pytest.raises(ValueError, match=r"at dense/bias, expected a freeze mask, got none"):
    maskopt.pack({"dense": Layer(KERNEL, BIAS)}, problems)


def test_nnx_state_with_mixed_depth():
  state = nnx.State({"a": {"b": nnx.Param(BIAS)}, "c": nnx.Param(BIAS)})
  assert _tree.flatten(state).paths == ("a/b", "c")
