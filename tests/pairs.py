"""Every pair of parameters by default, every combination with the slow tests."""

import itertools

import pytest


def pairwise(*factors):
  """Rows that hold every pair of values of every two factors; greedy, in a fixed order."""
  wanted = {
    ((i, a), (j, b))
    for (i, x), (j, y) in itertools.combinations(enumerate(factors), 2)
    for a in x
    for b in y
  }
  rows = []
  while wanted:
    best = max(
      itertools.product(*factors),
      key=lambda row: len(wanted & set(itertools.combinations(enumerate(row), 2))),
    )
    rows.append(best)
    wanted -= set(itertools.combinations(enumerate(best), 2))
  return rows


def every_pair(*, indirect=(), **factors):
  """Parametrize a test by the product of three or more factors, a list of values.

  Most bugs hang on one parameter or on two together; what hangs on three is left to the slow run.
  """
  columns = [list(values) for values in factors.values()]
  sizes = [range(len(column)) for column in columns]
  chosen = set(pairwise(*sizes))
  cases = []
  for row in itertools.product(*sizes):
    values = [column[k] for column, k in zip(columns, row, strict=True)]
    name = "-".join(getattr(v, "__name__", None) or str(v) for v in values)
    marks = () if row in chosen else pytest.mark.slow
    cases.append(pytest.param(*values, id=name, marks=marks))
  return pytest.mark.parametrize(tuple(factors), cases, indirect=list(indirect))
