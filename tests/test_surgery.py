import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import surgery_models as models
from flax import linen as nn, nnx
from flax.core import FrozenDict
from surgery_models import CASES, bits, by_path, parameters, paths

import maskopt
from maskopt import surgery

ids = [c.name for c in CASES]
every_case = pytest.mark.parametrize("case", CASES, ids=ids)


def check(case, result, *, old, new_forward=None):
  """The mask freezes what is old, twenty steps leave it alone, and the rest does move."""
  kept = {p: x for p, x in by_path(result.model).items() if np.all(paths(result.freeze_mask)[p])}
  for p, x in kept.items():
    if p in old:
      np.testing.assert_array_equal(bits(x), bits(old[p]))
  case = dataclasses.replace(case, new_forward=new_forward or case.forward)
  before = maskopt.snapshot(parameters(result.model))
  after = models.trained(case, result.model, result.freeze_mask)
  audit = maskopt.audit(before, after, result.freeze_mask)
  assert audit.ok and audit.moved > 0
  return kept


def values(params):
  return jax.tree.map(np.asarray, params)


class TestAssign:
  @every_case
  def test_chosen_elements_get_the_value_and_train(self, case):
    model, old = case.model(), by_path(case.model())
    path = next(p for p in old if p.endswith("head/kernel"))
    result = surgery.assign(model, [(path, np.s_[0, :], 0.25)])
    new = by_path(result.model)
    np.testing.assert_array_equal(new[path][0], 0.25)
    np.testing.assert_array_equal(bits(new[path][1:]), bits(old[path][1:]))
    mask = np.broadcast_to(paths(result.freeze_mask)[path], old[path].shape)
    assert not mask[0].any() and mask[1:].all()
    kept = check(case, result, old=old)
    assert set(kept) == set(old) - {path}

  def test_values_take_the_shape_of_the_leaf_or_of_the_chosen_block(self):
    params = {"w": jnp.zeros((3, 4), jnp.bfloat16), "n": jnp.zeros(3, jnp.int32)}
    rules = [
      ("w", np.s_[0, :], jnp.arange(4, dtype=jnp.float32)),
      ("w", np.s_[1:, [0, 2]], [[1, 2], [3, 4]]),
      ("n", lambda leaf: leaf + 7),
    ]
    new = surgery.assign(params, rules).model
    assert new["w"].dtype == jnp.bfloat16
    expected = [[0, 1, 2, 3], [1, 0, 2, 0], [3, 0, 4, 0]]
    np.testing.assert_array_equal(np.asarray(new["w"], np.float32), expected)
    np.testing.assert_array_equal(new["n"], [7, 7, 7])

  def test_the_first_rule_for_an_element_wins(self):
    params = {"w": jnp.zeros(3)}
    rules = [("w", np.array([True, False, False]), 1.0), ("w", 2.0)]
    assert surgery.assign(params, rules).model["w"].tolist() == [1.0, 2.0, 2.0]
    with pytest.raises(ValueError, match=r"rules\[1\], expected elements that are left"):
      surgery.assign(params, rules[1:] + rules[:1])

  def test_bits_of_special_values_survive(self):
    special = np.array([-0.0, np.nan, 1e-45, np.inf], np.float32)
    special.view(np.uint32)[1] = 0x7FC12345
    result = surgery.assign({"w": special, "v": jnp.asarray(special)}, [("*", np.s_[3:], 1.0)])
    for leaf in result.model.values():
      np.testing.assert_array_equal(bits(leaf)[:3], bits(special)[:3])

  def test_moments_of_assigned_elements_are_fresh(self):
    params = {"w": jnp.ones(3)}
    tx = optax.sgd(0.1, momentum=0.9)
    state = jax.tree.map(lambda x: x + 5.0, tx.init(params))
    result = surgery.assign(params, [("w", np.s_[0:1], 0.0)], opt_state=state, tx=tx)
    assert jax.tree.leaves(result.opt_state)[0].tolist() == [0.0, 5.0, 5.0]

  def test_bad_input(self):
    params = {"w": jnp.zeros((3, 4)), "n": jnp.zeros(3, jnp.int32)}
    with pytest.raises(ValueError, match="a pattern that names a parameter"):
      surgery.assign(params, [("x", 0.0)])
    with pytest.raises(
      ValueError,
      match=r"at w, expected values that broadcast to \(3, 4\) or to the chosen \(1, 4\)",
    ):
      surgery.assign(params, [("w", np.s_[0, :], np.zeros(3))])
    with pytest.raises(TypeError, match="at n, expected values for int32, got float 0.5"):
      surgery.assign(params, [("n", 0.5)])
    with pytest.raises(TypeError, match="expected values for float32"):
      surgery.assign(params, [("w", "zero")])
    with pytest.raises(TypeError, match=r"\(pattern, value\) or \(pattern, where, value\)"):
      surgery.assign(params, [("w",)])
    assert not params["w"].any()


class TestReset:
  @every_case
  def test_chosen_layers_start_anew_and_train(self, case):
    old = by_path(case.model())
    result = surgery.reset(case.model(), [("head", True)], key=jax.random.key(5))
    new = by_path(result.model)
    assert not new["head/bias"].any() and old["head/bias"].any()
    assert (new["head/kernel"] != old["head/kernel"]).all()
    kept = check(case, result, old=old)
    assert set(kept) == {p for p in old if not p.startswith("head")}

  def test_statistics_of_a_whole_layer_start_anew(self):
    for model in (models.NnxCNN(nnx.Rngs(0)), CASES[5].build()):
      if isinstance(model, nnx.Module):
        model.norm.mean[...] += 3.0
      for rules, expected in (
        ([("norm", True)], True),
        ([("norm/scale", True)], False),
        ([("norm", maskopt.units(0))], False),
      ):
        new = surgery.reset(model, rules).model
        mean = (
          new.norm.mean[...] if isinstance(new, nnx.Module) else new["batch_stats"]["norm"]["mean"]
        )
        assert (not np.any(mean)) == expected

  def test_units_and_initializer(self):
    params = {"d": {"kernel": jnp.zeros((3, 4)), "bias": jnp.ones(4)}}
    ones = jax.nn.initializers.ones
    new = surgery.reset(params, [("d", maskopt.units([1]))], init=ones)
    np.testing.assert_array_equal(new.model["d"]["kernel"], np.eye(4)[[1, 1, 1]])
    assert new.model["d"]["bias"].tolist() == [1.0, 0.0, 1.0, 1.0]
    assert new.freeze_mask["d"]["bias"].tolist() == [True, False, True, True]

  def test_bad_input(self):
    params = {"d": {"kernel": jnp.zeros((3, 4))}}
    with pytest.raises(ValueError, match="`maskopt.surgery.reset.*none .*near paths"):
      surgery.reset(params, [("e/kernel", True)])
    with pytest.raises(TypeError, match="an initializer"):
      surgery.reset(params, [("d", True)], init="ones")


class DeepMLP(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(5, name="dense_0")(x)
    for k in range(self.depth):
      x = nn.Dense(5, name=f"dense_{k + 1}")(x)
    return nn.Dense(2, name=f"dense_{self.depth + 1}")(jnp.tanh(x))

  depth: int = 0


class TestDeepen:
  @pytest.mark.parametrize("case", CASES[:4], ids=ids[:4])
  def test_modules_compute_what_they_did(self, case):
    old = by_path(case.model())
    result = surgery.deepen(case.model(), case.layer, inputs=case.inputs)
    np.testing.assert_allclose(
      case.apply(result.model), case.apply(case.model()), rtol=1e-6, atol=1e-6
    )
    new = by_path(result.model)
    layer = case.layer
    added = {p for p in new if p.startswith(f"{layer}/layers/1/")}
    assert added == {f"{layer}/layers/1/kernel", f"{layer}/layers/1/bias"}
    kept = check(case, result, old={})
    assert set(kept) == set(new) - added
    for p in old:
      moved = p.replace(layer, f"{layer}/layers/0", 1) if p.startswith(layer) else p
      np.testing.assert_array_equal(bits(new[moved]), bits(old[p]))

  def test_a_sequential_gets_a_neighbour_and_moments_follow(self):
    model = nnx.Sequential(
      nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 2, rngs=nnx.Rngs(1))
    )
    params = nnx.state(model, nnx.Param)
    tx = optax.sgd(0.1, momentum=0.9)
    state = jax.tree.map(lambda x: x + 3.0, tx.init(params))
    x = models.INPUTS["mlp"]
    result = surgery.deepen(
      model, "layers/0", activation=nnx.relu, inputs=x, opt_state=state, tx=tx
    )
    assert len(result.model.layers) == 5 and len(model.layers) == 3
    np.testing.assert_array_equal(bits(result.model(x)), bits(model(x)))
    trace = {p: np.asarray(t) for p, t in paths(result.opt_state[0].trace).items()}
    assert (trace["layers/4/kernel"] == 3.0).all() and (trace["layers/0/kernel"] == 3.0).all()
    assert not trace["layers/2/kernel"].any()

  def test_a_convolution_is_followed_by_one(self):
    kernel = np.asarray(
      surgery.deepen(models.NnxCNN(nnx.Rngs(0)), "conv").model.conv.layers[1].kernel[...]
    )
    expected = np.zeros((3, 3, 4, 4))
    expected[1, 1] = np.eye(4)
    np.testing.assert_array_equal(kernel, expected)

  def test_numbered_parameters_move_up(self):
    old, new = DeepMLP(), DeepMLP(depth=1)
    x = models.INPUTS["mlp"]
    variables = old.init(jax.random.key(0), x)
    result = surgery.deepen(variables, "dense_0", inputs=x, forward=old, new_forward=new)
    np.testing.assert_array_equal(bits(new.apply(result.model, x)), bits(old.apply(variables, x)))
    case = models.Case("deep", "dense_0", x, None, old, new)
    kept = check(case, result, old={}, new_forward=new)
    assert set(kept) == {f"dense_{k}/{n}" for k in (0, 2) for n in ("kernel", "bias")}
    list_result = surgery.deepen([{"kernel": jnp.ones((2, 3))}, {"kernel": jnp.ones((3, 1))}], "0")
    assert [x["kernel"].shape for x in list_result.model] == [(2, 3), (3, 3), (3, 1)]

  @pytest.mark.parametrize("case", CASES[4:], ids=ids[4:])
  def test_linen_parameters_get_a_named_layer(self, case):
    result = surgery.deepen(case.model(), case.layer, name="extra")
    params = parameters(result.model)
    width = np.shape(params["extra"]["kernel"])[-1]
    middle = params["extra"]["kernel"].reshape(-1, width, width)
    np.testing.assert_array_equal(middle[len(middle) // 2], np.eye(width))
    assert np.all(list(paths(result.freeze_mask["extra"]).values()) == np.array(False))
    assert width == {"mlp": 5, "cnn": 4, "lstm": 4, "attention": 4}[case.name.split("-")[1]]

  def test_bad_input(self):
    model = models.NnxMLP(nnx.Rngs(0))
    x = models.INPUTS["mlp"]
    with pytest.raises(ValueError, match="at nope, expected a layer"):
      surgery.deepen(model, "nope")
    with pytest.raises(ValueError, match="the same old outputs"):
      surgery.deepen(model, "hidden", activation=jnp.tanh, inputs=x)
    with pytest.raises(ValueError, match="module whose output the new layer can take"):
      surgery.deepen(models.NnxLSTM(nnx.Rngs(0)), "rnn/cell")
    params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"bias": jnp.ones(2)}}
    with pytest.raises(ValueError, match="a numbered layer, or a name for the new one"):
      surgery.deepen(params, "a")
    with pytest.raises(ValueError, match="at b, expected a name that is free"):
      surgery.deepen(params, "a", name="b")
    with pytest.raises(ValueError, match="at b/bias, expected a kernel"):
      surgery.deepen(params, "b", name="c")
    with pytest.raises(ValueError, match="whose forward is yours"):
      surgery.deepen(params, "a", name="c", activation=jnp.tanh)


class TestTakeAndAppend:
  @every_case
  def test_parts_come_with_their_bits_and_their_moments(self, case):
    model, old = case.model(), by_path(case.model())
    tx = optax.sgd(0.1, momentum=0.9)
    state = jax.tree.map(lambda x: x + 2.0, tx.init(parameters(model)))
    result = surgery.take(model, case.layer, opt_state=state, tx=tx)
    new = by_path(result.model)
    assert {f"{case.layer}/{p}" for p in new} == {p for p in old if p.startswith(case.layer + "/")}
    for p, x in new.items():
      np.testing.assert_array_equal(bits(x), bits(old[f"{case.layer}/{p}"]))
    assert all(x is True for x in paths(result.freeze_mask).values())
    assert all((x == 2.0).all() for x in jax.tree.leaves(result.opt_state))
    assert maskopt.audit(case.build(), case.model(), True).ok

  @pytest.mark.parametrize("case", CASES[4:], ids=ids[4:])
  def test_first_layers_of_linen_variables(self, case):
    names = list(case.model()["params"])
    order = (case.forward, case.inputs)
    result = surgery.take(case.model(), 1, layers=order)
    first = {"mlp": "hidden", "cnn": "conv", "lstm": "cell", "attention": "embed"}
    assert list(result.model["params"]) == [first[case.name.split("-")[1]]]
    rest = surgery.take(case.model(), slice(1, None), layers=order)
    assert sorted([*result.model["params"], *rest.model["params"]]) == sorted(names)
    if "batch_stats" in case.model():
      assert "batch_stats" not in result.model and "norm" in rest.model["batch_stats"]

  def test_layers_of_a_sequential(self):
    model = nnx.Sequential(
      nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 2, rngs=nnx.Rngs(1))
    )
    x = models.INPUTS["mlp"]
    first = surgery.take(model, 2).model
    np.testing.assert_array_equal(bits(first(x)), bits(nnx.relu(model.layers[0](x))))
    last = surgery.take(model, slice(-1, None))
    np.testing.assert_array_equal(bits(last.model(first(x))), bits(model(x)))
    assert set(by_path(last.model)) == {"layers/0/kernel", "layers/0/bias"}

  def test_several_parts_keep_their_containers(self):
    params = FrozenDict(
      {"a": [{"w": jnp.ones(1)}, {"w": jnp.ones(2)}], "b": (jnp.ones(3), jnp.ones(4))}
    )
    new = surgery.take(params, ["a/1", "b/0"]).model
    assert isinstance(new, FrozenDict) and new["a"][0]["w"].shape == (2,)
    assert isinstance(new["b"], tuple) and len(new["b"]) == 1

  def test_taking_bad_input(self):
    model, params = (
      models.NnxMLP(nnx.Rngs(0)),
      {"a_0": {"w": jnp.ones(1)}, "a_1": {"w": jnp.ones(1)}},
    )
    for which in (0, -1, 3, slice(2, 2)):
      with pytest.raises(ValueError, match="expected some of 2 layers"):
        surgery.take(params, which)
    with pytest.raises(ValueError, match="at a_0/x, expected a part of the model, got none"):
      surgery.take(params, "a_0/x")
    with pytest.raises(ValueError, match="at b, expected a layer"):
      surgery.take(params, ["a_0", "b"])
    with pytest.raises(TypeError, match="a number of layers, a slice or paths"):
      surgery.take(params, 1.5)
    with pytest.raises(ValueError, match="whose call is its own"):
      surgery.take(model, 1)
    with pytest.raises(ValueError, match="one part of an nnx module"):
      surgery.take(model, ["hidden", "head"])
    with pytest.raises(ValueError, match="at hidden/kernel, expected a module, got Param"):
      surgery.take(model, "hidden/kernel")
    with pytest.raises(ValueError, match="a layer order"):
      surgery.take({"a": {"w": jnp.ones(1)}, "b": {"w": jnp.ones(1)}}, 1)

  @pytest.mark.parametrize("case", CASES[:4], ids=ids[:4])
  def test_modules_are_followed_by_new_layers(self, case):
    extra = nnx.Linear(2, 3, rngs=nnx.Rngs(7))
    result = surgery.append(case.model(), nnx.relu, extra)
    expected = extra(nnx.relu(case.apply(case.model())))
    np.testing.assert_array_equal(bits(case.apply(result.model)), bits(expected))
    kept = check(case, result, old={})
    old = by_path(case.model())
    assert set(kept) == {f"layers/0/{p}" for p in old}
    for p, x in old.items():
      np.testing.assert_array_equal(bits(kept[f"layers/0/{p}"]), bits(x))

  @pytest.mark.parametrize("case", CASES[4:], ids=ids[4:])
  def test_linen_variables_get_new_names(self, case):
    new = {"extra": {"kernel": jnp.ones((2, 3))}}
    result = surgery.append(case.model(), new)
    assert isinstance(result.model["params"], dict) and set(result.model) == set(case.model())
    mask = paths(result.freeze_mask)
    assert mask.pop("extra/kernel") is False and all(x is True for x in mask.values())

  def test_appending_bad_input(self):
    params = {"a": {"w": jnp.ones(1)}}
    with pytest.raises(ValueError, match="expected a layer, or several, got none"):
      surgery.append(params)
    with pytest.raises(ValueError, match="at a, expected a name that is free"):
      surgery.append(params, {"a": {"w": jnp.ones(1)}})
    with pytest.raises(TypeError, match=r"layers\[0\], expected a dict of new layers"):
      surgery.append(params, jnp.ones(1))
    with pytest.raises(TypeError, match=r"layers\[0\], expected an nnx module or a function"):
      surgery.append(models.NnxMLP(nnx.Rngs(0)), {"a": 1})


class TestReplaceHead:
  @every_case
  def test_the_body_is_kept_and_the_head_trains(self, case):
    old = by_path(case.model())
    order = None if case.forward is None else (case.forward, case.inputs)
    result = surgery.replace_head(case.model(), 2, layers=order, key=jax.random.key(3))
    assert (by_path(result.model)["head/kernel"] != old["head/kernel"]).all()
    kept = check(case, result, old=old)
    assert set(kept) == {p for p in old if not p.startswith("head")}
    wide = surgery.replace_head(case.model(), 7, layer="head").model
    assert by_path(wide)["head/kernel"].shape[-1] == by_path(wide)["head/bias"].shape[0] == 7

  def test_another_module_or_other_parameters(self):
    model = models.NnxMLP(nnx.Rngs(0))
    head = nnx.Linear(5, 9, use_bias=False, rngs=nnx.Rngs(1))
    result = surgery.replace_head(model, head)
    assert result.model(models.INPUTS["mlp"]).shape == (4, 9)
    assert paths(result.freeze_mask)["head/kernel"] is False
    params = [{"w": jnp.ones((2, 3))}, {"w": jnp.ones((3, 1))}]
    new = surgery.replace_head(params, {"v": jnp.ones(3)})
    assert new.freeze_mask == [{"w": True}, {"v": False}]
    tx = optax.adam(0.1)
    state = surgery.replace_head(params, 4, opt_state=tx.init(params), tx=tx).opt_state
    assert state[0].mu[1]["w"].shape == (3, 4)
    assert model.head.kernel.shape == (5, 2)

  def test_bad_input(self):
    params = {"a": {"w": jnp.ones((2, 3))}, "b": {"w": jnp.ones((3, 1))}}
    with pytest.raises(ValueError, match="Name the head: layer="):
      surgery.replace_head(params, 4)
    with pytest.raises(ValueError, match="at least one output, got 0"):
      surgery.replace_head(params, 0, layer="b")
    with pytest.raises(ValueError, match="at c, expected a layer"):
      surgery.replace_head(params, 4, layer="c")
    with pytest.raises(TypeError, match="a number of outputs, or a layer"):
      surgery.replace_head(params, 4.0, layer="b")


class TestTransplant:
  @every_case
  def test_what_was_copied_is_frozen(self, case):
    old = by_path(case.model())
    target = surgery.reset(case.model(), [(..., True)]).model
    rules = [("head", False), (..., True)]
    result = surgery.transplant(case.model(), target, rules)
    new = by_path(result.model)
    kept = check(case, result, old=old)
    assert set(kept) == {p for p in old if not p.startswith("head")}
    np.testing.assert_array_equal(new["head/kernel"], by_path(target)["head/kernel"])
    assert {x.path for x in result.report.of("skipped")} >= {"head/kernel", "head/bias"}

  def test_everything_makes_the_same_function(self):
    for case in CASES:
      target = surgery.reset(case.model(), [(..., True)], key=jax.random.key(1)).model
      result = surgery.transplant(case.model(), target)
      np.testing.assert_array_equal(bits(case.apply(result.model)), bits(case.apply(case.model())))

  def test_between_kinds(self):
    source = models.moved(models.NnxCNN(nnx.Rngs(0)))
    target = CASES[5].build()
    result = surgery.transplant(source, target)
    x = CASES[5].inputs
    np.testing.assert_allclose(CASES[5].forward.apply(result.model, x), source(x), rtol=1e-5)
    assert not result.report.of("skipped")

  def test_blocks_of_other_shapes_are_cropped(self):
    source = {
      "w": jnp.arange(6.0).reshape(2, 3),
      "v": jnp.ones((2, 2)),
      "n": jnp.ones(2, jnp.int32),
    }
    target = {"w": jnp.zeros((3, 2)), "v": jnp.zeros(4), "n": jnp.zeros(2), "z": jnp.zeros(1)}
    tx = optax.sgd(0.1, momentum=0.9)
    state = jax.tree.map(lambda x: (x + 2).astype(x.dtype), tx.init(source))
    result = surgery.transplant(source, target, opt_state=state, tx=tx)
    assert result.model["w"].tolist() == [[0.0, 1.0], [3.0, 4.0], [0.0, 0.0]]
    assert result.freeze_mask["w"].tolist() == [[True], [True], [False]]
    assert not target["w"].any()
    graft = next(x for x in result.report.leaves if x.path == "w")
    assert (graft.outcome, graft.count) == ("cropped", 4)
    reasons = {x.path: x.reason for x in result.report.of("skipped")}
    assert reasons == {
      "v": "another number of axes",
      "n": "int32 for float32",
      "z": "the source has none",
    }
    assert result.opt_state[0].trace["w"].tolist() == [[2.0, 2.0], [2.0, 2.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match="a leaf that both networks have"):
      surgery.transplant(source, target, crop=False)

  def test_rules_rename_parts_and_leaves(self):
    source = {"encoder": {"a": jnp.ones(2), "b": jnp.ones(3)}, "c": jnp.full(1, 4.0)}
    target = {
      "body": {"a": jnp.zeros(2), "b": jnp.zeros(3)},
      "tail": jnp.zeros(1),
      "x": jnp.zeros(1),
    }
    rules = [("body/b", None), ("body", "encoder"), ("tail", lambda path: "c")]
    result = surgery.transplant(source, target, rules)
    assert result.freeze_mask == {"body": {"a": True, "b": False}, "tail": True, "x": False}
    text = str(result.report)
    assert "body/a  encoder/a  (2,)    (2,)    copied" in text
    assert "x       -          -       (1,)    skipped: no rule asks for it" in text

  def test_narrower_targets_round(self):
    result = surgery.transplant({"w": jnp.full(2, 1.001)}, {"w": jnp.zeros(2, jnp.bfloat16)})
    assert result.model["w"].dtype == jnp.bfloat16 and result.model["w"].tolist() == [1.0, 1.0]

  def test_bad_input(self):
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="a pattern that names a parameter"):
      surgery.transplant(params, params, [("v", True)])
    with pytest.raises(ValueError, match=r"expected a path of the source, got 'v' \(it has w\)"):
      surgery.transplant(params, params, [("w", "v")])
    with pytest.raises(TypeError, match="where the values come from"):
      surgery.transplant(params, params, [("w", 3)])


def test_every_operation_wants_state_and_transform_together():
  params = {"d_0": {"kernel": jnp.ones((2, 2))}, "d_1": {"kernel": jnp.ones((2, 2))}}
  tx = optax.adam(0.1)
  calls = [
    lambda **k: surgery.assign(params, [("d_0", 0.0)], **k),
    lambda **k: surgery.reset(params, [("d_0", True)], **k),
    lambda **k: surgery.deepen(params, "d_0", **k),
    lambda **k: surgery.take(params, 1, **k),
    lambda **k: surgery.append(params, {"d_2": {"kernel": jnp.ones(1)}}, **k),
    lambda **k: surgery.replace_head(params, 3, **k),
    lambda **k: surgery.transplant(params, params, **k),
  ]
  for call in calls:
    with pytest.raises(ValueError, match="an optimizer state and its transform, got only one"):
      call(tx=tx)
    other = tx.init({"e": jnp.ones(1)})
    with pytest.raises(ValueError, match="a state of tx over these parameters"):
      call(tx=tx, opt_state=other)
    assert call(tx=tx, opt_state=tx.init(params)).opt_state is not None


class TestFromOneOptimizerToSeveral:
  """From now on old weights at one rate and new ones at another, in the call that grows."""

  RATES = {"old": optax.adam(0.01), "new": optax.adam(0.1)}

  @pytest.fixture(autouse=True)
  def _promotion(self):
    """Optax's Adam itself needs promotion."""
    with jax.numpy_dtype_promotion("standard"):
      yield

  def grown(self, tx, to, params=None, state=None):
    if params is None:
      rng = np.random.default_rng(0)
      shapes = {"a": {"kernel": (3, 4), "bias": (4,)}, "b": {"kernel": (4, 2)}}
      params = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
      )
    state = tx.init(params) if state is None else state
    for _ in range(3):
      grads = jax.tree.map(lambda p: jnp.cos(p) + 1, params)
      updates, state = tx.update(grads, state, params)
      params = maskopt.apply_updates(params, updates)
    return state, surgery.grow(params, "a", 2, consumers=["b"], opt_state=state, tx=tx, to=to)

  def parted(self, mask):
    labels = jax.tree.map(lambda m: np.where(m, "old", "new"), mask)
    return maskopt.partition(self.RATES, labels, prefer="memory")

  def nu(self, state, group):
    return state.inner_states[group].inner_state[0].nu["a"]["kernel"]

  @pytest.mark.parametrize(
    ("tx", "migrates"),
    [
      (optax.adam(0.05), True),
      (maskopt.selective_transform(optax.adam(0.05), freeze_mask=False), True),
      (optax.partition({"x": optax.adam(0.05)}, lambda p: jax.tree.map(lambda _: "x", p)), False),
    ],
    ids=["plain", "selective", "optax.partition"],
  )
  def test_in_one_call_as_by_migration(self, tx, migrates):
    state, result = self.grown(tx, self.parted)
    (old,) = [
      x.nu["a"]["kernel"]
      for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "nu"))
      if hasattr(x, "nu")
    ]
    np.testing.assert_array_equal(bits(self.nu(result.opt_state, "old")), bits(old))
    assert not np.any(self.nu(result.opt_state, "new"))
    counts = [s.inner_state[0].count for s in result.opt_state.inner_states.values()]
    assert [int(c) for c in counts] == [3, 3]
    _, by_hand = self.grown(tx, None)
    if migrates:
      to = self.parted(result.freeze_mask)
      migrated = maskopt.migrate(by_hand.opt_state, by_hand.model, to=to)
      assert jax.tree.all(
        jax.tree.map(lambda x, y: np.array_equal(bits(x), bits(y)), migrated, result.opt_state)
      )

  def test_what_was_new_becomes_old_with_its_moments(self):
    state, first = self.grown(optax.adam(0.05), self.parted)
    tx = self.parted(first.freeze_mask)
    state, second = self.grown(tx, self.parted, first.model, first.opt_state)
    found = self.nu(second.opt_state, "old")
    assert found.shape == (3, 6) and np.all(found > 0)
    np.testing.assert_array_equal(bits(found[:, :4]), bits(self.nu(state, "old")))
    np.testing.assert_array_equal(bits(found[:, 4:]), bits(self.nu(state, "new")))
    back = surgery.grow(
      first.model, "a", 1, consumers=["b"], opt_state=first.opt_state, tx=tx, to=optax.adam(0.1)
    )
    whole = back.opt_state[0].nu["a"]["kernel"]
    np.testing.assert_array_equal(bits(whole[:, :4]), bits(self.nu(first.opt_state, "old")))

  def test_another_optimizer_is_refused_and_the_remedy_works(self):
    momentum = optax.sgd(0.1, momentum=0.9)
    with pytest.raises(
      ValueError,
      match=r"a state of the same optimizer, got moments at 0/mu, 0/nu, and not at 0/trace"
      r"\. Leave opt_state out and start the new optimizer with to\.init\(new parameters\)",
    ):
      self.grown(optax.adam(0.05), momentum)
    _, result = self.grown(optax.adam(0.05), None)
    state = momentum.init(result.model)
    assert state[0].trace["a"]["kernel"].shape == (3, 6)
