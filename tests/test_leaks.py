"""What stays behind: no tracer after a trace, no array after a step, whichever way either ends."""

import contextlib
import copy
import gc
import pickle
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx

import maskopt
from maskopt import _provenance

SHAPE = (16, 12)
_RNG = np.random.default_rng(0)
_FEW, _MANY = _RNG.random(SHAPE) < 0.6, _RNG.random(SHAPE) < 0.2
ROWS = np.arange(16)[:, None] % 3 > 0
MASKS = {
  "Frozen": True,
  "Full": False,
  "Slice": np.arange(16)[:, None] >= 4,
  "rows": ROWS,
  "Elements": _FEW,
  "Dense": _MANY,
  "runtime": maskopt.runtime(_FEW),
  "runtime_count": maskopt.runtime(_FEW, int((~_FEW).sum())),
}


@pytest.fixture(autouse=True, scope="module")
def _what_was_there_before():
  """Is much, compiled and imported, and not searched for garbage and referrers in every test."""
  gc.collect()
  gc.freeze()
  yield
  gc.unfreeze()


@pytest.fixture(autouse=True)
def _promotion():
  """Optax's Adam itself needs promotion."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def params(dtype=jnp.float32):
  return {"w": jnp.ones(SHAPE, dtype), "v": jnp.ones(5, dtype)}


def loss(p):
  return (p["w"] ** 2).sum() + p["v"].sum()


def selective(mask, **kwargs):
  return maskopt.selective_transform(
    optax.adam(0.1), freeze_mask={"w": mask, "v": False}, **{"prefer": "memory"} | kwargs
  )


def plain(tx, p, s):
  u, s = tx.update(jax.grad(loss)(p), s, p)
  return maskopt.apply_updates(p, u), s


def sliced(tx, p, s):
  g = maskopt.grad(loss, maskopt.mask_of(s))(p)
  u, s = tx.update(g, s, p)
  return maskopt.apply_updates(p, u), s


def packed(tx, p, s):
  g = maskopt.grad(loss, maskopt.mask_of(s), packed=True)(p)
  u, s = tx.update(g, s, p)
  return optax.apply_updates(p, u), s


def nested(tx, p, s):
  u, s = jax.jit(tx.update)(p, s, p)
  return maskopt.apply_updates(p, u), s


def scanned(tx, p, s):
  return jax.lax.scan(lambda c, _: (plain(tx, *c), None), (p, s), length=3)[0]


def mapped(tx, p, s):
  def member(p):
    return plain(tx, p, s)[0]

  return jax.tree.map(lambda x: x[0], jax.vmap(member)(jax.tree.map(lambda x: x[None], p))), s


def differentiated(tx, p, s):
  return jax.grad(lambda q: loss(plain(tx, q, s)[0]))(p), s


def thrown_away(tx, p, s):
  """Updates made in the trace, kept by nobody."""
  tx.update(p, s, p)
  return p, s


WAYS = (plain, sliced, packed, nested, scanned, mapped, differentiated, thrown_away)


# Every mask one way, every way with a packed and a dense mask.
CASES = [(mask, plain) for mask in MASKS]
CASES += [(mask, way) for mask in ("Elements", "runtime") for way in WAYS[1:]]


def notes():
  """What the module-level memories hold."""
  return [*_provenance.made_of._notes.values(), *_provenance.unmasked._notes.values()]


@contextlib.contextmanager
def nothing_stays():
  """Fail if a tracer made inside is still referred to, or a note of an array made inside."""
  before = notes()
  with jax.checking_leaks():
    yield
  assert [n for n in notes() if all(n is not old for old in before)] == []


@pytest.mark.parametrize(("mask", "way"), CASES)
def test_no_tracer_outlives_its_trace(mask, way):
  tx, p = selective(MASKS[mask]), params()
  s = tx.init(p)
  with nothing_stays():
    jax.eval_shape(lambda p, s: way(tx, p, s), p, s)


@pytest.mark.parametrize(
  "make", ["masters", "next mask", "masked_freeze", "multiplier", "partition"]
)
def test_no_tracer_outlives_the_trace_of_the_other_transforms(make):
  rows = {"w": ROWS, "v": False}
  p, extra = params(jnp.bfloat16 if make == "masters" else jnp.float32), {}
  if make == "masters":
    tx = selective(ROWS, master_dtype=jnp.float32)
  elif make == "next mask":
    tx = selective(MASKS["runtime_count"])
    extra = {"freeze_mask": {"w": MASKS["runtime_count"], "v": False}}
  elif make == "partition":
    labels = {"w": np.where(ROWS, "a", "b"), "v": "a"}
    tx = maskopt.partition({"a": optax.adam(0.1), "b": optax.sgd(0.1)}, labels)
  else:
    multiplied = maskopt.scale_by_multiplier({"w": np.where(ROWS, 0.0, 0.5), "v": 1.0})
    outer = maskopt.masked_freeze(rows) if make == "masked_freeze" else multiplied
    tx = optax.chain(selective(_FEW), outer)

  def step(p, s):
    u, s = tx.update(p, s, p, **extra)
    return maskopt.apply_updates(p, u), s

  s = tx.init(p)
  with nothing_stays():
    jax.eval_shape(step, p, s)


def test_no_tracer_outlives_a_trace_that_fails():
  tx, p = selective(_FEW), params()
  s, seen, before = tx.init(p), [], len(notes())

  def step(p, s):
    u, _ = tx.update(p, s, p)
    seen.extend(map(weakref.ref, jax.tree.leaves((p, s, u))))
    assert len(notes()) == before + 1  # in the middle there is something to forget
    raise ZeroDivisionError("in the middle")

  for _ in range(2):
    with pytest.raises(ZeroDivisionError, match="in the middle"):
      jax.jit(step)(p, s)
  gc.collect()
  assert [r() for r in seen if r() is not None] == [] and len(notes()) == before


def test_a_tracer_that_is_kept_is_seen():
  """That the checks above can fail: a tracer kept by the user, an array kept with its note."""
  kept, tx, p = [], selective(_FEW), params()
  with pytest.raises(Exception, match="Leaked"), nothing_stays():
    jax.eval_shape(lambda p: kept.append(p) or p, jnp.ones(3))
  with pytest.raises(AssertionError), nothing_stays():
    kept.append(tx.update(p, tx.init(p), p)[0])


def refs(tree):
  return [weakref.ref(x) for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]


def alive(references):
  return [r().shape for r in references if r() is not None]


# Eager steps leave the arrays between grad, update and apply_updates to us.
@pytest.mark.parametrize(
  ("mask", "way", "jit"),
  [
    *((mask, plain, jit) for mask in MASKS for jit in (False, True)),
    *((mask, way, False) for mask in ("Elements", "rows") for way in (sliced, packed, nested)),
  ],
)
def test_arrays_are_freed_with_their_last_user(mask, way, jit):
  """Reference counts alone: nothing waits for the garbage collector."""
  tx, p = selective(MASKS[mask]), params()
  s = tx.init(p)
  step = jax.jit(lambda p, s: way(tx, p, s)) if jit else lambda p, s: way(tx, p, s)
  step(p, s)  # constants of the trace
  gc.collect()
  gc.disable()
  noted = len(notes())
  try:
    before = {id(r()): r for r in refs((p, s))}
    p, s = step(p, s)
    after = refs((p, s))
    kept = {id(r()) for r in after}  # a mask, and a frozen parameter, may be the same arrays still
    assert alive(r for i, r in before.items() if i not in kept) == []
    del p, s
    assert alive(after) == []
    assert len(notes()) == noted
  finally:
    gc.enable()


def test_a_note_is_of_the_very_array():
  """Not of one that has the address of another."""
  memory, x, other = _provenance.Memory(), jnp.ones(3), jnp.ones(3)
  memory.remember(other, "other")
  memory._notes[id(x)] = memory._notes[id(other)]  # as if x had come to stand where other stood
  assert memory.recall(x) is None and memory.recall(other) == "other"


@pytest.mark.parametrize("mask", sorted(set(MASKS) - {"Frozen", "Full"}))
def test_an_update_keeps_its_values_and_no_parameter(mask):
  tx, p = selective(MASKS[mask]), params()
  s, g, noted = tx.init(p), jax.tree.map(jnp.copy, p), len(notes())
  u, s = tx.update(g, s, p)
  gone = refs((p, g, s.inner_state))
  assert len(notes()) == noted + 1
  del p, g, s
  assert alive(gone) == []
  p = maskopt.apply_updates(params(), u)  # and it still works
  assert len(reference.moved(params()["w"], p["w"], True)) > 0
  del u
  assert len(notes()) == noted


def test_a_transform_keeps_no_parameter():
  """Neither one given a function of the parameters, nor one that saw foreign states."""

  def of(p):
    return jax.tree.map(lambda x: np.arange(x.size).reshape(x.shape) % 2 == 0, p)

  for mask in (of, {"w": ROWS, "v": True}):
    tx = maskopt.selective_transform(optax.adam(0.1), freeze_mask=mask)
    p = params()
    s = maskopt.selective_transform(optax.adam(0.1), freeze_mask=mask).init(p)
    tx.init(p)
    tx.update(p, s, p)
    gone = refs((p, s))
    del p, s
    gc.collect()
    assert alive(gone) == []


def test_steps_leave_no_arrays_behind():
  tx, p = selective(_FEW), params()
  s, counts = tx.init(p), []
  for _ in range(4):
    p, s = sliced(tx, p, s)
    counts.append((len(jax.live_arrays()), len(notes())))
  assert len(set(counts)) == 1


def test_a_mask_that_a_module_carries_is_unpacked_once_and_goes_with_it():
  carried = np.random.default_rng(1).random((64, 32)) < 0.5
  layer = maskopt.nnx.MaskedLinear(64, 32, kernel_freeze_mask=carried, rngs=nnx.Rngs(0))
  nnx.grad(lambda m: m(jnp.ones((1, 64))).sum())(layer)
  mask = layer.kernel_freeze_mask
  array = maskopt.nnx.freeze_mask(layer)["kernel"]
  np.testing.assert_array_equal(array, carried)
  assert mask.array is array and not array.flags.writeable
  copies = pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask)
  assert all(c == mask and hash(c) == hash(mask) and "array" not in vars(c) for c in copies)
  gone = weakref.ref(array.base if array.base is not None else array)
  del array
  assert gone() is not None
  del layer, mask, copies
  gc.collect()
  assert gone() is None
