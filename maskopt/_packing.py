"""A whole tree's layouts: what optimizers, gradients and reports share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from jax import core

from . import _choice, _layout, _masks, _provenance, _tree
from ._choice import Prefer
from ._errors import Problem, describe, fail, show
from ._layout import Dense, Frozen, Full, Index, Layout
from ._packed import Packed, applied as applied, dense as dense, is_packed as is_packed
from ._provenance import Record

_REMEDY = "Use one mask throughout: maskopt.mask_of(state) is the one a state was made for."
_UNPACK = "Give the very mask that maskopt.pack was given, and its values in their shapes."


@dataclasses.dataclass(frozen=True, eq=False)
class Static:
  """The part of a tree's layouts that is known at trace time: hashable, and cheap to compare.

  Attributes:
    paths: of every leaf, holes included.
    layouts: one per leaf; None at a hole.
    digest: equal exactly if paths and layouts are.
  """

  paths: tuple[str, ...]
  layouts: tuple[Layout | None, ...]
  digest: str

  @classmethod
  def of(cls, paths: Sequence[str], layouts: Sequence[Layout | None]) -> Static:
    return cls(tuple(paths), tuple(layouts), _layout.digest(tuple(paths), tuple(layouts)))

  # jit compares this node at every call: one string, not a field for each leaf.
  def __eq__(self, other: object) -> bool:
    return self is other or (isinstance(other, Static) and self.digest == other.digest)

  def __hash__(self) -> int:
    return hash(self.digest)


@jax.tree_util.register_pytree_with_keys_class
class Layouts:
  """A freeze mask as it works: one layout for each leaf, and the arrays these need at run time.

  It is a pytree whose leaves are the index arrays, so it travels in an optimizer state and may be
  given wherever a freeze mask is asked for. `maskopt.mask_of(state)` returns it.

  Attributes:
    static: paths and layouts.
    index: one dict of arrays per leaf.
  """

  def __init__(self, static: Static, index: Sequence[Index]):
    self.static = static
    self.index = tuple(index)

  def tree_flatten_with_keys(self):
    named = [(i, d) for i, d in enumerate(self.index) if d]
    children = [(jax.tree_util.DictKey(self._name(i)), d) for i, d in named]
    return children, (self.static, tuple(i for i, _ in named))

  def _name(self, i: int) -> str:
    """The path, and a name of the static mask: a checkpoint of another mask has none of these."""
    path, layout = self.static.paths[i] or "root", self.static.layouts[i]
    return f"{path}@{layout.digest[:8]}" if layout and layout.digest else path

  def tree_flatten(self):
    children, aux = self.tree_flatten_with_keys()
    return [child for _, child in children], aux

  @classmethod
  def tree_unflatten(cls, aux, children):
    static, positions = aux
    index: list[Index] = [{}] * len(static.paths)
    for i, child in zip(positions, children, strict=True):
      index[i] = child
    return cls(static, index)

  def __repr__(self) -> str:
    lines = [
      f"  {show(path)}: {layout.kind} trains {trains(layout)} of {layout.size:,}"
      for path, layout in self.items()
    ]
    return "\n".join(["Layouts:", *lines])

  def items(self) -> list[tuple[str, Layout]]:
    """Path and layout of every parameter."""
    return [(p, k) for p, k in zip(self.static.paths, self.static.layouts, strict=True) if k]

  @property
  def freeze_mask(self) -> dict[str, Any]:
    """The mask as nested dicts of bools and bool arrays of the parameter's shape; True = frozen."""
    entries = [
      (path, _frozen(layout, index))
      for path, layout, index in zip(
        self.static.paths, self.static.layouts, self.index, strict=True
      )
      if layout is not None
    ]
    return _tree.nested([p for p, _ in entries], [m for _, m in entries])

  def flat(self, tree: Any, where: str, *, shapes: bool = True) -> _tree.Flat:
    """Flatten a tree that must have our paths, and, where it holds arrays, our shapes."""
    flat = _tree.flatten(tree, is_leaf=is_packed)
    if flat.paths != self.static.paths:
      fail_paths(flat.paths, self.static.paths, where)
    problems = []
    for path, leaf, layout in zip(flat.paths, flat.leaves, self.static.layouts, strict=True):
      if layout is None or (not is_packed(leaf) and _tree.is_hole(leaf)):
        continue
      if is_packed(leaf):
        if not leaf.layout.stores_like(layout) and leaf.index is None:
          got = f"{leaf.layout.kind} values of shape {leaf.layout.packed_shape}"
          problems.append(Problem(path, f"{layout.kind} values of {layout.packed_shape}", got))
      elif shapes and np.shape(leaf) != layout.shape:
        problems.append(Problem(path, f"an array of shape {layout.shape}", describe(leaf)))
    if problems:
      fail(where, problems, _REMEDY)
    return flat

  def take(self, tree: Any, where: str) -> Any:
    """The inner optimizer's view: packed values in the tree's containers, MaskedNode elsewhere.

    A leaf that was made from packed values gives them back; nothing dense is read.
    """
    flat = self.flat(tree, where)
    taken = []
    for leaf, layout, index in zip(flat.leaves, self.static.layouts, self.index, strict=True):
      if layout is None or isinstance(layout, Frozen):
        taken.append(optax.MaskedNode())
      elif is_packed(leaf):
        taken.append(_repacked(leaf, layout, index))
      elif _tree.is_hole(leaf):
        taken.append(leaf)
      else:
        taken.append(_taken(leaf, layout, index))
    return flat.unflatten(taken)

  def map(self, fun: Callable[..., Any], flat: _tree.Flat, *trees: Any) -> Any:
    """Map `fun(leaf, layout, index, *inner)` over leaves; inner trees as `take` made them."""
    others = [flat.treedef.flatten_up_to(tree) for tree in trees]
    leaves = [
      leaf if layout is None else fun(leaf, layout, index, *more)
      for leaf, layout, index, *more in zip(
        flat.leaves, self.static.layouts, self.index, *others, strict=True
      )
    ]
    return flat.unflatten(leaves)


def came_packed(leaf: Any, layout: Layout, index: Index) -> bool:
  """Whether a leaf's packed values are at hand, so that nothing dense needs to exist."""
  record = _provenance.made_of.recall(leaf)
  return is_packed(leaf) or (record is not None and record.values_of(layout, index) is not None)


def _taken(leaf: Any, layout: Layout, index: Index) -> Any:
  record = _provenance.made_of.recall(leaf)
  values = None if record is None else record.values_of(layout, index)
  if values is not None:
    return values
  whole = _provenance.unmasked.recall(leaf)
  if whole is not None and whole.is_of_mask(layout, index):
    return layout.take(whole.values, index)
  return layout.take(leaf, index)


def _repacked(leaf: Packed, layout: Layout, index: Index) -> Any:
  """Packed values as another layout, or the next value of a runtime mask, stores them."""
  record = Record(leaf.layout, leaf.index or index, leaf.values)
  values = record.values_of(layout, index)
  if values is not None:
    return values
  if leaf.values is None:
    return optax.MaskedNode()
  assert leaf.index is not None  # `Layouts.flat` has refused it otherwise
  dense = leaf.layout.put(leaf.values, jnp.zeros(layout.shape, leaf.values.dtype), leaf.index)
  return layout.take(dense, index)


def fail_paths(
  got: tuple[str, ...], expected: tuple[str, ...], where: str, remedy: str = _REMEDY
) -> None:
  missing = [Problem(p, "a leaf", "none") for p in expected if p not in set(got)]
  extra = [Problem(p, "no leaf", "one") for p in got if p not in set(expected)]
  fail(where, (missing + extra) or [Problem("", "the same order of leaves", "another")], remedy)


def trains(layout: Layout) -> str:
  """How many elements of a leaf train, in words."""
  return "a runtime mask's choice" if layout.count is None else f"{layout.count:,}"


def abstract(static: Static) -> _tree.Flat:
  """The parameters' paths, shapes and dtypes, as their layouts know them."""
  leaves = [
    None if k is None else jax.ShapeDtypeStruct(k.shape, jnp.dtype(k.dtype)) for k in static.layouts
  ]
  return _tree.Flat(static.paths, leaves, jax.tree.structure(0))


def _frozen(layout: Layout, index: Index) -> Any:
  if isinstance(layout, (Frozen, Full)):
    return isinstance(layout, Frozen)
  if isinstance(layout, Dense):
    return jnp.broadcast_to(index["frozen"], layout.shape)
  ones = layout.take(jnp.ones(layout.shape, jnp.uint8), index)
  return layout.put(ones, jnp.zeros(layout.shape, jnp.uint8), index) == 0


def layouts_of(
  freeze_mask: Any,
  params: Any,
  where: str,
  *,
  prefer: Prefer = "time",
  keep_rank: bool = False,
) -> Layouts:
  """Analyse a freeze mask over parameters; `Layouts` come back as they are, once they fit."""
  if isinstance(freeze_mask, Layouts):
    freeze_mask.flat(params, where)
    return freeze_mask
  flat = params if isinstance(params, _tree.Flat) else _tree.flatten(params)
  masks = _masks.resolve(
    freeze_mask, flat if not _masks.is_function(freeze_mask) else params, where
  )
  _masks.check_trainable(flat, masks, where)
  platform = _choice.platform_of(flat.leaves)
  chosen = [
    (None, {})
    if mask is None
    else _choice.choose(
      mask,
      leaf,
      _masks.dtype_of(leaf),
      platform=platform,
      prefer=prefer,
      keep_rank=keep_rank,
    )
    for mask, leaf in zip(masks, flat.leaves, strict=True)
  ]
  _check_counts(flat, masks, where)
  static = Static.of(flat.paths, [layout for layout, _ in chosen])
  return Layouts(static, [jax.tree.map(jnp.asarray, index) for _, index in chosen])


def _check_counts(flat: _tree.Flat, masks: list[_masks.LeafMask], where: str) -> None:
  """A runtime mask at hand must train as many elements as it says; a traced one cannot be asked."""
  problems = []
  for path, leaf, mask in zip(flat.paths, flat.leaves, masks, strict=True):
    if not isinstance(mask, _masks.Runtime) or isinstance(mask.mask, core.Tracer):
      continue
    trains = int(np.count_nonzero(~np.asarray(mask.mask))) * (
      np.size(leaf) // max(mask.mask.size, 1)
    )
    if mask.count not in (None, trains):
      problems.append(Problem(path, f"{mask.count} trainable elements", f"a mask with {trains}"))
  if problems:
    fail(where, problems, "Give maskopt.runtime the count of trainable elements.")


def pack(tree: chex.ArrayTree, freeze_mask: Any) -> chex.ArrayTree:
  """Return only the trainable values of a tree.

    pack(x)[k] = x[trainable[k]]        unpack(pack(x), x) = x, bit for bit

  Args:
    tree: arrays shaped like the parameters: parameters, gradients, a moment, or a module.
    freeze_mask: a freeze mask over them, or `maskopt.mask_of(state)`, whose index arrays are then
      arguments of the surrounding `jit` and not constants in it.
  Returns:
    The tree with a `Packed` leaf wherever something is frozen; wholly trainable leaves are the
    arrays themselves. Blocks keep their rank, scattered elements are 1-D, frozen leaves hold no
    array. A runtime mask without a count keeps the leaf's shape, with zeros where frozen.
  Raises:
    ValueError: the mask does not fit the tree; TypeError: a mask leaf is not boolean.
  Example:
    >>> import jax.numpy as jnp, numpy as np, maskopt
    >>> mask = {"w": np.array([True, False, False])}
    >>> maskopt.pack({"w": jnp.arange(6.0).reshape(2, 3)}, mask)["w"].values.shape
    (2, 2)
  """
  where = "maskopt.pack(freeze_mask=...)"
  tree = _tree.parameters(tree)
  layouts = layouts_of(freeze_mask, tree, where, prefer="values")
  flat = layouts.flat(tree, where)

  def packed(leaf: Any, layout: Layout, index: Index) -> Any:
    return (
      leaf if isinstance(layout, Full) else Packed(layout.take(leaf, index), layout, index=index)
    )

  return layouts.map(packed, flat)


def unpack(packed: chex.ArrayTree, base: chex.ArrayTree, freeze_mask: Any) -> chex.ArrayTree:
  """Return `base` with the packed values at its trainable elements.

    unpack(v, base)[i] = v[k] if i == trainable[k] else base[i]

  Args:
    packed: from `pack` with the same mask, or anything computed leaf by leaf from it.
    base: arrays shaped like the parameters; its frozen elements come back bit for bit.
    freeze_mask: the mask that `pack` was given.
  Returns:
    A tree like `base`, in its dtypes. Differentiable in both trees.
  Raises:
    ValueError: the values were packed with another mask (the next value of a runtime mask cannot
      be told from it), or have other shapes now; lists every path.
  Example:
    >>> import jax.numpy as jnp, numpy as np, maskopt
    >>> mask, w = {"w": np.array([True, False])}, {"w": jnp.array([1.0, 2.0])}
    >>> maskopt.unpack(maskopt.pack({"w": jnp.array([8.0, 9.0])}, mask), w, mask)["w"].tolist()
    [1.0, 9.0]
  """
  where = "maskopt.unpack(freeze_mask=...)"
  base = _tree.parameters(base)
  layouts = layouts_of(freeze_mask, base, where, prefer="values")
  values = _tree.flatten(packed, is_leaf=is_packed)
  if values.paths != layouts.static.paths:
    fail_paths(values.paths, layouts.static.paths, where, _UNPACK)
  triples = zip(values.paths, values.leaves, layouts.static.layouts, strict=True)
  problems = [p for path, x, layout in triples if layout and (p := _misfit(path, x, layout))]
  if problems:
    fail(where, problems, _UNPACK)

  def unpacked(leaf: Any, layout: Layout, index: Index, value: Any) -> Any:
    if isinstance(layout, Frozen):
      return leaf
    if not is_packed(value):
      return Full(layout.shape, layout.dtype).put(value, leaf, {})
    alike = value.layout == layout or isinstance(layout, Dense)
    given = value.values if alike else value.values.reshape(layout.packed_shape)
    return layout.put(given, leaf, index)

  return layouts.map(unpacked, layouts.flat(base, where), values.unflatten(values.leaves))


def _misfit(path: str, value: Any, layout: Layout) -> Problem | None:
  """Why a value is not what `pack` makes of a leaf with that layout, if it is not."""
  if is_packed(value):
    theirs = dataclasses.replace(value.layout, dtype=layout.dtype)  # as any value, these are cast
    alike, shape = theirs.stores_like(layout), getattr(value.values, "shape", theirs.packed_shape)
    fits = alike and shape == theirs.packed_shape
    got = "no values" if value.values is None else f"{theirs.kind} values of {shape}"
    got += " at other elements" * (not alike and shape == layout.packed_shape)
  else:
    hole = _tree.is_hole(value)
    whole = isinstance(layout, Full) and not hole and np.shape(value) == layout.shape
    fits, got = whole or (isinstance(layout, Frozen) and hole), describe(value)
  if isinstance(layout, Frozen):
    expected = "no values"
  else:
    kind = "an array" if isinstance(layout, Full) else f"{layout.kind} values"
    expected = f"{kind} of {layout.packed_shape}"
  return None if fits else Problem(path, expected, got)


# A state that travels as bytes names the mask it belongs to; its arrays alone would not.
def _to_state_dict(layouts: Layouts) -> dict[str, Any]:
  return {
    "digest": layouts.static.digest,
    "index": {
      path or "root": serialization.to_state_dict(index)
      for path, index in zip(layouts.static.paths, layouts.index, strict=True)
      if index
    },
  }


def _from_state_dict(target: Layouts, state: dict[str, Any]) -> Layouts:
  if state["digest"] != target.static.digest:
    problem = Problem("", f"a state for mask {target.static.digest}", f"one for {state['digest']}")
    fail("flax.serialization.from_state_dict", [problem], "Restore into a state of the same mask.")
  index = [
    serialization.from_state_dict(old, state["index"][path or "root"]) if old else {}
    for path, old in zip(target.static.paths, target.index, strict=True)
  ]
  return Layouts(target.static, index)


serialization.register_serialization_state(Layouts, _to_state_dict, _from_state_dict)
