"""Strict JAX on eight host devices; Hypothesis without a clock and with a fixed seed."""

import hypothesis
import jax

# Before anything asks for a device. Strict: an implicit promotion or broadcast of ours is a bug.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

_CHECKS = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
hypothesis.settings.register_profile(
  "default",
  deadline=None,
  derandomize=True,
  max_examples=25,
  print_blob=True,
  suppress_health_check=_CHECKS,
)
hypothesis.settings.register_profile(
  "slow", hypothesis.settings.get_profile("default"), derandomize=False, max_examples=1000
)
hypothesis.settings.load_profile("default")
