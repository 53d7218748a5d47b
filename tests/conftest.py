"""Strict JAX on eight host devices; Hypothesis without a clock and with a fixed seed."""

import hypothesis
import jax
import pytest

# Before anything asks for a device. Strict: an implicit promotion or broadcast of ours is a bug.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

_CHECKS = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
hypothesis.settings.register_profile(
  "default",
  deadline=None,
  derandomize=True,
  max_examples=15,
  print_blob=True,
  suppress_health_check=_CHECKS,
)
hypothesis.settings.register_profile(
  "slow", hypothesis.settings.get_profile("default"), derandomize=False, max_examples=1000
)
hypothesis.settings.load_profile("default")

# Compiling is most of the run. What these test does not hang on machine code, and without LLVM's
# optimization that takes two thirds of the time; tests of bits, steps and programs have the user's.
PLAIN_CODE = tuple(
  f"test_{name}"
  for name in (
    "demo explain layers linen masks migrate multiplier nnx packing partition public recipe report "
    "rules sides slicer surgery traced tree"
  ).split()
)
_FLAG = "jax_disable_most_optimizations"


def _has_plain_code(item):
  return isinstance(item, pytest.Function) and item.module.__name__.startswith(PLAIN_CODE)


def pytest_collection_modifyitems(items):
  items.sort(key=_has_plain_code)


@pytest.fixture(autouse=True)
def _machine_code(request):
  plain = _has_plain_code(request.node)
  if jax.config.read(_FLAG) and not plain:
    jax.clear_caches()
  jax.config.update(_FLAG, plain)
