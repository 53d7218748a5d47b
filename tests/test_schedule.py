"""Masks that change with the step, static and in the graph: what trains when, traces, resuming."""

import copy
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from reference import bits, moved, same_bits

import maskopt

RNG = np.random.default_rng(0)
P = {
  f"layer{k}": {
    "kernel": RNG.standard_normal((4, 4)).astype(np.float32),
    "bias": RNG.standard_normal(4).astype(np.float32),
  }
  for k in range(3)
}
GRADS = [
  jax.tree.map(lambda x: RNG.standard_normal(x.shape).astype(np.float32), P) for _ in range(12)
]
ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))


@pytest.fixture(autouse=True)
def _promotion():
  """Optax's Adam itself needs promotion."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def params():
  return jax.tree.map(jnp.asarray, P)


def _units(*trained):
  """A mask that trains as many units of every kernel whatever the numbers are."""
  frozen = ~np.isin(np.arange(4), trained)
  return {name: {"kernel": frozen, "bias": frozen} for name in P}


BLOCKS = [_units(0, 1), _units(1, 2), _units(2, 3), _units(0, 3), _units(0, 2)]
FORMS = {
  "boundaries": {"masks": {0: BLOCKS[0], 3: BLOCKS[1], 4: True, 7: False}},
  "top_first": {"top_first": 3, "layers": list(P)},
  "freeze_out": {"freeze_out": 12, "layers": list(P)},
  "rotate": {"rotate": 2, "layers": list(P), "order": "down"},
  "random": {"rotate": 2, "layers": list(P), "order": "random", "always": [0], "seed": 3},
  "blocks": {"masks": {2 * k: mask for k, mask in enumerate(BLOCKS)}},
}


def _full(mask):
  resolved = maskopt.mask_of(
    maskopt.selective_transform(optax.sgd(1.0), freeze_mask=mask).init(params())
  ).freeze_mask
  return jax.tree.map(lambda m, p: np.broadcast_to(np.asarray(m), p.shape), resolved, P)


def _check_moves(before, after, mask):
  for old, new, frozen in zip(*map(jax.tree.leaves, (before, after, _full(mask))), strict=True):
    assert moved(old, new, frozen) == []
    assert (bits(old) != bits(new))[~frozen].all()


def run_static(schedule, steps, p=None, start=0, state=None, hook=lambda *_: None):
  """The loop of the docstring."""
  p = params() if p is None else p
  tx = maskopt.selective_transform(ADAM, freeze_mask=schedule.at(start))
  traces = []

  def step_with(tx):
    @jax.jit
    def step(p, state, g):
      traces.append(1)
      updates, state = tx.update(g, state, p)
      return maskopt.apply_updates(p, updates), state

    return step

  state = tx.init(p) if state is None else state
  step = step_with(tx)
  for n in range(start, steps):
    if n > start and schedule.changes(n):
      tx = maskopt.selective_transform(ADAM, freeze_mask=schedule.at(n))
      state = maskopt.migrate(state, p, to=tx, grads=GRADS[n])
      step = step_with(tx)
    hook(n, p, state)
    p, state = step(p, state, GRADS[n])
  return p, state, len(traces)


def run_runtime(schedule, steps, p=None, start=0, state=None, make=None, hook=lambda *_: None):
  make = make or (lambda mask: maskopt.selective_transform(ADAM, freeze_mask=mask))
  tx, traces = make(schedule), []

  @jax.jit
  def step(p, state, g):
    traces.append(1)
    updates, state = tx.update(g, state, p)
    return maskopt.apply_updates(p, updates), state

  p = params() if p is None else p
  state = tx.init(p) if state is None else state
  for n in range(start, steps):
    hook(n, p, state)
    p, state = step(p, state, GRADS[n])
  return p, state, len(traces)


def checking(schedule):
  """A hook that compares what moved in each step with the schedule's own mask."""
  seen = []

  def hook(n, p, state):
    if seen:
      _check_moves(seen[-1], p, schedule.at(n - 1))
    seen.append(p)
    frozen = maskopt.mask_of(state).freeze_mask
    want = _full(schedule.at(n))
    assert jax.tree.all(
      jax.tree.map(lambda f, m: np.array_equal(np.broadcast_to(f, m.shape), m), frozen, want)
    )

  return hook


@pytest.mark.parametrize("form", FORMS)
def test_static_trains_what_each_stage_says_in_one_trace_a_stage(form):
  schedule = maskopt.unfreeze_schedule(**FORMS[form])
  *_, traces = run_static(schedule, 10, hook=checking(schedule))
  assert traces == 1 + sum(schedule.changes(n) for n in range(10))


@pytest.mark.parametrize("form", FORMS)
def test_runtime_trains_the_same_in_one_trace(form):
  schedule = maskopt.unfreeze_schedule(**FORMS[form], mode="runtime")
  *_, traces = run_runtime(schedule, 10, hook=checking(schedule))
  assert traces == 1


@pytest.mark.parametrize("form", FORMS)
def test_masked_freeze_takes_a_schedule(form):
  schedule = maskopt.unfreeze_schedule(**FORMS[form], mode="runtime")

  def make(mask):
    return optax.chain(optax.adam(0.1), maskopt.masked_freeze(mask))

  *_, traces = run_runtime(schedule, 8, make=make, hook=checking(schedule))
  assert traces == 1


def test_constant_counts_are_packed_and_others_are_not():
  packed = maskopt.unfreeze_schedule(**FORMS["blocks"], mode="runtime")
  state = maskopt.selective_transform(ADAM, freeze_mask=packed).init(params())
  mu = state.inner_state.inner_state[1][0].mu
  assert mu["layer0"]["kernel"].shape == (8,) and mu["layer0"]["bias"].shape == (2,)
  dense = maskopt.unfreeze_schedule(**FORMS["top_first"], mode="runtime")
  state = maskopt.selective_transform(ADAM, freeze_mask=dense).init(params())
  assert state.inner_state.inner_state[1][0].mu["layer0"]["kernel"].shape == (4, 4)
  # The last layer trains in every stage: it is no runtime leaf at all.
  assert maskopt.mask_of(state).freeze_mask["layer2"] == {"kernel": False, "bias": False}


def _orbax(tree, target, path):
  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(path / "step", tree)
    checkpointer.wait_until_finished()
    return checkpointer.restore(path / "step", target)


def _bytes(tree, target, path):
  del path
  return flax.serialization.from_bytes(target, flax.serialization.to_bytes(tree))


def _pickled(tree, target, path):
  del target, path
  return pickle.loads(pickle.dumps(tree))


# Each takes (tree, a tree of the same structure with other values, a directory).
FILES = {"orbax": _orbax, "bytes": _bytes, "pickle": _pickled}


def _resumes(forms):
  """Every form through one kind of file, and every kind of file for one form."""
  more = [f for f in FORMS if f not in ("boundaries", "random", "blocks")]
  slow = [pytest.param(f, "bytes", marks=pytest.mark.slow) for f in more if f in forms]
  few = [(form, "bytes") for form in forms if form not in more]
  return few + slow + [("blocks", f) for f in FILES if f != "bytes"]


@pytest.mark.parametrize(("form", "file"), _resumes(["boundaries", "random", "blocks"]))
def test_a_static_schedule_resumes_bit_for_bit(form, file, tmp_path):
  schedule, kept = maskopt.unfreeze_schedule(**FORMS[form]), {}
  p, state, _ = run_static(schedule, 8, hook=lambda n, *now: kept.update({n: now}))
  for middle in (3, 6) if file == "bytes" else (6,):
    # Taken after `migrate`, as the loop of the docstring would write it: with the mask of `middle`.
    tx = maskopt.selective_transform(ADAM, freeze_mask=schedule.at(middle))
    q, half = FILES[file](kept[middle], (params(), tx.init(params())), tmp_path)
    assert same_bits(kept[middle], (q, half)) and not same_bits(q, p)
    q, resumed, _ = run_static(schedule, 8, q, middle, jax.tree.map(jnp.asarray, half))
    assert same_bits(p, q) and same_bits(state, resumed)


def test_a_static_schedule_resumes_from_the_file_of_the_stage_before():
  schedule = maskopt.unfreeze_schedule(**FORMS["blocks"])
  p, state, _ = run_static(schedule, 8)
  q, half, _ = run_static(schedule, 6)
  assert schedule.changes(6)
  tx = maskopt.selective_transform(ADAM, freeze_mask=schedule.at(5))
  q, half = _bytes((q, half), (params(), tx.init(params())), None)
  tx = maskopt.selective_transform(ADAM, freeze_mask=schedule.at(6))
  half = maskopt.migrate(jax.tree.map(jnp.asarray, half), q, to=tx, grads=GRADS[6])
  q, resumed, _ = run_static(schedule, 8, q, 6, half)
  assert same_bits(p, q) and same_bits(state, resumed)


@pytest.mark.parametrize(("form", "file"), _resumes([*FORMS, "function"]))
def test_a_runtime_schedule_resumes_bit_for_bit(form, file, tmp_path):
  kwargs = {"masks": _moving_rows} if form == "function" else FORMS[form]
  schedule, kept = maskopt.unfreeze_schedule(**kwargs, mode="runtime"), {}
  p, state, _ = run_runtime(schedule, 8, hook=lambda n, *now: kept.update({n: now}))
  # At step 4 a stage begins in most forms: the coming update is still to put its mask in place.
  middle = 4
  tx = maskopt.selective_transform(ADAM, freeze_mask=schedule)
  q, half = FILES[file](kept[middle], (params(), tx.init(params())), tmp_path)
  assert same_bits(kept[middle], (q, half)) and not same_bits(q, p)
  q, resumed, _ = run_runtime(schedule, 8, q, middle, jax.tree.map(jnp.asarray, half))
  assert same_bits(p, q) and same_bits(state, resumed)


def test_runtime_and_static_agree_where_nothing_thaws():
  """Layers that freeze one by one: no moment is seeded, so both are the same training."""
  form = FORMS["freeze_out"]
  p, *_ = run_static(maskopt.unfreeze_schedule(**form), 10)
  q, *_ = run_runtime(maskopt.unfreeze_schedule(**form, mode="runtime"), 10)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), p, q)


@pytest.mark.parametrize("packed", [True, False])
def test_thawed_elements_take_no_long_step(packed):
  """At step 1,000 of a constant gradient every update is one learning rate, thawed or not."""
  schedule = maskopt.unfreeze_schedule({0: BLOCKS[0], 2: BLOCKS[1]}, mode="runtime")
  tx = maskopt.selective_transform(optax.adam(0.1), freeze_mask=schedule)
  p = params()
  state = tx.init(p)
  inner = state.inner_state.inner_state
  old = inner[0]._replace(
    count=jnp.asarray(1000, jnp.int32),
    mu=jax.tree.map(jnp.ones_like, inner[0].mu),
    nu=jax.tree.map(jnp.ones_like, inner[0].nu),
  )
  state = state._replace(inner_state=state.inner_state._replace(inner_state=(old, *inner[1:])))
  loss = lambda q: sum(x.sum() for x in jax.tree.leaves(q))  # noqa: E731

  @jax.jit
  def step(p, state):
    grads = maskopt.grad(loss, maskopt.mask_of(state), packed=packed)(p)
    updates, state = tx.update(grads, state, p)
    return maskopt.apply_updates(p, updates), state

  sizes = []
  for _ in range(6):
    q, state = step(p, state)
    sizes.append(float(jnp.max(jnp.abs(p["layer1"]["kernel"] - q["layer1"]["kernel"]))))
    p = q
  assert max(sizes) < 0.13  # Adam's own at b1 / sqrt(b2) extremes, not 0.25 and more


def _moving_rows(step):
  frozen = (jnp.arange(4) + step // 2) % 4 > 1
  return {name: {"kernel": maskopt.runtime(frozen, 8), "bias": True} for name in P}


def test_a_function_of_the_step_in_the_graph():
  schedule = maskopt.unfreeze_schedule(_moving_rows, mode="runtime")
  seen = []

  def hook(n, p, state):
    if seen:
      frozen = (np.arange(4) + (n - 1) // 2) % 4 > 1
      _check_moves(seen[-1], p, {name: {"kernel": frozen, "bias": True} for name in P})
    seen.append(p)

  *_, traces = run_runtime(schedule, 9, hook=hook)
  assert traces == 1


SHAPE = (4, 5, 3)
# Name -> (shape of the masks, trainable elements of each, shape of the positions of three stages).
STACKS = {
  "rows": ((4, 1, 1), 2, (3, 2, 1, 1)),
  "middle": ((5, 1), 3, (3, 1, 3, 1)),
  "last": ((3,), 2, (3, 1, 1, 2)),
  "one row": ((4, 1, 1), 1, (3, 15)),
  "one unit": ((3,), 1, (3, 20)),
  "pairs of outer dimensions": ((4, 5, 1), 7, (3, 7, 1)),
  "first and last dimension": ((4, 1, 3), 5, (3, 25)),
  "elements": ((4, 5, 3), 11, (3, 11)),
  "one element": ((4, 5, 3), 1, (3, 1)),
}


@pytest.mark.parametrize("name", STACKS)
def test_the_state_keeps_compact_positions_of_every_stage(name):
  mask_shape, count, stored = STACKS[name]
  rng = np.random.default_rng(0)
  frozen = rng.permutation(int(np.prod(mask_shape))) >= count
  masks = [np.roll(frozen, k).reshape(mask_shape) for k in range(3)]
  schedule = maskopt.unfreeze_schedule({2 * k: m for k, m in enumerate(masks)}, mode="runtime")
  tx = maskopt.selective_transform(optax.sgd(1.0), freeze_mask=schedule)
  p = jnp.zeros(SHAPE)
  state = tx.init(p)
  assert state.masks[""].shape == stored and state.masks[""].dtype == jnp.int32
  for n in range(6):
    layouts = maskopt.mask_of(state)
    want = np.flatnonzero(~np.broadcast_to(masks[n // 2], SHAPE))
    assert np.array_equal(layouts.index[0]["flat"], want)
    updates, state = jax.jit(tx.update)(jnp.ones(SHAPE), state, p)
    assert np.array_equal(np.flatnonzero(updates), want)


@pytest.mark.parametrize(
  ("mask_shape", "spare"),
  [*((s, 1) for s in [(4, 1, 1), (4, 5, 1), (5, 1), (3,), (1, 5, 3), (4, 5, 3)]),
   ((5, 1), 0), ((4, 5, 3), 0), ((4, 1, 1), 7), ((4, 5, 3), 7)],
)  # fmt: skip
def test_a_mask_that_is_data_is_found_whatever_its_structure(mask_shape, spare):
  """With fewer trainable elements than places, too: the rest points past the end."""
  rng = np.random.default_rng(0)
  first, mask = (rng.permutation(np.prod(mask_shape)).reshape(mask_shape) > 1 for _ in range(2))
  want = np.flatnonzero(~np.broadcast_to(mask, SHAPE))
  count = len(want) + spare
  full = np.arange(60).reshape(SHAPE) >= count  # any mask of that many elements, for `init`
  tx = maskopt.selective_transform(optax.sgd(1.0), freeze_mask=maskopt.runtime(full, count))
  p = jnp.zeros(SHAPE)

  @jax.jit
  def step(state, mask):
    return tx.update(jnp.ones(SHAPE), state, p, freeze_mask=maskopt.runtime(mask, count))

  for m in (first, mask):
    updates, state = step(tx.init(p), m)
  assert np.array_equal(np.flatnonzero(updates), want)
  flat = np.asarray(maskopt.mask_of(state).index[0]["flat"])
  assert np.array_equal(flat[: len(want)], want) and (np.diff(flat) > 0).all()
  assert (flat[len(want) :] >= 60).all()


def test_a_row_mask_costs_its_rows():
  """Given with the step, as data: no search through the leaf."""
  rows, n = 50, 20_000
  tx = maskopt.selective_transform(
    optax.sgd(1.0), freeze_mask=maskopt.runtime((np.arange(rows) > 0)[:, None], n)
  )
  p = jnp.zeros((rows, n))

  def step(state, p, mask):
    updates, state = tx.update(p, state, p, freeze_mask=maskopt.runtime(mask, n))
    return maskopt.apply_updates(p, updates), state

  mask = jnp.asarray((np.arange(rows) > 0)[:, None])
  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(tx.init(p), p, mask).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 64 * n


def _compiled(tx, p):
  def step(p, state, g):
    updates, state = tx.update(g, state, p)
    return maskopt.apply_updates(p, updates), state

  return jax.jit(step, donate_argnums=(0, 1)).lower(p, tx.init(p), p).compile()


def test_a_step_sets_no_memory_aside_to_search_a_mask():
  """The turn's scratch grows with what trains, at 16 bytes an element, and not with the leaf."""
  n, count = 1_000_000, 1000
  masks = {k: np.arange(n) % 1000 != k for k in range(5)}
  schedule = maskopt.unfreeze_schedule(masks, mode="runtime")
  tx = maskopt.selective_transform(optax.adam(0.1), freeze_mask=schedule)
  memory = _compiled(tx, jnp.zeros(n)).memory_analysis()
  assert memory.temp_size_in_bytes < 16 * count + 40_000
  # Every large buffer is updated in place.
  assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1000


SIDE = 2048
# Name -> the masks of two stages over 4M elements.
LARGE = {
  "rows": [(np.arange(SIDE) % 10 != k)[:, None] for k in (1, 2)],
  "scattered": [(np.arange(SIDE**2) % 100 != k).reshape(SIDE, SIDE) for k in (1, 2)],
  "dense": [(np.arange(SIDE) % 10 < k)[:, None] for k in (1, 2)],
}


@pytest.mark.parametrize(
  ("form", "optimizer", "dtype"),
  [
    ("rows", optax.adam(0.1), "float32"),
    ("scattered", optax.adam(0.1), "float32"),
    ("dense", optax.adam(0.1), "float32"),
    ("rows", ADAM, "float32"),
    ("rows", optax.sgd(0.1, momentum=0.9), "float32"),
    ("rows", optax.adam(0.1), "bfloat16"),
  ],
)
def test_a_change_of_the_mask_takes_no_more_memory_than_a_step_or_three_arrays(
  form, optimizer, dtype
):
  """XLA sets its scratch aside at every step: past 32 MB, fresh pages for all of the step."""
  masks, p = LARGE[form], jnp.zeros((SIDE, SIDE), dtype)
  count = None if form == "dense" else int((~np.broadcast_to(masks[0], p.shape)).sum())
  fixed = maskopt.runtime(jnp.asarray(np.broadcast_to(masks[0], p.shape)), count)
  schedule = maskopt.unfreeze_schedule(dict(enumerate(masks)), mode="runtime")
  sizes = [
    _compiled(tx, p).memory_analysis().temp_size_in_bytes
    for tx in (
      maskopt.selective_transform(optimizer, freeze_mask=m, master_dtype=jnp.float32)
      for m in (fixed, schedule)
    )
  ]
  arrays = 3 if jax.__version_info__ < (0, 11) else 4  # later, what a clip scales waits as well
  assert sizes[1] < max(sizes[0], arrays * 4 * (count or 0)) + 500_000


def test_a_schedule_adds_one_array_to_the_state_and_one_for_each_leaf_that_changes():
  fixed = {
    name: {
      k: maskopt.runtime(jnp.asarray(np.broadcast_to(m, P[name][k].shape))) for k, m in v.items()
    }
    for name, v in BLOCKS[0].items()
  }
  schedule = maskopt.unfreeze_schedule(**FORMS["blocks"], mode="runtime")
  states = [
    maskopt.selective_transform(ADAM, freeze_mask=m).init(params()) for m in (fixed, schedule)
  ]
  sizes = [len(jax.tree.leaves(state)) for state in states]
  assert sizes[1] - sizes[0] == 1 + len(jax.tree.leaves(P))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [40_000, 16_384, 7])
def test_moments_of_what_stays_are_carried_through_masks_of_any_size(count, dtype):
  rng = np.random.default_rng(0)
  order = rng.permutation(100_000)
  masks = [~np.isin(np.arange(100_000), order[k : k + count]) for k in (0, count // 3)]
  schedule = maskopt.unfreeze_schedule(dict(enumerate(masks)), mode="runtime")
  tx = maskopt.selective_transform(optax.sgd(1.0, momentum=0.5), freeze_mask=schedule)
  p = jnp.zeros(100_000, dtype)
  grads = [rng.integers(-9, 9, 100_000).astype(np.float32) for _ in range(2)]
  state, step = tx.init(p), jax.jit(tx.update)
  for g in grads:
    updates, state = step(jnp.asarray(g, dtype), state, p)
  momentum = np.where(masks[0], 0, grads[0])
  want = np.where(masks[1], 0, -(grads[1] + 0.5 * momentum))
  assert np.array_equal(np.asarray(updates, np.float32), want)


def test_one_scan_over_the_whole_schedule():
  schedule = maskopt.unfreeze_schedule(**FORMS["blocks"], mode="runtime")
  tx = maskopt.selective_transform(ADAM, freeze_mask=schedule)
  stacked = jax.tree.map(lambda *x: np.stack(x), *GRADS[:10])

  @jax.jit
  def whole(p, state):
    def step(carry, g):
      p, state = carry
      updates, state = tx.update(g, state, p)
      return (maskopt.apply_updates(p, updates), state), None

    return jax.lax.scan(step, (p, state), stacked)[0]

  p, state = whole(params(), tx.init(params()))
  q, *_ = run_runtime(schedule, 10)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), p, q)
  assert int(state.step) == 10


def test_freeze_out_times_and_rates():
  schedule = maskopt.unfreeze_schedule(freeze_out=1000, t0=0.5, layers=list(P))
  ends = [1000 * (0.5 + 0.5 * i / 2) ** 3 for i in range(3)]
  assert schedule.starts == (0, 125, 422)
  assert [schedule.at(n)(P)["layer0"]["bias"] for n in (124, 125)] == [False, True]
  tx = optax.chain(optax.sgd(1.0), schedule.scale_by_cosine())
  p, ones = params(), jax.tree.map(jnp.ones_like, params())
  state = tx.init(p)
  state = (state[0], state[1]._replace(count=jnp.asarray(100, jnp.int32)))
  updates, _ = tx.update(ones, state, p)
  for k, end in enumerate(ends):
    want = -(1 + np.cos(np.pi * 100 / end)) / 2
    np.testing.assert_allclose(updates[f"layer{k}"]["bias"], want, rtol=1e-5)
  p, *_ = run_runtime(
    maskopt.unfreeze_schedule(freeze_out=10, layers=list(P), mode="runtime"),
    3,
    make=lambda m: optax.chain(
      maskopt.selective_transform(optax.sgd(1.0), freeze_mask=m), m.scale_by_cosine()
    ),
  )
  assert moved(P["layer0"]["bias"], p["layer0"]["bias"], np.ones(4, bool)) != []


def test_order_of_the_layers():
  def trained(schedule, n):
    mask = schedule.at(n)(P)
    return [k for k in range(3) if not mask[f"layer{k}"]["bias"]]

  top = maskopt.unfreeze_schedule(top_first=5, layers=P)
  assert [trained(top, n) for n in (0, 4, 5, 10, 99)] == [[2], [2], [1, 2], [0, 1, 2], [0, 1, 2]]
  up = maskopt.unfreeze_schedule(rotate=2, layers=P)
  assert [trained(up, n) for n in range(8)] == [[0], [0], [1], [1], [2], [2], [0], [0]]
  pairs = maskopt.unfreeze_schedule(rotate=1, train=2, always=[-1], order="down", layers=P)
  assert trained(pairs, 0) == [0, 1, 2]
  lisa = maskopt.unfreeze_schedule(rotate=1, always=[0], order="random", layers=P)
  drawn = [tuple(trained(lisa, n)) for n in range(128)]
  assert set(drawn) == {(0, 1), (0, 2)} and 40 < drawn[::2].count((0, 1)) + 16 < 70
  assert drawn == [tuple(trained(copy.deepcopy(lisa), n)) for n in range(128)]


def test_schedules_survive_pickle():
  schedule = pickle.loads(pickle.dumps(maskopt.unfreeze_schedule(**FORMS["random"])))
  assert schedule.changes(2) and "starts=(0, 2, 4, 6, 8, 10, ...)" in repr(schedule)


def test_a_static_schedule_is_the_mask_of_step_0_and_says_so():
  schedule = maskopt.unfreeze_schedule(**FORMS["top_first"])
  message = r"mask of step 0 and never changes\. Give schedule\.at\(step\)"
  with pytest.warns(UserWarning, match=message):
    state = maskopt.selective_transform(ADAM, freeze_mask=schedule).init(params())
  assert maskopt.mask_of(state).freeze_mask["layer0"] == {"kernel": True, "bias": True}


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({}, "expected one of masks, top_first, freeze_out, rotate, got none"),
    ({"top_first": 2, "rotate": 3}, "expected one of .* got top_first, rotate"),
    ({"top_first": 0, "layers": P}, "expected top_first= of at least 1 step, got 0"),
    ({"top_first": 2}, "expected layers=, the parameters or the names of the layers, got NoneType"),
    ({"top_first": 2, "layers": {"a": P["layer0"], "b": P["layer1"]}}, "bare tree without numbers"),
    ({"rotate": 2, "layers": P, "train": 4}, "expected train= from 1 to 3"),
    ({"rotate": 2, "layers": P, "always": [3]}, r"expected numbers of the 3 layers .* got \[3\]"),
    ({"rotate": 2, "layers": P, "order": "left"}, "expected order="),
    ({"freeze_out": 10, "layers": P, "t0": 0.0}, "expected t0 between 0 and 1, got 0.0"),
    ({"masks": {5: True}}, r"expected steps that ascend from 0, got \[5\]"),
    ({"masks": [(0, True), (0, False)]}, r"expected steps that ascend from 0, got \[0, 0\]"),
    ({"masks": {0.5: True}}, "expected int steps, got 0.5"),
    ({"masks": [True]}, "expected steps and masks, got list"),
    ({"masks": lambda step: True}, "expected boundaries and masks in static mode, got a function"),
    ({"masks": {0: True}, "mode": "lazy"}, 'expected mode="static" or "runtime", got'),
  ],
)
def test_wrong_schedules_are_refused(kwargs, message):
  with pytest.raises((ValueError, TypeError), match=message):
    maskopt.unfreeze_schedule(**kwargs)


def test_layers_that_are_not_there_are_named():
  schedule = maskopt.unfreeze_schedule(top_first=2, layers=["layer0", "layer1", "neck"])
  with pytest.raises(
    ValueError, match="at layer2/bias, expected one of the layers .*; at neck, exp"
  ):
    schedule.at(0)(P)
  runtime = {name: {"kernel": maskopt.runtime(np.ones(4, bool)), "bias": True} for name in P}
  schedule = maskopt.unfreeze_schedule({0: runtime, 1: False}, mode="runtime")
  with pytest.raises(ValueError, match="at layer0/kernel, expected bools or NumPy arrays in every"):
    maskopt.selective_transform(ADAM, freeze_mask=schedule).init(params())
  with pytest.raises(ValueError, match="expected a schedule with freeze_out="):
    schedule.scale_by_cosine()
