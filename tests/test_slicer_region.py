"""Index sets and regions against plain Python sets."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import given, strategies as st

from maskopt._slicer import Region, _index as ix, _region as rg
from maskopt._slicer._rules_reshape import groups
from maskopt._slicer._take import take

SIZE = 12


@st.composite
def indices(draw: Any, size: int = SIZE) -> Any:
  kind = draw(st.sampled_from(["none", "slice", "points"]))
  if kind == "none":
    return None
  if kind == "slice":
    start = draw(st.integers(0, size - 1))
    stop = draw(st.integers(start + 1, size))
    return ix.make_index(slice(start, stop, draw(st.integers(1, 4))), size)
  chosen = draw(st.sets(st.integers(0, size - 1), min_size=1))
  return ix.make_index(sorted(chosen), size)


def members(index: Any, size: int = SIZE) -> set[int]:
  return set(ix.positions(index, size).tolist())


@given(indices(), indices())
def test_union_and_contains(a: Any, b: Any) -> None:
  both = ix.union(a, b, SIZE)
  assert members(both) == members(a) | members(b)
  assert ix.contains(both, a)
  assert ix.contains(both, b)
  assert ix.contains(a, b) == (members(b) <= members(a))


@given(indices())
def test_equal_sets_are_equal_keys(a: Any) -> None:
  again = ix.canonical(ix.from_positions(ix.positions(a, SIZE)), SIZE)
  assert again == a
  assert hash(again) == hash(a)


@given(indices(), st.data())
def test_relative_positions(have: Any, data: Any) -> None:
  chosen = data.draw(st.sets(st.sampled_from(sorted(members(have))), min_size=1))
  want = ix.make_index(sorted(chosen), SIZE)
  line = ix.positions(have, SIZE)
  at = ix.positions(ix.relative(have, want), len(line))
  np.testing.assert_array_equal(line[at], ix.positions(want, SIZE))


@given(indices(), st.integers(0, SIZE), st.integers(0, SIZE))
def test_within(a: Any, low: int, high: int) -> None:
  low, high = sorted((low, high))
  assert members(ix.within(a, SIZE, low, high)) == {k for k in members(a) if low <= k < high}


@given(indices(), st.integers(1, 3), st.integers(-2, 5))
def test_moved(a: Any, scale: int, shift: int) -> None:
  assert members(ix.moved(a, SIZE, scale, shift)) == {scale * k + shift for k in members(a)}


@given(indices())
def test_cover(a: Any) -> None:
  if isinstance(a, ix.Points):
    assert members(a) <= members(ix.cover(a))
    assert [k for r in ix.runs(a) for k in r] == a.values.tolist()


@given(st.lists(st.tuples(indices(), indices()), min_size=1, max_size=12))
def test_join_covers_every_region(regions: Any) -> None:
  shape = (SIZE, SIZE)
  demand = rg.join_all(map(Region, regions), shape)
  for r in regions:
    assert any(rg.covers(d, Region(r)) for d in demand)
  assert len(demand) <= rg.MAX_REGIONS
  assert rg.covers(rg.one(demand, shape)[0], Region(regions[0]))


@given(indices(), indices(), st.data())
def test_take(a: Any, b: Any, data: Any) -> None:
  x = np.arange(SIZE * SIZE).reshape(SIZE, SIZE)
  have = Region((a, b))
  want = []
  for index in have:
    chosen = data.draw(st.sets(st.sampled_from(sorted(members(index))), min_size=1))
    want.append(ix.make_index(sorted(chosen), SIZE))
  rows, columns = (ix.positions(i, SIZE) for i in have)
  got = take(x[np.ix_(rows, columns)], have, Region(want))
  np.testing.assert_array_equal(got, x[np.ix_(*(ix.positions(i, SIZE) for i in want))])


@given(st.permutations([2, 3, 2, 1, 5]), st.integers(0, 3))
def test_reshape_groups_hold_the_same_elements(shape: list[int], at: int) -> None:
  other = (*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :], 1)
  for group in groups(tuple(shape), other):
    left = itertools.accumulate((shape[d] for d in group.ins), lambda a, b: a * b)
    right = itertools.accumulate((other[d] for d in group.outs), lambda a, b: a * b)
    assert list(left)[-1] == list(right)[-1]
