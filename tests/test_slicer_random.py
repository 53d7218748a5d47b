"""Random programs, sliced: equal to slices of the whole."""

from __future__ import annotations

import pytest
from slicer_random import random_program
from test_slicer import assert_sliced

TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
SAMPLE, ALL_PROGRAMS, CHUNK = 50, 600, 25


def check(seed: int) -> None:
  fun, demands, args, names = random_program(seed)
  try:
    assert_sliced(fun, demands, *args, tol=TOLERANCE[str(args[0].dtype)])
  except Exception as error:
    error.add_note(f"random_program({seed}): {names} on {args[0].dtype}, {demands}")
    raise


# float16 constants overflow to inf while the programs are drawn, as they may
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("seed", range(SAMPLE))
def test_random_program_equals_slices(seed: int) -> None:
  check(seed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("first", range(SAMPLE, ALL_PROGRAMS, CHUNK))
def test_many_random_programs_equal_slices(first: int) -> None:
  for seed in range(first, first + CHUNK):
    check(seed)
