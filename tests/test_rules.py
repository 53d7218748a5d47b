import copy
import functools
import operator
import pickle
import re
import tracemalloc

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from flax.core import freeze

import maskopt
from maskopt import _patterns, _tree

A = np.s_


def array(*shape):
  return np.ones(shape, np.float32)


def layer(n_in, n_out):
  return {"kernel": array(n_in, n_out), "bias": array(n_out)}


PARAMS = {
  "embed": {"embedding": array(7, 4)},
  "lstm_1": {"cell": layer(4, 4)},
  "lstm_10": {"cell": layer(4, 4)},
  "head": layer(4, 3),
}


def leaves(tree):
  flat = _tree.flatten(tree)
  return dict(zip(flat.paths, flat.leaves, strict=True))


def dense(mask, params):
  """The mask in full, by path."""
  shapes = {p: np.shape(x) for p, x in leaves(params).items()}
  return {p: np.broadcast_to(m, shapes[p]) for p, m in leaves(mask).items()}


def frozen_paths(rules, params=None, **keywords):
  mask = maskopt.build_mask(PARAMS if params is None else params, rules, **keywords)
  return {p for p, m in leaves(mask).items() if m is True}


ALL = set(leaves(PARAMS))


# Patterns


@pytest.mark.parametrize(
  ("pattern", "expected"),
  [
    ("lstm_1", {"lstm_1/cell/kernel", "lstm_1/cell/bias"}),
    ("lstm_1/cell/kernel", {"lstm_1/cell/kernel"}),
    ("lstm_*", {p for p in ALL if p.startswith("lstm")}),
    ("lstm_?", {p for p in ALL if p.startswith("lstm_1/")}),
    ("*/kernel", {"head/kernel"}),
    ("**/kernel", {p for p in ALL if p.endswith("kernel")}),
    ("**/cell", {p for p in ALL if "/cell/" in p}),
    ("lstm**bias", {"lstm_1/cell/bias", "lstm_10/cell/bias"}),
    ("[el]*", ALL - {"head/kernel", "head/bias"}),
    ("[!el]*", {"head/kernel", "head/bias"}),
    ("**/[jk]ernel", {p for p in ALL if p.endswith("kernel")}),
    ("head/**", {"head/kernel", "head/bias"}),
    (re.compile("^head"), {"head/kernel", "head/bias"}),
    (re.compile(r"_1\b"), {"lstm_1/cell/kernel", "lstm_1/cell/bias"}),
    (lambda path, leaf: leaf.ndim == 1, {p for p in ALL if p.endswith("bias")}),
    (lambda path, leaf: path == "head/bias", {"head/bias"}),
    (nnx.PathContains("cell"), {p for p in ALL if "/cell/" in p}),
  ],
)
def test_patterns(pattern, expected):
  assert frozen_paths([(pattern, True)]) == expected


def test_dots_are_everything_else():
  rules = [("head", False), (..., True)]
  assert frozen_paths(rules) == ALL - {"head/kernel", "head/bias"}
  assert frozen_paths(dict(rules)) == ALL - {"head/kernel", "head/bias"}


PART = st.text("ab*?[]!^-.\\", min_size=1, max_size=4)


@hypothesis.given(st.lists(PART, min_size=1, max_size=3), st.lists(PART, min_size=1, max_size=4))
def test_a_path_with_its_signs_in_brackets_is_matched_only_by_itself(parts, other):
  path, other = "/".join(parts), "/".join(other)
  regex = _patterns.glob(re.sub(r"([*?[])", r"[\1]", path))
  assert regex.fullmatch(path) and regex.fullmatch(path + "/below")
  assert bool(regex.fullmatch(other)) == _tree.covers(path, other)


class Model(nnx.Module):
  def __init__(self, rngs):
    self.stem = nnx.Linear(2, 3, rngs=rngs)
    self.drop = nnx.Dropout(0.1, rngs=rngs)
    self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
    self.lora = nnx.LoRA(3, 2, 3, rngs=rngs)
    self.norm = nnx.BatchNorm(3, rngs=rngs)


@pytest.mark.parametrize(
  ("pattern", "expected"),
  [
    (nnx.LoRAParam, {"lora/lora_a", "lora/lora_b"}),
    (nnx.Not(nnx.LoRAParam), None),
    (nnx.All(nnx.Param, nnx.PathContains("stem")), {"stem/kernel", "stem/bias"}),
    (nnx.Any(nnx.LoRAParam, nnx.PathContains("stem")), None),
    (nnx.PathContains(1), {"blocks/1/kernel", "blocks/1/bias"}),
  ],
)
def test_nnx_filters_choose_what_nnx_chooses(pattern, expected):
  model = Model(nnx.Rngs(0))
  oracle = set(leaves(nnx.state(model, nnx.All(nnx.Param, pattern))))
  assert expected in (None, oracle)
  assert frozen_paths([(pattern, True)], model) == oracle
  assert frozen_paths([(pattern, True)], nnx.state(model, nnx.Param)) == oracle


def test_an_nnx_state_may_hold_other_variables():
  state = nnx.state(Model(nnx.Rngs(0)))
  assert frozen_paths([(nnx.BatchStat, True)], state) == {"norm/mean", "norm/var"}


@pytest.mark.parametrize(
  ("params", "pattern", "kind", "match"),
  [
    (PARAMS, nnx.Param, TypeError, "in nnx variables, got a bare tree. Give the nnx.Module"),
    (PARAMS, nnx.Not(nnx.Param), TypeError, "in nnx variables, got a bare tree"),
    (None, nnx.BatchStat, ValueError, r"BatchStat.* got none \(the variables are LoRAParam, Param"),
    (None, jax.Array, TypeError, "expected an nnx.Variable type, got the type "),
    (PARAMS, True, TypeError, "rules.0. True, expected a path, a compiled regex, .* got bool True"),
    (
      PARAMS,
      None,
      TypeError,
      r"got NoneType None. Write a path as a string, .*for everything else",
    ),
    (
      PARAMS,
      lambda path: True,
      TypeError,
      r"a function of \(path, leaf\), got one of \(path\). As pat",
    ),
    (None, slice(None, None, 0), ValueError, "a slice with a step other than 0, got layers.::0."),
    (PARAMS, ("head", "embed"), TypeError, "got tuple .*one rule per pattern"),
    (
      PARAMS,
      lambda path, leaf: leaf,
      TypeError,
      "returns a bool, got float32 of shape .* at embed/embedding",
    ),
  ],
)
def test_patterns_that_cannot_be_applied(params, pattern, kind, match):
  params = Model(nnx.Rngs(0)) if params is None else params
  with pytest.raises(kind, match=match):
    maskopt.build_mask(params, [(pattern, True)])


@pytest.mark.parametrize(
  ("pattern", "match"),
  [
    ("lstm_2", r"rules\[0\] 'lstm_2', expected a pattern that names a parameter, got none \(near"),
    ("lstm_2", "near paths: lstm_1, lstm_10"),
    ("cell/kernel", "near paths: lstm_1/cell/kernel, lstm_10/cell/kernel"),
    ("cell", r"near paths: lstm_1/cell, lstm_10/cell\). Patterns start at the root"),
    ("head/kernle", "near paths: head/kernel"),
    ("head/", "near paths: head"),
    ("zzzzzz", r"the parameters are embed/embedding, .*lstm_10/cell/kernel\)"),
    (
      re.compile("nothing"),
      "the parameters are embed/embedding, .* A compiled regex is searched for",
    ),
    (lambda path, leaf: False, "<lambda>, expected a pattern.* The function was asked about each"),
    (
      nnx.PathContains("nothing"),
      "expected a pattern .*A filter is asked about the parameters' var",
    ),
  ],
)
def test_a_rule_that_matches_nothing_lists_near_paths(pattern, match):
  with pytest.raises(ValueError, match=match):
    maskopt.build_mask(PARAMS, [(pattern, True)])


def test_a_rule_on_a_tree_without_parameters():
  assert maskopt.build_mask({"a": None}, []) == {"a": None}
  with pytest.raises(ValueError, match="got a tree without parameters. Give the parameters first"):
    maskopt.build_mask({"a": None}, [("a", True)])


@pytest.mark.parametrize(
  ("rules", "match"),
  [
    (
      [(..., True), ("head", False)],
      r"rules\[1\] 'head', .* none: rules\[0\] ... came first for all",
    ),
    (
      [("head", True), ("head/bias", False)],
      r"rules\[0\] 'head' came first for the one. The first",
    ),
    ([("**/bias", 1), ("**/kernel", 1), ("head", True)], r"\*\*/bias', rules\[1\] .* for all 2"),
    (
      [("embed", 1), ("lstm_*", True), ("head", True), (..., False)],
      r"rules\[3\] \.\.\., .*rules\[2\]",
    ),
  ],
)
def test_a_rule_that_can_never_apply_names_what_shadows_it(rules, match):
  with pytest.raises(ValueError, match=match):
    maskopt.build_mask(PARAMS, rules)


def test_one_error_lists_every_fault():
  rules = [("hed", True), ("head", "frozen"), ("head/bias", True), ("embed", A[:, 9:])]
  match = r"'hed', .*'head/bias', .*at embed/embedding \(rules\[3\].*at head/bias \(rules\[1\]"
  with pytest.raises(TypeError, match=match) as error:
    maskopt.build_mask(PARAMS, rules)
  assert str(error.value).count("at head/kernel (rules[1] 'head')") == 1


@pytest.mark.parametrize(
  ("rules", "match"),
  [
    ("head", r"at rules, expected \(pattern, value\) pairs, got str 'head'"),
    (True, r"at rules, expected \(pattern, value\) pairs, got bool True"),
    (["head", ("a", "b", "c")], r"at rules\[0\], .* got str 'head'; at rules\[1\], .* got tuple"),
  ],
)
def test_rules_are_pairs(rules, match):
  with pytest.raises(TypeError, match=match):
    maskopt.build_mask(PARAMS, rules)


# Values


INDICES = [
  A[0],
  A[-1],
  A[:, :3],
  A[:, -1],
  A[..., 0],
  A[1:3, ..., ::2],
  A[:3, :3],
  A[[0, -1]],
  A[:, [3, 1]],
  A[[0, 1], :, 2],
  A[[0, 1], [1, 2]],
  A[np.array([0, 2]), ..., np.array([1, 1])],
  A[np.array([True, False, True, False]), :2],
  A[np.array([True, False, True, False]), ..., [1, 2]],
  A[...],
  A[:],
  A[[]],
  np.array([1, 2]),
  range(2),
  A[range(2), :, range(2)],
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_an_index_freezes_what_numpy_takes(index):
  params = {"w": array(4, 5, 6), "other": array(2)}
  expected = np.zeros((4, 5, 6), bool)
  expected[index] = True
  mask = maskopt.build_mask(params, [("w", index)])
  np.testing.assert_array_equal(dense(mask, params)["w"], expected)
  # And no larger than its structure: an axis the mask does not depend on has size 1.
  if isinstance(mask["w"], np.ndarray):
    for axis, n in enumerate(mask["w"].shape):
      first = expected.take([0], axis)
      assert n == 1 or not np.array_equal(np.broadcast_to(first, expected.shape), expected)


@hypothesis.given(st.data())
def test_random_indices_freeze_what_numpy_takes(data):
  shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))

  def part(n):
    ints = st.integers(-n, n - 1)
    return ints | st.slices(n) | st.lists(ints, min_size=1, max_size=3, unique=True)

  index = tuple(data.draw(part(n)) for n in shape[: data.draw(st.integers(1, len(shape)))])
  expected = np.zeros(shape, bool)
  try:
    expected[index] = True
  except IndexError:
    hypothesis.assume(False)
  hypothesis.assume(expected.any())
  params = {"w": array(*shape), "other": array(2)}
  mask = maskopt.build_mask(params, [("w", index)])
  np.testing.assert_array_equal(dense(mask, params)["w"], expected)


def test_a_billion_elements_cost_kilobytes():
  params = {"w": jax.ShapeDtypeStruct((1 << 15, 1 << 15), jnp.float32)}
  rows = maskopt.build_mask(params, [("w", A[:100])])["w"]
  columns = maskopt.build_mask(params, [("w", maskopt.units(slice(100)))])["w"]
  assert (rows.shape, columns.shape) == ((1 << 15, 1), (1, 1 << 15))
  assert rows.nbytes + columns.nbytes == 1 << 16
  given = maskopt.build_mask(params, [("w", np.arange(1 << 15) < 4)])["w"]
  assert given.shape == (1, 1 << 15)


HUGE = {"w": jax.ShapeDtypeStruct((1_000_000, 50_000), jnp.float32)}
COLUMNS = np.arange(50_000) < 5
STRUCTURED = {  # the shape of the mask, and how many of it are frozen
  "units": (maskopt.units([0, -1]), (1, 50_000), 2),
  "flags": (maskopt.units(COLUMNS), (1, 50_000), 5),
  "slice": (maskopt.units(slice(None, None, -2)), (1, 50_000), 25_000),
  "every unit": (maskopt.units(slice(None)), None, None),
  "rows": (A[:100], (1_000_000, 1), 100),
  "every row, some columns": (A[:1_000_000, :3], (1, 50_000), 3),
  "many rows": (A[np.arange(500_000)], (1_000_000, 1), 500_000),
  "train_only": (maskopt.train_only(A[:, 3:]), (1, 50_000), 3),
  "heads": (maskopt.heads(0, of=50, axis=1), (1, 50_000), 1000),
  "array": (COLUMNS, (1, 50_000), 5),
  "view": (np.broadcast_to(COLUMNS, (1_000_000, 50_000)), (1, 50_000), 5),
  "view of one": (np.broadcast_to(np.True_, (1_000_000, 50_000)), None, None),
}


@pytest.mark.parametrize("case", STRUCTURED)
@pytest.mark.filterwarnings("ignore:maskopt.build_mask. the mask freezes every")
def test_structure_costs_its_axis_and_not_the_leaf(case):
  """50 billion elements: a dense mask of them would not fit."""
  value, shape, count = STRUCTURED[case]
  maskopt.build_mask({"w": array(4, 50)}, [("w", True)])
  tracemalloc.start()
  mask = maskopt.build_mask(HUGE, [("w", value)])["w"]
  both = maskopt.union({"w": mask}, maskopt.invert({"w": mask}))["w"]
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  if shape is None:
    assert mask is True and both is True
  else:
    assert (mask.shape, np.count_nonzero(mask)) == (shape, count)
    assert both.shape == shape and both.all()
  assert peak < 10 * 2**20 if case == "many rows" else peak < 4 * 2**20


def test_a_dense_mask_is_compared_without_a_second_one():
  dense = np.zeros((2000, 2000), bool)
  dense[:, 7] = True  # the first and the last row are alike, and so are all
  tracemalloc.start()
  mask = maskopt.build_mask({"w": jax.ShapeDtypeStruct((2000, 2000), jnp.float32)}, [("w", dense)])
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert mask["w"].shape == (1, 2000) and peak < 2000 * 2000 / 4
  dense[5, 3] = True
  mask = maskopt.build_mask({"w": array(2000, 2000)}, [("w", dense)])["w"]
  np.testing.assert_array_equal(mask, dense)


def test_many_units_are_shown_in_part():
  assert repr(maskopt.units(np.arange(99))) == (
    "units([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ... 87 more])"
  )
  with pytest.raises(ValueError, match=r"units in \[-3, 2\], got 3, 4, .* 14, \.\.\.\. Name fewer"):
    maskopt.build_mask({"w": array(4, 3)}, [("w", maskopt.units(range(99)))])


@pytest.mark.parametrize(
  "value",
  [np.array([True, False, False]), np.array([[True], [False], [True], [True]]), np.eye(4, 3) > 0],
)
def test_bool_arrays_broadcast(value):
  params = {"w": array(4, 3), "other": array(2)}
  mask = maskopt.build_mask(params, [("w", value)])
  np.testing.assert_array_equal(dense(mask, params)["w"], np.broadcast_to(value, (4, 3)))
  assert mask["w"].shape == ((1,) * (2 - value.ndim) + value.shape)
  value[:] = True  # the mask is a copy
  assert not np.all(mask["w"])


def test_a_dense_array_of_rows_becomes_a_row_mask():
  value = np.repeat(np.array([[True], [False]]), 3, axis=1)
  mask = maskopt.build_mask({"w": array(2, 3)}, [("w", value)])
  assert mask["w"].tolist() == [[True], [False]]
  mask = maskopt.build_mask({"w": array(2, 3), "v": array(1)}, [("w", value | True)])
  assert mask == {"w": True, "v": False}


def test_a_jax_array_stays_runtime_data():
  value = jnp.array([True, False, True])
  mask = maskopt.build_mask({"w": array(4, 3)}, [("w", value)])
  assert isinstance(mask["w"], jax.Array) and mask["w"].shape == (1, 3)
  inverted = maskopt.build_mask({"w": array(4, 3)}, [("w", maskopt.train_only(value))])
  assert inverted["w"].tolist() == [[False, True, False]]


@pytest.mark.parametrize("idx", [[0, 1, 2], [-1], 3, slice(1, 3), np.array([0, 2]), range(2), []])
def test_units_are_the_last_axis_of_kernel_and_bias_alike(idx):
  params = {
    "a": {"kernel": array(5, 4), "bias": array(4), "scale": array(4), "embedding": array(9, 4)},
    "b": {"kernel": array(3, 3, 5, 4)},
    "c": {"kernel": array(5, 2, 4), "bias": array(2, 4)},
  }
  expected = np.zeros(4, bool)
  expected[idx] = True
  mask = maskopt.build_mask(params, [(..., maskopt.units(idx))])
  for path, frozen in dense(mask, params).items():
    np.testing.assert_array_equal(frozen, np.broadcast_to(expected, frozen.shape), path)
  assert all(m is False or m.size == 4 for m in leaves(mask).values())


def test_units_by_a_bool_array():
  mask = maskopt.build_mask({"b": array(3)}, [("b", maskopt.units(np.array([True, False, True])))])
  assert mask["b"].tolist() == [True, False, True]
  with pytest.raises(ValueError, match="at b .*expected a bool array for 3 units, got one for 2"):
    maskopt.build_mask({"b": array(3)}, [("b", maskopt.units(np.array([True, False])))])


@pytest.mark.parametrize("text", [".*bias", "^body.*", "bias$", "(body|a)/b", r"body\.b", "b.+s"])
def test_a_string_that_looks_like_a_regex_is_told_of_compiling(text):
  params = {"body": {"bias": array(3)}}
  match = r"Patterns start at the root .* A regex is given compiled: "
  with pytest.raises(ValueError, match=match + re.escape(f"{re.compile(text)!r}.") + "$"):
    maskopt.build_mask(params, [(text, True)])


@pytest.mark.parametrize(
  "text", ["bias", "*bias", "**/kernel", "bod[xz]", "(body", "body.bias", "[[a]|b"]
)
def test_other_strings_are_not(text):
  with pytest.raises(ValueError, match=r"any parts in front\.$"):
    maskopt.build_mask({"body": {"bias": array(3)}}, [(text, True)])


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, list])
def test_an_array_of_0_and_1_is_not_read_as_indices(dtype):
  flags = [0, 1, 0, 1, 0, 1] if dtype is list else np.array([0, 1, 0, 1, 0, 1], dtype)
  params = {"a": array(4, 6)}
  remedy = r"Name each once; an array of 0 and 1 becomes a mask by x != 0\."
  match = rf"at a .*expected each index once, got 0, 1 more often\. {remedy}"
  for value in (flags, A[:, flags], maskopt.train_only(flags)):
    with pytest.raises((ValueError, TypeError), match=match):
      maskopt.build_mask(params, [("a", value)])
  with pytest.raises(ValueError, match=f"units.*expected each index once, got 0, 1 .*{remedy}"):
    maskopt.units(flags)
  with pytest.raises(ValueError, match=f"heads.*expected each index once, got 0, 1 .*{remedy}"):
    maskopt.heads(flags, of=6)
  mask = maskopt.build_mask(params, [("a", maskopt.units(np.asarray(flags) != 0))])
  assert mask["a"].tolist() == [[False, True, False, True, False, True]]
  many = np.repeat(np.arange(99), 2)
  with pytest.raises(ValueError, match=r"got 0, 1, .*, 11, \.\.\. more often"):
    maskopt.units(many)


def test_a_table_of_0_and_1_says_what_makes_it_a_mask():
  with pytest.raises(TypeError, match="of an array of 0 and 1, x != 0"):
    maskopt.build_mask({"w": array(4, 3)}, [("w", np.eye(4, 3, dtype=int))])


def test_all_units_are_the_whole_leaf_and_one_unit_too():
  params = {"a": array(4, 1), "b": array(4, 2), "c": array(2)}
  mask = maskopt.build_mask(params, [("a", maskopt.units(0)), ("b", maskopt.units([0, 1]))])
  assert mask == {"a": True, "b": True, "c": False}


def test_units_of_equinox_layers_are_the_first_axis():
  key = jax.random.key(0)
  model = [
    eqx.nn.Linear(5, 3, key=key),
    eqx.nn.Conv2d(2, 3, 3, key=key),
    eqx.nn.ConvTranspose2d(2, 3, 3, key=key),
    eqx.nn.Embedding(7, 3, key=key),
    eqx.nn.LayerNorm(3),
  ]
  mask = maskopt.build_mask(model, [(..., maskopt.units([0, 2]))])
  first = {"0": (3, 1), "1": (3, 1, 1, 1), "2": (3, 1, 1, 1), "3": (1, 3), "4": (3,)}
  for path, m in leaves(mask).items():
    if path.endswith("weight"):
      assert m.shape == first[path[0]] and m.ravel().tolist() == [True, False, True]
  assert mask[1].bias.shape == (3, 1, 1)


def test_units_say_which_kernel_is_too_small():
  match = (
    r"at head/bias \(rules\[0\] \.\.\.\), expected units in \[-3, 2\], got 3; "
    r"at head/kernel .* in \[-3, 2\], got 3. Name fewer parameters"
  )
  with pytest.raises(ValueError, match=match):
    maskopt.build_mask(PARAMS, [(..., maskopt.units([0, 3]))])
  with pytest.raises(ValueError, match="at scale .*a parameter with units, got a scalar"):
    maskopt.build_mask({"scale": np.float32(1)}, [("scale", maskopt.units(0))])
  with pytest.raises(
    ValueError, match=r"units among 3, got slice\(5, None, None\), which selects none"
  ):
    maskopt.build_mask(PARAMS, [("head", maskopt.units(slice(5, None)))])


@pytest.mark.parametrize(
  ("idx", "got"),
  [
    *((0.5, "float 0.5"), ("a", "str 'a'"), (True, "bool True"), (None, "NoneType None")),
    *(([[0]], r"list \[\[0\]\]"), ([[0], [1, 2]], "list"), ([0.0, 1.0], r"list \[0.0, 1.0\]")),
    *(({0, 1}, r"set {0, 1}"), (2**70, "int 1180591620717411303424")),
  ],
)
def test_units_are_ints(idx, got):
  match = (
    r"`maskopt.units\(idx=...\)`: at idx, expected an int, ints, a slice or a bool array, got "
  )
  with pytest.raises(TypeError, match=match + got + ".*Count from 0"):
    maskopt.units(idx)


def test_units_are_slices_of_ints():
  with pytest.raises(
    TypeError, match=r"at idx, expected a slice of ints, got slice\(None, 1.5, None"
  ):
    maskopt.units(slice(1.5))
  with pytest.raises(ValueError, match="at idx, expected a slice with a step other than 0"):
    maskopt.units(slice(None, None, 0))
  with pytest.raises(ValueError, match="at idx, expected ints of 64 bits, got uint64"):
    maskopt.units(np.array([2**63], np.uint64))


def test_an_index_may_be_a_jax_array():
  for index in (jnp.array([0, 2]), A[jnp.array([0, 2]), :], A[jnp.array([0, 2]), ...]):
    mask = maskopt.build_mask({"w": array(4, 3)}, [("w", index)])["w"]
    assert mask.ravel().tolist() == [True, False, True, False]
  paired = maskopt.build_mask({"w": array(4, 3)}, [("w", A[jnp.array([0, 2]), [1, 2]])])["w"]
  assert np.argwhere(paired).tolist() == [[0, 1], [2, 2]]


def test_a_lone_array_has_no_path():
  with pytest.raises(ValueError, match=r"the parameters are the root\). Write `...`: a lone array"):
    maskopt.build_mask(array(3), [("w", True)])


def heads_of(params, value):
  return dense(maskopt.build_mask(params, [(..., value)]), params)


def test_heads_of_flax_attention():
  model = nnx.MultiHeadAttention(4, 12, rngs=nnx.Rngs(0), decode=False)
  for found in (
    heads_of(model, maskopt.heads([1, -1], of=4)),
    {p: ~m for p, m in heads_of(model, maskopt.train_only(maskopt.heads([1, 3], of=4))).items()},
  ):
    frozen = np.array([False, True, False, True])
    for name in ("query", "key", "value"):
      np.testing.assert_array_equal(
        found[f"{name}/kernel"], np.broadcast_to(frozen[:, None], (12, 4, 3))
      )
      np.testing.assert_array_equal(found[f"{name}/bias"], np.broadcast_to(frozen[:, None], (4, 3)))
    np.testing.assert_array_equal(
      found["out/kernel"], np.broadcast_to(frozen[:, None, None], (4, 3, 12))
    )
    assert not found["out/bias"].any()  # what all heads share


def test_a_bias_tells_which_of_two_axes_has_the_heads():
  made = {"kernel": array(2, 2, 3), "bias": array(2, 3)}
  read = {"kernel": array(2, 2, 3), "bias": array(3)}
  found = heads_of({"made": made, "read": read}, maskopt.heads(0, of=2))
  assert found["made/kernel"][:, 0].all() and not found["made/kernel"][:, 1].any()
  assert found["made/bias"][0].all() and not found["made/bias"][1].any()
  assert found["read/kernel"][0].all() and not found["read/kernel"][1].any()
  assert not found["read/bias"].any()
  with pytest.raises(ValueError, match=r"one axis for 2 heads, got shape \(2, 2, 3\), where axes"):
    maskopt.build_mask({"w": array(2, 2, 3)}, [("w", maskopt.heads(0, of=2))])


def test_heads_of_fused_kernels():
  made, read = {"kernel": array(5, 6), "bias": array(6)}, {"kernel": array(6, 5), "bias": array(5)}
  found = heads_of({"made": made, "read": read}, maskopt.heads([1], of=3))
  frozen = np.array([0, 0, 1, 1, 0, 0], bool)
  np.testing.assert_array_equal(found["made/kernel"], np.broadcast_to(frozen, (5, 6)))
  np.testing.assert_array_equal(found["made/bias"], frozen)
  np.testing.assert_array_equal(found["read/kernel"], np.broadcast_to(frozen[:, None], (6, 5)))
  assert not found["read/bias"].any()


def test_fused_heads_on_a_square_kernel_ask_for_the_axis():
  params = {"kernel": array(6, 6), "bias": array(6)}
  match = (
    r"at bias .*one axis for 3 heads, got shape \(6, 6\), where axes \[0, 1\] may be .* axis=-1"
  )
  with pytest.raises(ValueError, match=match):
    maskopt.build_mask(params, [(..., maskopt.heads(1, of=3))])
  made = heads_of(params, maskopt.heads(1, of=3, axis=-1))
  read = heads_of(params, maskopt.heads(1, of=3, axis=0))
  assert made["kernel"][:, 2:4].all() and made["kernel"].sum() == 12
  assert made["bias"].tolist() == [False, False, True, True, False, False]
  assert read["kernel"][2:4].all() and read["kernel"].sum() == 12 and not read["bias"].any()


def test_fused_query_key_and_value_ask_for_their_order():
  params = {"kernel": array(4, 12), "bias": array(12)}
  with pytest.raises(ValueError, match="the order of 3 fused projections.*Say parts=3 if whole"):
    maskopt.build_mask(params, [(..., maskopt.heads(1, of=2, axis=-1))])
  side = heads_of(params, maskopt.heads(1, of=2, axis=-1, parts=3))
  woven = heads_of(params, maskopt.heads(1, of=2, axis=-1, parts=1))
  np.testing.assert_array_equal(side["bias"], np.tile([0, 0, 1, 1], 3).astype(bool))
  np.testing.assert_array_equal(woven["bias"], np.repeat([False, True], 6))
  np.testing.assert_array_equal(side["kernel"], np.broadcast_to(side["bias"], (4, 12)))


def test_heads_of_equinox_attention():
  model = eqx.nn.MultiheadAttention(2, 6, use_query_bias=True, key=jax.random.key(0))
  model = eqx.filter(model, eqx.is_inexact_array)
  rules = [("output_proj", maskopt.heads(0, of=2, axis=1)), (..., maskopt.heads(0, of=2, axis=0))]
  found = dense(maskopt.build_mask(model, rules), model)
  assert found["query_proj/weight"][:3].all() and not found["query_proj/weight"][3:].any()
  assert found["query_proj/bias"].tolist() == [True] * 3 + [False] * 3
  assert found["output_proj/weight"][:, :3].all() and not found["output_proj/weight"][:, 3:].any()


@pytest.mark.parametrize(
  ("shape", "value", "match"),
  [
    (
      (5, 7),
      maskopt.heads(0, of=2),
      r"an axis for 2 heads, got shape \(5, 7\), where none.*Give the nu",
    ),
    (
      (5, 6),
      maskopt.heads(0, of=2, axis=5),
      r"an axis in \[-2, 1\], got 5 of shape .* Say which axis",
    ),
    ((4, 6), maskopt.heads(3, of=3), r"heads in \[-3, 2\], got 3. Count heads from 0 to of - 1"),
    (
      (5, 6),
      maskopt.heads(0, of=2, axis=0),
      r"an axis 0 that 2 heads divide, got shape \(5, 6\). Give the number",
    ),
    (
      (5, 6),
      maskopt.heads(0, of=2, parts=2),
      r"2 x 2 heads, got an axis of 6 in shape \(5, 6\). Say parts=1 where",
    ),
    ((), maskopt.heads(0, of=2), "a parameter with heads, got a scalar"),
    ((64,), maskopt.heads(0, of=2), r"an axis for 2 heads, got shape \(64,\)"),
  ],
)
def test_heads_that_do_not_fit(shape, value, match):
  with pytest.raises(ValueError, match=match):
    maskopt.build_mask({"w": array(*shape)}, [("w", value)])


def test_heads_are_counted():
  with pytest.raises(
    ValueError, match=r"`maskopt.heads\(of=...\)`: at of, expected a positive int"
  ):
    maskopt.heads(0, of=0)
  with pytest.raises(
    ValueError, match="at parts, expected a positive int, got int -1. Give 3 for fused"
  ):
    maskopt.heads(0, of=2, parts=-1)
  with pytest.raises(TypeError, match=r"`maskopt.heads\(idx=...\)`: at idx"):
    maskopt.heads("a", of=2)
  with pytest.raises(
    TypeError, match="at of, expected a positive int, got float 2.0. Give the num"
  ):
    maskopt.heads(0, of=2.0)
  with pytest.raises(TypeError, match="at axis, expected an int, got str 'x'. Count the axes"):
    maskopt.heads(0, of=2, axis="x")


def test_train_only_freezes_everything_but():
  params = {"w": array(2, 3), "b": array(3)}
  mask = maskopt.build_mask(params, [(..., maskopt.train_only(maskopt.units([0])))])
  assert mask["w"].tolist() == [[False, True, True]] and mask["b"].tolist() == [False, True, True]
  assert maskopt.build_mask(params, [("b", maskopt.train_only(False))]) == {"w": False, "b": True}
  twice = maskopt.train_only(maskopt.train_only(A[:, 0]))
  assert maskopt.build_mask(params, [("w", twice)])["w"].tolist() == [[True, False, False]]


def test_functions_of_the_leaf_return_any_value():
  params = {"w": np.array([[1.0, -2.0], [3.0, 4.0]]), "b": np.array([0.5, -1.0])}
  mask = maskopt.build_mask(params, [(..., lambda leaf: np.abs(leaf) > 1)])
  assert mask["w"].tolist() == [[False, True], [True, True]] and mask["b"] is False
  mask = maskopt.build_mask(params, [(..., lambda leaf: maskopt.units(leaf.ndim - 1))])
  assert mask["w"].tolist() == [[False, True]] and mask["b"].tolist() == [True, False]


@pytest.mark.parametrize(
  ("value", "kind", "match"),
  [
    (None, TypeError, "at w .*what to freeze, got NoneType None. Write True to freeze"),
    ("True", TypeError, "what to freeze, got str 'True'"),
    (1.0, TypeError, "what to freeze, got float 1.0"),
    (array(3), TypeError, "ints, slices and lists of ints, got float32 of shape"),
    (
      [True, False],
      TypeError,
      r"got list \[True, False\]. Write a mask as a bool array, .*np.array",
    ),
    (array(4, 3), TypeError, "got float32 of shape .* Write True where frozen; .* by x != 0"),
    (A[np.eye(4, 3) > 0,], TypeError, "got bool of shape .* A mask is a bool array by itself"),
    ([[0], [1, 2]], TypeError, r"got list \[\[0\], \[1, 2\]\]. Write what np.s_ gives"),
    (
      A[:, :1.5],
      TypeError,
      r"a slice of ints, got slice\(None, 1.5, None\). Write a slice of ints",
    ),
    (A[::0], ValueError, r"a slice with a step other than 0, got slice\(None, None, 0\)"),
    (
      lambda path, leaf: True,
      TypeError,
      r"a function of \(leaf\), got one of \(path, leaf\). As value",
    ),
    (A[None, 0], TypeError, "got NoneType None. Write what np.s_ gives"),
    (A[:, True], TypeError, "got bool True"),
    (A[0, 0, 0], ValueError, r"an index for shape \(4, 3\), got one of 3 axes. Name fewer"),
    (A[..., ...], ValueError, "got two ellipses"),
    (A[4], ValueError, r"indices of axis 0 in \[-4, 3\], got 4"),
    (A[:, [0, -4]], ValueError, r"indices of axis 1 in \[-3, 2\], got -4"),
    (
      A[:, 3:],
      ValueError,
      r"indices of axis 1 among 3, got slice\(3, None, None\), which selects none",
    ),
    (A[[0, 9], [0, 1]], ValueError, "an index for shape .*index 9 is out of bounds"),
    (
      np.ones(4, bool),
      ValueError,
      r"bool of shape \(4,\) \(NumPy aligns the last axes: give it the shape \(4, 1\)\). Name",
    ),
    (np.ones(1, bool), ValueError, "one element on a larger leaf: write a bool"),
    (np.ones((1, 4, 3), bool), ValueError, "bool broadcastable to"),
    (jnp.ones(4, bool), ValueError, "bool broadcastable to"),
    (lambda leaf: None, TypeError, "Write True to freeze"),
    (bool, TypeError, "what to freeze, got type"),
  ],
)
def test_values_that_do_not_fit(value, kind, match):
  for wrapped in (value, maskopt.train_only(value)):
    with pytest.raises(kind, match=match):
      maskopt.build_mask({"w": array(4, 3)}, [("w", wrapped)])
  with pytest.raises(kind, match=r"at w \(default\)"):
    maskopt.build_mask({"w": array(4, 3)}, [], default=value)


def test_a_tree_as_value_is_named_in_a_word():
  model = {"fc1": nnx.Linear(2, 4, rngs=nnx.Rngs(0))}
  mask = maskopt.build_mask(nnx.state(model["fc1"]), [("bias", True)])
  params = {"fc1": {"kernel": array(2, 4), "bias": array(4)}}
  match = (
    r"at fc1/kernel \(rules\[0\] 'fc1'\), expected what to freeze, got a tree \({}\)\. A rule gives"
  )
  for value, name in ((mask, "State"), ({"kernel": True, "bias": False}, "dict")):
    with pytest.raises(TypeError, match=match.format(name)) as caught:
      maskopt.build_mask(params, [("fc1", value)])
    assert "\n" not in str(caught.value) and str(caught.value).endswith("by maskopt.union.")


def test_values_show_themselves_compare_and_survive_pickle():
  value = maskopt.train_only(maskopt.heads([0, -1], of=4, parts=3))
  assert repr(value) == "train_only(heads([0, -1], of=4, parts=3))"
  assert repr(maskopt.units(slice(2))) == "units(slice(None, 2, None))"
  assert pickle.loads(pickle.dumps(value)) == value == copy.deepcopy(value)
  assert maskopt.units([0]) == maskopt.units(0) != maskopt.units(1)


# Trees


def test_containers_stay():
  rules = [("**/bias", True), ("**/kernel", maskopt.units(0))]
  plain = {"a": layer(2, 3)}
  expected = dense(maskopt.build_mask(plain, rules), plain)
  linen = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))["params"]
  abstract = jax.eval_shape(lambda: plain)
  for params in (freeze(plain), {"a": linen}, nnx.State(plain), abstract):
    mask = maskopt.build_mask(params, rules)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, dense(mask, params), expected)
  for params in ([layer(2, 3)], (layer(2, 3), None), {"a": layer(2, 3), "b": optax.MaskedNode()}):
    assert jax.tree.structure(maskopt.build_mask(params, rules)) == jax.tree.structure(params)


@pytest.mark.parametrize("model", ["nnx", "equinox", "abstract"])
def test_a_mask_of_a_module_freezes_that_module(model):
  key = jax.random.key(0)
  params = {
    "nnx": lambda: Model(nnx.Rngs(0)),
    "equinox": lambda: eqx.nn.MLP(2, 3, 3, 1, key=key),
    "abstract": lambda: nnx.eval_shape(lambda: Model(nnx.Rngs(0))),
  }[model]()
  mask = maskopt.build_mask(params, [("**/bias", True), (0, maskopt.units(1))])
  tree = _tree.parameters(params)
  tx = maskopt.selective_transform(optax.sgd(0.1), freeze_mask=mask)
  if model == "abstract":
    jax.eval_shape(tx.init, tree)
    return
  if model == "equinox":
    tree = eqx.filter(tree, eqx.is_inexact_array)
  ones = jax.tree.map(jnp.ones_like, tree)
  updates, _ = tx.update(ones, tx.init(tree), tree)
  after = leaves(maskopt.apply_updates(tree, updates))
  frozen = dense(mask, tree)
  for path, before in leaves(tree).items():
    if before is not None:
      np.testing.assert_array_equal(np.asarray(after[path] == before), frozen[path], path)


def test_holes_stay_and_take_no_rule():
  params = {"a": array(2), "b": None, "c": optax.MaskedNode(), "d": jax.nn.relu}
  mask = maskopt.build_mask(params, [("a", A[0])])
  assert mask["b"] is None and isinstance(mask["c"], optax.MaskedNode) and mask["d"] is None
  with pytest.raises(ValueError, match="'b', expected a pattern that names a parameter, got none"):
    maskopt.build_mask(params, [("b", True)])


def test_integer_leaves_and_numbers_may_be_frozen():
  params = {"q": np.ones(3, np.int8), "count": 3, "w": array(3)}
  mask = maskopt.build_mask(params, [("q", True), ("count", True)])
  assert mask == {"q": True, "count": True, "w": False}


def test_a_bare_array_is_its_own_root():
  assert maskopt.build_mask(array(3), [(..., A[0])]).tolist() == [True, False, False]
  with pytest.raises(ValueError, match=r"at the root \(rules\[0\] \.\.\.\)"):
    maskopt.build_mask(array(3), [(..., A[5])])


def test_freezing_everything_warns_once():
  with pytest.warns(UserWarning, match="build_mask: the mask freezes every parameter") as record:
    maskopt.build_mask(PARAMS, [(..., True)])
  assert len(record) == 1 and record[0].filename == __file__
  with pytest.warns(UserWarning, match="freezes every parameter"):
    maskopt.build_mask(Model(nnx.Rngs(0)), [], default=True)
  with pytest.warns(UserWarning, match="build_multipliers: every factor is 0, which freezes"):
    maskopt.build_multipliers(PARAMS, [(..., None)])


def test_the_default_is_a_value():
  mask = maskopt.build_mask({"a": array(2), "b": array(2)}, [("a", True)], default=A[0])
  assert mask["a"] is True and mask["b"].tolist() == [True, False]


def test_nothing_is_changed():
  params = copy.deepcopy(PARAMS)
  rules = [("head", maskopt.units(0))]
  maskopt.build_mask(params, rules)
  assert rules == [("head", maskopt.units(0))]
  jax.tree.map(np.testing.assert_array_equal, params, PARAMS)


# Multipliers


class Chain(nnx.Module):
  """Mathematica's NetChain[{..., LinearLayer, SoftmaxLayer}], with names against the order."""

  def __init__(self, rngs):
    self.z = nnx.Linear(2, 3, rngs=rngs)
    self.tail = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.softmax)


def test_mathematicas_minus_two_is_the_linear_before_the_softmax():
  model = Chain(nnx.Rngs(0))
  found = leaves(maskopt.build_multipliers(model, [(-2, 1.0), (..., None)]))
  assert found == {
    "tail/layers/0/bias": 1.0,
    "tail/layers/0/kernel": 1.0,
    "z/bias": 0.0,
    "z/kernel": 0.0,
  }
  with pytest.raises(
    ValueError, match=r"at rules\[1\] -2, .* rules\[0\] \.\.\. came first for all 2"
  ):
    maskopt.build_multipliers(model, [(..., None), (-2, 1.0)])


def test_multipliers():
  params = {"a": array(2, 3), "b": array(3), "c": array(3), "d": array(3), "e": array(3)}
  rules = [
    ("a", np.array([0.5, 1.0, 2.0], np.float32)),
    ("b", 2),
    ("c", np.array([1, 2, 3])),
    ("d", lambda leaf: -1.0 / leaf.size),
  ]
  found = maskopt.build_multipliers(params, rules)
  assert found["a"].tolist() == [[0.5, 1.0, 2.0]] and found["a"].dtype == np.float32
  assert found["c"].tolist() == [1.0, 2.0, 3.0] and found["c"].dtype == np.float32
  assert [found[k] for k in "bde"] == [2.0, -1.0 / 3, 1.0]
  assert all(type(found[k]) is float for k in "bde")
  assert maskopt.build_multipliers(params, [("a", 1)], default=None)["e"] == 0.0
  given = maskopt.build_multipliers(params, [("a", jnp.ones((2, 1)))])["a"]
  assert isinstance(given, jax.Array) and given.shape == (2, 1)


@pytest.mark.parametrize(
  ("value", "kind", "match"),
  [
    (True, TypeError, r"build_multipliers\(rules=...\)`: at w .*expected a factor, got bool True"),
    (np.array([True, False, True]), TypeError, "a factor, got bool of shape"),
    (maskopt.units(0), TypeError, "a factor, got Units"),
    ("1", TypeError, "a factor, got str '1'"),
    (1j, TypeError, "a factor, got complex 1j"),
    (float("nan"), ValueError, "finite factors, got NaN or infinity"),
    (np.array([1.0, np.inf, 0.0]), ValueError, "finite factors"),
    (np.ones(4), ValueError, r"float broadcastable to \(4, 3\), got float64 of shape \(4,\)"),
    (np.ones(1), ValueError, "one element on a larger leaf: write a float"),
    (lambda leaf: "x", TypeError, "a factor, got str 'x'"),
    (lambda path, leaf: 1.0, TypeError, r"a function of \(leaf\), got one of \(path, leaf\)"),
  ],
)
def test_factors_that_do_not_fit(value, kind, match):
  with pytest.raises(kind, match=match):
    maskopt.build_multipliers({"w": array(4, 3)}, [("w", value)])


def test_multipliers_scale_updates_and_none_freezes_against_infinity():
  params = {"body": jnp.ones(2), "head": jnp.ones(2)}
  factors = maskopt.build_multipliers(params, [("head", 0.5), (..., None)])
  tx = optax.chain(optax.sgd(1.0), maskopt.scale_by_multiplier(factors))
  updates, _ = tx.update(
    {"body": jnp.full(2, jnp.inf), "head": jnp.ones(2)}, tx.init(params), params
  )
  after = maskopt.apply_updates(params, updates)
  assert functools.reduce(operator.add, (after[k].tolist() for k in after)) == [1.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize("value", [1, [0, 2], slice(3), range(2), np.array([0, 2])])
@pytest.mark.parametrize("wrap", [lambda v: v, maskopt.train_only])
def test_a_bare_index_is_no_value_for_parameters_of_several_ranks(value, wrap):
  """Row 1 of a kernel and entry 1 of its bias have nothing to do with each other."""
  params = {"a": {"kernel": array(8, 6), "bias": array(6)}, "b": array(6)}
  message = r"rules\[0\] 'a', expected parameters of one rank, .* \(6,\) at a/bias .*maskopt\.units"
  with pytest.raises(ValueError, match=message):
    maskopt.build_mask(params, [("a", wrap(value))])
  maskopt.build_mask(params, [("a/kernel", wrap(value)), ("**/b*", wrap(value))])


def test_a_module_is_no_pattern_and_its_path_is_told():
  model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(0)))
  message = r'rules\[0\] Linear, .*got the module Linear\. Write its path: "layers/1"'
  with pytest.raises(TypeError, match=message):
    maskopt.build_mask(model, [(model.layers[1], True)])
  linear = eqx.nn.Linear(2, 3, key=jax.random.key(0))
  with pytest.raises(TypeError, match="got the module Linear. Write the module's path as a string"):
    maskopt.build_mask(linear, [(linear, True)])
