"""Which units of a normalisation layer are frozen: those whose parameters all are."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _masks, _tree
from .._carrying import StaticMask
from .._errors import Problem, fail
from .._masks import LeafMask, Runtime


class Units:
  """The frozen units of every layer of a network.

    unit i of a layer is frozen if freeze_mask[i] for each of its parameters

  Args:
    freeze_mask: a static freeze mask over params.
    params: the parameters.
    where: the call that errors name.
  Raises:
    ValueError: the mask does not fit, or is runtime data.
  """

  def __init__(self, freeze_mask: Any, params: Any, where: str):
    flat = _tree.flatten(params)
    masks = _masks.resolve(freeze_mask, flat, where)
    moving = [
      Problem(path, "a static mask", "a runtime mask")
      for path, mask in zip(flat.paths, masks, strict=True)
      if isinstance(mask, Runtime)
    ]
    if moving:
      fail(where, moving, "Build it of NumPy bools: which layer is still is part of the program.")
    self._where = where
    self._masks = dict(zip(flat.paths, masks, strict=True))
    self._shapes = {p: np.shape(x) for p, x in zip(flat.paths, flat.leaves, strict=True)}

  def of(self, path: str, shape: tuple[int, ...]) -> StaticMask | bool:
    """Which elements of a statistic of that shape, in the layer at path, are of frozen units.

    A layer without parameters follows the smallest module around it that has some.
    """
    own = [p for p in self._masks if p.rpartition("/")[0] == path]
    if not own:
      around = next((a for a in _tree.ancestors(path) if self._inside(a)), None)
      return around is not None and all(_whole(self._masks[p]) for p in self._inside(around))
    if all(_whole(self._masks[p]) for p in own):
      return True
    if any(_none(self._masks[p]) for p in own):
      return False
    other = [p for p in own if self._shapes[p] != shape]
    if other:
      problems = [Problem(p, f"a bool, for its units are not those of {shape}", "bools")
                  for p in other]  # fmt: skip
      fail(self._where, problems, "Freeze the parameters of that layer wholly, or not at all.")
    units = np.logical_and.reduce([np.broadcast_to(_array(self._masks[p]), shape) for p in own])
    return StaticMask.of(units) if units.any() else False

  def _inside(self, path: str) -> list[str]:
    return [p for p in self._masks if _tree.covers(path, p)]


def _array(mask: LeafMask) -> np.ndarray:
  return np.asarray(mask, np.bool_)


def _whole(mask: LeafMask) -> bool:
  return mask is None or bool(_array(mask).all())


def _none(mask: LeafMask) -> bool:
  return not _array(mask).any()
