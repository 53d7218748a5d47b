"""What a rule's value freezes in one parameter, as a mask that is as small as its structure."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _masks, _traced
from ._complaints import Complaint, check_takes
from ._errors import Problem, describe, fail
from ._heads import Leaf, head_axis, head_mask, parts_of
from ._indexing import FITS, Positions, chosen, indexed, positions
from ._masks import Runtime

_VALUES = (
  "Write True or False, a NumPy bool array, an index (np.s_[:, :3]), maskopt.units, maskopt.heads, "
  "maskopt.train_only or a function of the leaf."
)

_TREE = (
  "A rule gives every parameter it names one value: write a rule for each leaf of the tree, or "
  "join whole masks by maskopt.union."
)
_ARGUMENTS = {
  "of": "Give the number of heads that the layer has.",
  "parts": "Give 3 for fused query, key and value that lie side by side, 1 if they interleave.",
  "axis": "Count the axes of the kernel from 0; negative ones count from the end.",
}


@dataclasses.dataclass(frozen=True)
class Units:
  """A rule value; see `units`."""

  idx: Positions

  def __repr__(self) -> str:
    return f"units({self.idx!r})"


@dataclasses.dataclass(frozen=True)
class Heads:
  """A rule value; see `heads`."""

  idx: Positions
  of: int
  axis: int | None = None
  parts: int | None = None

  def __repr__(self) -> str:
    extra = "".join(
      f", {k}={v}" for k, v in (("axis", self.axis), ("parts", self.parts)) if v is not None
    )
    return f"heads({self.idx!r}, of={self.of}{extra})"


@dataclasses.dataclass(frozen=True)
class TrainOnly:
  """A rule value; see `train_only`."""

  value: Any

  def __repr__(self) -> str:
    return f"train_only({self.value!r})"


def units(idx: int | slice | Sequence[int] | np.ndarray) -> Units:
  """Name output units, of kernel and bias alike, as the value of a rule.

    frozen[..., j] = j in idx

  Units are the last axis of a parameter: of a kernel (in, out) or (h, w, in, out), a bias (out,), a
  scale (out,), an embedding (vocabulary, out), an attention kernel (in, heads, head_dim).

  A module, given as the parameters or as `layers=`, tells of more. The linear, convolution and
  recurrent layers of Equinox are (out, in), `nnx.ConvTranspose(transpose_kernel=True)` is (h, w,
  out, in), and where the gates of a cell lie side by side (`nnx.OptimizedLSTMCell`, `nnx.GRUCell`,
  the cells of Equinox) a unit is that of every gate. In a bare tree it is a place on the last axis.

  Args:
    idx: an int, ints, a slice, or a bool array with one element per unit; negative ints count from
      the end. No ints name no unit.
  Returns:
    A value for `maskopt.build_mask`, which raises where a unit lies outside a parameter.
  Raises:
    TypeError: idx is neither.
    ValueError: an int stands there twice, as in an array of 0 and 1 (make it a mask by x != 0).
  Example:
    >>> import numpy as np, maskopt
    >>> params = {"dense": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}
    >>> mask = maskopt.build_mask(params, [("dense", maskopt.units([0, -1]))])
    >>> mask["dense"]["bias"].tolist(), mask["dense"]["kernel"].shape
    ([True, False, True], (1, 3))
  """
  return Units(_read(idx, "maskopt.units(idx=...)"))


def heads(
  idx: int | slice | Sequence[int] | np.ndarray,
  of: int,
  *,
  axis: int | None = None,
  parts: int | None = None,
) -> Heads:
  """Name attention heads as the value of a rule.

    frozen[..., h, ...] = h in idx        along the axis of the heads

  The axis is found by shape: the one of size `of` in kernels (in, of, d) and (of, d, out), the one
  that `of` divides in fused kernels (in, of * d) and (of * d, out). A bias follows its kernel; one
  that has no heads (of, d, out -> out) is left alone.

  Args:
    idx: heads, as in `maskopt.units`.
    of: the number of heads.
    axis: the axis of the kernel, where its shape leaves that open.
    parts: how many projections lie side by side on a fused axis: 3 for (query, key, value) each
      with its heads, 1 where every head has its own three.
  Returns:
    A value for `maskopt.build_mask`, which raises where a shape has no heads or several axes.
  Raises:
    TypeError: idx names no heads, or another argument is no int.
    ValueError: of or parts is not positive, or a head is named twice.
  Example:
    >>> import numpy as np, maskopt
    >>> params = {"query": {"kernel": np.ones((6, 2, 3)), "bias": np.ones((2, 3))}}
    >>> mask = maskopt.build_mask(params, [("query", maskopt.heads(0, of=2))])
    >>> mask["query"]["kernel"].shape, mask["query"]["bias"].tolist()
    ((1, 2, 1), [[True], [False]])
  """
  for name, count in (("of", of), ("parts", 1 if parts is None else parts)):
    _check_int(name, count, "a positive int", count_from=1)
  if axis is not None:
    _check_int("axis", axis, "an int")
  return Heads(_read(idx, "maskopt.heads(idx=...)"), int(of), axis, parts)


def _check_int(name: str, value: Any, expected: str, count_from: int | None = None) -> None:
  """Raise unless an argument of `heads` is an int, and one that counts something."""
  where = f"maskopt.heads({name}=...)"
  if _traced.is_traced(value):
    problem = _traced.Traced(name, expected, _traced.told(value), TypeError)
    fail(where, [problem], _traced.REMEDY)
  is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
  if not is_int or (count_from is not None and value < count_from):
    kind = ValueError if is_int else TypeError
    fail(where, [Problem(name, expected, describe(value), kind)], _ARGUMENTS[name])


def _read(idx: Any, where: str) -> Positions:
  """The positions, at once: whoever wrote them sees the error where they stand."""
  try:
    return positions(idx)
  except Complaint as c:
    fail(where, [Problem("idx", c.expected, c.got, c.kind)], c.remedy)


def train_only(value: Any) -> TrainOnly:
  """Freeze everything but what a value names, in the parameters that the rule names.

    frozen[i] = not value[i]

  Args:
    value: any rule value of `maskopt.build_mask`.
  Returns:
    A value for `maskopt.build_mask`.
  Example:
    >>> import numpy as np, maskopt
    >>> params = {"head": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}
    >>> rules = [("head", maskopt.train_only(maskopt.units(0)))]
    >>> maskopt.build_mask(params, rules)["head"]["bias"].tolist()
    [False, True, True]
  """
  return TrainOnly(value)


def frozen(value: Any, leaf: Leaf) -> Any:
  """Return the mask of one parameter: a bool, or a bool array of its rank that broadcasts to it.

  Raises:
    Complaint: the value is none, or does not fit the parameter.
  """
  if isinstance(value, (bool, np.bool_)):
    return bool(value)
  if isinstance(value, TrainOnly):
    mask = frozen(value.value, leaf)
    if isinstance(mask, Runtime):
      size = math.prod(leaf.shape)
      return Runtime(~mask.mask, None if mask.count is None else size - mask.count)
    return not mask if isinstance(mask, bool) else ~mask
  if isinstance(value, Units):
    return _units(value, leaf)
  if isinstance(value, Heads):
    return _heads(value, leaf)
  if isinstance(value, Runtime):
    return Runtime(broadcastable(value.mask, leaf.shape, "bool"), value.count)
  is_array = isinstance(value, (np.ndarray, jax.Array))
  if is_array and value.dtype == np.bool_:
    return _compact(broadcastable(value, leaf.shape, "bool"))
  _traced.refuse(value, "what to freeze")
  if isinstance(value, (int, np.integer, slice, tuple, list, range)) or value is ... or is_array:
    return _compact(indexed(value if isinstance(value, tuple) else (value,), leaf.shape))
  if callable(value) and not isinstance(value, type):
    check_takes(value, ("leaf",), "As value it returns what to freeze of the leaf.")
    return frozen(value(leaf.value), leaf)
  if isinstance(value, Mapping):
    # Not its repr: that of a State is many lines, and it would stand at every leaf of the rule.
    raise Complaint("what to freeze", f"a tree ({type(value).__name__})", _TREE, TypeError)
  remedy = _VALUES if value is not None else "Write True to freeze. " + _VALUES
  raise Complaint("what to freeze", describe(value), remedy, TypeError)


def bare_index(value: Any) -> Any:
  """The index in a rule value that counts along the first axis alone, if there is one."""
  if isinstance(value, TrainOnly):
    return bare_index(value.value)
  is_ints = isinstance(value, (np.ndarray, jax.Array)) and value.dtype != np.bool_
  is_index = isinstance(value, (int, np.integer, slice, list, range)) or is_ints
  return value if is_index and not isinstance(value, bool) else None


def broadcastable(array: Any, shape: tuple[int, ...], kind: str) -> Any:
  """The array with the rank of the parameter; raises `Complaint`."""
  one = array.size == 1 and math.prod(shape) > 1
  if one:
    _traced.refuse(array, f"{kind} broadcastable to {shape}")
  if one or not _masks.broadcasts(array.shape, shape):
    got = describe(array) + _masks.misfit(array.shape, shape, kind)
    raise Complaint(f"{kind} broadcastable to {shape}", got, FITS)
  return array.reshape((1,) * (len(shape) - array.ndim) + array.shape)


def _compact(mask: Any) -> Any:
  """A copy of a static mask without the axes it does not depend on; runtime masks stay."""
  if isinstance(mask, jax.Array):
    return mask
  for axis, n in enumerate(mask.shape):
    before = (slice(None),) * axis
    first, last = mask[(*before, slice(0, 1))], mask[(*before, slice(n - 1, n))]
    if mask.strides[axis] == 0:  # a view made by np.broadcast_to
      mask = first
    # The ends tell most masks apart; a comparison of all with the first would be one more mask.
    elif n > 1 and np.array_equal(first, last):
      every = np.logical_and.reduce(mask, axis=axis, keepdims=True)
      if np.array_equal(every, np.logical_or.reduce(mask, axis=axis, keepdims=True)):
        mask = every
  return bool(mask.all()) if mask.size <= 1 else np.array(mask)


def _along(axis: int, leaf: Leaf, keep: Any) -> Any:
  """The mask that depends on one axis only; `keep(n)` says on what of its n positions."""
  shape = [-1 if k == axis else 1 for k in range(len(leaf.shape))]
  return _compact(keep(leaf.shape[axis]).reshape(shape))


def _units(value: Units, leaf: Leaf) -> Any:
  if not leaf.shape:
    raise Complaint("a parameter with units", "a scalar", FITS)

  def keep(n: int) -> np.ndarray:
    gates = leaf.side.gates(n)
    of_one = chosen(value.idx.within(n // gates, "units"), n // gates)
    return of_one if of_one.size == 1 else np.tile(of_one, gates)

  return _along(leaf.side.axis_of(len(leaf.shape)), leaf, keep)


def _heads(value: Heads, leaf: Leaf) -> Any:
  if not leaf.shape:
    raise Complaint("a parameter with heads", "a scalar", FITS)
  axis = head_axis(leaf, value.of, value.axis)
  if axis is None:
    return False
  remedy = "Count heads from 0 to of - 1; negative numbers count from the end."
  wanted = value.idx.within(value.of, "heads", remedy)
  parts = parts_of(leaf, axis, value.of, value.parts)
  where = f"in shape {leaf.shape}"
  return _along(axis, leaf, lambda n: head_mask(n, value.of, wanted, parts, where))


def factor(value: Any, leaf: Leaf) -> Any:
  """Return the multiplier of one parameter: a float, or an array of its rank that broadcasts.

  Raises:
    Complaint: the value is no factor, is not finite, or does not fit the parameter.
  """
  remedy = "Write a number (0 or None freezes), an array of numbers or a function of the leaf."
  if value is None:
    return 0.0
  is_array = isinstance(value, (np.ndarray, jax.Array))
  if callable(value) and not is_array and not isinstance(value, type):
    check_takes(value, ("leaf",), "As value it returns the factors of the leaf.")
    return factor(value(leaf.value), leaf)
  # A NumPy scalar and a Python number are one-element arrays to the checks below.
  array: Any = value if is_array or not isinstance(value, numbers.Number) else np.asarray(value)
  if not _is_real(array):
    raise Complaint("a factor", describe(value), remedy, TypeError)
  if not isinstance(array, jax.Array) and not np.all(np.isfinite(np.asarray(array, np.float64))):
    raise Complaint("finite factors", "NaN or infinity", "Write 0 or None to freeze.")
  if not is_array:
    return float(array)
  if not jnp.issubdtype(array.dtype, np.floating):
    array = array.astype(np.float32)
  array = broadcastable(array, leaf.shape, "float")
  return np.array(array) if isinstance(array, np.ndarray) else array


def _is_real(array: Any) -> bool:
  return isinstance(array, (np.ndarray, jax.Array)) and (
    jnp.issubdtype(array.dtype, np.floating) or jnp.issubdtype(array.dtype, np.integer)
  )
