"""Where the output units of a ready-made layer are, where its parameters alone do not tell."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from . import _tree

# The modules of Equinox whose kernels are (out, in) and not (in, out).
_EQUINOX = ("equinox.nn._linear", "equinox.nn._conv", "equinox.nn._rnn")


@dataclasses.dataclass(frozen=True)
class Side:
  """The output units of a layer.

  Attributes:
    axis: of its kernel; the last axis of its bias, or the first where it is the first of both.
    units: how many units it has, if several gates of them lie side by side.
  """

  axis: int = -1
  units: int | None = None

  @property
  def out_first(self) -> bool:
    """Whether kernels are (out, in)."""
    return self.axis == 0

  def axis_of(self, rank: int) -> int:
    """The axis of a parameter of that rank, at least 1."""
    return self.axis % rank if -rank <= self.axis < rank else rank - 1

  def gates(self, size: int) -> int:
    """How many gates lie on an axis of that size."""
    return size // self.units if self.units and size % self.units == 0 else 1


def sides(source: Any) -> dict[str, Side]:
  """The sides of the layers in a module, by path, that are not those of a kernel (in, out)."""
  if isinstance(source, nnx.Module):
    found = {"/".join(map(str, parts)): _of_nnx(x) for parts, x in nnx.iter_graph(source)}
  else:
    nodes, _ = jax.tree_util.tree_flatten_with_path(source, is_leaf=_is_equinox)
    found = {_tree.path_of(keys): _of_equinox(x) for keys, x in nodes}
  return {path: side for path, side in found.items() if side is not None}


def _of_nnx(x: Any) -> Side | None:
  if isinstance(x, (nnx.OptimizedLSTMCell, nnx.GRUCell)):
    return Side(units=x.hidden_features)
  return Side(axis=-2) if isinstance(x, nnx.ConvTranspose) and x.transpose_kernel else None


def _is_equinox(x: Any) -> bool:
  return any(c.__module__ in _EQUINOX for c in type(x).__mro__)


def _of_equinox(x: Any) -> Side | None:
  return Side(0, getattr(x, "hidden_size", None)) if _is_equinox(x) else None
