"""Every report over unusual leaves: none, scalars, keys, empty ones, narrow dtypes, two copies."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import reference

import maskopt

HALF = np.array([True, False])
_LONG = {"x" * 200: {"y" * 200: jnp.ones((3, 2))}}
# Parameters, their mask, and how many elements are frozen and train.
CASES = {
  "empty": ({}, {}, (0, 0)),
  "one bool over an empty tree": ({}, True, (0, 0)),
  "None": ({"a": None}, True, (0, 0)),
  "None alone": (None, None, (0, 0)),
  "scalars": ({"a": jnp.ones(()), "b": 2.0}, {"a": True, "b": False}, (1, 1)),
  "Python numbers": ({"a": 1, "b": 1j, "c": True}, {"a": True, "b": False, "c": True}, (2, 1)),
  "a lone array": (jnp.ones((3, 2)), HALF, (3, 3)),
  "keys": ({"k": jax.random.split(jax.random.key(0)), "w": jnp.ones(2)}, True, (4, 0)),
  "integers": ({"n": jnp.arange(3), "w": jnp.ones(3)}, {"n": True, "w": False}, (3, 3)),
  "no rows": ({"z": jnp.ones((0, 2)), "w": jnp.ones(3)}, {"z": HALF, "w": False}, (0, 3)),
  "no units": ({"kernel": jnp.ones((2, 0)), "bias": jnp.ones(0)}, False, (0, 0)),
  "no rows, runtime": ({"z": jnp.ones((0, 2))}, {"z": maskopt.runtime(HALF)}, (0, 0)),
  "long paths": (_LONG, False, (0, 6)),
  "NumPy": ({"w": np.ones((3, 2))}, {"w": HALF}, (3, 3)),
  "bfloat16": ({"w": jnp.ones((3, 2), jnp.bfloat16)}, {"w": HALF}, (3, 3)),
  "float8": ({"w": np.ones((3, 2), ml_dtypes.float8_e5m2)}, {"w": HALF}, (3, 3)),
  "complex": ({"w": jnp.ones((3, 2), jnp.complex64)}, {"w": HALF}, (3, 3)),
  "two copies": (optax.LookaheadParams.init_synced({"w": jnp.ones((3, 2))}), {"w": HALF}, (3, 3)),
}


def moved(params):
  """The parameters one step later: every float has another value."""

  def other(x):
    is_float = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)
    return x + 1 if is_float else x

  return jax.tree.map(other, params)


@pytest.mark.parametrize("case", CASES)
def test_every_report_takes_every_leaf(case, tmp_path):
  params, mask, (frozen, trainable) = CASES[case]
  summary = maskopt.summary(params, mask)
  assert (summary.frozen, summary.trainable) == (frozen, trainable)
  assert max(map(len, str(summary).splitlines())) <= 100 and summary._repr_html_()
  numbers = maskopt.metrics(params, mask, per_leaf=True)
  assert numbers["trainable_parameters"] == trainable
  before = maskopt.snapshot(params)
  copies = 2 if case == "two copies" else 1
  same = maskopt.audit(before, params, mask)
  assert same.ok and (same.frozen, same.trainable) == (frozen * copies, trainable * copies)
  assert (
    bool(maskopt.audit(before, moved(params), mask))
    == ("integer" in case or "key" in case or not frozen or case == "Python numbers")
    or case == "keys"
  )
  maskopt.plot(params, mask).savefig(tmp_path / "mask.png")
  maskopt.plot(moved(params), mask, before=before).savefig(tmp_path / "change.png")


def test_an_audit_of_lookahead_tells_which_copy_leaked():
  params = optax.LookaheadParams.init_synced({"w": jnp.ones(2), "b": jnp.ones(())})
  slow = {"w": jnp.array([3.0, 1.0]), "b": jnp.float32(4)}
  mask = {"w": HALF, "b": True}
  audit = maskopt.audit(maskopt.snapshot(params), params._replace(slow=slow), mask)
  assert [x.path for x in audit.leaves if x.changed] == ["slow/b", "slow/w"]
  assert "! slow/b: 1 that changed: 1.0 -> 4.0" in str(audit)
  tx = maskopt.selective_transform(optax.lookahead(optax.sgd(0.1), 2, 0.5), freeze_mask=mask)
  state = tx.init(params)
  assert maskopt.audit(params, params, maskopt.mask_of(state)).frozen == 4
  assert maskopt.summary(params, maskopt.mask_of(state)).trainable == 1
  assert maskopt.metrics(params, mask, grad=params)["grad_norm_frozen"] == np.float32(2**0.5)


def test_the_state_of_numpys_float64_is_counted_as_jax_keeps_it():
  params = {"w": np.ones((3, 2)), "b": np.ones(4)}
  mask = {"w": HALF, "b": False}
  state = maskopt.selective_transform(optax.adam(0.1), freeze_mask=mask).init(params)
  held = sum(x.nbytes for x in jax.tree.leaves(state)) - 4  # Adam's count
  assert maskopt.summary(params, mask).optimizer_bytes == held
  assert maskopt.metrics(params, mask)["optimizer_bytes"] == held


@pytest.mark.parametrize("mask", [True, {"w": HALF, "b": True}], ids=["whole", "units"])
@pytest.mark.parametrize("call", ["summary", "audit", "plot", "snapshot"])
def test_a_report_inside_jit_is_refused_in_one_sentence(call, mask):
  def inside(p):
    arguments = {"summary": (p, mask), "audit": (p, p, mask), "plot": (p, mask), "snapshot": (p,)}
    getattr(maskopt, call)(*arguments[call])
    return p

  match = rf"`maskopt.{call}\(.*at the root, expected parameters at hand, got traced ones. Call it"
  with pytest.raises(TypeError, match=match):
    jax.jit(inside)({"w": jnp.ones((3, 2)), "b": jnp.ones(2)})


def test_norms_need_values():
  abstract = {"w": jax.ShapeDtypeStruct((3, 2), jnp.float32), "b": jnp.ones(2)}
  match = r"metrics\(params, ...\)`: at w, expected an array, got an abstract one .*maskopt.summary"
  with pytest.raises(ValueError, match=match):
    maskopt.metrics(abstract, True)
  gone = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
  gone["w"].delete()
  with pytest.raises(ValueError, match=r"metrics\(grad=...\)`: at w, .*got one that was donated"):
    maskopt.metrics({"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, True, grad=gone)


@pytest.fixture
def promotion():
  """Optax's Adam itself needs promotion."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.mark.usefixtures("promotion")
def test_a_transform_over_leaves_without_elements():
  params = {"z": jnp.ones((0, 2)), "w": jnp.ones(2)}
  tx = maskopt.selective_transform(optax.adam(0.1), freeze_mask={"z": HALF, "w": HALF})
  updates, _ = tx.update(params, tx.init(params), params)
  after = maskopt.apply_updates(params, updates)
  assert after["z"].shape == (0, 2) and reference.moved(params["w"], after["w"], HALF) == []
  nothing = maskopt.selective_transform(optax.adam(0.1), freeze_mask=True)
  assert nothing.update({}, nothing.init({}), {})[0] == {}


def test_a_mask_over_no_parameters_says_so():
  with pytest.raises(
    ValueError, match=r"at w, expected a parameter, .*The tree has no parameters\."
  ):
    maskopt.summary({}, {"w": True})
