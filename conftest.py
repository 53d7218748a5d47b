"""Doctests run as a user would run them; the tests are stricter (tests/conftest.py)."""

import os
import tempfile

import jax
import pytest


def pytest_configure(config):
  """What one worker of a run has compiled, the other reads."""
  if hasattr(config, "workerinput") or "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  folder = tempfile.TemporaryDirectory(prefix="maskopt-tests-", ignore_cleanup_errors=True)
  config.add_cleanup(folder.cleanup)
  # Workers have it before they import JAX.
  os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


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
