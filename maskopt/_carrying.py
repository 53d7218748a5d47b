"""Freeze masks that nnx modules carry, as static metadata.

A module carries the mask of its parameter `kernel` as the attribute `kernel_freeze_mask`. It stands
on the module and not in the variable's metadata, which the state of another module overwrites.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import nnx

from . import _ties
from ._masks import LeafMask

SUFFIX = "_freeze_mask"


@dataclasses.dataclass(frozen=True)
class StaticMask:
  """A mask as hashable metadata: nnx would make a NumPy array data, which saves no FLOPs.

  Attributes:
    shape: of the mask, which broadcasts to its parameter.
    bits: `np.packbits` of it.
  """

  shape: tuple[int, ...]
  bits: bytes

  @classmethod
  def of(cls, mask: Any) -> StaticMask:
    array = np.asarray(mask, np.bool_)
    return cls(array.shape, np.packbits(array).tobytes())

  @functools.cached_property
  def array(self) -> np.ndarray:
    """The mask unpacked, once for each object: it lives and dies with it."""
    size = math.prod(self.shape)
    array = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=size).view(np.bool_)
    array = array.reshape(self.shape)
    array.flags.writeable = False  # it is shared by all who ask
    return array

  def __getstate__(self) -> dict[str, Any]:
    return {"shape": self.shape, "bits": self.bits}  # copies and pickles stay packed

  def __repr__(self) -> str:
    return f"StaticMask(freezes {np.count_nonzero(self.array)} of {self.array.size}, {self.shape})"


def carried(module: Any) -> Iterator[tuple[str, Any, LeafMask]]:
  """(attribute, variable, mask) of every parameter of this very module whose mask it carries."""
  for name, mask in vars(module).items():
    if name.endswith(SUFFIX) and isinstance(mask, (bool, StaticMask)):
      attribute = name.removesuffix(SUFFIX)
      variable = vars(module).get(attribute)
      if isinstance(variable, nnx.Variable):
        yield attribute, variable, mask if isinstance(mask, bool) else mask.array


def by_path(model: Any) -> dict[str, Any]:
  """The masks carried anywhere in the model, by the path its state has for the variable."""
  names = _ties.names(model)
  found: dict[str, Any] = {}
  for _, module in nnx.iter_graph(model):
    if isinstance(module, nnx.Module):
      for _, variable, mask in carried(module):
        path = names[id(variable)]
        found[path] = either(found[path], mask) if path in found else mask
  return found


def either(a: Any, b: Any) -> Any:
  """The mask that freezes what one of two does."""
  both = np.logical_or(a, b)
  return both if both.ndim else bool(both)
