"""Output units of ready-made layers, against the derivative of one unit by all parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import maskopt
from maskopt import _tree

X = jnp.asarray(np.random.default_rng(0).normal(size=3), jnp.float32)
H = jnp.asarray(np.random.default_rng(1).normal(size=4), jnp.float32)


def nnx_layer(build):
  module = build(nnx.Rngs(0))
  graphdef, state = nnx.split(module)

  def call(state, *args):
    return nnx.merge(graphdef, state)(*args)

  return module, state, call


def lstm():
  module, state, call = nnx_layer(lambda rngs: nnx.OptimizedLSTMCell(3, 4, rngs=rngs))
  return module, state, lambda s: call(s, (H, H), X)[1]


def gru():
  module, state, call = nnx_layer(lambda rngs: nnx.GRUCell(3, 4, rngs=rngs))
  return module, state, lambda s: call(s, H, X)[1]


def transposed(transpose_kernel):
  module, state, call = nnx_layer(
    lambda rngs: nnx.ConvTranspose(3, 4, (2,), transpose_kernel=transpose_kernel, rngs=rngs)
  )
  return module, state, lambda s: call(s, jnp.stack([X, 2 * X])[None]).sum((0, 1))


def equinox_cell(kind):
  cell = kind(3, 4, key=jax.random.key(0))
  state = (H, H) if kind is eqx.nn.LSTMCell else H
  return cell, cell, lambda c: jnp.asarray(jax.tree.leaves(c(X, state))[0])


LAYERS = {
  "nnx lstm": lstm,
  "nnx gru": gru,
  "nnx transposed kernel": lambda: transposed(True),
  "nnx transposed convolution": lambda: transposed(False),
  "equinox lstm": lambda: equinox_cell(eqx.nn.LSTMCell),
  "equinox gru": lambda: equinox_cell(eqx.nn.GRUCell),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_unit_is_what_its_output_depends_on(name):
  module, params, outputs = LAYERS[name]()
  unit = 2
  mask = maskopt.build_mask(module, [(..., maskopt.units(unit))])
  by, masks = (_tree.flatten(x) for x in (jax.grad(lambda p: outputs(p)[unit])(params), mask))
  assert masks.paths == by.paths
  for path, frozen, slope in zip(masks.paths, masks.leaves, by.leaves, strict=True):
    depends = np.asarray(slope) != 0
    assert depends.any()
    np.testing.assert_array_equal(np.broadcast_to(frozen, depends.shape), depends, err_msg=path)


@pytest.mark.parametrize("name", ["nnx lstm", "nnx gru", "equinox lstm", "equinox gru"])
def test_units_of_a_cell_are_counted_by_gate(name):
  module, _, _ = LAYERS[name]()
  with pytest.raises(ValueError, match=r"expected units in \[-4, 3\], got 4"):
    maskopt.build_mask(module, [(..., maskopt.units(4))])
  everything = maskopt.build_mask(module, [(..., maskopt.train_only(maskopt.units(slice(None))))])
  assert not any(jax.tree.leaves(everything))


def test_a_module_tells_of_the_units_in_a_bare_tree():
  module, _, _ = lstm()
  bare = nnx.to_pure_dict(nnx.state(module, nnx.Param))
  told = maskopt.build_mask(bare, [(..., maskopt.units(0))], layers=module)
  assert told["dense_i"]["kernel"].nonzero()[1].tolist() == [0, 4, 8, 12]
  untold = maskopt.build_mask(bare, [(..., maskopt.units(0))])
  assert untold["dense_i"]["kernel"].nonzero()[1].tolist() == [0]
