"""Disjoint blocks become one vector in the order of the array, exactly."""

import functools
import itertools
import math

import jax
import numpy as np
import pytest
import reference
from test_slicer import QUICK

from maskopt._choice import blocks_of
from maskopt._slicer import in_order, region


def rng(seed=0):
  return np.random.default_rng(seed)


def trainable(r, shape):
  """A union of one to three random products."""
  mask = np.zeros(shape, bool)
  for _ in range(r.integers(1, 4)):
    sets = [np.flatnonzero(r.random(n) < r.choice([0.2, 0.5, 1.0])) for n in shape]
    if r.random() < 0.5:  # contiguous
      sets = [np.arange(s[0], s[-1] + 1) if len(s) else s for s in sets]
    mask[np.ix_(*sets)] = True
  return mask


CASES = [
  (shape, mask, blocks)
  for seed, shape in itertools.product(range(40), [(12,), (9, 8), (5, 6, 7), (3, 2, 4, 5)])
  for mask in [trainable(rng(seed), shape)]
  for blocks in [blocks_of(mask, shape)]
  if blocks
]


def joined(x, blocks):
  regions = [region(x.shape, *sets) for sets in blocks]
  return in_order([x[np.ix_(*sets)] for sets in blocks], regions, x.shape)


def test_the_cases_are_unions_of_every_kind():
  counts = [len(blocks) for _, _, blocks in CASES]
  assert len(CASES) > 100 and {1, 2, 3, 4} <= set(counts)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("int8", marks=pytest.mark.slow)])
def test_equals_the_array_at_the_mask(dtype):
  for shape, mask, blocks in CASES:
    x = rng().normal(size=shape).astype(np.float32).view(np.int32).astype(dtype)
    compiled = jax.jit(functools.partial(joined, blocks=blocks), compiler_options=QUICK)
    np.testing.assert_array_equal(compiled(x), x[mask])


def test_bits_are_moved_and_never_changed():
  shape, mask, blocks = next(c for c in CASES if len(c[2]) == 3 and len(c[0]) == 2)
  odd = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
  x = np.resize(odd, math.prod(shape)).reshape(shape)
  got = np.asarray(jax.jit(lambda x: joined(x, blocks))(x))
  np.testing.assert_array_equal(reference.bits(got), reference.bits(x[mask]))


def test_the_program_holds_a_list_per_dimension_only():
  shape = (300, 200, 4)
  few = np.isin(np.arange(300), rng().choice(300, 30, replace=False))
  some = np.isin(np.arange(200), rng().choice(200, 20, replace=False))
  mask = np.broadcast_to((few[:, None] | some)[..., None], shape)
  blocks = blocks_of(mask, shape)
  parts = [np.zeros([len(s) for s in sets], np.float32) for sets in blocks]
  regions = [region(shape, *sets) for sets in blocks]
  closed = jax.make_jaxpr(lambda *b: in_order(b, regions, shape))(*parts)
  assert sum(np.size(c) for c in closed.consts) < 310
