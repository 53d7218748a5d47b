"""Frozen means bit for bit: special values, every float dtype, every layout, every way there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from pairs import every_pair

import maskopt

DTYPES = {**reference.REAL, "complex64": np.complex64}
SHAPE = (16, 12)
_RNG = np.random.default_rng(0)


def _mask(*trains):
  mask = np.ones(SHAPE, bool)
  mask[trains] = False
  return mask


_FEW, _MANY = _RNG.random(SHAPE) < 0.6, _RNG.random(SHAPE) < 0.2
# name: frozen elements, the mask as it is given, prefer
LAYOUTS = {
  "Frozen": (_mask(np.zeros(SHAPE, bool)), True, "time"),
  "Slice": (_mask(slice(4, 9), slice(2, 7)), _mask(slice(4, 9), slice(2, 7)), "memory"),
  "rows": (_mask([0, 5, 6]), _mask([0, 5, 6])[:, :1], "memory"),
  "columns": (_mask(slice(None), [0, 4]), _mask(slice(None), [0, 4])[0], "memory"),
  "Elements": (_FEW, _FEW, "memory"),
  "Dense": (_MANY, _MANY, "time"),
  "runtime": (_FEW, maskopt.runtime(_FEW), "time"),
  "runtime_count": (_FEW, maskopt.runtime(_FEW, int((~_FEW).sum())), "time"),
}


def setting(dtype, layout):
  """Parameters with special frozen bits, gradients that are NaN and Inf there, and the mask."""
  frozen, mask, prefer = LAYOUTS[layout]
  rng = np.random.default_rng(1)
  params = {"w": reference.with_specials(rng, SHAPE, DTYPES[dtype], frozen)}
  grads = {"w": reference.normal(rng, SHAPE, DTYPES[dtype])}
  rubbish = np.array([np.nan, np.inf, -np.inf, -3.0]).astype(DTYPES[dtype])
  grads["w"][frozen] = np.resize(rubbish, int(frozen.sum()))
  return params, grads, frozen, {"w": mask}, prefer


@pytest.fixture(params=DTYPES)
def dtype(request):
  with jax.enable_x64(request.param == "float64"), jax.numpy_dtype_promotion("standard"):
    yield request.param


def in_place(tx, params, grads):
  """Update and apply in one jit that owns the parameters."""

  def step(p, s, g):
    u, s = tx.update(g, s, p)
    return maskopt.apply_updates(p, u), s

  # A copy: donation would take the caller's buffer.
  p, s = jax.tree.map(jnp.array, params), tx.init(params)
  step = jax.jit(step, donate_argnums=(0, 1))
  for _ in range(3):
    p, s = step(p, s, grads)
  return p


def two_jits(tx, params, grads):
  """Update and apply in different jits: nobody remembers what was packed."""
  update, apply = jax.jit(tx.update), jax.jit(maskopt.apply_updates)
  p, s = params, tx.init(params)
  for _ in range(3):
    u, s = update(grads, s, p)
    p = apply(p, u)
  return p


def eager(tx, params, grads):
  p, s = params, tx.init(params)
  for _ in range(3):
    u, s = tx.update(grads, s, p)
    p = maskopt.apply_updates(p, u)
  return p


def nested(tx, params, grads):
  """Update in a jit within the jit."""
  update = jax.jit(tx.update)

  @jax.jit
  def step(p, s, g):
    u, s = update(g, s, p)
    return maskopt.apply_updates(p, u), s

  return step(params, tx.init(params), grads)[0]


def scanned(tx, params, grads):
  def step(carry, _):
    p, s = carry
    u, s = tx.update(grads, s, p)
    return (maskopt.apply_updates(p, u), s), None

  return jax.jit(lambda c: jax.lax.scan(step, c, length=3)[0])((params, tx.init(params)))[0]


def packed(tx, params, grads):
  """Packed gradients, and Optax's own apply_updates."""

  @jax.jit
  def step(p, s, g):
    u, s = tx.update(maskopt.pack(g, maskopt.mask_of(s)), s, p)
    return optax.apply_updates(p, u), s

  return step(params, tx.init(params), grads)[0]


FEW_WAYS = in_place, two_jits, eager
WAYS = *FEW_WAYS, nested, scanned, packed


@every_pair(dtype=DTYPES, layout=LAYOUTS, way=WAYS, indirect=["dtype"])
def test_frozen_bits_stay(dtype, layout, way):
  params, grads, frozen, mask, prefer = setting(dtype, layout)
  inner = optax.sgd(0.1, momentum=0.9)
  tx = maskopt.selective_transform(inner, freeze_mask=mask, prefer=prefer)
  after = way(tx, jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, grads))
  assert reference.moved(params["w"], after["w"], frozen) == []
  trained = np.asarray(after["w"])[~frozen]
  assert np.isfinite(trained).all() and (trained != params["w"][~frozen]).all()


def _outside(name, tx):
  return {
    "scale": lambda: optax.chain(tx, optax.scale(0.5)),
    "MultiSteps": lambda: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(tx, 1),
    "trace": lambda: optax.chain(tx, optax.trace(0.9)),
    "multiplier": lambda: optax.chain(tx, maskopt.masked_freeze(False)),
  }[name]()


@pytest.mark.parametrize("layout", ["Frozen", "rows", "Elements", "Dense"])
@pytest.mark.parametrize("name", ["scale", "MultiSteps", "apply_if_finite", "trace", "multiplier"])
def test_frozen_bits_stay_below_a_wrapper(name, layout):
  for dtype in ("bfloat16", "float32"):
    params, grads, frozen, mask, prefer = setting(dtype, layout)
    if name in ("MultiSteps", "apply_if_finite"):  # these add up and judge the raw gradients
      grads["w"][frozen] = 1.0
    tx = maskopt.selective_transform(optax.sgd(0.1), freeze_mask=mask, prefer=prefer)
    outer = _outside(name, tx)
    with jax.numpy_dtype_promotion("standard"):
      after = in_place(outer, *(jax.tree.map(jnp.asarray, x) for x in (params, grads)))
    assert reference.moved(params["w"], after["w"], frozen) == []
    assert (np.asarray(after["w"])[~frozen] != params["w"][~frozen]).all()


@every_pair(dtype=DTYPES, layout=LAYOUTS, way=FEW_WAYS, indirect=["dtype"])
def test_masked_freeze_keeps_bits(dtype, layout, way):
  params, grads, frozen, mask, _ = setting(dtype, layout)
  tx = optax.chain(optax.sgd(0.1, momentum=0.9), maskopt.masked_freeze(mask))
  after = way(tx, *(jax.tree.map(jnp.asarray, x) for x in (params, grads)))
  assert reference.moved(params["w"], after["w"], frozen) == []
  assert np.isfinite(np.asarray(after["w"])[~frozen]).all()


@every_pair(narrow=["float16", "bfloat16"], layout=LAYOUTS, way=FEW_WAYS)
def test_masters_keep_frozen_bits(narrow, layout, way):
  with jax.numpy_dtype_promotion("standard"):
    _check_masters(narrow, layout, way)


def _check_masters(narrow, layout, way):
  params, grads, frozen, mask, prefer = setting(narrow, layout)
  tx = maskopt.selective_transform(
    optax.adamw(0.1), freeze_mask=mask, prefer=prefer, master_dtype=jnp.float32
  )
  after = way(tx, *(jax.tree.map(jnp.asarray, x) for x in (params, grads)))
  assert reference.moved(params["w"], after["w"], frozen) == []
  assert np.isfinite(np.asarray(after["w"])[~frozen].astype(np.float32)).all()


@every_pair(dtype=DTYPES, layout=LAYOUTS, jit=[False, True], indirect=["dtype"])
def test_optax_apply_updates_is_exact_for_normal_values(dtype, layout, jit):
  _, grads, frozen, mask, prefer = setting(dtype, layout)
  params = {"w": reference.normal(np.random.default_rng(2), SHAPE, DTYPES[dtype])}
  params["w"][frozen & (np.arange(12) % 3 == 0)] = -0.0
  params["w"][frozen & (np.arange(12) % 3 == 1)] = np.inf
  tx = maskopt.selective_transform(optax.adamw(0.1), freeze_mask=mask, prefer=prefer)

  def step(p, s, g):
    u, s = tx.update(g, s, p)
    return optax.apply_updates(p, u), s

  step = jax.jit(step) if jit else step
  p, s, g = (jax.tree.map(jnp.asarray, x) for x in (params, tx.init(params), grads))
  for _ in range(3):
    p, s = step(p, s, g)
  assert reference.moved(params["w"], p["w"], frozen) == []


def test_optax_apply_updates_flushes_subnormals_on_cpu():
  """The exception that `apply_updates` documents: Optax adds, and XLA:CPU flushes subnormals."""
  params = {"w": jnp.asarray(np.array([1, 1], np.uint32).view(np.float32))}
  tx = maskopt.selective_transform(optax.sgd(0.1), freeze_mask=True)
  updates, _ = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
  assert reference.moved(params["w"], maskopt.apply_updates(params, updates)["w"], True) == []
  assert np.asarray(optax.apply_updates(params, updates)["w"]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", DTYPES)
def test_zero_updates_keep_every_bit(name):
  """`apply_updates` by itself, with +0.0 and -0.0, whoever made the updates."""
  values = reference.special(DTYPES[name])
  with jax.enable_x64(name == "float64"):
    params = jnp.asarray(values)
    for zero in (0.0, -0.0):
      for apply in (maskopt.apply_updates, jax.jit(maskopt.apply_updates)):
        after = apply(params, jnp.full(values.shape, zero, DTYPES[name]))
        assert reference.moved(values, after, True) == []


def test_wider_updates_are_added_in_the_wide_dtype():
  rng = np.random.default_rng(0)
  params = jnp.asarray(reference.normal(rng, 512, reference.REAL["bfloat16"]))
  updates = jnp.asarray(rng.normal(size=512) * 0.01, jnp.float32)
  with jax.numpy_dtype_promotion("standard"):
    expected = optax.apply_updates(params, updates)
  assert reference.same_bits(maskopt.apply_updates(params, updates), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stop_gradient_returns_the_same_bits(dtype, layout):
  params, _, frozen, mask, _ = setting(dtype, layout)
  params = jax.tree.map(jnp.asarray, params)
  for call in (lambda f: f, jax.jit):
    assert reference.same_bits(call(lambda p: maskopt.stop_gradient(p, mask))(params), params)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pack_and_unpack_move_bits(dtype, layout):
  params, other, frozen, mask, _ = setting(dtype, layout)
  values = maskopt.pack(jax.tree.map(jnp.asarray, params), mask)
  base = jax.tree.map(jnp.asarray, other)
  after = maskopt.unpack(values, base, mask)
  assert reference.moved(other["w"], after["w"], frozen) == []
  assert reference.moved(params["w"], after["w"], ~frozen) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unpack_gives_the_dtypes_of_the_base(layout):
  frozen, mask, _ = LAYOUTS[layout]
  params = {"w": reference.normal(np.random.default_rng(1), SHAPE, np.float32)}
  base = {"w": jnp.ones(SHAPE, jnp.float16)}
  values = maskopt.pack(jax.tree.map(jnp.asarray, params), {"w": mask})
  after = maskopt.unpack(values, base, {"w": mask})["w"]
  want = np.where(frozen, np.float16(1), params["w"].astype(np.float16))
  assert reference.same_bits(after, want)
  whole = maskopt.unpack({"w": jnp.ones(SHAPE)}, base, False)["w"]
  assert whole.dtype == jnp.float16


# Trainable elements whose update is zero.


@pytest.mark.parametrize("kind", ["Elements", "columns"])
def test_zero_updates_of_many_elements_keep_every_bit(kind):
  """From a million elements on they are added by one scatter, which must leave these out."""
  special = reference.special(np.float32)
  shape = (2**20 + 2**10, 2)
  mask = np.zeros(shape, bool)
  mask[:, 1] = True
  if kind == "Elements":
    mask[0] = False, False
    mask[5:, 0] ^= np.arange(shape[0] - 5) % 2**12 == 0
  w = np.ones(shape, np.float32)
  w[~mask] = np.resize(special, (~mask).sum())
  steps = (np.arange(w.size) % 31 == 0).reshape(shape)  # coprime to the special values
  tx = maskopt.selective_transform(optax.sgd(1.0), freeze_mask=mask, prefer="memory")
  state = tx.init(jnp.asarray(w))
  (layout,) = [layout for _, layout in maskopt.mask_of(state).items()]
  assert layout.kind == {"Elements": "Elements", "columns": "Block"}[kind]
  assert layout.count >= 2**20

  @jax.jit
  def step(p, s, g):
    return maskopt.apply_updates(p, tx.update(g, s, p)[0])

  after = step(jnp.asarray(w), state, jnp.asarray(steps, jnp.float32))
  assert reference.moved(w, after, mask | ~steps) == []
  moved = (steps & ~mask) & np.isfinite(w) & (np.abs(w) < 1e30)
  assert (np.asarray(after)[moved] == np.where(np.abs(w[moved]) < 1, -1, w[moved] - 1)).all()


@pytest.mark.parametrize("apply", [maskopt.apply_updates, optax.apply_updates])
@pytest.mark.parametrize("narrow", ["float16", "bfloat16"])
def test_zero_updates_of_masters_keep_bits(narrow, apply):
  """A master moves as a parameter does: by zero, not at all."""
  special = reference.special(reference.REAL[narrow])
  wide = special.astype(np.float32)  # an infinity has no difference to itself
  special = special[np.isfinite(wide) & (apply is maskopt.apply_updates or np.abs(wide) > 1)]
  p = jnp.asarray(np.concatenate([special, np.ones(2, special.dtype)]))
  mask = np.arange(p.size) == p.size - 1
  with jax.numpy_dtype_promotion("standard"):
    tx = maskopt.selective_transform(
      optax.sgd(1.0), freeze_mask=mask, prefer="memory", master_dtype=jnp.float32
    )
    for call in (lambda f: f, jax.jit):
      state, after = tx.init(p), p
      for _ in range(2):
        updates, state = call(tx.update)(jnp.zeros_like(p), state, after)
        after = apply(after, updates)
      assert reference.moved(p, after, True) == []

      @call
      def step(p, s):
        updates, s = tx.update(jnp.zeros_like(p), s, p)
        return apply(p, updates), s

      assert reference.moved(p, step(p, tx.init(p))[0], True) == []
