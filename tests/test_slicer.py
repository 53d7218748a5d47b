"""The slicer computes the wanted blocks of a program, equal to slices of the whole, and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import slicer_programs as programs

from maskopt._slicer import ALL, NONE, Region, region, slice_program
from maskopt._slicer._take import take

QUICK = {"xla_backend_optimization_level": 0}  # compiling is most of what these tests do


def block_of(whole: Any, r: Region) -> np.ndarray:
  """NumPy's own slice of an array, the oracle."""
  out = np.asarray(whole)
  for d, i in enumerate(r):
    if i is not None:
      out = np.take(out, list(i) if isinstance(i, range) else i.values, axis=d)
  return out


def assert_sliced(fun: Callable[..., Any], demands: Any, *args: Any, tol: float = 2e-5) -> Any:
  """slice_program equals slicing the outputs of `fun`; returns the report."""
  whole = jax.tree.leaves(jax.jit(fun, compiler_options=QUICK)(*args))
  blocks, report = None, None

  def run(*args: Any) -> Any:
    nonlocal report
    out, report = slice_program(fun, demands, *args)
    return out

  blocks = jax.jit(run, compiler_options=QUICK)(*args)
  for demand, got, expected in zip(demands, blocks, whole, strict=True):
    scale = tol * max(1.0, float(np.abs(np.asarray(expected, np.float64)).max(initial=0)))
    if demand is NONE:
      assert got is None
    elif demand is ALL:
      np.testing.assert_allclose(got, expected, atol=scale, rtol=tol)
    else:
      for r, block in zip(demand, got, strict=True):
        reference = block_of(expected, r)
        assert block.dtype == reference.dtype
        np.testing.assert_allclose(
          np.asarray(block, np.float64), np.asarray(reference, np.float64), atol=scale, rtol=tol
        )
  return report


def assert_least(case: programs.Case) -> None:
  report = assert_sliced(case.grad, case.demands, *case.args)
  assert report.flops_sliced <= (1 + case.slack) * case.least, report.stops
  assert report.flops_sliced >= 0.98 * case.least  # the count itself is right


KINDS = ["columns", "rows", "block"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", ["raw", "linen", "nnx", "equinox"])
def test_mlp_reaches_minimum(library: str, kind: str) -> None:
  assert_least(programs.mlp(library, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", ["jit", "checkpoint"])
def test_wrapped_mlp_reaches_minimum(wrap: str, kind: str) -> None:
  assert_least(programs.mlp("raw", kind, wrap))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", ["plain", "checkpoint"])
def test_scanned_mlp_reaches_minimum(wrap: str, kind: str) -> None:
  assert_least(programs.mlp_scan(kind, wrap))


@pytest.mark.parametrize("kind", ["out", "in"])
@pytest.mark.parametrize("wrap", ["plain", "checkpoint"])
def test_cnn_reaches_minimum(wrap: str, kind: str) -> None:
  assert_least(programs.cnn(kind, wrap))


@pytest.mark.parametrize("kind", ["grouped", "depthwise", "dilated"])
def test_grouped_cnn_reaches_minimum(kind: str) -> None:
  assert_least(programs.grouped_cnn(kind))


@pytest.mark.parametrize("taps", [slice(1, 2), slice(0, 5, 2), slice(2, 4)])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_conv_taps_reach_minimum(taps: slice, stride: int, dilation: int) -> None:
  case = programs.conv_taps(taps, stride, dilation)
  if len(range(*taps.indices(5))) / 5 < 0.5:
    assert_least(case)
  else:
    assert_sliced(case.grad, case.demands, *case.args)


@pytest.mark.parametrize("wrap", ["plain", "checkpoint"])
def test_lstm_reaches_minimum(wrap: str) -> None:
  assert_least(programs.lstm(wrap))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_nnx_recurrent_cells_are_sliced(kind: str) -> None:
  grad, args, demands = programs.nnx_recurrent(kind)
  report = assert_sliced(grad, demands, *args)
  assert not report.stops
  assert report.flops_sliced < 0.75 * report.flops_full


SLOW_JIT = pytest.param("jit", marks=pytest.mark.slow)  # the same program, one call deeper


@pytest.mark.parametrize("kind", ["fused", "heads"])
@pytest.mark.parametrize("wrap", ["plain", SLOW_JIT, "checkpoint"])
def test_transformer_reaches_minimum(wrap: str, kind: str) -> None:
  assert_least(programs.transformer(kind, wrap))


@pytest.mark.parametrize("kind", ["fused", "heads"])
@pytest.mark.parametrize("wrap", ["plain", "checkpoint"])
def test_scanned_transformer_reaches_minimum(wrap: str, kind: str) -> None:
  assert_least(programs.transformer_scan(kind, wrap))


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("wrap", ["plain", "checkpoint"])
def test_embedding_reaches_minimum(wrap: str, one_hot: bool, kind: str) -> None:
  assert_least(programs.embedding(kind, one_hot, wrap))


@pytest.mark.parametrize("wrap", ["plain", "checkpoint"])
def test_tied_logits_reach_minimum(wrap: str) -> None:
  assert_least(programs.tied_logits(wrap))


@pytest.mark.parametrize("wrap", ["plain", "jit", "checkpoint"])
def test_deep_programs_stay_as_short(wrap: str) -> None:
  case = programs.transformer("heads", wrap, layers=8)
  whole = jax.make_jaxpr(case.grad)(*case.args)
  sliced = jax.make_jaxpr(lambda *args: slice_program(case.grad, case.demands, *args)[0])
  assert len(sliced(*case.args).eqns) <= 1.1 * len(whole.eqns)


CASES: dict[str, Callable[[], programs.Case]] = {
  "mlp columns": lambda: programs.mlp("raw", "columns"),
  "mlp rows, checkpoint": lambda: programs.mlp("raw", "rows", "checkpoint"),
  "mlp scan": lambda: programs.mlp_scan("columns"),
  "cnn out": lambda: programs.cnn("out"),
  "cnn in": lambda: programs.cnn("in"),
  "grouped cnn": lambda: programs.grouped_cnn("grouped"),
  "lstm": lambda: programs.lstm(),
  "transformer fused": lambda: programs.transformer("fused"),
  "transformer heads, checkpoint": lambda: programs.transformer("heads", "checkpoint"),
  "transformer scan": lambda: programs.transformer_scan("heads"),
  "embedding rows": lambda: programs.embedding("rows"),
  "embedding columns": lambda: programs.embedding("columns"),
  "tied logits": lambda: programs.tied_logits(),
}


@pytest.mark.parametrize("name", CASES)
def test_peak_temporary_memory_is_never_above_that_of_slicing_after(name: str) -> None:
  case = CASES[name]()

  def whole(*args: Any) -> Any:
    leaves = zip(jax.tree.leaves(case.grad(*args)), case.demands, strict=True)
    return [[take(g, region(g.shape), r) for r in d] for g, d in leaves if d is not NONE]

  def sliced(*args: Any) -> Any:
    return [x for x in slice_program(case.grad, case.demands, *args)[0] if x is not None]

  def peak(f: Callable[..., Any]) -> int:
    compiled = jax.jit(f, compiler_options=QUICK).lower(*case.args).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert peak(sliced) <= peak(whole) + 256  # XLA aligns arrays at 64 bytes, short ones too
