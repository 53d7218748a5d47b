"""A table of what trains, what it costs, and where a mask looks like a slip."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from .. import _carrying, _copies, _masks, _ties, _tree
from .._errors import show
from .._layout import Dense, Elements, Index, Layout
from .._masks import FreezeMask
from .._packing import Layouts
from . import _elements, _live, _parts, _show, _slips
from ._parts import Other
from ._show import Shown, Table
from ._slips import Slip

_SLIPS_SHOWN = 6
# A tenth less memory is worth a line.
_WORTH_SAYING = 0.9


class Row(NamedTuple):
  """One parameter leaf of a summary.

  Attributes:
    path: as rules write it.
    shape: of the parameter.
    dtype: its name.
    parameters: number of elements.
    frozen: how many of them are frozen.
    layout: "Frozen", "Full", "Block", "Elements", "Dense" or "Joint" (of several optimizers).
    optimizer_bytes: two copies of the packed values and the layout's index arrays.
    dense_bytes: two copies of the leaf, as Adam without a mask would keep; 0 for integers.
    memory_bytes: what `prefer="memory"` would hold in place of `optimizer_bytes`.
    runtime: whether the mask is data, so that it may change without recompiling.
  """

  path: str
  shape: tuple[int, ...]
  dtype: str
  parameters: int
  frozen: int
  layout: str
  optimizer_bytes: int
  dense_bytes: int
  memory_bytes: int
  runtime: bool

  @property
  def trainable(self) -> bool | Literal["partial"]:
    """Whether the leaf trains; "partial" if some of its elements do."""
    if 0 < self.frozen < self.parameters:
      return "partial"
    return self.layout != "Frozen" and self.frozen == 0

  @property
  def frozen_share(self) -> float:
    """Frozen elements over all elements; 0 for an empty leaf."""
    return self.frozen / self.parameters if self.parameters else 0.0


@dataclasses.dataclass(frozen=True, repr=False)
class Summary(Shown):
  """What `summary` returns; it prints itself.

  Attributes:
    rows: one `Row` per parameter leaf, in network order where that is known.
    slips: units whose kernel is frozen and whose bias is not, and the reverse.
    others: (kind, arrays, values) of what a module holds beside its parameters.
    live: normalisation layers that follow the batch although units there are frozen.
    shared: (further path, path of the row) of every parameter that a module holds under several.
  """

  rows: tuple[Row, ...]
  slips: tuple[Slip, ...] = ()
  others: tuple[tuple[str, int, int], ...] = ()
  live: tuple[str, ...] = ()
  shared: tuple[tuple[str, str], ...] = ()

  @property
  def parameters(self) -> int:
    """Number of parameters."""
    return sum(row.parameters for row in self.rows)

  @property
  def frozen(self) -> int:
    """Number of frozen parameters."""
    return sum(row.frozen for row in self.rows)

  @property
  def trainable(self) -> int:
    """Number of trainable parameters."""
    return self.parameters - self.frozen

  @property
  def optimizer_bytes(self) -> int:
    """Bytes of Adam's moments and of the index arrays under `selective_transform`."""
    return sum(row.optimizer_bytes for row in self.rows)

  @property
  def dense_bytes(self) -> int:
    """Bytes of Adam's moments without a mask."""
    return sum(row.dense_bytes for row in self.rows)

  @property
  def memory_bytes(self) -> int:
    """What `selective_transform(..., prefer="memory")` would hold in place of `optimizer_bytes`."""
    return sum(row.memory_bytes for row in self.rows)

  def _table(self) -> Table:
    slipped = {path for slip in self.slips for path in (slip.frozen, slip.trains)}
    title = f"Summary: {_show.counted(len(self.rows), 'leaf')}".replace("leafs", "leaves")
    return Table(
      title,
      _HEADERS,
      [_cells(row, row.path in slipped) for row in self.rows],
      ["warn" if r.path in slipped else "dim" if not r.trainable else "" for r in self.rows],
      right=frozenset({3, 5, 7}),
      spare=(2, 6, 1),  # dtype, layout, shape
      notes=[*self._totals(), *self._warnings()],
    )

  def _totals(self) -> list[tuple[str, str]]:
    trained = _show.share(self.trainable, self.parameters)
    frozen = _show.share(self.frozen, self.parameters)
    notes = [
      ("", f"Parameters: {self.parameters:,}"),
      ("", f"  trainable: {self.trainable:,} ({trained})"),
      ("", f"  frozen: {self.frozen:,} ({frozen})"),
      ("", f"Adam's state: {_show.size(self.optimizer_bytes)}{self._saved()}"),
    ]
    if self.memory_bytes < _WORTH_SAYING * self.optimizer_bytes:
      notes.append(("", f'  with prefer="memory": {_show.size(self.memory_bytes)}'))
    if self.shared:
      same = [f"{alias} is {path}" for alias, path in self.shared]
      notes.append(("dim", f"Shared, counted once: {_show.listed(same)}"))
    if self.others:
      parts = [
        f"{_show.counted(n, 'array')} of {kind} ({_show.counted(values, 'value')})"
        for kind, n, values in self.others
      ]
      notes.append(("dim", f"Not parameters: {', '.join(parts)}"))
    return notes

  def _saved(self) -> str:
    if not self.dense_bytes or self.optimizer_bytes == self.dense_bytes:
      return ""
    portion = _show.share(self.optimizer_bytes, self.dense_bytes)
    return f", {portion} of the {_show.size(self.dense_bytes)} without a mask"

  def _warnings(self) -> list[tuple[str, str]]:
    notes = [("warn", f"! {slip}") for slip in self.slips[:_SLIPS_SHOWN]]
    if len(self.slips) > _SLIPS_SHOWN:
      notes.append(("warn", f"! and {len(self.slips) - _SLIPS_SHOWN} more, see .slips"))
    notes += [
      (
        "warn",
        f"! {path} follows the batch: frozen units there drift at its output; "
        "maskopt.nnx.freeze_statistics holds them still",
      )
      for path in self.live
    ]
    if whole := [show(row.path) for row in self.rows if row.runtime and row.layout == "Dense"]:
      what = (
        "a mask that is a jax.Array may change at every step, so all has state; np.asarray(mask) "
      )
      what += "is fixed, maskopt.runtime(mask, count=...) says how many train"
      notes.append(("warn", f"! {_show.listed(whole)}: {what}"))
    return notes


_HEADERS = ("path", "shape", "dtype", "params", "trainable", "frozen", "layout", "Adam")


def _cells(row: Row, slipped: bool) -> tuple[str, ...]:
  return (
    show(row.path),
    _show.shape(row.shape),
    row.dtype,
    f"{row.parameters:,}",
    f"{row.trainable}{' !' if slipped else ''}",
    _show.share(row.frozen, row.parameters),
    row.layout + " (runtime)" * row.runtime,
    _show.size(row.optimizer_bytes),
  )


def summary(params: Any, freeze_mask: FreezeMask | Layouts | None = None) -> Summary:
  """Return a table of the parameters: what trains, what is frozen, and what the optimizer holds.

    frozen + trainable = parameters        optimizer_bytes = 2 * packed values + index arrays

  The mask is analysed once, as `selective_transform` would, and structure stays symbolic: a row
  mask of a billion elements costs its rows. Units whose kernel is frozen and whose bias trains, or
  the reverse, are marked and named.

  Args:
    params: a tree of arrays or of `jax.ShapeDtypeStruct`, linen's variables, or a module; of
      `optax.LookaheadParams` the fast copy is shown.
    freeze_mask: any freeze mask over them, or `maskopt.mask_of(state)`; without one every float
      trains but what nnx modules freeze by masks of their own.
  Returns:
    A `Summary` that prints itself; `.rows`, `.slips` and the totals are there as data.
  Raises:
    ValueError: the mask does not fit.
    TypeError: it is not boolean, an integer leaf would train, or it is called inside `jit`.
  Example:
    >>> import jax.numpy as jnp, numpy as np, maskopt
    >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    >>> first = np.array([True, False, False])
    >>> report = maskopt.summary(params, {"kernel": first, "bias": False})
    >>> report
    Summary: 2 leaves
    path    shape   dtype    params  trainable  frozen  layout  Adam
    ----------------------------------------------------------------
    bias    (3,)    float32       3  True !         0%  Full    24 B
    kernel  (4, 3)  float32      12  partial !   33.3%  Dense   99 B
    ----------------------------------------------------------------
    Parameters: 15
      trainable: 11 (73.3%)
      frozen: 4 (26.7%)
    Adam's state: 123 B, 102.5% of the 120 B without a mask
      with prefer="memory": 96 B
    ! kernel is frozen and bias trains: unit 0
    >>> report.slips[0].units
    (0,)
  """
  where = "maskopt.summary(freeze_mask=...)"
  source = params = _copies.trained(params)
  params, freeze_mask, others = _parts.parts(params, freeze_mask, where)
  flat = _tree.flatten(params)
  if freeze_mask is None:
    # Without a mask nothing can be wrong with it: shared arrays and integers are only shown.
    params = flat.unflatten([_parts.spec(x) for x in flat.leaves])
    own = _carrying.by_path(source) if isinstance(source, nnx.Module) else {}
    masks = [own.get(p, _without_mask(x)) for p, x in zip(flat.paths, flat.leaves, strict=True)]
    freeze_mask = flat.unflatten(masks)
  layouts = _elements.analysed(freeze_mask, params, where)
  items = [
    (path, layout, index, leaf)
    for path, layout, index, leaf in (
      (flat.paths[i], layouts.static.layouts[i], layouts.index[i], flat.leaves[i])
      for i in _parts.network_order(source, flat.paths)
    )
    if layout is not None
  ]
  rows = tuple(_row(*item) for item in items)
  return Summary(
    rows,
    tuple(_slips.find([item[:3] for item in items])),
    _kinds(others),
    _live.live_statistics(source, {row.path: row.frozen for row in rows}),
    tuple(x for x in _ties.aliases(source) if x[1] in {row.path for row in rows}),
  )


def _without_mask(leaf: Any) -> bool | None:
  """Frozen exactly if nothing could train it."""
  return None if _tree.is_hole(leaf) else not _trains(leaf)


def _trains(leaf: Any) -> bool:
  return jnp.issubdtype(_masks.dtype_of(leaf), jnp.inexact)


def _row(path: str, layout: Layout, index: Index, leaf: Any) -> Row:
  dtype = _masks.dtype_of(leaf)
  dense = 2 * layout.size * _elements.item_bytes(layout) if _trains(leaf) else 0
  held = 2 * _elements.packed_bytes(layout) + _elements.index_bytes(index)
  frozen = _elements.frozen_count(layout, index)
  runtime = isinstance(layout, (Dense, Elements)) and not layout.digest
  least = held if runtime else _elements.least_bytes(layout, held)
  kind = layout.kind
  return Row(path, layout.shape, str(dtype), layout.size, frozen, kind, held, dense, least, runtime)


def _kinds(others: list[Other]) -> tuple[tuple[str, int, int], ...]:
  arrays = Counter(x.kind for x in others)
  values = Counter()
  for x in others:
    values[x.kind] += int(np.size(x.value))
  return tuple((kind, n, values[kind]) for kind, n in arrays.items())
