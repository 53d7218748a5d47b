"""Packed trees: what `pack` returns, what `unpack` and `apply_updates` make of it."""

import copy
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import strategies
from hypothesis import given, strategies as st

import maskopt
from maskopt import _packing, _provenance
from maskopt._packed import Packed

W = {"w": jnp.arange(6.0).reshape(2, 3)}
SCATTERED = np.array([[True, False, True], [False, True, True]])


@given(strategies.problems(), st.booleans())
def test_unpack_undoes_pack(problem, as_layouts):
  params, mask, full = problem
  given_mask = _packing.layouts_of(mask, params, "test") if as_layouts else mask
  packed = maskopt.pack(params, given_mask)
  assert reference.same_bits(maskopt.unpack(packed, params, given_mask), params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  after = maskopt.unpack(packed, zeros, given_mask)
  for k in params:
    assert reference.same_bits(after[k], np.where(full[k], np.float32(0), params[k]))
  kept = sum(int((~f).sum()) for f in full.values())
  assert as_layouts or sum(x.size for x in jax.tree.leaves(packed)) == kept


def test_shapes_of_packed_leaves():
  def values(mask):
    leaf = maskopt.pack(W, {"w": mask})["w"]
    return leaf.values if isinstance(leaf, Packed) else leaf

  assert values(True) is None
  assert values(False) is W["w"]
  assert values(np.array([True, False, False])).shape == (2, 2)
  assert values(SCATTERED).shape == (2,)
  assert values(maskopt.runtime(SCATTERED)).shape == (2, 3)
  assert values(maskopt.runtime(SCATTERED, 2)).shape == (2,)


def test_packed_leaves_are_a_pytree_with_one_leaf():
  packed = maskopt.pack(W, {"w": SCATTERED})
  doubled = jax.tree.map(lambda x: 2 * x, packed)
  assert isinstance(doubled["w"], Packed) and doubled["w"].values.tolist() == [2.0, 6.0]
  names = [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(packed)]
  assert names == ["['w'].values"]
  assert "Packed(Elements of (2, 3)" in repr(packed["w"])
  assert jax.jit(lambda p: p)(packed)["w"].layout == packed["w"].layout


def test_unpack_refuses_the_values_of_another_mask():
  packed = jax.tree.map(lambda x: x, maskopt.pack(W, {"w": SCATTERED}))
  with pytest.raises(
    ValueError, match=r"`maskopt.unpack\(.*at w, expected Elements values of \(4,\)"
  ):
    maskopt.unpack(packed, W, {"w": ~SCATTERED})
  with pytest.raises(ValueError, match=r"at w, expected a leaf, got none; at v, expected no leaf"):
    maskopt.unpack({"v": packed["w"]}, W, {"w": SCATTERED})


B = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
MASKS = {
  "all": False,
  "none": True,
  "a row": np.array([[True], [False]]),
  "the other row": np.array([[False], [True]]),
  "a column": np.array([True, False, True]),
  "scattered": SCATTERED,
  "others": np.roll(SCATTERED, 1, 0),
}
GOT = {
  "all": r"float32 of shape \(2, 3\)",
  "none": "no values",
  "scattered": r"Elements values of \(2,\)",
  "others": r"Elements values of \(2,\)",
}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(MASKS, 2)))
def test_unpack_refuses_every_other_mask(first, second, again):
  packed = maskopt.pack(B, {"w": MASKS[first], "b": False})
  packed = jax.tree.map(lambda x: x + 0, packed) if again else packed
  got = GOT.get(first, r"Block values of \(\d, \d\)")
  expected = {"all": r"an array of \(2, 3\)", "none": "no values"}.get(second, "(Block|Elem.*) val")
  with pytest.raises(
    ValueError,
    match=rf"`maskopt.unpack\(.*`: at w, expected {expected}.*got {got}.*very mask",
  ):
    maskopt.unpack(packed, B, {"w": MASKS[second], "b": False})


def test_unpack_refuses_values_that_are_none_or_of_other_shapes():
  mask = {"w": SCATTERED, "b": False}
  packed = maskopt.pack(B, mask)
  summed = jax.tree.map(jnp.sum, packed)
  match = (
    r"at b, .*an array of \(3,\), got float32 of shape \(\); at w, .*got Elements values of \(\)"
  )
  with pytest.raises(ValueError, match=match):
    maskopt.unpack(summed, B, mask)
  with pytest.raises(ValueError, match=r"at b, .*got NoneType None; at w, .*got float32 of shape"):
    maskopt.unpack({"w": B["w"], "b": None}, B, mask)


def test_unpack_casts_to_the_dtypes_of_its_base():
  for name, frozen in MASKS.items():
    mask = {"w": frozen, "b": True}
    packed = jax.tree.map(lambda x: x + 0, maskopt.pack(B, mask))
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), B)
    assert reference.same_bits(maskopt.unpack(packed, narrow, mask), narrow), name


def test_packing_a_tree_of_other_shapes_is_refused():
  tx_mask = _packing.layouts_of({"w": SCATTERED}, W, "test")
  with pytest.raises(
    ValueError, match=r"at w, expected an array of shape \(2, 3\), got float32 of"
  ):
    maskopt.pack({"w": jnp.ones(3)}, tx_mask)


def test_index_arrays_from_a_state_are_arguments():
  """A mask closed over is a constant of the program; from `mask_of` it is an argument."""
  n = 1 << 16
  mask = np.random.default_rng(0).random(n) < 0.9
  layouts = _packing.layouts_of(mask, jnp.zeros(n), "test", prefer="values")
  lowered = jax.jit(maskopt.pack).lower(jnp.zeros(n), layouts)
  assert len(lowered.as_text()) < 20_000


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_packed_trees_survive_pickle_and_deepcopy(clone):
  packed = maskopt.pack(W, {"w": SCATTERED})
  again = clone(packed)
  assert jax.tree.structure(again) == jax.tree.structure(packed)
  assert reference.same_bits(maskopt.unpack(again, W, {"w": SCATTERED}), W)


def test_layouts_show_their_mask():
  layouts = _packing.layouts_of({"w": SCATTERED}, W, "test", prefer="values")
  np.testing.assert_array_equal(layouts.freeze_mask["w"], SCATTERED)
  assert repr(layouts) == "Layouts:\n  w: Elements trains 2 of 6"
  data = _packing.layouts_of({"w": maskopt.runtime(SCATTERED)}, W, "test")
  assert "trains a runtime mask's choice of 6" in repr(data)
  assert [p for p, _ in layouts.items()] == ["w"]


def test_static_layouts_are_equal_by_what_they_store():
  a, b = (_packing.layouts_of({"w": SCATTERED}, W, "test").static for _ in range(2))
  c = _packing.layouts_of({"w": ~SCATTERED}, W, "test").static
  assert a == b and hash(a) == hash(b) and a != c and a != "a"


def test_provenance_forgets_with_its_array():
  layouts = _packing.layouts_of({"w": SCATTERED}, W, "test", prefer="values")
  layout, index = layouts.static.layouts[0], layouts.index[0]
  record = _provenance.Record(layout, index, jnp.ones(2))
  array = _provenance.made_of.remember(jnp.ones((2, 3)), record)
  assert _provenance.made_of.recall(array) is record
  assert _provenance.made_of.recall(array + 0) is None
  del array
  # Another array may get the same id; it must not get the record.
  for _ in range(100):
    assert _provenance.made_of.recall(jnp.ones((2, 3))) is None


def test_packed_gradients_of_one_runtime_mask_are_not_taken_for_the_next():
  first, following = (
    maskopt.runtime(frozen, count=3) for frozen in (np.arange(8) < 5, np.arange(8) > 2)
  )
  tx = maskopt.selective_transform(optax.sgd(1.0), freeze_mask=first)
  params, grads = jnp.zeros(8), jnp.arange(1.0, 9.0)
  state = tx.init(params)
  packed = maskopt.pack(grads, maskopt.mask_of(state))
  updates, _ = tx.update(packed, state, params)
  assert (params + updates).tolist() == [0, 0, 0, 0, 0, -6, -7, -8]
  # What trains now had no gradient: it was frozen when the gradient was packed.
  updates, _ = tx.update(packed, state, params, freeze_mask=following)
  assert (params + updates).tolist() == [0] * 8
  crossed = jax.jit(lambda x: x)(packed)
  with pytest.raises(ValueError, match="expected an array, or values packed in this trace"):
    tx.update(crossed, state, params, freeze_mask=following)
