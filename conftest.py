"""Doctests run as a user would run them; the tests are stricter (tests/conftest.py)."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
  """Tables fit the terminal, and a runner may say that it has a narrow one."""
  monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture(autouse=True)
def _as_a_user(request):
  if not isinstance(request.node, pytest.DoctestItem):
    yield
    return
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield
