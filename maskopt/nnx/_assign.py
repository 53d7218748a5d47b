"""Values written into chosen elements of a module's parameter, before these are frozen."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from .. import _bits, _indexing
from .._complaints import Complaint, listing
from .._errors import Problem, describe, fail
from . import _carried

_WHERE = "maskopt.nnx.assign(module, name, where, values)"


def assign(module: nnx.Module, name: str, where: Any, values: Any) -> None:
  """Write values into chosen elements of a module's parameter, in place.

    parameter[where] = values        every other element keeps its bits

  Kernels are stored (in, out): unit j of a `Linear` is `np.s_[:, j]`. Indices start at 0.

  Args:
    module: the module; under a transform, one that may be changed there.
    name: the parameter's path in it: "kernel", "first/bias".
    where: an index of ints, slices and lists of ints, as `np.s_[:, [0, 2]]`, or a bool array that
      broadcasts to the parameter, True = write. Not a freeze mask: freeze what you have written
      with the same one.
    values: numbers or an array that broadcasts to the chosen elements; they are cast to the
      parameter's dtype, floats never to integers. NaN and Inf are written.
  Raises:
    ValueError: no parameter has that name, an index is out of range, or the shapes do not fit.
    TypeError: values or index are of another kind.
  Example:
    >>> import numpy as np, maskopt
    >>> from flax import nnx
    >>> layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> maskopt.nnx.assign(layer, "kernel", np.s_[:, 1], [5.0, 6.0])
    >>> layer.kernel[:, 1].tolist()
    [5.0, 6.0]
  """
  variable = _variable(module, name)
  old = variable.get_value()
  chosen = _chosen(where, old.shape, name)
  new = _values(values, old[chosen].shape, old.dtype, name)
  # On integer views: XLA:CPU would quiet a bfloat16 NaN beside what is written.
  moved = _bits.bits(old).at[chosen].set(_bits.bits(new))
  variable.set_value(_bits.from_bits(moved, old.dtype))


def _variable(module: Any, name: str) -> nnx.Variable:
  _carried.need_module(module, _WHERE)
  found = {
    "/".join(map(str, path)): x
    for path, x in nnx.iter_graph(module)
    if isinstance(x, nnx.Variable) and hasattr(x, "shape") and hasattr(x, "dtype")
  }
  variable = found.get(name) if isinstance(name, str) else None
  if variable is None:
    got = f"{name!r} (there are {listing(list(found)) or 'none'})"
    fail(_WHERE, [Problem("name", "the path of a variable", got)], "Write it as errors do.")
  return variable


def _chosen(where: Any, shape: tuple[int, ...], name: str) -> Any:
  """The index with every part checked, ready for `x[...]`."""
  flags = isinstance(where, np.ndarray) and where.dtype == np.bool_
  if flags and where.ndim and where.shape != shape[:1]:
    try:
      return np.nonzero(np.broadcast_to(where, shape))
    except ValueError:
      problem = Problem(name, f"bools that broadcast to {shape}", describe(where))
      fail(_WHERE, [problem], "Give one bool for each element, unit (last axis) or row.")
  index = where if isinstance(where, tuple) else (where,)
  try:
    _indexing.indexed(index, shape)
  except Complaint as c:
    fail(_WHERE, [Problem(name, c.expected, c.got, c.kind)], c.remedy)
  return tuple(np.asarray(p) if isinstance(p, (list, range)) else p for p in index)


def _values(values: Any, shape: tuple[int, ...], dtype: Any, name: str) -> Any:
  array = np.asarray(values) if not hasattr(values, "dtype") else values
  number = jnp.issubdtype(array.dtype, jnp.number)
  exact = jnp.issubdtype(dtype, jnp.integer) and not jnp.issubdtype(array.dtype, jnp.integer)
  if not number or exact:
    problem = Problem(name, f"numbers for {np.dtype(dtype).name}", describe(array), TypeError)
    fail(_WHERE, [problem], "Cast them yourself.")
  try:
    return jnp.broadcast_to(jnp.asarray(array).astype(dtype), shape)
  except ValueError:
    problem = Problem(name, f"values that broadcast to {shape}", describe(array))
    fail(_WHERE, [problem], "Give one value for each chosen element.")
