"""snapshot and audit: what survives, what is found, what is named."""

import copy
import io
import pickle

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import maskopt


def bits(x):
  x = np.asarray(x)
  return x.view(f"u{x.dtype.itemsize}")


def make(dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "a": {
      "kernel": rng.normal(size=(5, 4)).astype(dtype),
      "bias": rng.normal(size=4).astype(dtype),
    },
    "b": rng.normal(size=(2, 3, 4)).astype(dtype),
  }


MASK = {"a": {"kernel": np.array([True, False, True, False]), "bias": False}, "b": True}


class Net(nnx.Module):
  def __init__(self, rngs):
    self.frozen = nnx.Linear(4, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.head = nnx.Linear(4, 2, rngs=rngs)
    self.tail = nnx.BatchNorm(2, rngs=rngs)

  def __call__(self, x):
    return self.tail(self.head(self.drop(self.norm(self.frozen(x)))))


# Snapshot


def test_a_snapshot_survives_donation():
  params = jax.tree.map(jnp.asarray, make())
  before = maskopt.snapshot(params)
  step = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
  after = step(params)
  for _ in range(3):
    after = step(after)
  assert params["b"].is_deleted()
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(bits(x), bits(y)), before.tree, make())
  assert maskopt.audit(before, after, MASK).changed == 2 * 5 + 24


def test_a_snapshot_shares_no_memory_with_numpy_parameters():
  params = make()
  before = maskopt.snapshot(params)
  params["b"] += 1
  assert maskopt.audit(before, params, MASK).changed == 24


def test_a_snapshot_survives_in_place_updates_of_a_module():
  model = Net(nnx.Rngs(0))
  before = maskopt.snapshot(model)
  kernel = np.array(model.head.kernel[...])
  model.head.kernel[...] = model.head.kernel[...] + 1
  np.testing.assert_array_equal(before.tree["head"]["kernel"][...], kernel)
  assert {x.path for x in before.others} >= {"norm/mean", "drop/rngs/count", "drop/rngs/key"}


def test_a_snapshot_can_be_pickled_and_copied():
  before = maskopt.snapshot(make())
  for other in (pickle.loads(pickle.dumps(before)), copy.deepcopy(before)):
    assert maskopt.audit(other, make(), True)


def test_a_snapshot_says_what_it_holds():
  assert repr(maskopt.snapshot(make())) == "Snapshot of 3 arrays, 192 B on the host"
  assert "and of 6 that are no parameters" in str(maskopt.snapshot(Net(nnx.Rngs(0))))


class Elsewhere:
  """An array of which other processes hold a part."""

  shape, dtype, is_fully_addressable = (2,), np.dtype(np.float32), False


def test_what_cannot_be_read_is_named_all_at_once():
  gone = jnp.ones(2)
  gone.delete()
  tree = {"gone": gone, "far": Elsewhere(), "abstract": jax.ShapeDtypeStruct((2,), np.float32)}
  with pytest.raises(ValueError, match=r"maskopt.snapshot\(params\)") as e:
    maskopt.snapshot(tree)
  for words in (
    "at gone, expected an array that still exists",
    "at far, expected an array that this process holds wholly, got one sharded over several",
    "at abstract, expected an array, got an abstract one",
  ):
    assert words in str(e.value)


def test_a_traced_tree_is_refused():
  with pytest.raises(TypeError, match="at the root, expected parameters at hand, got traced ones"):
    jax.jit(lambda w: maskopt.snapshot({"w": w}).tree)(jnp.ones(2))


# Audit


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, np.float32, np.float64, np.complex64])
def test_counts_agree_with_numpy(dtype):
  before, after = make(dtype), make(dtype)
  after["a"]["kernel"][1:3] += 1
  after["a"]["bias"][0] += 1
  after["b"][1, 2, 3] += 1
  report = maskopt.audit(before, after, MASK)
  leaves = {x.path: x for x in report.leaves}
  assert not report and not report.ok
  assert leaves["a/kernel"][1:5] == (10, 4, 10, 4)
  assert leaves["a/bias"][1:5] == (0, 0, 4, 1)
  assert leaves["b"][1:5] == (24, 1, 0, 0)
  (change,) = leaves["b"].changes
  assert change.position == (1, 2, 3)
  assert (change.old, change.new) == (before["b"][1, 2, 3], after["b"][1, 2, 3])
  assert [c.position for c in leaves["a/kernel"].changes] == [(1, 0), (1, 2), (2, 0), (2, 2)]
  assert (report.changed, report.moved, report.frozen, report.trainable) == (5, 5, 34, 14)


@pytest.mark.parametrize(
  "old, new",
  [
    (np.uint32(0x00000000), np.uint32(0x80000000)),  # -0.0
    (np.uint32(0x7FC00000), np.uint32(0x7FC00001)),  # payload of NaN
    (np.uint32(0x00000001), np.uint32(0x00000000)),  # flushed subnormal
  ],
)
def test_bits_are_compared_and_not_values(old, new):
  before, after = (np.array([x, x], np.uint32).view(np.float32) for x in (old, new))
  report = maskopt.audit({"w": before}, {"w": after}, {"w": np.array([True, False])})
  assert (report.changed, report.moved) == (1, 1)
  assert maskopt.audit({"w": before}, {"w": before.copy()}, True)


def test_a_changed_payload_shows_its_bits():
  before, after = (np.array([x], np.uint32).view(np.float32) for x in (0x7FC00000, 0x7FC00001))
  text = str(maskopt.audit({"w": before}, {"w": after}, True))
  assert "[0] nan (0x7fc00000) -> nan (0x7fc00001)" in text


def test_complex128_and_float8_and_bool_and_scalars():
  before = {
    "z": np.array([1 + 2j, complex(3, -0.0)]),
    "f8": np.ones(2, jnp.float8_e4m3fn),
    "flag": np.array([True, False]),
    "s": np.float32(1),
  }
  after = {**before, "z": np.array([1 + 2j, complex(3, 0.0)]), "s": np.float32(2)}
  report = maskopt.audit(before, after, True)
  assert {x.path: x.changed for x in report.leaves} == {"f8": 0, "flag": 0, "s": 1, "z": 1}
  assert [x.changes[0].position for x in report.leaves if x.changed] == [(), (1,)]


def test_keys_of_random_numbers_are_elements():
  keys = jax.random.split(jax.random.key(0), 3)
  after = jnp.concatenate([keys[:2], jax.random.split(jax.random.key(1), 1)])
  report = maskopt.audit(maskopt.snapshot({"k": keys}), {"k": after}, {"k": np.ones(3, bool)})
  assert report.leaves[0][1:3] == (3, 1) and report.leaves[0].changes[0].position == (2,)


@pytest.mark.parametrize("share", [0.01, 0.3])
@pytest.mark.parametrize("rows", [False, True])
def test_every_layout_finds_one_leak_and_only_that(share, rows):
  rng = np.random.default_rng(2)
  shape = (300, 256)
  frozen = rng.random((300, 1) if rows else shape) >= share
  where = np.broadcast_to(frozen, shape)
  before = rng.normal(size=shape).astype(np.float32)
  after = np.where(where, before, before + 1)
  assert maskopt.audit({"w": before}, {"w": after}, {"w": frozen}).moved == np.sum(~where)
  at = tuple(np.argwhere(where)[1234])
  after[at] = np.nextafter(after[at], np.inf)
  report = maskopt.audit({"w": before}, {"w": after}, {"w": frozen})
  assert report.changed == 1 and report.leaves[0].changes[0].position == at


def test_limit_bounds_the_changes_and_not_the_counts():
  w = np.zeros(100, np.float32)
  report = maskopt.audit({"w": w}, {"w": w + 1}, True, limit=5)
  assert (report.changed, len(report.leaves[0].changes)) == (100, 5)
  assert "100 that changed: [0] 0.0 -> 1.0; [1] 0.0 -> 1.0; [2] 0.0 -> 1.0; ..." in str(report)


def test_raise_if_failed_names_every_leaf():
  before, after = make(), make()
  maskopt.audit(before, after, MASK).raise_if_failed()
  after["a"]["kernel"][0, 0] += 1
  after["b"][0] += 1
  with pytest.raises(ValueError, match=r"maskopt.audit\(before, after, freeze_mask\)") as e:
    maskopt.audit(before, after, MASK).raise_if_failed()
  assert "at a/kernel, expected 10 frozen elements with the bits they had, got 1" in str(e.value)
  assert "at b, expected 24 frozen" in str(e.value) and "selective_transform" in str(e.value)


def test_different_trees_are_an_error_that_lists_paths():
  before, after = make(), make()
  after["c"] = after.pop("b")
  after["a"]["bias"] = after["a"]["bias"].astype(np.float16)
  with pytest.raises(ValueError, match="Compare a model with itself") as e:
    maskopt.audit(before, after, MASK)
  for words in (
    "at c, expected no leaf",
    "at b, expected the leaf that was there before, got none",
    r"at a/bias, expected float32 of shape (4,), got float16 of shape (4,)",
  ):
    assert words in str(e.value)


def test_a_mask_of_another_model_is_an_error():
  with pytest.raises(ValueError, match="maskopt.audit.*at z, expected a parameter"):
    maskopt.audit(make(), make(), {"a": True, "b": True, "z": True})


def test_containers_do_not_matter():
  before = maskopt.snapshot(make())
  after = nnx.State(make())
  assert maskopt.audit(before, after, lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
  assert maskopt.audit(before, maskopt.snapshot(after), MASK)


def test_equinox_models_with_functions_as_leaves():
  model = eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(0))
  other = eqx.tree_at(lambda m: m.layers[0].bias, model, model.layers[0].bias + 1)
  frozen = jax.tree.map(eqx.is_array, model)
  report = maskopt.audit(maskopt.snapshot(model), other, frozen)
  assert [x.path for x in report.leaves if x.changed] == ["layers/0/bias"]


def test_shared_arrays_are_no_matter_for_a_proof():
  w = np.ones(3, np.float32)
  assert maskopt.audit({"a": w, "b": w}, {"a": w, "b": w}, True)


def test_adamw_before_the_freeze_leaks_and_maskopt_does_not():
  params = jax.tree.map(jnp.asarray, make())
  before = maskopt.snapshot(params)
  grads = jax.tree.map(jnp.ones_like, params)
  wrong = optax.chain(maskopt.masked_freeze(MASK), optax.adamw(0.1, weight_decay=0.1))
  right = maskopt.selective_transform(optax.adamw(0.1, weight_decay=0.1), freeze_mask=MASK)
  reports = []
  for tx in (wrong, right):
    p, state = params, tx.init(params)
    for _ in range(3):
      with jax.numpy_dtype_promotion("standard"):  # Optax's Adam relies on it
        updates, state = tx.update(grads, state, p)
      p = maskopt.apply_updates(p, updates)
    reports.append(maskopt.audit(before, p, maskopt.mask_of(state)))
  assert (reports[0].changed, reports[1].changed) == (34, 0)
  assert reports[1].moved == 14


# State that is no parameter


def trained_module():
  model = Net(nnx.Rngs(0))
  before = maskopt.snapshot(model)
  nnx.jit(lambda m, x: m(x))(model, jnp.arange(12.0).reshape(3, 4))
  return model, before


def test_statistics_of_frozen_layers_drift_and_others_are_noted():
  model, before = trained_module()
  mask = {"frozen": True, "norm": True, "head": False, "tail": False}
  report = maskopt.audit(before, model, mask)
  assert report.ok
  assert report.drifted == ("norm/mean", "norm/var")
  assert set(report.notes) == {"drop/rngs/count", "tail/mean", "tail/var"}
  assert "moved in layers that are wholly frozen: norm/mean, norm/var" in str(report)
  report.raise_if_failed()
  with pytest.raises(ValueError, match="at norm/mean, expected still statistics"):
    report.raise_if_failed(drift=True)


def test_counts_of_random_numbers_never_drift():
  model, before = trained_module()
  report = maskopt.audit(before, model, True)
  assert "drop/rngs/count" in report.notes and "drop/rngs/count" not in report.drifted


def test_nothing_moved_nothing_noted():
  model = Net(nnx.Rngs(0))
  report = maskopt.audit(maskopt.snapshot(model), model, True)
  assert report and report.notes == report.drifted == ()


def test_parameters_alone_say_nothing_of_statistics():
  model, before = trained_module()
  assert maskopt.audit(before, nnx.state(model, nnx.Param), True).notes == ()


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))


@pytest.mark.parametrize("norm_frozen", [False, True])
def test_linen_statistics(norm_frozen):
  x = jnp.arange(8.0).reshape(2, 4)
  variables = Linen().init(jax.random.key(0), x)
  _, moved = Linen().apply(variables, x, mutable=["batch_stats"])
  mask = {"Dense_0": True, "BatchNorm_0": norm_frozen}
  report = maskopt.audit(maskopt.snapshot(variables), {**variables, **moved}, mask)
  paths = ("batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var")
  assert (report.drifted, report.notes) == ((paths, ()) if norm_frozen else ((), paths))


def trained_linen():
  x = jnp.arange(8.0).reshape(2, 4)
  variables = Linen().init(jax.random.key(0), x)
  _, moved = Linen().apply(variables, x, mutable=["batch_stats"])
  return variables, {**variables, **moved}


@pytest.mark.parametrize("norm_frozen", [False, True])
def test_linen_statistics_under_a_mask_built_over_the_variables(norm_frozen):
  before, after = trained_linen()
  rules = [("params/Dense_0", True), ("params/BatchNorm_0", norm_frozen)]
  mask = maskopt.build_mask(before, rules)
  assert mask["batch_stats"] == {"BatchNorm_0": {"mean": False, "var": False}}
  report = maskopt.audit(maskopt.snapshot(before), after, mask)
  paths = ("batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var")
  assert (report.drifted, report.notes) == ((paths, ()) if norm_frozen else ((), paths))
  assert report.trainable == (0 if norm_frozen else 6)
  bare = maskopt.audit(before, {"params": after["params"]}, mask)
  assert bare.notes == bare.drifted == ()


def test_linen_statistics_that_the_mask_freezes_must_keep_their_bits():
  before, after = trained_linen()
  mask = maskopt.build_mask(before, [("params", True), ("**/mean", True)])
  report = maskopt.audit(before, after, mask)
  assert {x.path for x in report.leaves if x.changed} == {"batch_stats/BatchNorm_0/mean"}
  assert report.drifted == ("batch_stats/BatchNorm_0/var",)
  match = "batch_stats/BatchNorm_0/mean, expected the leaf that was there before, got none"
  with pytest.raises(ValueError, match=match):
    maskopt.audit(before, {"params": after["params"]}, mask)


def test_linen_statistics_under_the_mask_of_a_state():
  before, after = trained_linen()
  tx = maskopt.selective_transform(optax.sgd(0.1), freeze_mask=True)
  paths = ("batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var")
  for params in (before["params"], {"params": before["params"]}):
    assert maskopt.audit(before, after, maskopt.mask_of(tx.init(params))).drifted == paths


def test_state_without_parameters_of_its_own_belongs_to_the_layer_around_it():
  class Block(nnx.Module):
    def __init__(self, rngs):
      self.linear = nnx.Linear(2, 2, rngs=rngs)
      self.norm = nnx.BatchNorm(2, use_bias=False, use_scale=False, rngs=rngs)

  class Whole(nnx.Module):
    def __init__(self, rngs):
      self.block = Block(rngs)
      self.head = nnx.Linear(2, 2, rngs=rngs)

  model = Whole(nnx.Rngs(0))
  before = maskopt.snapshot(model)
  model.block.norm(jnp.arange(4.0).reshape(2, 2))
  assert maskopt.audit(before, model, {"block": True, "head": False}).drifted
  assert maskopt.audit(before, model, {"block": False, "head": True}).notes


# How it shows itself


def test_nothing_that_trains_has_moved_is_said_in_every_form():
  from rich.console import Console

  def shown(report):
    out = io.StringIO()
    Console(file=out, width=120).print(report)
    return str(report), report._repr_html_(), out.getvalue()

  note = "! nothing that trains has moved: was the gradient computed with another mask, or did the"
  still = maskopt.audit(make(), make(), MASK)
  assert still.ok and still.notes == ()
  assert all(note in text for text in shown(still))
  leaked = make()
  leaked["b"][0, 0, 0] = 7
  assert all(note in text for text in shown(maskopt.audit(make(), leaked, MASK)))
  stepped = make()
  stepped["a"]["bias"][0] = 7
  everything_frozen = maskopt.audit(make(), make(), True)
  for report in (maskopt.audit(make(), stepped, MASK), everything_frozen):
    assert not any("nothing that trains" in text for text in shown(report))


def test_an_audit_shows_itself_in_every_form():
  from rich.console import Console

  after = make()
  after["b"][0, 0, 0] = 7
  report = maskopt.audit(make(), after, MASK)
  out = io.StringIO()
  Console(file=out, width=100).print(report)
  for text in (str(report), repr(report), report._repr_html_(), out.getvalue()):
    assert "Audit FAILED: 1 of 34 frozen elements changed" in text and "[0, 0, 0]" in text
  assert "Audit passed: 34 frozen elements kept every bit, 0 of 14 trainable elements moved" in str(
    maskopt.audit(make(), make(), MASK)
  )
  assert max(map(len, str(report).splitlines())) <= 100


@pytest.mark.parametrize(
  "before", [lambda m: m, lambda m: nnx.state(m, nnx.Param), lambda m: nnx.split(m)[1]]
)
def test_a_module_is_not_compared_with_itself(before):
  """Its variables are updated in place, so both sides would be what came of it."""
  model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  leaks = [maskopt.masked_freeze({"kernel": True, "bias": False}), optax.add_decayed_weights(0.1)]
  optimizer = nnx.Optimizer(model, optax.chain(*leaks, optax.sgd(0.1)), wrt=nnx.Param)
  first, copied = before(model), maskopt.snapshot(model)
  optimizer.update(model, nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(model))
  mask = {"kernel": True, "bias": False}
  with pytest.raises(ValueError, match=r"got the same variable\. .* maskopt\.snapshot\(model\)"):
    maskopt.audit(first, model, mask)
  assert not maskopt.audit(copied, model, mask).ok


def test_models_that_share_some_variables_are_compared():
  body = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  old, new = (nnx.Dict(body=body, head=nnx.Linear(3, 1, rngs=nnx.Rngs(k))) for k in (1, 2))
  report = maskopt.audit(old, new, {"body": True, "head": False})
  assert report.ok and report.moved == 3
