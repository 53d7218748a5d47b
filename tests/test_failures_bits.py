"""Failures of today's tools in the bits of frozen elements, and where an optimizer sees leaves.

Each is shown as it happens on XLA:CPU, beside ours.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from optax import contrib

import maskopt


@pytest.fixture(autouse=True)
def _promotion():
  """Optax's Adam itself needs promotion."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def ours(inner, mask, **kwargs):
  return maskopt.selective_transform(inner, freeze_mask=mask, **kwargs)


# Bits.

# What each way of not changing an element changes all the same. An update of zero is +0.0 or -0.0.
_SUBNORMAL, _NAN = {"subnormal"}, {"quiet NaN", "signalling NaN"}
_MOVED_NAN = _NAN if jax.__version_info__ < (0, 11) else set()  # later, where nothing is computed
REWRITTEN = {
  ("p + 0.0", "float32"): {"-0.0", "signalling NaN"} | _SUBNORMAL,
  ("p + -0.0", "float32"): {"signalling NaN"} | _SUBNORMAL,
  ("where(frozen, p, p + u)", "float32"): set(),
  ("p.at[trainable].add(u)", "float32"): set(),
  ("p + 0.0", "bfloat16"): {"-0.0"} | _SUBNORMAL | _NAN,
  ("p + -0.0", "bfloat16"): _SUBNORMAL | _NAN,
  ("where(frozen, p, p + u)", "bfloat16"): _MOVED_NAN,
  ("p.at[trainable].add(u)", "bfloat16"): _MOVED_NAN,
}
_METHODS = {
  "p + 0.0": lambda p, u, frozen: p + jnp.where(frozen, jnp.zeros_like(u), u),
  "p + -0.0": lambda p, u, frozen: p + jnp.where(frozen, -jnp.zeros_like(u), u),
  "where(frozen, p, p + u)": lambda p, u, frozen: jnp.where(frozen, p, p + u),
  "p.at[trainable].add(u)": lambda p, u, frozen: p.at[-2:].add(u[-2:]),
}
_KINDS = np.array(
  ["-0.0", *3 * ["subnormal"], *2 * ["infinity"], *3 * ["quiet NaN"], *3 * ["signalling NaN"]]
  + [*2 * ["largest"], "0.0", *2 * ["trainable"]]
)


def _special(dtype):
  values = reference.special(reference.REAL[dtype])
  return np.concatenate([values, np.ones(2, values.dtype)]), _KINDS != "trainable"


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(("method", "dtype"), REWRITTEN)
def test_arithmetic_rewrites_the_bits_of_frozen_elements(method, dtype, jit):
  p, frozen = _special(dtype)
  u = jnp.full(p.shape, 0.5, p.dtype)

  def theirs(p, u):
    return _METHODS[method](p, u, jnp.asarray(frozen))

  after = (jax.jit(theirs) if jit else theirs)(jnp.asarray(p), u)
  moved = {str(_KINDS[i]) for (i,) in reference.moved(p, after, frozen)}
  assert moved == REWRITTEN[method, dtype]
  assert (np.asarray(after)[~frozen] == 1.5).all()
  for zero in (0.0, -0.0):
    updates = jnp.where(frozen, jnp.asarray(zero, u.dtype), u)
    apply = jax.jit(maskopt.apply_updates) if jit else maskopt.apply_updates
    after = apply(jnp.asarray(p), updates)
    assert reference.moved(p, after, frozen) == []
    assert (np.asarray(after)[~frozen] == 1.5).all()


def test_equality_cannot_see_it():
  """`==` finds -0.0 and 0.0 equal, and every NaN unequal to itself; a view of the bits does not."""
  p, _ = _special("float32")
  after = np.asarray(jnp.asarray(p[:1]) + 0.0)
  assert after == p[:1] and reference.moved(p[:1], after, True) == [[0]]
  assert p[6] != p[6] and reference.moved(p[6:7], p[6:7].copy(), True) == []


def test_masking_by_a_product_makes_nan_of_inf():
  p = jnp.array([jnp.inf, 1.0])
  mask = np.array([True, False])
  assert np.isnan((p * jnp.asarray(~mask, p.dtype))[0])
  tx = ours(optax.sgd(0.5), {"w": mask})
  updates, _ = tx.update({"w": jnp.full(2, jnp.inf)}, tx.init({"w": p}), {"w": p})
  after = maskopt.apply_updates({"w": p}, updates)
  assert after["w"][0] == jnp.inf
  assert not np.isnan(maskopt.pack({"w": p}, {"w": mask})["w"].values).any()


def test_restoring_by_a_difference_is_not_restoring():
  """p + (q - p) is not q for 99.5% of pairs, so nothing here undoes a step by its difference."""
  rng = np.random.default_rng(0)
  p, q = (jnp.asarray(scale * rng.normal(size=1000), jnp.float32) for scale in (1, 1e-3))
  assert (np.asarray(p + (q - p)) != np.asarray(q)).mean() > 0.99
  mask = rng.random(1000) < 0.5
  after = maskopt.unpack(maskopt.pack(q, mask), p, mask)
  assert reference.same_bits(after, np.where(mask, p, q))


def test_schedule_free_outside_drifts():
  """Averages of parameters outside the freezing round frozen elements; inside they do not."""
  rng = np.random.default_rng(0)
  params = {"w": jnp.asarray(rng.normal(size=1000), jnp.float32)}
  frozen = np.arange(1000) < 990
  grads = {"w": jnp.asarray(rng.normal(size=1000), jnp.float32)}

  def train(tx):
    def step(carry, _):
      params, state = carry
      updates, state = tx.update(grads, state, params)
      return (maskopt.apply_updates(params, updates), state), None

    return jax.jit(lambda c: jax.lax.scan(step, c, length=50)[0])((params, tx.init(params)))[0]

  outside = contrib.schedule_free(ours(optax.sgd(0.1), {"w": frozen}, prefer="memory"), 0.1)
  assert len(reference.moved(params["w"], train(outside)["w"], frozen)) > 100
  inside = ours(contrib.schedule_free(optax.sgd(0.1), 0.1), {"w": frozen}, prefer="memory")
  after = train(inside)["w"]
  assert reference.moved(params["w"], after, frozen) == []
  assert (np.asarray(after) != np.asarray(params["w"]))[~frozen].all()


def test_an_average_outside_drifts():
  """An average of parameters rounds what never moves; over packed values it has none of it."""
  rng = np.random.default_rng(0)
  params = {"w": jnp.asarray(rng.normal(size=1000), jnp.float32)}
  mask = {"w": np.arange(1000) < 990}

  def averaged(tree):
    average = tree
    for _ in range(50):
      average = optax.incremental_update(tree, average, 0.001)
    return average

  assert len(reference.moved(params["w"], averaged(params)["w"], mask["w"])) > 100
  packed = averaged(maskopt.pack(params, mask))
  assert packed["w"].values.shape == (10,)
  after = maskopt.unpack(packed, params, mask)
  assert reference.moved(params["w"], after["w"], mask["w"]) == []


# Leaf-coupled optimizers.

# Gradients zeroed at frozen elements first: exact for these, wrong by the given share for those.
ZEROED = {
  "sgd": (lambda: optax.sgd(0.1), 0),
  "adam": (lambda: optax.adam(0.1), 0),
  "adamw": (lambda: optax.adamw(0.1), 0),
  "lion": (lambda: optax.lion(0.1), 0),
  "rmsprop": (lambda: optax.rmsprop(0.1), 0),
  "adagrad": (lambda: optax.adagrad(0.1), 0),
  "sm3": (lambda: optax.sm3(0.1), 0),
  "novograd": (lambda: optax.novograd(0.1), 0),
  "global norm": (lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)), 0),
  "lamb": (lambda: optax.lamb(0.1), 0.5),
  "lars": (lambda: optax.lars(0.1), 0.5),
  "fromage": (lambda: optax.fromage(0.1), 0.5),
  "adafactor": (lambda: optax.adafactor(0.1, min_dim_size_to_factor=2), 0.01),
  "muon": (lambda: contrib.muon(0.1), 0.2),
  "adaptive_grad_clip": (lambda: optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)), 0.5),
  "block rms": (lambda: optax.chain(optax.clip_by_block_rms(0.5), optax.sgd(0.1)), 0.5),
}


def _moved(tx, params, grads):
  @jax.jit
  def step(params, state, g):
    updates, state = tx.update(g, state, params)
    return maskopt.apply_updates(params, updates), state

  state, start = tx.init(params), params
  for g in grads:
    params, state = step(params, state, g)
  return np.asarray(params["w"]) - np.asarray(start["w"])


@pytest.mark.parametrize("name", ZEROED)
def test_zeroing_gradients_is_not_training_alone(name):
  """The trainable rows by themselves are the oracle, for Optax with zeros and for a Block."""
  make, wrong = ZEROED[name]
  rng = np.random.default_rng(0)
  tree = [{"w": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)} for _ in range(4)]
  rows = np.isin(np.arange(8), [1, 4, 6])
  params, *grads = tree
  sub, *sub_grads = [{"w": x["w"][rows]} for x in tree]
  with jax.numpy_rank_promotion("allow"):  # Optax's muon
    want = _moved(make(), sub, sub_grads)

    def error(tx):
      return np.linalg.norm(_moved(tx, params, grads)[rows] - want) / np.linalg.norm(want)

    zero = optax.stateless(lambda g, _: {"w": jnp.where(rows[:, None], g["w"], 0)})
    zeroed = error(optax.chain(zero, make()))
    assert zeroed > wrong if wrong else zeroed < 1e-5
    assert error(ours(make(), {"w": ~rows[:, None]}, prefer="memory")) < 1e-5


def test_scattered_elements_as_a_vector_cost_adafactor_its_factors():
  """Why a warning names the leaf: factored moments of 512 KiB become a whole one of 26 MB."""
  rng = np.random.default_rng(0)
  params = {"w": jnp.zeros((256, 256))}
  mask = {"w": rng.random((256, 256)) < 0.8}
  inner = optax.adafactor(0.1)

  def size(tx):
    return sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))

  with pytest.warns(UserWarning, match=r"at w, the optimizer depends on the shape of a leaf"):
    scattered = size(ours(inner, mask, prefer="memory"))
  rows = size(ours(inner, {"w": rng.random((256, 1)) < 0.4}, prefer="memory"))
  assert size(inner) < 3_000 and rows < 3_000 < 50_000 < scattered
