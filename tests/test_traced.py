"""What jit traces, where a value must be read: our error in words, and what may be data works."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import maskopt

PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
INT, INTS = jnp.int32(1), jnp.array([0, 1])
FLAG, FLAGS = jnp.array(True), jnp.array([True, False, True])
REMEDY = "make it outside and close over it. A mask may be data, .*maskopt.runtime"


def rule(value):
  maskopt.build_mask(PARAMS, [("w", value)])


def labelled(labels):
  tx = maskopt.partition({0: optax.sgd(1.0), 1: optax.sgd(0.1)}, labels)
  tx.init(PARAMS)


POSITIONS = "expected an int, ints, a slice or a bool array, got a"
WHAT = "at w (rules[0] 'w'), expected what to freeze, got a"
CASES = {
  "units": (maskopt.units, INTS, f"`maskopt.units(idx=...)`: at idx, {POSITIONS} traced int32 of"),
  "flags": (maskopt.units, FLAGS, f"at idx, {POSITIONS} traced bool of shape (3,)"),
  "ints": (lambda x: maskopt.units([x, 2]), INT, f"at idx, {POSITIONS} list of traced values"),
  "slice": (lambda x: maskopt.units(slice(x)), INT, f"at idx, {POSITIONS} slice of traced values"),
  "heads": (lambda x: maskopt.heads(x, 3), INT, f"`maskopt.heads(idx=...)`: at idx, {POSITIONS}"),
  "of": (lambda x: maskopt.heads(0, x), INT, "`maskopt.heads(of=...)`: at of, expected a positive"),
  "axis": (lambda x: maskopt.heads(0, 3, axis=x), INT, "at axis, expected an int, got a traced in"),
  "parts": (lambda x: maskopt.heads(0, 3, parts=x), INT, "at parts, expected a positive int, got"),
  "index": (rule, INT, f"{WHAT} traced int32"),
  "indices": (rule, INTS, f"{WHAT} traced int32 of shape (2,)"),
  "tuple": (lambda x: rule(np.s_[:, [x, x]]), INT, f"{WHAT} tuple of traced values"),
  "index slice": (lambda x: rule(np.s_[:, :x]), INT, f"{WHAT} tuple of traced values"),
  "floats": (rule, jnp.ones(3), f"{WHAT} traced float32 of shape (3,)"),
  "bool": (rule, FLAG, "at w (rules[0] 'w'), expected bool broadcastable to (4, 3), got a traced"),
  "one bool": (rule, FLAG[None], "to (4, 3), got a traced bool of shape (1,)"),
  "train_only": (lambda x: rule(maskopt.train_only(x)), FLAG, "got a traced bool"),
  "of the leaf": (lambda x: rule(lambda leaf: x), FLAG, "got a traced bool"),
  "default": (
    lambda x: maskopt.build_mask(PARAMS, [("w", True)], default=x), FLAG,
    "at b (default), expected bool broadcastable to (3,), got a traced bool",
  ),
  "pattern": (
    lambda x: maskopt.build_mask(PARAMS, [(x, True)]), INT, "a function or `...`, got a traced int"
  ),
  "layers": (
    lambda x: maskopt.build_mask(PARAMS, [(slice(x), True)], layers=["b", "w"]), INT,
    "expected a slice of integers, got a slice of traced values",
  ),
  "answer": (
    lambda x: maskopt.build_mask(PARAMS, [(lambda path, leaf: x, True)]), FLAG,
    "expected a function that returns a bool, got a traced bool",
  ),
  "factor": (
    lambda x: maskopt.build_multipliers(PARAMS, [("w", x)]), jnp.float32(0.5),
    "at w (rules[0] 'w'), expected float broadcastable to (4, 3), got a traced float32",
  ),
  "labels": (
    lambda x: labelled({"w": x, "b": 0}), jnp.array([0, 1, 0]),
    "`maskopt.partition(labels=...)`: at w, expected a label, or an array of labels, got a traced",
  ),
  "label": (labelled, INT, "at the root, expected a label, or an array of labels, got a traced"),
  "label function": (
    lambda x: labelled(lambda params: {"w": x, "b": 0}), jnp.array([0, 1, 0]),
    "at w, expected a label, or labels that broadcast to (4, 3), got a traced int32 of shape (3,)",
  ),
  "count": (
    lambda x: maskopt.runtime({"w": FLAGS}, count=x), INT,
    "`maskopt.runtime(count=...)`: at w, expected an int, got a traced int32",
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_traced_value_is_refused_in_words(case):
  function, x, match = CASES[case]

  def traced(x):
    function(x)

  with pytest.raises(TypeError, match=f"{re.escape(match)}.*{REMEDY}"):
    jax.jit(traced)(x)


def test_all_traced_labels_in_one_error():
  match = (
    r"at b, expected a label, .* got a traced int32; at w, expected a label, .*of shape \(3,\)"
  )
  with pytest.raises(TypeError, match=match):
    jax.jit(lambda b, w: labelled({"w": w, "b": b}))(INT, jnp.array([0, 1, 0]))


def test_what_may_be_data_is_data():
  """A bool array that broadcasts, bare or as a runtime mask with a count, in a rule too."""

  def step(frozen):
    units = maskopt.runtime(frozen, count=4)
    mask = maskopt.build_mask(PARAMS, [("w", units), ("b", maskopt.train_only(frozen))])
    tx = maskopt.selective_transform(optax.sgd(0.5), freeze_mask=mask)
    state = tx.init(PARAMS)
    updates, _ = tx.update(PARAMS, state, PARAMS)
    return maskopt.apply_updates(PARAMS, updates)

  after = jax.jit(step)(FLAGS)
  assert after["w"].tolist() == [[1, 0.5, 1]] * 4 and after["b"].tolist() == [0.5, 1, 0.5]


def test_a_runtime_mask_in_a_rule_keeps_its_count():
  units = maskopt.runtime(np.asarray(FLAGS), count=4)
  mask = maskopt.build_mask(PARAMS, [("w", units)])
  assert mask["w"].count == 4 and mask["w"].mask.shape == (1, 3) and mask["b"] is False
  others = maskopt.build_mask(PARAMS, [("w", maskopt.train_only(units))])["w"]
  assert others.count == 8 and others.mask.tolist() == [[False, True, False]]
  with pytest.raises(ValueError, match=r"at w .*bool broadcastable to \(4, 3\), got bool of shape"):
    maskopt.build_mask(PARAMS, [("w", maskopt.runtime(jnp.ones(4, bool)))])


@pytest.mark.parametrize(
  ("mask", "count", "kind", "match"),
  [
    ({"w": FLAGS}, 1.0, TypeError, r"runtime\(count=...\)`: at w, expected an int, got float 1.0"),
    ({"w": FLAGS}, True, TypeError, "at w, expected an int, got bool True. Give the number of tra"),
    ({"w": FLAGS, "b": FLAGS}, {"w": 1}, ValueError, "at b, expected a count, got none"),
    ({"w": FLAGS}, {"w": 1, "b": 2}, ValueError, "at b, expected a mask, got a count alone"),
    (
      {"w": np.ones(3), "b": "x"},
      1,
      TypeError,
      r"at b, expected a bool or a boolean array, got str 'x'; at w, ",
    ),
  ],
)
def test_runtime_says_what_is_wrong(mask, count, kind, match):
  with pytest.raises(kind, match=match):
    maskopt.runtime(mask, count=count)


def test_counts_may_be_a_tree_with_none_where_it_changes():
  counts = {"b": None, "w": np.int64(2), "c": 3}
  mask = maskopt.runtime({"w": FLAGS, "b": FLAGS, "c": True}, counts)
  assert (mask["w"].count, mask["b"].count, mask["c"]) == (2, None, True)
