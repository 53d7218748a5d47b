"""A copy of a model on the host, for later comparison."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from .. import _tree
from .._errors import Problem, fail
from . import _parts
from ._parts import Other
from ._show import Shown, Table, counted, size


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Snapshot(Shown):
  """A model as it was; see `snapshot`.

  Attributes:
    tree: NumPy copies in the containers that were given; a module's parameters as an `nnx.State`.
      Keys of random numbers are held as their `jax.random.key_data`.
    specs: the same with a `jax.ShapeDtypeStruct` for each array, keys included.
    others: what a module holds beside its parameters.
  """

  tree: Any
  specs: Any
  others: tuple[Other, ...]

  def _table(self) -> Table:
    arrays = [x for x in _tree.flatten(self.tree).leaves if not _tree.is_hole(x)]
    total = sum(x.nbytes for x in arrays) + sum(x.value.nbytes for x in self.others)
    title = f"Snapshot of {counted(len(arrays), 'array')}"
    if self.others:
      title += f" and of {len(self.others)} that are no parameters"
    return Table(f"{title}, {size(total)} on the host", (), (), ())


def snapshot(params: Any) -> Snapshot:
  """Copy parameters to the host, so that they can be compared after any number of steps.

    snapshot(params).tree[i] = params[i] at the time of the call, bit for bit

  The copy shares no memory with the parameters: it survives donated buffers and modules that are
  updated in place. It costs the parameters' bytes on the host.

  Args:
    params: any tree of arrays (parameters, linen's variables, an average kept by an optimizer) or a
      module. Of an `nnx.Module` every variable is remembered, so that `audit` can name statistics
      that moved.
  Returns:
    A `Snapshot`, to be given to `audit` or `plot` as `before`; `.tree` holds the arrays.
  Raises:
    ValueError: a leaf is abstract, donated, or not wholly on this process; lists every one.
    TypeError: it is called inside `jit`.
  Example:
    >>> import jax.numpy as jnp, maskopt
    >>> before = maskopt.snapshot({"w": jnp.array([1.0, 2.0])})
    >>> before
    Snapshot of 1 array, 8 B on the host
    >>> before.tree["w"].tolist()
    [1.0, 2.0]
  """
  return taken(params, "maskopt.snapshot(params)", copy=True)


def taken(tree: Any, where: str, *, copy: bool) -> Snapshot:
  """A snapshot, or with `copy=False` a view that is valid until the next step."""
  if isinstance(tree, Snapshot):
    return tree
  others = _parts.beside(tree)
  flat = _tree.flatten(tree)
  _parts.refuse_traced(flat.leaves, where)
  # Every copy to the host starts before the first one is waited for.
  for leaf in [*flat.leaves, *(x.value for x in others)]:
    _start_copy(leaf)
  problems: list[Problem] = []
  leaves = [
    leaf if _tree.is_hole(leaf) else _parts.on_host(leaf, path, problems, copy=copy)
    for path, leaf in zip(flat.paths, flat.leaves, strict=True)
  ]
  held = tuple(
    dataclasses.replace(x, value=_parts.on_host(x.value, x.path, problems, copy=copy))
    for x in others
  )
  if problems:
    fail(where, problems, "Give arrays that this process can read now.")
  specs = flat.unflatten([_parts.spec(x) for x in flat.leaves])
  return Snapshot(flat.unflatten(leaves), specs, held)


def _start_copy(x: Any) -> None:
  if isinstance(x, jax.Array) and _parts.is_readable(x) and not _parts.is_key(x):
    x.copy_to_host_async()
