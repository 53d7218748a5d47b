"""The units a slip names, and what a report of abstract parameters costs."""

import tracemalloc

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maskopt
from maskopt.report._units import Units

BILLION = 1_000_000_000
HUGE = {
  "kernel": jax.ShapeDtypeStruct((4, BILLION), jnp.bfloat16),
  "bias": jax.ShapeDtypeStruct((BILLION,), jnp.bfloat16),
}


@hypothesis.given(st.data())
def test_units_are_the_positions_of_numpy(data):
  shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=0, max_size=3)))
  held = tuple(data.draw(st.sampled_from((1, n))) for n in shape)
  rng = np.random.default_rng(data.draw(st.integers(0, 99)))
  which = rng.random(held) < 0.5
  units = Units(which, shape)
  rows = np.argwhere(np.broadcast_to(which, shape)).tolist()
  expected = tuple(r[0] if len(shape) == 1 else tuple(r) for r in rows)
  assert tuple(units) == expected and units == expected and len(units) == len(expected)
  assert units[1:9:2] == expected[1:9:2] and units[::-1] == expected[::-1]
  assert units != (*expected, 0) and (units == [*expected]) is False
  full = Units(np.array(np.broadcast_to(which, shape)), shape)
  assert full == units and hash(full) == hash(units)
  if expected:
    assert units[0] == expected[0] and units[-1] == expected[-1]
    assert repr(units) == repr(expected) or len(expected) > 8
    assert units != expected[:-1] and units != (*expected[:-1], "other")
  with pytest.raises(IndexError):
    units[len(expected)]


def test_many_units_are_read_in_pieces_and_shown_in_part():
  which = np.arange(70_000) % 7 == 0
  units = Units(which, which.shape)
  assert list(units) == np.flatnonzero(which).tolist() and units[9_999] == 69_993
  assert repr(units) == "(0, 7, 14, 21, 28, 35, 42, 49, ... 10,000 in all)"
  assert Units(np.ones(1, bool), (BILLION,))[-1:] and len(Units(np.zeros(1, bool), (5,))) == 0


def peak(function):
  function()  # what the first call imports and caches
  tracemalloc.start()
  result = function()
  bytes_ = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  return result, bytes_


@pytest.mark.parametrize("frozen", ["kernel", "bias"])
def test_a_billion_units_cost_kilobytes(frozen):
  mask = {name: name == frozen for name in HUGE}

  def shown():
    report = maskopt.summary(HUGE, mask)
    return report.slips, str(report) + report._repr_html_() + repr(report.slips) + repr(report)

  ((slip,), text), bytes_ = peak(shown)
  assert (len(slip.units), slip.of, slip.frozen) == (BILLION, BILLION, frozen)
  assert "all 1,000,000,000 units" in text and "1,000,000,000 in all" in text
  assert bytes_ < 2**20
