"""The contract, over every optimizer of Optax: frozen bits stay, trainable values train alone.

After 20 steps the frozen elements have the bits they started with, and the trainable ones are those
of the inner optimizer on the sub-problem, run by plain Optax. By default each optimizer runs once,
in cases that cover every pair of dtype, mask and mode; `pytest -m slow` runs the full product, with
all masks in one tree: what an optimizer couples it couples in the sub-problem too, so a leaf of
every kind beside the others is compared as it would be alone, and one program serves nine cells.
"""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import reference
from optimizers import ABSENT, SEES_RANK, SEES_SIZE, SLOW_EAGER, TABLE, transformations
from pairs import pairwise
from reference import View

import maskopt
from maskopt import _coupling

STEPS = 20
# For optimizers whose control flow is compiled anew at every eager step. Eager runs the Python that
# jit traces, and from the second step on the same operations on the same shapes; these steps are
# more than any period in the table (3), and what comes later jit's 20 steps see.
SLOW_EAGER_STEPS = 4
SHAPE = (8, 6)
_RNG = np.random.default_rng(0)


def _scattered(share):
  mask = np.ones(SHAPE, bool)
  mask.flat[_RNG.permutation(mask.size)[: round(share * mask.size)]] = False
  return mask


def _where(*index):
  mask = np.ones(SHAPE, bool)
  mask[index] = False
  return mask


# name: mask of the parameter's shape, how it is given, what the inner optimizer sees, the layout
_ROWS, _COLUMNS = _where([0, 3, 7]), _where(slice(None), [1, 4])
_BLOCK = _where(slice(2, 6), slice(1, 4))
_FEW, _MANY = _scattered(0.4), _scattered(0.8)
MASKS = {
  "frozen": (np.ones(SHAPE, bool), True, "gone", "Frozen"),
  "full": (np.zeros(SHAPE, bool), False, "block", "Full"),
  "rows": (_ROWS, _ROWS[:, :1], "block", "Block"),
  "block": (_BLOCK, _BLOCK, "block", "Block"),
  "columns": (_COLUMNS, _COLUMNS[0], "block", "Block"),
  "scattered": (_FEW, _FEW, "elements", "Elements"),
  "dense": (_MANY, _MANY, "dense", "Dense"),
  "runtime": (_FEW, maskopt.runtime(_FEW), "dense", "Dense"),
  "runtime_count": (_FEW, maskopt.runtime(_FEW, int((~_FEW).sum())), "elements", "Elements"),
}
DTYPES = ("float16", "bfloat16", "float32", "float64")
MODES = ("eager", "jit")

# Per 20 steps, relative to the largest trainable value. Narrow floats: XLA keeps wide intermediates
# inside a fusion and the two programs fuse differently, so a step may differ by a rounding.
TOLERANCE = {"float16": 32, "bfloat16": 32, "float32": 512, "float64": 512}  # units of epsilon

# Whose updates are zero: of every leaf, or of every matrix.
STANDS_STILL = ("set_to_zero", "freeze")

# Gradients at frozen elements.
RUBBISH = (np.nan, np.inf, -np.inf, 1e4, -3.0)


def cases():
  """Every optimizer once, every pair of the rest: each row goes to the first that may run it."""
  rows = itertools.cycle(pairwise(DTYPES, tuple(MASKS), MODES))
  waiting = sorted(TABLE)
  while waiting:
    row = next(rows)
    name = next((n for n in waiting if _default(n, *row)), None)
    if name is not None:
      waiting.remove(name)
      yield name, *row


def _default(name, dtype, mask, mode):
  """Whether the default run may give an optimizer this case."""
  entry = TABLE[name]
  slow = name in SLOW_EAGER and mode == "eager"
  return dtype in entry.dtypes and not slow


class Problem:
  """A separable quadratic over a flat dict of leaves, and its gradient."""

  def __init__(self, target, weight, at_frozen):
    self.target, self.weight, self.at_frozen = target, weight, at_frozen

  def value(self, params):
    """The loss where the weight is not zero: frozen NaNs stay out of the value."""
    terms = [
      jnp.sum(jnp.where(w == 0, jnp.zeros_like(w), w * (p.astype(w.dtype) - t) ** 2) / 2)
      for p, t, w in zip(*map(jax.tree.leaves, (params, self.target, self.weight)), strict=True)
    ]
    return functools.reduce(jnp.add, terms)

  def grad(self, params):
    """Its gradient, and whatever was given where the weight is zero."""

    def one(p, t, w):
      rubbish = jnp.resize(jnp.array(self.at_frozen), p.shape)
      true = w * (p.astype(w.dtype) - t)
      return jnp.where(w == 0, rubbish.astype(w.dtype), true).astype(p.dtype)

    return jax.tree.map(one, params, self.target, self.weight)

  def extra(self, names, params, grads):
    known = {
      "value": lambda: self.value(params),
      "grad": lambda: grads,
      "value_fn": lambda: self.value,
      "obj_fn": lambda: self.value,
      "grad_fn": lambda: lambda p, _: self.grad(p),
    }
    return {name: known[name]() for name in names}


def run(tx, apply, params, problem, entry, mode, steps, between=lambda p: p):
  """The parameters after so many steps."""

  def step(carry):
    params, state = carry
    grads = problem.grad(params)
    updates, state = tx.update(grads, state, params, **problem.extra(entry.extra, params, grads))
    return between(apply(params, updates)), state

  carry = params, tx.init(params)
  if mode == "jit" and entry.scans:
    scan = jax.jit(lambda c: jax.lax.scan(lambda c, _: (step(c), None), c, length=steps)[0])
    return scan(carry)[0]
  step = jax.jit(step) if mode == "jit" else step
  for _ in range(steps):
    carry = step(carry)
  return carry[0]


def setting(dtype, masks):
  """Parameters with special bits where frozen, and the frozen arrays and views of their leaves.

  One kernel for each mask, under the mask's name, beside a bias that trains and a frozen base.
  """
  rng = np.random.default_rng(1)
  frozen = {m: MASKS[m][0] for m in masks} | {"bias": np.zeros(4, bool), "base": np.ones(20, bool)}
  views = {m: View(MASKS[m][2], MASKS[m][0]) for m in masks}
  views["bias"] = View("block", frozen["bias"])
  params = {
    k: reference.with_specials(rng, f.shape, reference.REAL[dtype], f) for k, f in frozen.items()
  }
  return params, frozen, views


def check(name, dtype, masks, mode, steps=STEPS):
  """Complaints, each under the name of its cell, about one optimizer on one tree of leaves."""
  entry = TABLE[name]
  params, frozen, views = setting(dtype, masks)
  wide = np.float64 if dtype == "float64" else np.float32
  rng = np.random.default_rng(2)
  target = {k: (np.sign(rng.normal(size=f.shape)) * 6).astype(wide) for k, f in frozen.items()}
  weight = {
    k: np.where(f, 0, rng.uniform(0.5, 1.0, f.shape)).astype(wide) for k, f in frozen.items()
  }

  problem = Problem(*jax.tree.map(jnp.asarray, (target, weight)), RUBBISH)
  inner = entry.make()
  given = {m: MASKS[m][1] for m in masks} | {"bias": False, "base": True}
  tx = maskopt.selective_transform(inner, freeze_mask=given, prefer="memory")
  start = jax.tree.map(jnp.asarray, params)
  kinds = {path: layout.kind for path, layout in maskopt.mask_of(tx.init(start)).items()}
  assert {m: kinds[m] for m in masks} == {m: MASKS[m][3] for m in masks}
  after = run(tx, maskopt.apply_updates, start, problem, entry, mode, steps)

  sub = Problem(*(reference.sub_problem(x, views) for x in (target, weight)), (0.0,))
  alone = run(
    _plain(inner),
    optax.apply_updates,
    reference.sub_problem(params, views),
    sub,
    entry,
    mode,
    steps,
    between=functools.partial(reference.rezero, views=views),
  )
  found = []
  for k, before in params.items():
    cell = f"{name}, {dtype}, {mode}, leaf {k}"
    where = reference.moved(before, after[k], frozen[k])
    found += [f"{cell}: frozen bits moved at {where}"] if where else []
    if k in alone:
      complaint = _differs(name, dtype, before, after[k], views[k], alone[k])
      found += [f"{cell}: {complaint}"] if complaint else []
  return found


def _differs(name, dtype, before, after, view, alone):
  """What is wrong with one leaf's trainable values beside those of the reference; None if right."""
  trains = ~view.frozen
  got, start = (np.asarray(x)[trains].astype(np.float64) for x in (after, before))
  want = view.put(alone, before)[trains].astype(np.float64)
  # In narrow floats Optax itself may diverge (bfloat16 rounds a hyperparameter 0.999 to 1) or
  # stand still (adaptive rates begin tiny); then so must we.
  narrow = dtype in reference.NARROW
  if not (np.isfinite(want).all() or narrow):
    return "the reference itself diverged"
  step = TOLERANCE[dtype] * float(ml_dtypes.finfo(reference.REAL[dtype]).eps)
  try:
    np.testing.assert_allclose(got, want, rtol=step, atol=step * np.abs(want).max())
  except AssertionError as error:
    return str(error)
  stands = (name in STANDS_STILL or narrow) and (want == start).all()
  return None if stands or (got != start).any() else "nothing trained"


def _plain(inner):
  if isinstance(inner, optax.GradientTransformation):
    return optax.with_extra_args_support(inner)
  return optax.GradientTransformationExtraArgs(inner.init, inner.update)  # MultiSteps


def _checked(name, dtype, masks, mode, steps=STEPS):
  # Optax itself promotes; and leaf-coupled optimizers warn, which test_compose.py looks at.
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
    jax.enable_x64(dtype == "float64"),
    warnings.catch_warnings(),
  ):
    warnings.filterwarnings("ignore", ".*deprecated", DeprecationWarning)
    warnings.filterwarnings("ignore", "(?s).*depends on the shape of a leaf", UserWarning)
    found = check(name, dtype, masks, mode, steps)
  assert not found, "\n".join(found)


# Like cases side by side, so that each process finds most eager operations compiled.
@pytest.mark.parametrize(("name", "dtype", "mask", "mode"), sorted(cases(), key=lambda c: c[1:]))
def test_contract(name, dtype, mask, mode):
  _checked(name, dtype, (mask,), mode)


@functools.lru_cache(maxsize=1)
def _forget_other_than(dtype):
  """Compiled programs of one dtype only: those of all are 4 GB in each process."""
  jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
  # By dtype, for the same reason.
  ("name", "dtype"),
  [(n, d) for d in DTYPES for n in sorted(TABLE) if d in TABLE[n].dtypes],
)
def test_full_product(name, dtype, mode):
  _forget_other_than(dtype)
  slow = name in SLOW_EAGER and mode == "eager"
  _checked(name, dtype, tuple(MASKS), mode, SLOW_EAGER_STEPS if slow else STEPS)


def test_table_names_every_public_transformation():
  assert transformations() <= set(TABLE) | set(ABSENT)


def test_default_cases_cover_every_optimizer_and_every_pair():
  chosen = list(cases())
  pairs = {p for _, *row in chosen for p in itertools.combinations(enumerate(row), 2)}
  assert len(pairs) == 4 * 9 + 4 * 2 + 9 * 2
  assert sorted(name for name, *_ in chosen) == sorted(TABLE)


def test_private_gradients_are_per_example_and_refused():
  # Why the table leaves them out: their gradients have a leading batch dimension, so they are no
  # gradients of the parameters. Aggregate first, then hand the result to selective_transform.
  params = {"w": jnp.ones(3)}
  inner = optax.contrib.differentially_private_aggregate(1.0, 1.0, key=jax.random.key(0))
  tx = maskopt.selective_transform(inner, freeze_mask=False)
  with pytest.raises(ValueError, match=r"at w, expected an array of shape \(3,\), got .*\(5, 3\)"):
    tx.update({"w": jnp.ones((5, 3))}, tx.init(params), params)


def test_who_sees_rank_and_size():
  """Read from each optimizer's own program; a wrong answer is a missing or a needless warning."""
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", ".*deprecated", DeprecationWarning)
    inner = {name: _plain(entry.make()) for name, entry in TABLE.items()}
  assert {name for name, tx in inner.items() if _coupling.sees_rank(tx)} == SEES_RANK
  assert {name for name, tx in inner.items() if _coupling.sees_size(tx)} == SEES_SIZE


def test_an_unreadable_optimizer_is_taken_to_see_everything():
  def update(updates, state, params=None, *, needed, **extra):
    return updates, state

  inner = optax.GradientTransformationExtraArgs(lambda p: (), update)
  assert _coupling.sees_rank(inner) and _coupling.sees_size(inner)
