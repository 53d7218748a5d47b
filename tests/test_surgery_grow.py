import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import surgery_models as models
from flax import nnx
from surgery_models import CASES, bits, by_path, paths

import maskopt
from maskopt import surgery

ids = [c.name for c in CASES]


def grown(case, mode="zero"):
  return _grown(case.name, mode)


@functools.cache
def _grown(name, mode):
  case = next(c for c in CASES if c.name == name)
  extra = {"inputs": case.inputs, "forward": case.forward, "new_forward": case.new_forward}
  return surgery.grow(case.model(), case.layer, 2, mode=mode, **extra)


@pytest.mark.parametrize("mode", ["zero", "copy"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_old_outputs_are_kept(case, mode):
  old, result = case.model(), grown(case, mode)
  np.testing.assert_allclose(
    case.apply(result.model, new=True), case.apply(old), rtol=2e-5, atol=2e-6
  )
  assert result.report.difference <= 1e-5


def whole(x):
  """Values of few bits, whose products and sums are exact in any order."""
  return jnp.round(x * 8) / 8 if jnp.issubdtype(x.dtype, jnp.floating) else x


def test_zero_outgoing_is_exact_where_sums_are():
  params = {
    "a": {"kernel": whole(models.normal(0, (6, 40))), "bias": whole(models.normal(1, (40,)))},
    "b": {"kernel": whole(models.normal(2, (40, 7)))},
  }
  x = whole(models.normal(3, (9, 6)))

  def forward(p, x):
    return jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"][None]) @ p["b"]["kernel"]

  result = surgery.grow(params, "a", 23, inputs=x, forward=forward)
  assert result.report.difference == 0.0
  np.testing.assert_array_equal(bits(forward(result.model, x)), bits(forward(params, x)))


@pytest.mark.parametrize("mode", ["zero", "init"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_old_weights_keep_their_bits_and_are_what_the_mask_freezes(case, mode):
  old, result = by_path(case.model()), grown(case, mode)
  new, mask = by_path(result.model), paths(result.freeze_mask)
  assert new.keys() == old.keys() == mask.keys()
  assert any(new[p].shape != old[p].shape for p in new)
  for p in new:
    frozen = np.broadcast_to(mask[p], new[p].shape)
    assert frozen.sum() == old[p].size
    np.testing.assert_array_equal(bits(new[p][frozen]), bits(old[p].reshape(-1)))


@pytest.mark.parametrize("mode", ["zero", pytest.param("copy", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_training_moves_new_weights_only(case, mode):
  result = grown(case, mode)
  before = maskopt.snapshot(models.parameters(result.model))
  after = models.trained(case, result.model, result.freeze_mask)
  audit = maskopt.audit(before, after, result.freeze_mask)
  assert audit.ok
  assert audit.moved > 0.5 * audit.trainable > 0


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_the_given_model_is_untouched(case):
  grown(case)
  fresh = case.build()
  assert maskopt.audit(maskopt.snapshot(fresh), case.model(), True).ok
  if isinstance(fresh, nnx.Module):
    sizes = [
      {k: v for k, v in vars(node).items() if isinstance(v, (int, tuple))}
      for model in (fresh, case.model())
      for _, node in nnx.iter_graph(model)
      if isinstance(node, nnx.Module)
    ]
    half = len(sizes) // 2
    assert sizes[:half] == sizes[half:]


def test_rows_of_a_flattened_consumer_are_those_of_the_new_channels():
  model = models.moved(models.NnxCNN(nnx.Rngs(0)))
  result = surgery.grow(model, "conv", 2, inputs=models.images())
  old, new = np.asarray(model.dense.kernel[...]), np.asarray(result.model.dense.kernel[...])
  pixels = new.reshape(9, 6, 6)
  np.testing.assert_array_equal(bits(pixels[:, :4]), bits(old.reshape(9, 4, 6)))
  assert not pixels[:, 4:].any()
  mask = np.asarray(result.freeze_mask["dense"]["kernel"][...]).reshape(9, 6, 1)
  assert mask[:, :4].all() and not mask[:, 4:].any()


def test_statistics_grow_with_their_channels():
  result = surgery.grow(models.NnxCNN(nnx.Rngs(0)), "conv", 2, inputs=models.images())
  norm = result.model.norm
  np.testing.assert_array_equal(norm.mean[...], np.zeros(6))
  np.testing.assert_array_equal(norm.var[...], np.ones(6))
  assert norm.num_features == 6 and norm.scale.shape == norm.bias.shape == (6,)


def test_gates_grow_each_by_themselves():
  model = models.moved(models.NnxLSTM(nnx.Rngs(0)))
  result = surgery.grow(model, "rnn", 3, inputs=models.INPUTS["lstm"])
  old = np.asarray(model.rnn.cell.dense_h.kernel[...]).reshape(4, 4, 4)
  new = np.asarray(result.model.rnn.cell.dense_h.kernel[...]).reshape(7, 4, 7)
  np.testing.assert_array_equal(bits(new[:4, :, :4]), bits(old))
  assert not new[4:, :, :4].any()  # new units tell old ones nothing
  assert new[:4, :, 4:].any() and new[4:, :, 4:].any()
  assert result.model.rnn.cell.hidden_features == 7


@pytest.mark.parametrize(
  "cell", [nnx.LSTMCell, nnx.GRUCell, nnx.SimpleCell], ids=lambda c: c.__name__
)
@pytest.mark.parametrize("mode", ["zero", "copy"])
def test_every_cell_of_nnx(cell, mode):
  model = models.NnxLSTM(nnx.Rngs(0), cell)
  result = surgery.grow(model, "rnn", 2, inputs=models.INPUTS["lstm"], mode=mode)
  assert result.model.head.kernel.shape == (6, 2)
  np.testing.assert_allclose(
    result.model(models.INPUTS["lstm"]), model(models.INPUTS["lstm"]), rtol=1e-5, atol=1e-6
  )


def test_new_heads_have_sizes_that_a_forward_can_use():
  result = surgery.grow(
    models.NnxAttention(nnx.Rngs(0)), "attention", 1, inputs=models.INPUTS["attention"]
  )
  attention = result.model.attention
  assert (attention.num_heads, attention.head_dim, attention.qkv_features) == (3, 2, 6)
  assert attention.out.in_features == (3, 2)
  assert result.freeze_mask["attention"]["query"]["kernel"][...].shape == (1, 3, 1)


def test_new_tokens():
  model = models.NnxAttention(nnx.Rngs(0))
  result = surgery.grow(model, "embed", 3, inputs=models.INPUTS["attention"])
  assert result.model.embed.num_embeddings == 14
  assert result.report.difference == 0.0
  out = result.model(jnp.full((1, 2), 13))
  assert np.isfinite(out).all()
  assert result.freeze_mask["embed"]["embedding"][...].ravel().tolist() == [True] * 11 + [False] * 3


def test_a_head_grows_its_outputs():
  model = models.NnxMLP(nnx.Rngs(0))
  result = surgery.grow(model, "head", 3, inputs=models.INPUTS["mlp"])
  out = result.model(models.INPUTS["mlp"])
  assert out.shape == (4, 5)
  np.testing.assert_array_equal(bits(out[:, :2]), bits(model(models.INPUTS["mlp"])))


def test_old_outputs_are_found_between_new_ones():
  params = {"a": models.normal(0, (3, 4))}

  def forward(p, x):
    return (x @ p["a"]).reshape(2, -1)

  x = models.normal(1, (2, 5, 3))
  result = surgery.grow(params, "a", 2, inputs=x, forward=forward)
  assert result.report.difference <= 1e-6
  new = np.asarray(forward(result.model, x)).reshape(2, 5, 6)
  np.testing.assert_allclose(new[..., :4].reshape(2, -1), forward(params, x), rtol=1e-5, atol=1e-6)


def test_a_residual_stream_grows_as_a_whole():
  params = {
    "embed": {"embedding": models.normal(0, (7, 4))},
    "up": {"kernel": models.normal(1, (4, 6))},
    "down": {"kernel": models.normal(2, (6, 4)), "bias": models.normal(3, (4,))},
    "out": {"kernel": models.normal(4, (4, 2))},
  }

  def forward(p, tokens):
    x = p["embed"]["embedding"][tokens]
    x = x + jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"] + p["down"]["bias"][None]
    return x @ p["out"]["kernel"]

  result = surgery.grow(params, "down", 2, inputs=jnp.arange(5), forward=forward)
  shapes = jax.tree.map(jnp.shape, result.model, is_leaf=lambda x: hasattr(x, "shape"))
  assert shapes["embed"]["embedding"] == (7, 6) and shapes["down"]["bias"] == (6,)
  assert shapes["up"]["kernel"] == (6, 6) and shapes["out"]["kernel"] == (6, 2)
  assert result.report.difference <= 1e-5


def test_units_pass_through_loops_branches_and_concatenation():
  params = {
    "a": models.normal(0, (3, 4)),
    "w": models.normal(1, (4, 4)),
    "b": models.normal(2, (7, 2)),
  }

  @jax.checkpoint
  def body(p, h):
    return jax.lax.cond(h.sum() > 0, lambda h: jnp.tanh(h @ p["w"]), lambda h: h @ p["w"], h)

  def forward(p, x):
    h, _ = jax.lax.scan(
      lambda h, _: (body(p, h), None), jnp.zeros((2, p["w"].shape[0])) + 0.1, None, 3
    )
    h = h + x @ p["a"]
    return jnp.concatenate([x, h], -1) @ p["b"]

  result = surgery.grow(
    params, "a", 2, inputs=models.normal(3, (2, 3)), forward=forward, mode="copy"
  )
  assert {k: v.shape for k, v in result.model.items()} == {"a": (3, 6), "w": (6, 6), "b": (9, 2)}
  assert result.report.difference <= 1e-5


def test_depthwise_filters_grow_with_their_channels():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.first = nnx.Conv(2, 4, (1, 1), rngs=rngs)
      self.depth = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=rngs)
      self.last = nnx.Conv(4, 3, (1, 1), rngs=rngs)

    def __call__(self, x):
      return self.last(nnx.relu(self.depth(nnx.relu(self.first(x)))))

  result = surgery.grow(Net(nnx.Rngs(0)), "first", 2, inputs=models.images())
  assert result.model.depth.kernel.shape == (3, 3, 1, 6)
  assert result.model.depth.feature_group_count == 6
  assert result.report.difference <= 1e-5


def test_a_scanned_stack_of_layers_grows_as_one():
  class Stack(nnx.Module):
    def __init__(self, rngs):
      self.first = nnx.Linear(3, 5, rngs=rngs)
      make = nnx.vmap(lambda r: nnx.Linear(5, 5, rngs=r))
      self.blocks = make(rngs.split(3))
      self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
      scan = nnx.scan(
        lambda h, block: nnx.tanh(block(h)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
      )
      return self.head(scan(self.first(x), self.blocks))

  result = surgery.grow(Stack(nnx.Rngs(0)), "first", 2, inputs=models.INPUTS["mlp"])
  assert result.model.blocks.kernel.shape == (3, 7, 7)
  assert result.freeze_mask["blocks"]["kernel"][...].shape == (1, 7, 7)
  assert result.report.difference <= 1e-5


def test_both_ways_of_a_bidirectional_network_grow_apart():
  class Net(nnx.Module):
    def __init__(self, rngs):
      cells = (nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs)) for _ in range(2))
      self.both = nnx.Bidirectional(*cells)
      self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
      return self.head(self.both(x))

  result = surgery.grow(Net(nnx.Rngs(0)), "both/forward_rnn", 1, inputs=models.INPUTS["lstm"])
  kernel = np.asarray(result.model.head.kernel[...])
  assert kernel.shape == (9, 2) and not kernel[4].any() and kernel[5:].any()
  assert result.model.both.backward_rnn.cell.hidden_features == 4
  assert result.report.difference <= 1e-5


def test_one_unit_and_its_pixels():
  params = {"a": models.normal(0, (3, 1)), "b": models.normal(1, (5, 2))}
  x = models.normal(2, (2, 5, 3))

  def forward(p, x):
    return (x @ p["a"]).reshape(2, -1) @ p["b"]

  result = surgery.grow(params, "a", 2, inputs=x, forward=forward)
  assert result.model["b"].shape == (15, 2) and result.report.difference <= 1e-5
  np.testing.assert_array_equal(result.model["b"][::3], params["b"])


def test_units_that_a_slice_drops_stay_dropped():
  params = {"a": models.normal(0, (3, 4)), "b": models.normal(1, (2, 2))}

  def forward(p, x):
    return (x @ p["a"])[:, :2] @ p["b"]

  result = surgery.grow(params, "a", 2, inputs=models.INPUTS["mlp"], forward=forward)
  assert result.model["a"].shape == (3, 6) and result.model["b"].shape == (2, 2)
  assert result.report.difference == 0.0


def test_fused_heads_keep_their_order():
  heads, width = 2, 3
  params = {
    "qkv": models.normal(0, (6, 3 * heads * width)),
    "out": models.normal(1, (heads * width, 6)),
  }

  def forward(p, x):
    q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)
    q, k, v = (t.reshape(*t.shape[:-1], -1, width) for t in (q, k, v))
    weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k), -1)
    mixed = jnp.einsum("hqk,khd->qhd", weights, v)
    return mixed.reshape(*mixed.shape[:-2], -1) @ p["out"]

  x = models.normal(2, (5, 6))
  result = surgery.grow(params, "qkv", 1, inputs=x, forward=forward, of=heads, parts=3)
  assert result.model["qkv"].shape == (6, 27) and result.model["out"].shape == (9, 6)
  np.testing.assert_allclose(forward(result.model, x), forward(params, x), rtol=1e-5, atol=1e-5)
  new = np.asarray(result.model["qkv"]).reshape(6, 3, 3, width)
  np.testing.assert_array_equal(new[:, :, :2], np.asarray(params["qkv"]).reshape(6, 3, 2, width))


def test_copies_share_what_they_send():
  params = {"a": {"kernel": models.normal(0, (3, 2))}, "b": {"kernel": models.normal(1, (2, 4))}}
  result = surgery.grow(params, "a", 4, consumers=["b"], mode="copy")
  a, b = (np.asarray(result.model[k]["kernel"]) for k in "ab")
  np.testing.assert_array_equal(a, np.asarray(params["a"]["kernel"])[:, [0, 1, 0, 1, 0, 1]])
  third = (np.asarray(params["b"]["kernel"]) / np.float32(3)).astype(np.float32)
  np.testing.assert_array_equal(b, third[[0, 1, 0, 1, 0, 1]])


def test_named_consumers_are_what_the_trace_finds():
  model = models.moved(models.NnxCNN(nnx.Rngs(0)))
  traced = surgery.grow(model, "conv", 2, inputs=models.images())
  named = surgery.grow(model, "conv", 2, consumers=["norm", "dense"])
  for p, x in by_path(traced.model).items():
    np.testing.assert_array_equal(bits(by_path(named.model)[p]), bits(x))
  np.testing.assert_array_equal(named.model.norm.var[...], traced.model.norm.var[...])
  assert named.report.difference is None


def test_named_consumers_of_attention():
  model = models.NnxAttention(nnx.Rngs(0))
  named = surgery.grow(model, "attention", 1, consumers=[], inputs=models.INPUTS["attention"])
  assert named.model.attention.out.kernel.shape == (3, 2, 4)
  assert named.report.difference <= 1e-5


def test_initializer_and_key_decide_new_weights():
  params = {"a": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}

  def new(**extra):
    return np.asarray(surgery.grow(params, "a", 3, consumers=[], **extra).model["a"]["kernel"])[
      :, 2:
    ]

  ones = jax.nn.initializers.ones
  np.testing.assert_array_equal(new(init=ones), np.ones((3, 3)))
  rules = [("a/bias", ones), ("**", jax.nn.initializers.constant(2.0))]
  np.testing.assert_array_equal(new(init=rules), np.full((3, 3), 2.0))
  assert (new(key=jax.random.key(1)) != new(key=jax.random.key(2))).all()
  np.testing.assert_array_equal(new(), new(key=jax.random.key(0)))


def test_abstract_inputs_trace_and_compare_nothing():
  model = models.NnxMLP(nnx.Rngs(0))
  result = surgery.grow(model, "hidden", 1, inputs=jax.ShapeDtypeStruct((1, 3), jnp.float32))
  assert result.model.head.kernel.shape == (6, 2) and result.report.difference is None


def test_report_shows_what_grew():
  text = str(grown(CASES[0]).report)
  assert text.startswith("hidden grew from 5 to 7 units; old outputs bit-equal")
  assert "head/kernel    (5, 2)  (7, 2)  reads" in text


def test_sharded_and_narrow_leaves_stay_what_they_are():
  mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
  params = {
    "a": jax.device_put(jnp.ones((3, 8), jnp.bfloat16), spec),
    "b": np.ones((8, 2), np.float16),
  }
  result = surgery.grow(params, "a", 4, consumers=["b"])
  assert result.model["a"].sharding == spec and result.model["a"].dtype == jnp.bfloat16
  assert isinstance(result.model["b"], np.ndarray) and result.model["b"].dtype == np.float16
  odd = surgery.grow(params, "a", 1, consumers=["b"]).model["a"]
  assert odd.sharding.is_fully_replicated and odd.shape == (3, 9)


def state_of(case, test, params):
  tx, to = case
  state = test.state(tx, params)
  return surgery.grow(params, "a", 2, consumers=["b"], opt_state=state, tx=tx, to=to).opt_state


class TestState:
  def params(self):
    return {"a": {"kernel": models.normal(0, (3, 4))}, "b": {"kernel": models.normal(1, (4, 2))}}

  def state(self, tx, params):
    state = tx.init(params)
    for _ in range(3):
      grads = jax.tree.map(lambda p: models.normal(5, p.shape), params)
      with jax.numpy_dtype_promotion("standard"):  # Optax's Adam asks for it
        _, state = tx.update(grads, state, params)
    return state

  @pytest.mark.parametrize(
    "tx",
    [optax.adam(0.1), optax.chain(optax.clip(1.0), optax.adamw(0.1)), optax.sgd(0.1, momentum=0.9)],
    ids=["adam", "chain", "momentum"],
  )
  def test_old_moments_keep_their_bits_and_new_ones_are_fresh(self, tx):
    params = self.params()
    state = self.state(tx, params)
    result = surgery.grow(params, "a", 2, consumers=["b"], opt_state=state, tx=tx)
    fresh = tx.init(result.model)
    assert jax.tree.structure(fresh) == jax.tree.structure(result.opt_state)
    compared = 0
    for old, new, start in zip(
      *map(jax.tree.leaves, (state, result.opt_state, fresh)), strict=True
    ):
      assert new.shape == start.shape and new.dtype == start.dtype
      corner = tuple(slice(n) for n in old.shape)
      np.testing.assert_array_equal(bits(new[corner]), bits(old))
      rest = np.ones(new.shape, bool)
      rest[corner] = False
      np.testing.assert_array_equal(bits(new)[rest], bits(start)[rest])
      compared += rest.sum()
    assert compared > 0

  def test_packed_moments_move_between_masks(self):
    params = self.params()
    mask = {"a": {"kernel": np.array([True, False, False, True])}, "b": {"kernel": False}}
    tx = maskopt.selective_transform(optax.adam(0.1), freeze_mask=mask, prefer="memory")
    state = self.state(tx, params)
    next_mask = {"a": {"kernel": np.array([False, True, False, True, False, True])}, "b": False}
    to = maskopt.selective_transform(optax.adam(0.1), freeze_mask=next_mask)
    result = surgery.grow(params, "a", 2, consumers=["b"], opt_state=state, tx=tx, to=to)
    old, new = state.inner_state[0].mu, result.opt_state.inner_state[0].mu
    np.testing.assert_array_equal(new["b"]["kernel"][:4], old["b"]["kernel"])
    layouts = maskopt.mask_of(result.opt_state)
    k = layouts.static.paths.index("a/kernel")
    wide = np.asarray(
      layouts.static.layouts[k].put(new["a"]["kernel"], jnp.full((3, 6), 9.0), layouts.index[k])
    )
    before = maskopt.mask_of(state)
    known = np.asarray(
      before.static.layouts[k].put(old["a"]["kernel"], jnp.full((3, 4), 9.0), before.index[k])
    )
    np.testing.assert_array_equal(wide[:, 2], known[:, 2])  # trained before and after
    assert not wide[:, [0, 4]].any()  # thawed, and new
    assert (wide[:, [1, 3, 5]] == 9.0).all()

  def test_elements_that_no_moment_was_kept_for_start_as_init_has_it(self):
    params = self.params()

    def to(kernel):
      mask = {"a": {"kernel": np.array(kernel)}, "b": False}
      adagrad = optax.adagrad(0.1, initial_accumulator_value=0.25)
      return maskopt.selective_transform(adagrad, freeze_mask=mask, prefer="memory")

    tx = to([[True], [False], [False]])
    state = self.state(tx, params)
    wide = to([[False], [False], [True]])
    result = surgery.grow(params, "a", 2, consumers=["b"], opt_state=state, tx=tx, to=wide)
    new = np.asarray(result.opt_state.inner_state[0].sum_of_squares["a"]["kernel"])
    old = np.asarray(state.inner_state[0].sum_of_squares["a"]["kernel"])
    np.testing.assert_array_equal(new[0], np.float32(0.25))
    np.testing.assert_array_equal(new[1, :4], old[0])
    np.testing.assert_array_equal(new[1, 4:], np.float32(0.25))

  def test_the_next_transform_may_be_a_function_of_the_new_mask(self):
    params = self.params()
    tx = optax.adam(0.1)
    result = surgery.grow(
      params,
      "a",
      2,
      consumers=["b"],
      opt_state=self.state(tx, params),
      tx=tx,
      to=lambda m: maskopt.selective_transform(optax.adam(0.1), freeze_mask=m),
    )
    assert maskopt.mask_of(result.opt_state).freeze_mask["a"]["kernel"].shape == (3, 6)
    assert int(result.opt_state.inner_state[0].count) == 3

  def test_masters_of_narrow_parameters_come_along(self):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), self.params())

    def to(mask):
      del mask
      return maskopt.selective_transform(
        optax.sgd(0.01), freeze_mask=False, master_dtype=jnp.float32
      )

    tx = to(None)
    state = tx.init(params)
    state = state._replace(masters=jax.tree.map(lambda m: m + 1e-4, state.masters))
    result = surgery.grow(params, "a", 1, consumers=["b"], opt_state=state, tx=tx, to=to)
    np.testing.assert_array_equal(
      bits(result.opt_state.masters["a"]["kernel"][:, :4]), bits(state.masters["a"]["kernel"])
    )
    assert result.opt_state.masters["a"]["kernel"].shape == (3, 5)

  def test_states_of_wrappers(self):
    params = self.params()
    labels = {"a": {"kernel": np.array(["x", "y", "x", "y"])}, "b": "y"}
    wide = {"a": {"kernel": np.array(["x", "y", "x", "y", "y", "y"])}, "b": "y"}
    optimizers = {"x": optax.adam(0.1), "y": optax.sgd(0.1, momentum=0.9)}
    whole = {"a": "x", "b": "y"}
    cases = [
      (optax.inject_hyperparams(optax.adam)(learning_rate=0.1), None),
      (optax.MultiSteps(optax.adam(0.1), 2), None),
      (optax.partition(optimizers, whole), None),
      (maskopt.partition(optimizers, whole), None),
      (maskopt.partition(optimizers, labels), maskopt.partition(optimizers, wide)),
      (optax.adafactor(0.1), None),
    ]
    for tx, to in cases:
      state = self.state(tx, params)
      result = surgery.grow(params, "a", 2, consumers=["b"], opt_state=state, tx=tx, to=to)
      fresh = (to or tx).init(result.model)
      assert jax.tree.structure(result.opt_state) == jax.tree.structure(fresh)
      counts = [
        int(x) for x in jax.tree.leaves(result.opt_state) if x.dtype == jnp.int32 and not x.ndim
      ]
      assert counts == [
        int(x) for x in jax.tree.leaves(state) if x.dtype == jnp.int32 and not x.ndim
      ]
    trace = {p: x for p, x in paths(state_of(cases[4], self, params)).items() if "trace/a" in p}
    (values,) = trace.values()
    old = self.state(cases[4][0], params).inner_states["y"].inner_state[0].trace["a"]["kernel"]
    assert values.shape == (3, 6)  # dense in both: zero where the other label's elements are
    np.testing.assert_array_equal(values[:, [1, 3]], old[:, [1, 3]])
    assert not values[:, 4:].any()

  def test_stacks_of_moments_are_refused(self):
    params, tx = self.params(), optax.scale_by_lbfgs()
    with pytest.raises(ValueError, match=r"expected a moment of \(3, 4\), got .*\(10, 3, 4\)"):
      surgery.grow(params, "a", 1, consumers=["b"], opt_state=tx.init(params), tx=tx)

  def test_two_learning_rates_after_growth(self):
    params, tx = self.params(), optax.sgd(0.1, momentum=0.9)
    grown = surgery.grow(params, "a", 2, consumers=["b"], opt_state=self.state(tx, params), tx=tx)
    labels = jax.tree.map(lambda m: np.where(m, "old", "new"), grown.freeze_mask)
    rates = {"old": optax.sgd(0.01, momentum=0.9), "new": optax.sgd(0.1, momentum=0.9)}
    to = maskopt.partition(rates, labels)
    state = maskopt.migrate(grown.opt_state, grown.model, to=to)
    zeros = jax.tree.map(jnp.zeros_like, grown.model)
    updates, _ = to.update(zeros, state, grown.model)
    moments = grown.opt_state[0].trace["a"]["kernel"]
    np.testing.assert_allclose(updates["a"]["kernel"][:, :4], -0.009 * moments[:, :4], rtol=1e-6)
    assert not updates["a"]["kernel"][:, 4:].any()

  @pytest.mark.parametrize("masked", [True, False])
  def test_states_of_nnx_optimizers(self, masked):
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    old_mask = {"kernel": np.array([True, False, False, True]), "bias": True}

    def to(mask):
      return maskopt.selective_transform(optax.sgd(0.1, momentum=0.9), freeze_mask=mask)

    def optimizer(model, mask):
      tx = optax.sgd(0.1, momentum=0.9)
      return (
        maskopt.nnx.Optimizer(model, tx, mask)
        if masked
        else nnx.Optimizer(model, tx, wrt=nnx.Param)
      )

    def gradients(model):
      return nnx.grad(lambda m: m(jnp.ones((1, 3))).sum())(model)

    before = optimizer(model, old_mask)
    before.update(model, gradients(model))
    taken = {"tx": to(old_mask), "to": to} if masked else {"tx": before.tx}
    result = surgery.grow(model, "", 2, consumers=[], opt_state=before.opt_state, **taken)
    after = optimizer(result.model, result.freeze_mask)
    nnx.update(after.opt_state, nnx.state(result.opt_state))
    trace = np.asarray(jax.tree.leaves(result.opt_state)[-1])
    expected = np.zeros((3, 2)) if masked else np.repeat([[1, 1, 1, 1, 0, 0]], 3, 0)
    np.testing.assert_array_equal(trace, expected)
    after.update(result.model, gradients(result.model))
    assert model.bias.shape == (4,) and result.model.bias.shape == (6,)

  def test_a_state_of_other_parameters_is_refused(self):
    params = self.params()
    tx = optax.adam(0.1)
    others = jax.tree.map(lambda p: p[:2], params)
    with pytest.raises(
      ValueError, match=r"a/kernel, expected a moment of \(3, 4\), got float32 of"
    ):
      surgery.grow(params, "a", 1, consumers=["b"], opt_state=tx.init(others), tx=tx)
    with pytest.raises(ValueError, match="a state of tx over these parameters"):
      surgery.grow(params, "a", 1, consumers=["b"], opt_state=tx.init({"a": params["a"]}), tx=tx)
    with pytest.raises(ValueError, match="a state of the same optimizer"):
      momentum = optax.sgd(0.1, momentum=0.9)
      surgery.grow(params, "a", 1, consumers=["b"], opt_state=tx.init(params), tx=tx, to=momentum)
    with pytest.raises(ValueError, match="only one of them"):
      surgery.grow(params, "a", 1, consumers=["b"], opt_state=tx.init(params))


class TestBadInput:
  def test_layers(self):
    model = models.NnxMLP(nnx.Rngs(0))
    with pytest.raises(
      ValueError, match="at nope, expected a layer .* The layers are head, hidden"
    ):
      surgery.grow(model, "nope", 1, inputs=models.INPUTS["mlp"])
    with pytest.raises(TypeError, match="the path of a layer"):
      surgery.grow(model, 0, 1, inputs=models.INPUTS["mlp"])
    with pytest.raises(ValueError, match="2 that may be meant"):
      surgery.grow(model, "", 1, inputs=models.INPUTS["mlp"])
    with pytest.raises(ValueError, match="axis=2"):
      surgery.grow(model, "hidden", 1, inputs=models.INPUTS["mlp"], axis=2)
    with pytest.raises(ValueError, match="parts"):
      surgery.grow(model, "hidden", 1, inputs=models.INPUTS["mlp"], parts=2)

  def test_units_and_mode(self):
    model = models.NnxMLP(nnx.Rngs(0))
    for units in (0, -9):
      with pytest.raises(ValueError, match=f"one unit more, or several, got {units}"):
        surgery.grow(model, "hidden", units, inputs=models.INPUTS["mlp"])
    with pytest.raises(TypeError, match="a number of units"):
      surgery.grow(model, "hidden", 1.5, inputs=models.INPUTS["mlp"])
    with pytest.raises(ValueError, match="got 'zeros'"):
      surgery.grow(model, "hidden", 1, inputs=models.INPUTS["mlp"], mode="zeros")
    with pytest.raises(TypeError, match="an initializer"):
      surgery.grow(model, "hidden", 1, inputs=models.INPUTS["mlp"], init=3)

  def test_consumers_that_cannot_be_found(self):
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    x = jnp.ones((2, 3))
    constant = jnp.ones(4)
    with pytest.raises(ValueError, match="at a, expected consumers, or forward= and inputs="):
      surgery.grow(params, "a", 1)
    with pytest.raises(ValueError, match="a constant of the forward, along axis 0 of shape"):
      surgery.grow(
        params, "a", 1, inputs=x, forward=lambda p, x: (x @ p["a"] + constant[None]) @ p["b"]
      )
    with pytest.raises(ValueError, match="input 0 of the forward, along axis 1"):
      surgery.grow(
        params, "a", 1, inputs=jnp.ones((2, 4)), forward=lambda p, x: x + x[:, :3] @ p["a"]
      )
    with pytest.raises(ValueError, match="the primitive sort"):
      surgery.grow(params, "a", 1, inputs=x, forward=lambda p, x: jnp.sort(x @ p["a"]) @ p["b"])
    with pytest.raises(ValueError, match="cuts units in two"):
      surgery.grow(
        params, "a", 1, inputs=x, forward=lambda p, x: (x @ p["a"]).reshape(2, 2, 2).sum(1)
      )
    with pytest.raises(ValueError, match="at a, expected a layer that the forward uses"):
      surgery.grow(params, "a", 1, inputs=x, forward=lambda p, x: x)

  def test_named_consumers_that_do_not_fit(self):
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((5, 2))}
    with pytest.raises(
      ValueError, match=r"at b, expected a parameter with an input axis .* \(5, 2\)"
    ):
      surgery.grow(params, "a", 1, consumers=["b"])
    with pytest.raises(ValueError, match="at c, expected a layer"):
      surgery.grow(params, "a", 1, consumers=["c"])
    with pytest.raises(ValueError, match="gates are found by tracing"):
      surgery.grow(models.NnxLSTM(nnx.Rngs(0)), "rnn", 1, consumers=["head"])

  def test_a_normalisation_over_the_units_cannot_keep_the_outputs(self):
    class Net(nnx.Module):
      def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 5, rngs=rngs)
        self.norm = nnx.LayerNorm(5, rngs=rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs)

      def __call__(self, x):
        return self.head(self.norm(self.hidden(x)))

    model = Net(nnx.Rngs(0))
    with pytest.raises(ValueError, match="at hidden, expected the same old outputs"):
      surgery.grow(model, "hidden", 1, inputs=models.INPUTS["mlp"])
    result = surgery.grow(model, "hidden", 1, inputs=models.INPUTS["mlp"], mode="init")
    assert result.model.norm.scale.shape == (6,) and result.report.difference > 1e-3

  def test_a_failure_leaves_everything_as_it_was(self):
    model = models.moved(models.NnxCNN(nnx.Rngs(0)))
    before = maskopt.snapshot(model)
    with pytest.raises(ValueError, match="takes its sizes from the parameters"):
      surgery.grow(
        model,
        "conv",
        1,
        inputs=models.images(),
        forward=lambda m, x: m.norm(m.conv(x)) + jnp.zeros((1, 1, 1, 4)),
      )
    assert maskopt.audit(before, model, True).ok
    assert model.conv.out_features == model.norm.num_features == 4
    assert model(models.images()).shape == (2, 2)

  def test_a_forward_that_knows_the_old_size(self):
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="takes its sizes from the parameters"):
      surgery.grow(
        params,
        "a",
        1,
        inputs=jnp.ones((2, 3)),
        forward=lambda p, x: (x @ p["a"]).reshape(2, 4) @ p["b"],
      )

  def test_an_initializer_of_another_shape(self):
    params = {"a": jnp.ones((3, 4))}
    with pytest.raises(ValueError, match=r"float32 of shape \(3, 5\) from init"):
      surgery.grow(params, "a", 1, consumers=[], init=lambda k, s, d: jnp.ones((2, 2), d))
