"""`maskopt.nnx.Optimizer`: frozen bits, the inner optimizer's trajectory, every nnx transform."""

import copy
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import maskopt
import maskopt.nnx

RNG = np.random.default_rng(0)
X = RNG.standard_normal((6, 4)).astype(np.float32)
Y = RNG.standard_normal((6, 3)).astype(np.float32)
MASK = {
  "first": {"kernel": np.arange(8) < 6, "bias": True},
  "second": {"kernel": RNG.random((8, 3)) < 0.7, "bias": np.array([True, False, False])},
}


@pytest.fixture(autouse=True)
def lenient():
  """Optax and Flax promote dtypes and ranks; our own modules are checked strictly elsewhere."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


class Net(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(4, 8, rngs=rngs)
    self.second = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    return self.second(nnx.relu(self.first(x)))


class Tied(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(5, 3, rngs=rngs)
    self.head = nnx.Linear(3, 5, rngs=rngs)
    self.out = nnx.Dict(embedding=self.embed.embedding)

  def __call__(self, i):
    return self.head(self.embed(i)) + self.embed(i) @ self.out["embedding"].T


def loss(model, x=X, y=Y):
  return ((model(x) - y) ** 2).mean()


def arrays(model):
  return {
    "/".join(map(str, path)): np.array(x[...])
    for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }


def frozen_of(model, mask=MASK):
  return {p: np.broadcast_to(mask[p.split("/")[0]][p.split("/")[1]], x.shape)
          for p, x in arrays(model).items()}  # fmt: skip


def same_bits(a, b):
  return a.view(np.uint32) == b.view(np.uint32)


def spoil(model):
  """Bits that arithmetic would change, at frozen elements."""
  kernel = np.array(model.first.kernel[...])
  kernel[0, 0], kernel[1, 0] = -0.0, 1e-40
  kernel.view(np.uint32)[2, 0] = 0x7FA00001  # a signalling NaN
  model.first.kernel[...] = jnp.asarray(kernel)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("packed", [None, False, True])
@pytest.mark.parametrize("prefer", ["time", "memory"])
def test_frozen_bits_and_the_trajectory_of_the_rest(graph, packed, prefer):
  model = Net(nnx.Rngs(0))
  optimizer = maskopt.nnx.Optimizer(
    model, optax.adamw(0.1, weight_decay=0.1), MASK, graph=graph, prefer=prefer
  )
  assert isinstance(optimizer, nnx.Optimizer)

  @nnx.jit(graph=graph)
  def step(model, optimizer, x):
    if packed is None:
      grads = nnx.grad(loss, graph=graph)(model, x)
    else:
      grads = maskopt.nnx.grad(loss, MASK, packed=packed)(model, x)
    optimizer.update(model, grads)

  before, frozen = arrays(model), frozen_of(model)
  for _ in range(3):
    step(model, optimizer, X)
  after = arrays(model)
  assert optimizer.step[...] == 3
  expected = reference(3)
  for path, f in frozen.items():
    assert same_bits(before[path], after[path])[f].all(), path
    assert not same_bits(before[path], after[path])[~f].any(), path
    np.testing.assert_allclose(after[path], expected[path], rtol=1e-4, atol=1e-6)


def reference(steps):
  """Optax on the trainable elements alone, as flat vectors, of a plain nnx model."""
  model = Net(nnx.Rngs(0))
  frozen = frozen_of(model)
  tx = optax.adamw(0.1, weight_decay=0.1)
  values = {p: jnp.asarray(x[~frozen[p]]) for p, x in arrays(model).items()}
  state = tx.init(values)
  for _ in range(steps):
    grads = {p: jnp.asarray(g[~frozen[p]]) for p, g in arrays(nnx.grad(loss)(model)).items()}
    updates, state = tx.update(grads, state, values)
    values = optax.apply_updates(values, updates)
    for p, x in arrays(model).items():
      x[~frozen[p]] = np.asarray(values[p])
      layer, name = p.split("/")
      getattr(getattr(model, layer), name)[...] = jnp.asarray(x)
  return arrays(model)


@pytest.mark.parametrize("jit", [False, True])
def test_special_bits_survive_decay_noise_and_nan_gradients(jit):
  model = Net(nnx.Rngs(0))
  spoil(model)
  tx = optax.chain(optax.add_noise(0.1, 0.5, 0), optax.adamw(0.1, weight_decay=0.5))
  optimizer = maskopt.nnx.Optimizer(model, tx, MASK)
  before, frozen = arrays(model), frozen_of(model)
  update = nnx.jit(lambda m, o, g: o.update(m, g)) if jit else (lambda m, o, g: o.update(m, g))
  grads = nnx.state(model, nnx.Param)
  grads = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), grads)
  update(model, optimizer, grads)
  for path, f in frozen.items():
    assert same_bits(before[path], arrays(model)[path])[f].all(), path


def test_scan_carries_model_and_optimizer():
  def trained(run):
    model = Net(nnx.Rngs(0))
    optimizer = maskopt.nnx.Optimizer(model, optax.adam(0.1), MASK)
    run(model, optimizer)
    return arrays(model)

  def step(carry, x):
    model, optimizer = carry
    optimizer.update(model, maskopt.nnx.grad(loss, MASK)(model, x))
    return carry

  xs = jnp.stack([X, X + 1, X - 1])

  def loop(model, optimizer):
    for x in xs:
      step((model, optimizer), x)

  scanned = trained(
    lambda m, o: nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)((m, o), xs)
  )
  for path, x in trained(loop).items():
    np.testing.assert_allclose(scanned[path], x, rtol=1e-4, atol=1e-6)


def test_cached_partial():
  model = Net(nnx.Rngs(0))
  optimizer = maskopt.nnx.Optimizer(model, optax.adamw(0.1, weight_decay=0.1), MASK)

  @nnx.jit
  def step(model, optimizer, x):
    optimizer.update(model, maskopt.nnx.grad(loss, MASK)(model, x))

  cached = nnx.cached_partial(step, model, optimizer)
  for _ in range(3):
    cached(X)
  for path, x in reference(3).items():
    np.testing.assert_allclose(arrays(model)[path], x, rtol=1e-4, atol=1e-6)


def test_one_trace_for_many_steps_and_state_is_packed():
  traces = []
  model = Net(nnx.Rngs(0))
  optimizer = maskopt.nnx.Optimizer(model, optax.adam(0.1), MASK, prefer="memory")

  @nnx.jit
  def step(model, optimizer):
    traces.append(1)
    optimizer.update(model, maskopt.nnx.grad(loss, MASK)(model))

  for _ in range(4):
    step(model, optimizer)
  assert len(traces) == 1
  mu = nnx.as_pure(optimizer.opt_state).inner_state[0].mu
  assert mu["first"]["kernel"].shape == (4, 2)
  assert mu["second"]["kernel"].ndim == 1
  assert not jax.tree.leaves(mu["first"]["bias"])
  layouts = maskopt.mask_of(nnx.as_pure(optimizer.opt_state))
  assert np.array_equal(layouts.freeze_mask["second"]["kernel"], MASK["second"]["kernel"])


def test_in_place_path_is_taken_under_jit():
  """The compiled step touches fewer bytes than the kernel has: no dense update is built."""
  model = nnx.Linear(512, 512, rngs=nnx.Rngs(0))
  mask = {"kernel": np.random.default_rng(1).random((512, 512)) >= 0.001, "bias": True}
  optimizer = maskopt.nnx.Optimizer(model, optax.sgd(0.1), mask, prefer="memory")
  graphdef, state = nnx.split((model, optimizer))

  def step(state, grad):
    model, optimizer = nnx.merge(graphdef, state)
    grads = nnx.State({"kernel": nnx.Param(grad), "bias": nnx.Param(jnp.zeros(512))})
    optimizer.update(model, grads)
    return nnx.state((model, optimizer))

  compiled = jax.jit(step, donate_argnums=0).lower(state, jnp.ones((512, 512))).compile()
  full = [x for x in re.findall(r"= f32\[(.*?)\]\S* (\w+)", compiled.as_text())]
  assert ("262144", "add") not in full and ("512,512", "add") not in full
  assert ("512,512", "broadcast") not in full and ("262144", "broadcast") not in full


def test_compiled_step_costs_what_the_plain_path_does():
  """What `nnx.jit` compiles is the plain in-place step: as many bytes and operations."""
  model = nnx.Linear(256, 512, rngs=nnx.Rngs(0))
  mask = {"kernel": np.arange(256)[:, None] >= 16, "bias": np.arange(512) >= 50}
  tx = maskopt.selective_transform(optax.adam(0.1), freeze_mask=mask)
  optimizer = maskopt.nnx.Optimizer(model, optax.adam(0.1), mask)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))

  def plain(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return maskopt.apply_updates(params, updates), state

  @nnx.jit(donate_argnums=(0, 1))
  def ours(model, optimizer, grads):
    optimizer.update(model, jax.tree.map(nnx.Param, grads))

  state = tx.init(params)
  expected = jax.jit(plain, donate_argnums=(0, 1)).lower(params, state, params).compile()
  expected = expected.cost_analysis()
  cost = ours.lower(model, optimizer, params).compile().cost_analysis()
  for key in ("flops", "bytes accessed"):
    assert cost[key] <= 1.01 * expected[key], key


def test_nothing_frozen_is_the_library_own_optimizer():
  ours, theirs = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
  a = maskopt.nnx.Optimizer(ours, optax.adamw(0.1), False)
  b = nnx.Optimizer(theirs, optax.adamw(0.1), wrt=nnx.Param)
  for _ in range(2):
    a.update(ours, nnx.grad(loss)(ours))
    b.update(theirs, nnx.grad(loss)(theirs))
  for path, x in arrays(theirs).items():
    assert same_bits(arrays(ours)[path], x).all()


def test_an_optimizer_that_freezes_nothing_says_so_unless_it_is_told_to():
  with pytest.warns(UserWarning, match="nothing is frozen, .* freeze_mask=False to train everyth"):
    maskopt.nnx.Optimizer(Net(nnx.Rngs(0)), optax.sgd(0.1))
  with pytest.raises(TypeError, match="got the type Param. A filter of variables is for wrt=Param"):
    maskopt.nnx.Optimizer(Net(nnx.Rngs(0)), optax.sgd(0.1), nnx.Param)


def test_migrate_tells_where_an_optimizer_has_its_transform():
  optimizer = maskopt.nnx.Optimizer(Net(nnx.Rngs(0)), optax.sgd(0.1), MASK)
  with pytest.raises(TypeError, match="got Optimizer. Of an nnx optimizer that is its .tx"):
    maskopt.migrate(optimizer.opt_state, Net(nnx.Rngs(0)), to=optimizer)


def test_state_splits_merges_and_restores():
  model = Net(nnx.Rngs(0))
  optimizer = maskopt.nnx.Optimizer(model, optax.adam(0.1), MASK)
  optimizer.update(model, nnx.grad(loss)(model))
  saved = jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state((model, optimizer))))
  other_model = Net(nnx.Rngs(1))
  other = maskopt.nnx.Optimizer(other_model, optax.adam(0.1), MASK)
  state = nnx.state((other_model, other))
  nnx.replace_by_pure_dict(state, saved)
  nnx.update((other_model, other), state)
  for m, o in ((model, optimizer), (other_model, other)):
    o.update(m, nnx.grad(loss)(m))
  for path, x in arrays(model).items():
    assert same_bits(arrays(other_model)[path], x).all()
  assert other.step[...] == 2


def test_sharding_labels_of_packed_leaves_are_dropped():
  init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
  with jax.set_mesh(jax.make_mesh((2,), ("model",), (jax.sharding.AxisType.Auto,))):
    model = nnx.Linear(8, 6, kernel_init=init, rngs=nnx.Rngs(0))
    mask = {"kernel": np.arange(48).reshape(8, 6) % 7 > 0, "bias": False}
    optimizer = maskopt.nnx.Optimizer(model, optax.adam(0.1), mask, prefer="memory")
    optimizer.update(model, nnx.grad(lambda m: m(jnp.ones((1, 8))).sum())(model))
  mu = optimizer.opt_state.inner_state[0].mu["kernel"]
  assert mu[...].ndim == 1 and "out_sharding" not in mu.get_metadata()


@pytest.mark.parametrize(
  "mask",
  [
    {"embed": True, "head": False},
    {"out": {"embedding": True}, "head": False},
    {"out": True, "head": False},
  ],
)
def test_tied_weights_freeze_through_either_name(mask):
  model = Tied(nnx.Rngs(0))
  optimizer = maskopt.nnx.Optimizer(model, optax.adamw(0.1), mask)
  assert [p for p, _ in maskopt.mask_of(optimizer.opt_state).items()] == [
    "embed/embedding", "head/bias", "head/kernel",
  ]  # fmt: skip
  before = np.array(model.embed.embedding[...])
  i = jnp.arange(5)
  for grad in (nnx.grad, lambda f: maskopt.nnx.grad(f, mask)):
    optimizer.update(model, grad(lambda m: (m(i) ** 2).sum())(model))
  assert same_bits(before, np.array(model.embed.embedding[...])).all()
  assert model.out["embedding"] is model.embed.embedding


def test_tied_weights_with_two_masks():
  mask = {"embed": False, "out": True, "head": False}
  message = (
    "at out, expected the mask of embed/embedding, which is the same variable as out/embedding, "
    "got another. A shared variable has one mask"
  )
  with pytest.raises(ValueError, match=message):
    maskopt.nnx.Optimizer(Tied(nnx.Rngs(0)), optax.sgd(0.1), mask)


def test_wrt_selects_other_variables():
  model = nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0))
  optimizer = maskopt.nnx.Optimizer(
    model, optax.adamw(0.1), {"lora": {"lora_a": True, "lora_b": False}}, wrt=nnx.LoRAParam
  )
  before = {k: np.array(x[...]) for k, x in nnx.to_flat_state(nnx.state(model))}
  wrt = nnx.DiffState(0, nnx.LoRAParam)
  grads = nnx.grad(lambda m: (m(X) ** 2).sum(), argnums=wrt)(model)
  optimizer.update(model, grads)
  after = {k: np.array(x[...]) for k, x in nnx.to_flat_state(nnx.state(model))}
  moved = {k for k in before if not same_bits(before[k], after[k]).all()}
  assert moved == {("lora", "lora_b")}


def test_wrt_that_does_not_match_names_both_filters():
  model = nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0))
  optimizer = maskopt.nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.LoRAParam)
  grads = nnx.grad(lambda m: m(X).sum(), argnums=nnx.DiffState(0, nnx.PathContains("bias")))(model)
  with pytest.raises(ValueError, match="at lora/lora_a, expected a gradient of what wrt=LoRAParam "
                     "selects, got none among gradients of Param; at lora/lora_b"):  # fmt: skip
    optimizer.update(model, grads)
  with pytest.raises(
    ValueError, match="expected variables that wrt=BatchStat selects, got LoRAParam"
  ):
    maskopt.nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.BatchStat)
  message = "at bias, expected a variable that wrt=LoRAParam selects, got a Param"
  with pytest.raises(ValueError, match=message):
    maskopt.nnx.Optimizer(model, optax.sgd(0.1), {"bias": True, "lora": False}, wrt=nnx.LoRAParam)


def test_mask_for_another_module_or_with_an_unknown_layer():
  model = Net(nnx.Rngs(0))
  with pytest.raises(ValueError, match="at third, expected a parameter, got none of that path. The "
                     "parameters are first/bias, first/kernel"):  # fmt: skip
    maskopt.nnx.Optimizer(model, optax.sgd(0.1), {"first": True, "second": True, "third": True})
  with pytest.raises(ValueError, match=r"at first/kernel, expected bool broadcastable to \(4, 8\)"):
    maskopt.nnx.Optimizer(
      model, optax.sgd(0.1), {"first": {"kernel": np.ones(7, bool), "bias": True}, "second": True}
    )


def test_runtime_mask_changes_without_a_retrace():
  model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  mask = {"kernel": maskopt.runtime(jnp.array([True, False, True])), "bias": True}
  optimizer = maskopt.nnx.Optimizer(model, optax.sgd(0.1), mask)
  traces = []

  @nnx.jit
  def step(model, optimizer, frozen):
    traces.append(1)
    mask = {"kernel": maskopt.runtime(frozen), "bias": True}
    optimizer.update(model, nnx.grad(lambda m: m(X).sum())(model), freeze_mask=mask)

  for k in range(3):
    before = np.array(model.kernel[...])
    step(model, optimizer, jnp.arange(3) != k)
    moved = (before != np.array(model.kernel[...])).any(axis=0)
    assert moved.tolist() == [j == k for j in range(3)]
  assert len(traces) == 1


def test_a_schedule_at_runtime_thaws_in_one_trace():
  schedule = maskopt.unfreeze_schedule(
    {0: {"first": True, "second": False}, 2: False}, mode="runtime"
  )
  model = Net(nnx.Rngs(0))
  optimizer = maskopt.nnx.Optimizer(model, optax.sgd(0.1), schedule)
  traces = []

  @nnx.jit
  def step(model, optimizer):
    traces.append(1)
    optimizer.update(model, nnx.grad(loss)(model))

  moved = []
  for _ in range(4):
    before = np.array(model.first.kernel[...])
    step(model, optimizer)
    moved.append(not same_bits(before, np.array(model.first.kernel[...])).all())
  assert moved == [False, False, True, True] and len(traces) == 1


def test_migrates_to_an_optimizer_with_another_mask():
  model = Net(nnx.Rngs(0))
  old = maskopt.nnx.Optimizer(model, optax.adam(0.1), {"first": True, "second": False})
  old.update(model, nnx.grad(loss)(model))
  new = maskopt.nnx.Optimizer(model, optax.adam(0.1), MASK)
  params = nnx.as_pure(nnx.state(model, nnx.Param))
  grads = nnx.as_pure(nnx.grad(loss)(model))
  state = maskopt.migrate(nnx.as_pure(old.opt_state), params, to=new.tx, grads=grads)
  nnx.update(new.opt_state, nnx.state(state))
  kept = new.opt_state.inner_state[0].mu["second"]["kernel"][...]
  assert np.any(kept)
  new.update(model, nnx.grad(loss)(model))


def test_nnx_jit_walks_no_more_objects_than_for_the_library_own_optimizer():
  model = Net(nnx.Rngs(0))
  ours = maskopt.nnx.Optimizer(model, optax.adamw(0.1), MASK, prefer="memory")
  theirs = nnx.Optimizer(model, optax.adamw(0.1), wrt=nnx.Param)
  a, b = (len(nnx.graphdef(optimizer).nodes) for optimizer in (ours, theirs))
  assert a <= b
  assert all(isinstance(x, nnx.OptState) and x[...].ndim >= 0 for x in ours.slots.values())


def test_optimizer_state_is_a_tree_of_the_variables_that_the_optimizer_has():
  model = Net(nnx.Rngs(0))
  tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
  optimizer = maskopt.nnx.Optimizer(model, tx, {"first": True, "second": False})
  optimizer.opt_state.inner_state.hyperparams["learning_rate"][...] = jnp.array(0.0)
  before = arrays(model)
  update = nnx.jit(lambda m, o: o.update(m, nnx.grad(loss)(m)))
  update(model, optimizer)
  assert all(same_bits(x, arrays(model)[path]).all() for path, x in before.items())
  lr = optimizer.slots["inner_state.hyperparams.learning_rate"]
  assert lr is optimizer.opt_state.inner_state.hyperparams["learning_rate"]
  # A state can be set as a whole, as after `maskopt.migrate`.
  optimizer.opt_state = jax.tree.map(jnp.array, nnx.as_pure(optimizer.opt_state))
  optimizer.opt_state.inner_state.hyperparams["learning_rate"][...] = jnp.array(0.5)
  update(model, optimizer)
  assert not same_bits(before["second/kernel"], arrays(model)["second/kernel"]).any()


def test_optimizer_is_built_abstractly_and_copied():
  mask = {"first": {"kernel": np.arange(8) < 6, "bias": True}, "second": False}

  def build():
    model = Net(nnx.Rngs(0))
    return model, maskopt.nnx.Optimizer(model, optax.adam(0.1), mask, prefer="memory")

  abstract = nnx.state(nnx.eval_shape(build))
  model, optimizer = build()
  jax.tree.map(
    lambda a, b: a.shape == b.shape or pytest.fail(), abstract, nnx.state((model, optimizer))
  )
  graphdef, _ = nnx.split(nnx.eval_shape(build))
  model, optimizer = nnx.merge(graphdef, nnx.state((model, optimizer)))
  twin_model, twin = copy.deepcopy((model, optimizer))
  optimizer.update(model, nnx.grad(loss)(model))
  assert twin.step[...] == 0 and not np.any(twin.opt_state.inner_state[0].mu["second"]["bias"][...])
  twin.update(twin_model, nnx.grad(loss)(twin_model))
  assert same_bits(arrays(model)["second/kernel"], arrays(twin_model)["second/kernel"]).all()


def test_model_and_gradients_in_the_wrong_order():
  model = Net(nnx.Rngs(0))
  optimizer = maskopt.nnx.Optimizer(model, optax.sgd(0.1), MASK)
  with pytest.raises(TypeError, match="expected the module, then gradients, got Net second"):
    optimizer.update(nnx.grad(loss)(model), model)


@pytest.mark.parametrize("kernel", [np.array([True, False, False, False]), True, False])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("around", [lambda tx: tx, lambda tx: optax.chain(optax.clip(1.0), tx)])
def test_an_optimizer_that_selects_already_is_refused(kernel, own, around):
  model = nnx.Linear(2, 4, rngs=nnx.Rngs(0))
  mask = {"kernel": kernel, "bias": False}
  tx = around(maskopt.selective_transform(optax.adam(0.1), freeze_mask=mask))
  match = (
    r"maskopt\.nnx\.Optimizer\(tx=\.\.\.\)`: at tx, expected an optimizer of whole parameters, got "
    r"one of maskopt\.selective_transform\. It would select twice\. Write "
    r"maskopt\.nnx\.Optimizer\(model, optax\.adam\(\.\.\.\), freeze_mask\) with"
  )
  with pytest.raises(ValueError, match=match):
    maskopt.nnx.Optimizer(model, tx, mask if own else None)
  # What the remedy says works.
  nnx.Optimizer(model, tx, wrt=nnx.Param)


def test_an_error_of_the_mask_alone_stays_as_it_is():
  model = nnx.Linear(2, 4, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"at kernel, expected bool broadcastable to \(2, 4\)"):
    maskopt.nnx.Optimizer(model, optax.adam(0.1), {"kernel": np.zeros(3, bool), "bias": False})


def test_a_partition_under_a_mask_is_no_second_selection():
  model = nnx.Linear(2, 4, rngs=nnx.Rngs(0))
  tx = maskopt.partition({"a": optax.adam(0.1)}, {"kernel": "a", "bias": "a"})
  maskopt.nnx.Optimizer(model, tx, {"kernel": True, "bias": False})
