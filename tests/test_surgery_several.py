"""Several layers grow in one call: one model, one mask, one state; and growth that stays apart."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import surgery_models as models
from flax import nnx
from surgery_models import bits, by_path, mlp, paths

import maskopt
from maskopt import surgery

X = models.INPUTS["mlp"]
BOTH = {"hidden": 2, "head": 3}


@pytest.fixture(autouse=True)
def _promotion():
  """Optax's Adam itself needs promotion."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def masks(result):
  new = by_path(result.model)
  return {p: np.broadcast_to(m, new[p].shape) for p, m in paths(result.freeze_mask).items()}


def is_old(old, new):
  """Where the old elements stand, by hand: new units come last on every axis."""
  corner = np.zeros(new.shape, bool)
  corner[tuple(slice(n) for n in old.shape)] = True
  return corner


@pytest.mark.parametrize("mode", ["zero", "progressive", "init"])
def test_rows_and_columns_of_a_layer_between_grow_at_once(mode):
  model = mlp()
  result = surgery.grow(model, BOTH, inputs=X, mode=mode)
  old, new = by_path(model), by_path(result.model)
  assert new["head/kernel"].shape == (7, 5) and result.model(X).shape == (4, 5)
  assert (result.model.hidden.out_features, result.model.head.in_features) == (7, 7)
  for p, x in new.items():
    np.testing.assert_array_equal(bits(x[is_old(old[p], x)]), bits(old[p].reshape(-1)))
  fresh = new["head/kernel"]
  assert fresh[:, 2:].all() and fresh[5:, :2].any() == (mode == "init")
  if mode != "init":
    np.testing.assert_allclose(result.model(X)[:, :2], model(X), rtol=1e-6, atol=1e-6)
    assert result.report.difference <= 1e-6


@pytest.mark.parametrize("order", [["hidden", "head"], ["head", "hidden"]])
def test_one_call_is_one_growth_after_the_other_in_any_order(order):
  result = surgery.grow(mlp(), {k: BOTH[k] for k in order}, inputs=X)
  first = surgery.grow(mlp(), "hidden", 2, inputs=X).model
  other = surgery.grow(first, "head", 3, inputs=X).model
  for p, x in by_path(other).items():
    np.testing.assert_array_equal(bits(by_path(result.model)[p]), bits(x), err_msg=p)
  old, new = by_path(mlp()), by_path(result.model)
  for p, mask in masks(result).items():
    np.testing.assert_array_equal(mask, is_old(old[p], new[p]), err_msg=p)


def test_progressive_growth_never_changes_an_old_output():
  result = surgery.grow(mlp(), BOTH, inputs=X, mode="progressive")
  old, new = by_path(mlp()), by_path(result.model)
  for p, mask in masks(result).items():
    expected = is_old(old[p], new[p])
    if p == "head/kernel":
      expected = np.broadcast_to(np.arange(5) < 2, (7, 5))  # zeros to old outputs hold still too
    np.testing.assert_array_equal(mask, expected, err_msg=p)
  assert np.shape(paths(result.freeze_mask)["head/kernel"]) == (1, 5)  # whole columns
  case = models.Case("nnx-mlp", "hidden", X, mlp)
  graph, _, rest = nnx.split(result.model, nnx.Param, ...)
  after = models.trained(case, result.model, result.freeze_mask)
  tuned = nnx.merge(graph, after, rest)
  np.testing.assert_array_equal(bits(tuned(X)[:, :2]), bits(result.model(X)[:, :2]))
  assert not np.array_equal(tuned(X)[:, 2:], result.model(X)[:, 2:])
  zero = surgery.grow(mlp(), BOTH, inputs=X)
  moved = nnx.merge(graph, models.trained(case, zero.model, zero.freeze_mask), rest)
  assert not np.array_equal(moved(X)[:, :2], zero.model(X)[:, :2])  # the mask makes the difference


def test_old_units_of_a_cell_do_not_hear_progressive_ones():
  model = models.moved(models.NnxLSTM(nnx.Rngs(0)))
  x = models.INPUTS["lstm"]
  result = surgery.grow(model, {"rnn": 2, "head": 1}, inputs=x, mode="progressive")
  mask = masks(result)["rnn/cell/dense_h/kernel"].reshape(6, 4, 6)
  assert mask[:, :, :4].all() and not mask[:, :, 4:].any()
  case = models.Case("nnx-lstm", "rnn", x, lambda: model)
  graph, _, rest = nnx.split(result.model, nnx.Param, ...)
  tuned = nnx.merge(graph, models.trained(case, result.model, result.freeze_mask), rest)
  np.testing.assert_array_equal(bits(tuned(x)[:, :2]), bits(result.model(x)[:, :2]))


def test_modes_by_layer():
  model = mlp()
  copied = surgery.grow(model, BOTH, inputs=X, mode={"hidden": "copy"})
  kernel, old = by_path(copied.model)["head/kernel"], by_path(model)["head/kernel"]
  np.testing.assert_array_equal(kernel[:2, :2] * 2, old[:2])  # shared with their copies
  np.testing.assert_array_equal(bits(kernel[5:]), bits(kernel[:2]))
  np.testing.assert_array_equal(bits(kernel[2:5, :2]), bits(old[2:]))
  np.testing.assert_allclose(copied.model(X)[:, :2], model(X), rtol=1e-5, atol=1e-6)
  twin = surgery.grow(model, BOTH, inputs=X, mode={"head": "copy"}).model
  np.testing.assert_array_equal(bits(twin(X)), bits(model(X)[:, [0, 1, 0, 1, 0]]))
  free = surgery.grow(model, BOTH, inputs=X, mode={"head": "init"})
  assert free.report.difference <= 1e-6 and not by_path(free.model)["head/kernel"][5:, :2].any()


@pytest.mark.parametrize(
  "mode", ["zero", "copy", {"a": "copy"}, {"b": "copy"}, {"a": "progressive", "b": "copy"}], ids=str
)
def test_units_of_two_layers_side_by_side_on_one_axis(mode):
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.a = nnx.Linear(3, 4, rngs=rngs)
      self.b = nnx.Linear(3, 5, rngs=rngs)
      self.head = nnx.Linear(9, 2, rngs=rngs)

    def __call__(self, x):
      return self.head(jnp.concatenate([nnx.relu(self.a(x)), jnp.tanh(self.b(x))], -1))

  model = models.moved(Net(nnx.Rngs(0)))
  result = surgery.grow(model, {"a": 2, "b": 1, "head": 1}, inputs=X, mode=mode)
  kernel = by_path(result.model)["head/kernel"]
  assert kernel.shape == (12, 3)
  np.testing.assert_allclose(result.model(X)[:, :2], model(X), rtol=1e-5, atol=1e-6)
  old = np.ones((12, 3), bool)
  old[[4, 5, 11]] = old[:, 2] = False
  expected = old.copy()
  if "progressive" in str(mode):
    expected[[4, 5], :2] = True
  np.testing.assert_array_equal(masks(result)["head/kernel"], expected)
  modes = mode if isinstance(mode, dict) else {"a": mode, "b": mode}
  for rows, layer in (([4, 5], "a"), ([11], "b")):
    assert kernel[rows][:, :2].any() == (modes.get(layer) == "copy")


def test_layers_of_one_stream_have_the_same_units():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.stem = nnx.Conv(2, 4, (3, 3), rngs=rngs)
      self.first = nnx.Conv(4, 4, (3, 3), rngs=rngs)
      self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
      self.second = nnx.Conv(4, 4, (3, 3), rngs=rngs)
      self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
      x = self.stem(x)
      x = x + self.second(nnx.relu(self.norm(self.first(x))))
      return self.head(x.mean((1, 2)))

  model, x = models.moved(Net(nnx.Rngs(0))), models.images()
  result = surgery.grow(model, {"stem": 2, "first": 3, "second": 2}, inputs=x)
  assert result.report.layers == (("stem and second", 4, 6), ("first", 4, 7))
  shapes = {p: v.shape for p, v in by_path(result.model).items()}
  assert shapes["second/kernel"] == (3, 3, 7, 6) and shapes["head/kernel"] == (6, 2)
  assert shapes["first/kernel"] == (3, 3, 6, 7) and shapes["norm/scale"] == (7,)
  np.testing.assert_allclose(result.model(x), model(x), rtol=1e-5, atol=1e-6)
  with pytest.raises(
    ValueError, match=r"at second, expected the units of stem, .* got 2 for stem and 3 for second"
  ):
    surgery.grow(model, {"stem": 2, "second": 3}, inputs=x)
  with pytest.raises(ValueError, match="at second, expected the mode of stem, .* got 'copy'"):
    surgery.grow(model, {"stem": 2, "second": 2}, inputs=x, mode={"second": "copy"})
  with pytest.raises(ValueError, match=r"at stem, expected new units further on .*; at first"):
    surgery.grow(model, {"stem": 2, "first": 3}, inputs=x, mode="progressive")


def test_linen_layers_grow_from_the_old_forward_to_the_new():
  old, new = models.LinenMLP(), models.LinenMLP(9, 4)
  variables = models._noisy(old.init(jax.random.key(0), X))
  result = surgery.grow(
    variables, {"hidden": 4, "head": 2}, inputs=X, forward=old, new_forward=new, mode="progressive"
  )
  np.testing.assert_allclose(
    new.apply(result.model, X)[:, :2], old.apply(variables, X), rtol=1e-6, atol=1e-6
  )
  assert result.report.difference <= 1e-6


def test_consumers_are_named_layer_by_layer():
  params = {k: {"kernel": models.normal(n, (4, 4))} for n, k in enumerate("abc")}
  result = surgery.grow(params, {"a": 2, "c": 1}, consumers={"a": ["b"], "c": []})
  shapes = {k: v["kernel"].shape for k, v in result.model.items()}
  assert shapes == {"a": (4, 6), "b": (6, 4), "c": (4, 5)}

  def forward(p, x):
    return x @ p["a"]["kernel"] @ p["b"]["kernel"] @ p["c"]["kernel"]

  x = models.normal(5, (2, 4))
  mixed = surgery.grow(params, {"a": 2, "b": 1}, consumers={"a": ["b"]}, inputs=x, forward=forward)
  assert mixed.model["b"]["kernel"].shape == (6, 5) and mixed.model["c"]["kernel"].shape == (5, 4)
  assert mixed.report.difference <= 1e-6


def test_axis_of_and_parts_by_layer():
  params = {"up": models.normal(0, (3, 8)), "down": models.normal(1, (4, 2))}

  def forward(p, x):
    gate, value = jnp.split(x @ p["up"], 2, -1)
    return (jax.nn.silu(gate) * value) @ p["down"]

  result = surgery.grow(
    params, {"up": 2, "down": 1}, inputs=X, forward=forward, parts={"up": 2}, axis={"down": 1}
  )
  assert {k: v.shape for k, v in result.model.items()} == {"up": (3, 12), "down": (6, 3)}
  np.testing.assert_array_equal(result.model["up"][:, [0, 1, 2, 3, 6, 7, 8, 9]], params["up"])
  assert result.report.difference <= 1e-5


def test_the_state_moves_once():
  model, tx = mlp(), optax.adam(0.1)
  params = nnx.state(model, nnx.Param)
  _, state = tx.update(jax.tree.map(jnp.cos, params), tx.init(params), params)
  result = surgery.grow(model, BOTH, inputs=X, opt_state=state, tx=tx)
  old, new = paths(state[0].nu), paths(result.opt_state[0].nu)
  assert old.keys() == new.keys() and int(result.opt_state[0].count) == 1
  for p, x in new.items():
    x, corner = np.asarray(x), is_old(old[p], x)
    np.testing.assert_array_equal(bits(x[corner]), bits(old[p]).reshape(-1))
    assert not x[~corner].any()


def test_report_names_every_layer():
  text = str(surgery.grow(mlp(), BOTH, inputs=X).report)
  assert text.startswith("hidden grew from 5 to 7 units, head from 2 to 5; old outputs ")
  assert "head/kernel    (5, 2)  (7, 5)  makes and reads" in text


class TestBadInput:
  def grow(self, layers, **settings):
    model = mlp()
    before = maskopt.snapshot(model)
    try:
      surgery.grow(model, layers, **{"inputs": X, **settings})
    finally:
      assert maskopt.audit(before, model, True).ok
      assert (model.hidden.out_features, model.head.in_features) == (5, 5)

  def test_all_layers_are_told_at_once(self):
    with pytest.raises(ValueError, match=r"at hidden, .* got 0; at head, .* got -2\. Growing only"):
      self.grow({"hidden": 0, "head": -2})
    with pytest.raises(
      ValueError, match=r"at hiden, expected a layer .*; at hed, expected a layer"
    ):
      self.grow({"hiden": 1, "hed": 2})
    with pytest.raises(ValueError, match=r"at hed, .* none of that path\. The layers are head, hi"):
      self.grow({"hidden": 1, "hed": 2})
    with pytest.raises(ValueError, match=r"at hidden, expected consumers, or inputs= .*; at head"):
      self.grow(BOTH, inputs=None)
    with pytest.raises(ValueError, match=r"at nope, expected a layer .*; at neither, expected"):
      self.grow(BOTH, consumers={"hidden": ["nope", "neither"], "head": []})

  def test_settings_of_layers_that_do_not_grow(self):
    with pytest.raises(
      ValueError,
      match=r"at mode\['x'\], expected a layer that grows.*consumers\['y'\].* are hidden",
    ):
      self.grow(BOTH, mode={"x": "zero"}, consumers={"y": []})
    with pytest.raises(ValueError, match="at consumers, expected a dict by layer"):
      self.grow(BOTH, consumers=["head"])
    with pytest.raises(ValueError, match="at head, expected .*, got 'zeros'"):
      self.grow(BOTH, mode={"head": "zeros"})

  def test_forms_of_the_call(self):
    with pytest.raises(TypeError, match="at units, expected nothing: each layer brings its number"):
      self.grow(BOTH, units=3)
    with pytest.raises(ValueError, match="at layer, expected a layer that grows, or several"):
      self.grow({})
    with pytest.raises(TypeError, match="at hidden, expected a number of units, got NoneType"):
      self.grow("hidden")
    with pytest.raises(TypeError, match="at layer, expected the path of a layer, or a dict"):
      self.grow(["hidden", "head"])
    with pytest.raises(TypeError, match="at layer, expected the path of a layer, got int"):
      self.grow({0: 1})

  def test_new_units_that_nobody_hears(self):
    with pytest.raises(
      ValueError, match=r"at hidden, expected new units further on .* none: head/kernel would read"
    ):
      self.grow({"hidden": 2}, mode="progressive")

  def test_units_are_heard_through_other_new_ones(self):
    params = {k: models.normal(n, (4, 4)) for n, k in enumerate("abcd")}
    params |= {"one": models.normal(5, (4, 2)), "two": models.normal(6, (4, 2))}

    def forward(p, x):
      return x @ p["a"] @ p["b"] @ p["one"], x @ p["c"] @ p["d"] @ p["two"]

    given = {"inputs": jnp.ones((2, 4)), "forward": forward, "mode": "progressive"}
    surgery.grow(params, {"a": 1, "b": 1, "one": 1}, **given)
    with pytest.raises(ValueError, match="at c, expected new units .* none: d would.*; at d") as e:
      surgery.grow(params, {"a": 1, "b": 1, "one": 1, "c": 1, "d": 1}, **given)
    assert "at a," not in str(e.value) and "at b," not in str(e.value)

  def test_units_within_one_another(self):
    params = {"a": models.normal(0, (3, 4)), "b": models.normal(1, (3, 5))}
    params["head"] = models.normal(2, (20, 2))

    def forward(p, x):
      pairs = (x @ p["a"])[:, :, None] * (x @ p["b"])[:, None]
      return pairs.reshape(len(x), -1) @ p["head"]

    with pytest.raises(ValueError, match="at b, expected units beside those of a, .* at head"):
      surgery.grow(params, {"a": 1, "b": 1}, inputs=X, forward=forward)
    first = surgery.grow(params, "a", 1, inputs=X, forward=forward)
    both = surgery.grow(first.model, "b", 1, inputs=X, forward=forward)
    assert both.model["head"].shape == (30, 2) and both.report.difference <= 1e-5
