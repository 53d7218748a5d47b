"""Every gradient transformation that Optax exports, set up for one contract.

An entry names its factory, the extra arguments its `update` needs, and whether its state keeps its
types, as a scan demands. `SEES_RANK` and `SEES_SIZE` list those that see more of a leaf than its
numbers; `ABSENT` says why a public name is not run.
"""

import functools
import inspect
from typing import NamedTuple

import jax
import optax
from optax import contrib


class Entry(NamedTuple):
  make: object
  extra: tuple[str, ...] = ()
  dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32", "float64")
  scans: bool = True


_LINESEARCH = ("value", "grad", "value_fn")


def _step(transform, size=0.05):
  """A transformation of gradients as an optimizer."""
  return optax.chain(transform, optax.scale(-size))


_ALIASES = {
  name: functools.partial(getattr(optax, name), 0.05)
  for name in (
    *("adabelief", "adadelta", "adagrad", "adam", "adamax", "adan", "amsgrad", "fromage"),
    *("novograd", "optimistic_adam", "optimistic_gradient_descent", "radam", "rmsprop"),
    *("rprop", "sgd", "sign_sgd", "signum", "sm3", "yogi", "optimistic_adam_v2"),
  )
} | {
  "adadelta": functools.partial(optax.adadelta, 20.0, weight_decay=0.01),
  "adafactor": functools.partial(optax.adafactor, 0.05, min_dim_size_to_factor=2),
  "adamaxw": functools.partial(optax.adamaxw, 0.05, weight_decay=0.1),
  "adamw": functools.partial(optax.adamw, 0.05, weight_decay=0.1),
  "adan": functools.partial(optax.adan, 0.05, weight_decay=0.1),
  "lamb": functools.partial(optax.lamb, 0.05, weight_decay=0.1),
  "lars": functools.partial(optax.lars, 0.5, weight_decay=0.1),
  "lion": functools.partial(optax.lion, 0.05, weight_decay=0.1),
  "noisy_sgd": functools.partial(optax.noisy_sgd, 0.05, key=0),
  "optimistic_adam": functools.partial(optax.optimistic_adam, 0.05, optimism=0.05),
  "rmsprop": functools.partial(optax.rmsprop, 0.05, momentum=0.9),
  "sgd": functools.partial(optax.sgd, 0.05, momentum=0.9),
}

_TRANSFORMS = {
  "adaptive_grad_clip": lambda: _step(optax.adaptive_grad_clip(0.1)),
  "add_decayed_weights": lambda: _step(optax.add_decayed_weights(0.1)),
  "add_noise": lambda: _step(optax.add_noise(0.1, 0.5, key=0)),
  "apply_every": lambda: _step(optax.apply_every(4)),
  "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.05), 3),
  "centralize": lambda: _step(optax.centralize()),
  "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05)),
  "clip": lambda: _step(optax.clip(0.5)),
  "clip_by_block_rms": lambda: _step(optax.clip_by_block_rms(0.5)),
  "clip_by_global_norm": lambda: _step(optax.clip_by_global_norm(0.5)),
  "conditionally_mask": lambda: optax.conditionally_mask(
    optax.sgd(0.05), lambda step: step % 2 == 0
  ),
  "conditionally_transform": lambda: _step(
    optax.conditionally_transform(optax.trace(0.9), lambda step: step % 2 == 0)
  ),
  "ema": lambda: _step(optax.ema(0.9)),
  "flatten": lambda: optax.flatten(optax.adam(0.05)),
  "freeze": lambda: optax.chain(optax.sgd(0.05), optax.freeze(_no_vectors)),
  "identity": lambda: _step(optax.identity()),
  "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(_decay),
  "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.adam)(_decay),
  "keep_params_nonnegative": lambda: optax.chain(optax.sgd(0.05), optax.keep_params_nonnegative()),
  "masked": lambda: optax.chain(optax.masked(optax.clip(0.1), _no_vectors), optax.sgd(0.05)),
  "monitor": lambda: _step(optax.monitor({"norm": optax.tree.norm})),
  "multi_transform": lambda: optax.multi_transform(
    {"a": optax.adam(0.05), "b": optax.sgd(0.05)}, _labels
  ),
  "named_chain": lambda: optax.named_chain(("adam", optax.scale_by_adam()), ("lr", _scale())),
  "normalize_by_update_norm": lambda: _step(optax.normalize_by_update_norm()),
  "partition": lambda: optax.partition({"a": optax.adam(0.05), "b": optax.sgd(0.05)}, _labels),
  "scale": lambda: optax.scale(-0.05),
  "scale_by_adadelta": lambda: _step(optax.scale_by_adadelta(), 1.0),
  "scale_by_adam": lambda: _step(optax.scale_by_adam()),
  "scale_by_adamax": lambda: _step(optax.scale_by_adamax()),
  "scale_by_adan": lambda: _step(optax.scale_by_adan()),
  "scale_by_amsgrad": lambda: _step(optax.scale_by_amsgrad()),
  "scale_by_belief": lambda: _step(optax.scale_by_belief()),
  "scale_by_distance_over_gradients": lambda: _step(
    optax.scale_by_distance_over_gradients(reps_rel=0.05), 1.0
  ),
  "scale_by_lbfgs": lambda: _step(optax.scale_by_lbfgs()),
  "scale_by_learning_rate": lambda: optax.scale_by_learning_rate(0.05),
  "scale_by_lion": lambda: _step(optax.scale_by_lion()),
  "scale_by_novograd": lambda: _step(optax.scale_by_novograd()),
  "scale_by_optimistic_gradient": lambda: _step(optax.scale_by_optimistic_gradient()),
  "scale_by_param_block_norm": lambda: _step(optax.scale_by_param_block_norm()),
  "scale_by_param_block_rms": lambda: _step(optax.scale_by_param_block_rms()),
  "scale_by_polyak": lambda: _step(optax.scale_by_polyak(max_learning_rate=0.5), 1.0),
  "scale_by_radam": lambda: _step(optax.scale_by_radam()),
  "scale_by_rms": lambda: _step(optax.scale_by_rms(initial_scale=0.1)),
  "scale_by_rprop": lambda: _step(optax.scale_by_rprop(0.05), 1.0),
  "scale_by_rss": lambda: _step(optax.scale_by_rss()),
  "scale_by_schedule": lambda: optax.scale_by_schedule(lambda step: -_decay(step)),
  "scale_by_sign": lambda: _step(optax.scale_by_sign()),
  "scale_by_sm3": lambda: _step(optax.scale_by_sm3()),
  "scale_by_stddev": lambda: _step(optax.scale_by_stddev(initial_scale=0.1)),
  "scale_by_trust_ratio": lambda: _step(optax.scale_by_trust_ratio()),
  "scale_by_yogi": lambda: _step(optax.scale_by_yogi()),
  "set_to_zero": optax.set_to_zero,
  "snapshot": lambda: _step(optax.snapshot("norm", optax.tree.norm)),
  "stateless": lambda: optax.stateless(lambda g, p: jax.tree.map(lambda x: -0.05 * x, g)),
  "stateless_with_tree_map": lambda: optax.stateless_with_tree_map(lambda g, p: -0.05 * g),
  "trace": lambda: _step(optax.trace(0.9)),
  "with_extra_args_support": lambda: optax.with_extra_args_support(optax.adam(0.05)),
  "zero_nans": lambda: _step(optax.zero_nans()),
}

_CONTRIB = {
  name: functools.partial(getattr(contrib, name), 0.05)
  for name in ("ademamix", "adopt", "dadapt_adamw", "madgrad", "muon", "simplified_ademamix")
} | {
  "acprop": lambda: contrib.acprop(0.05),
  "cocob": lambda: contrib.cocob(weight_decay=0.1),
  "dog": lambda: contrib.dog(0.5),
  "dowg": lambda: contrib.dowg(0.5),
  "galore": lambda: contrib.galore(0.05, rank=2),
  "mechanize": lambda: contrib.mechanize(optax.sgd(0.05)),
  "normalize": lambda: _step(contrib.normalize()),
  "prodigy": lambda: contrib.prodigy(0.5),
  "sam": lambda: contrib.sam(
    optax.sgd(0.05), optax.chain(contrib.normalize(), optax.sgd(0.1)), sync_period=2
  ),
  "scale_by_acprop": lambda: _step(contrib.scale_by_acprop()),
  "scale_by_ademamix": lambda: _step(contrib.scale_by_ademamix()),
  "scale_by_adopt": lambda: _step(contrib.scale_by_adopt()),
  "scale_by_cocob": lambda: contrib.scale_by_cocob(),
  "scale_by_galore": lambda: _step(contrib.scale_by_galore(rank=2)),
  "scale_by_madgrad": lambda: contrib.scale_by_madgrad(0.05),
  "scale_by_muon": lambda: _step(
    optax.masked(contrib.scale_by_muon(weight_dimension_numbers=_matrices), _no_vectors)
  ),
  "scale_by_simplified_ademamix": lambda: _step(contrib.scale_by_simplified_ademamix(), 0.01),
  "schedule_free": lambda: contrib.schedule_free(optax.sgd(0.05), 0.05),
  "schedule_free_adamw": lambda: contrib.schedule_free_adamw(0.05, weight_decay=0.1),
  "schedule_free_sgd": lambda: contrib.schedule_free_sgd(0.05),
  "split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(optax.adam(0.05)),
}


def _no_vectors(params):
  return jax.tree.map(lambda x: x.ndim > 1, params)


def _matrices(params):
  return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), params)


def _labels(params):
  return jax.tree.map(lambda x: "a" if x.ndim > 1 else "b", params)


def _decay(step):
  return 0.05 / (1 + 0.1 * step)


def _scale():
  return optax.scale(-0.05)


TABLE = {name: Entry(make) for name, make in {**_ALIASES, **_TRANSFORMS, **_CONTRIB}.items()} | {
  "lbfgs": Entry(lambda: optax.lbfgs(memory_size=3), _LINESEARCH),
  "polyak_sgd": Entry(lambda: optax.polyak_sgd(0.5), ("value",)),
  "scale_by_polyak": Entry(_TRANSFORMS["scale_by_polyak"], ("value",)),
  "scale_by_backtracking_linesearch": Entry(
    lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(8)), _LINESEARCH
  ),
  "scale_by_zoom_linesearch": Entry(
    lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(8)), _LINESEARCH
  ),
  "momo": Entry(lambda: contrib.momo(0.5), ("value",)),
  "momo_adam": Entry(lambda: contrib.momo_adam(0.05), ("value",)),
  "reduce_on_plateau": Entry(
    lambda: optax.chain(optax.sgd(0.05), contrib.reduce_on_plateau(patience=2)), ("value",)
  ),
  "sophia": Entry(lambda: contrib.sophia(0.05, update_interval=3), ("obj_fn",)),
  "hutchinson_estimator_diag_hessian": Entry(
    lambda: _step(contrib.hutchinson_estimator_diag_hessian()), ("obj_fn",)
  ),
  "sam_opaque": Entry(
    lambda: contrib.sam(
      optax.sgd(0.05), optax.sgd(0.1), sync_period=2, opaque_mode=True, reset_state=False
    ),
    ("grad_fn",),
  ),
  # Its state has no measurements before the first update.
  "monitor": Entry(_TRANSFORMS["monitor"], scans=False),
  # Narrow distances become float32 with the first update.
  "scale_by_distance_over_gradients": Entry(
    _TRANSFORMS["scale_by_distance_over_gradients"], scans=False
  ),
  "MultiSteps": Entry(lambda: optax.MultiSteps(optax.adam(0.05), every_k_schedule=3)),
}

# Control flow inside `update` is traced and compiled again at every eager step: seconds a case. By
# default these run in jit, in the full product both ways.
SLOW_EAGER = frozenset(
  [
    *("MultiSteps", "apply_if_finite", "conditionally_mask", "conditionally_transform", "galore"),
    *("hutchinson_estimator_diag_hessian", "lbfgs", "momo", "momo_adam", "reduce_on_plateau"),
    *("sam", "sam_opaque", "scale_by_backtracking_linesearch", "scale_by_galore", "sophia"),
    *("scale_by_lbfgs", "scale_by_zoom_linesearch", "adopt", "scale_by_adopt", "cocob"),
    *("muon", "scale_by_muon", "scale_by_polyak", "polyak_sgd"),
  ]
)

# What a public name needs that a transformation of the parameters' gradients is not.
ABSENT = {
  "differentially_private_aggregate": "takes one gradient per example, not one per parameter",
  "dpsgd": "takes one gradient per example, not one per parameter",
  "lookahead": "trains a pair of trees, LookaheadParams: tests/test_compose.py runs it",
  "measure_with_ema": "returns a measurement and no updates: `monitor` runs it",
  "selective_transform": "freezes by itself: tests/test_failures.py compares the two",
}

# Some see more of a leaf than its numbers: its rank (scattered elements are a vector to them) or
# its size (frozen elements are zeros to them). They train otherwise there, and a warning says so.
SEES_RANK = frozenset(
  [
    *("adafactor", "adaptive_grad_clip", "centralize", "galore", "muon", "scale_by_galore"),
    *("scale_by_muon", "scale_by_sm3", "sm3"),
    *("freeze", "masked", "multi_transform", "partition"),  # by rank in this table's own labels
  ]
)
SEES_SIZE = frozenset(["adafactor", "clip_by_block_rms", "scale_by_param_block_rms"])


def transformations():
  """Public names of Optax and contrib that make a gradient transformation."""
  names = {"MultiSteps", "monitor", "dog", "dowg", "hutchinson_estimator_diag_hessian"}
  for module in (optax, contrib):
    for name in dir(module):
      function = getattr(module, name)
      if name.startswith("_") or not inspect.isfunction(function):
        continue
      if "GradientTransformation" in str(inspect.signature(function).return_annotation):
        names.add(name)
  return names
