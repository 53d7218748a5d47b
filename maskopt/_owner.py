"""A transform's freeze mask, and the states that belong to it."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import _coupling, _masks, _owned, _packing
from ._choice import Prefer
from ._errors import Problem, fail
from ._layout import Dense, Elements, Layout
from ._masks import FreezeMask
from ._packing import Layouts


class Owner:
  """What a transform knows of its mask: how to lay it out, and which states were made for it.

  Args:
    freeze_mask: the mask the transform was given.
    where: the call that errors name.
    prefer: what the layouts are chosen for.
    optimizer: the inner optimizer, if the layouts must suit one.
  """

  def __init__(
    self,
    freeze_mask: FreezeMask,
    where: str,
    *,
    prefer: Prefer,
    optimizer: optax.GradientTransformationExtraArgs | None = None,
  ):
    self._mask = freeze_mask
    self._where = where
    self._prefer: Prefer = prefer
    self._optimizer = optimizer
    self._mine: set[str] = set()

  @functools.cached_property
  def _sees_rank(self) -> bool:
    return self._optimizer is not None and _coupling.sees_rank(self._optimizer)

  @functools.cached_property
  def _sees_size(self) -> bool:
    return self._optimizer is not None and _coupling.sees_size(self._optimizer)

  def _analysed(self, params: Any) -> Layouts:
    keep_rank = self._sees_rank or self._sees_size
    return _packing.layouts_of(
      self._mask, params, self._where, prefer=self._prefer, keep_rank=keep_rank
    )

  def layouts(self, params: Any) -> Layouts:
    """Lay the mask out over the parameters; warn where the optimizer would notice."""
    layouts = self._analysed(params)
    self._mine.add(layouts.static.digest)
    for path, layout in layouts.items():
      elements, dense = isinstance(layout, Elements), isinstance(layout, Dense)
      if (elements or dense) and self._sees_rank or dense and self._sees_size:
        warnings.warn(
          f"`{self._where}`: at {path}, the optimizer depends on the shape of a leaf, and the "
          f"trainable elements are no block of {layout.shape}: they are trained as "
          f"{'a vector' if elements else 'a leaf with zeros'}. Freeze whole rows, columns or "
          "blocks, or use an optimizer that works element by element.",
          stacklevel=4,
        )
    # Copies, for a loop that donates its state must not take the caller's mask away.
    return jax.tree.map(jnp.array, layouts)

  def check(self, state: Any, kind: type) -> None:
    """Raise unless it is a state of that kind, with the layouts that our mask gets."""
    layouts = getattr(state, "layouts", None)
    if not isinstance(state, kind) or not isinstance(layouts, Layouts):
      got = _owned.named(layouts if isinstance(state, kind) else state)
      problem = Problem("", "the state that init(params) returned", got)
      remedy = "Call tx.update(grads, state, params) with the state of this very transform."
      fail(f"{self._where}.update", [problem], remedy)
    static = layouts.static
    if static.digest in self._mine:
      return
    # A state from elsewhere: a file, or another transform. A function of the parameters cannot be
    # asked again, for the parameters may have changed since.
    if not _masks.is_function(self._mask) and not isinstance(self._mask, Layouts):
      ours = self._analysed(_packing.abstract(static)).static
      if ours != static:
        problems = [
          Problem(path, f"a state that trains {_packing.trains(a)}", _other(a, b))
          for path, a, b in zip(static.paths, ours.layouts, static.layouts, strict=True)
          if a is not None and b is not None and a != b
        ]
        fail(self._where, problems, "The state belongs to another mask: call init again.")
    self._mine.add(static.digest)


def _other(ours: Layout, theirs: Layout) -> str:
  """What another layout trains; the same number of other elements is worth a word."""
  return _packing.trains(theirs) + (" others" if ours.count == theirs.count else "")
