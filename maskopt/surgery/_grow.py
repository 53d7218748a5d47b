"""More units in layers, and more of everything that goes with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .._errors import show
from ..report._show import Shown, Table, shape as shown
from . import _initial, _model, _preserved, _reach, _request, _widen
from ._model import Model
from ._request import Mode
from ._result import State, Surgery, result
from ._start import Axis
from ._widen import Parts

_WHERE = "maskopt.surgery.grow(layer=...)"


@dataclasses.dataclass(frozen=True, repr=False)
class Growth(Shown):
  """What `grow` did; it prints itself.

  Attributes:
    layers: (layer, how many units there were, how many there are); layers whose units are the same
      ones, as on one residual stream, come together.
    leaves: (path, old shape, new shape, whether it makes or reads units) of each array that grew.
    difference: the largest change of an old output, relative to the largest output; None if nothing
      was computed. 0.0 says that every old output has its bits.
  """

  layers: tuple[tuple[str, int, int], ...]
  leaves: tuple[tuple[str, tuple[int, ...], tuple[int, ...], str], ...]
  difference: float | None

  def _table(self) -> Table:
    told = "not compared" if self.difference is None else f"changed by {self.difference:.2g}"
    told = "bit-equal" if self.difference == 0 else told
    (first, before, after), *others = self.layers
    grew = [f"{show(first)} grew from {before} to {after} units"]
    grew += [f"{show(layer)} from {a} to {b}" for layer, a, b in others]
    return Table(
      f"{', '.join(grew)}; old outputs {told}",
      ("path", "before", "after", "units"),
      [(p, shown(a), shown(b), role) for p, a, b, role in self.leaves],
      [""] * len(self.leaves),
    )


def grow(
  model: Any,
  layer: str | Mapping[str, int],
  units: int | None = None,
  *,
  inputs: Any = None,
  forward: Any = None,
  new_forward: Any = None,
  consumers: Sequence[Any] | Mapping[str, Sequence[Any]] | None = None,
  mode: Mode | Mapping[str, Mode] = "zero",
  init: Any = None,
  key: Any = None,
  axis: int | Mapping[str, int] | None = None,
  of: int | Mapping[str, int] | None = None,
  parts: int | Mapping[str, int] = 1,
  opt_state: Any = None,
  tx: Any = None,
  to: Any = None,
) -> Surgery:
  """Add units to layers, and whatever has to grow with them.

    old(x) = new(x)        for the old outputs, with mode "zero", "progressive" or "copy"

  The forward is traced with the example inputs, and the units are followed through it: to the bias,
  statistics and scales beside them, the rows of the layers that read them (through flattening,
  pooling, concatenation, scans), the other gates of a cell, the projections of an attention, and
  every layer that writes to the same residual stream. Units are the last axis of a kernel, the
  hidden units of a recurrent cell, the heads of an attention, the tokens of an embedding. New ones
  come after the old; where several runs of units lie on one axis (gates side by side, pixels times
  channels), after each run. Several layers grow at once, in any order, whether one reads the other
  or not. Sizes and masks that nnx layers carry follow; the static fields of an Equinox module, such
  as the number of heads, stay.

  Args:
    model: an nnx module, linen variables or parameters, or any tree of parameters.
    layer: path of the layer, or of its kernel; or a dict of layers and how many units to add to
      each. Layers on one residual stream have the same units: name one, or all with one number.
    units: how many to add, of one layer.
    inputs: example inputs of the forward, a tuple where it takes several; arrays, or
      `jax.ShapeDtypeStruct`s, with which nothing is compared.
    forward: `f(model, *inputs)`; a linen module, or `functools.partial(module, train=False)`; by
      default an nnx module's own call. It should compute as in evaluation.
    new_forward: the forward of the grown model where `forward` knows the old size: the new linen
      module. Without it, a linen model's outputs are not compared.
    consumers: paths of the layers that read the units, or (path, axis) pairs, in place of a trace.
      Normalisations between them count as consumers too. None are needed for an output layer: [].
      Of several layers, a dict by layer; those left out are traced.
    mode: "zero": weights from the new units to old ones are zero. "progressive": so they are, and
      the mask freezes them: however the new units train, no old output changes, so something that
      reads them must grow in the same call (Rusu et al. 2016, arXiv 1606.04671). "copy": new units
      are copies of old ones, which share their outgoing weights (Net2Net). "init": everything new
      is initialised. Of several layers, one for all or a dict by layer ("zero" where left out).
    init: initializer `(key, shape, dtype)` of new weights, or rules [(glob, initializer)]; by
      default variance 1 / fan-in.
    key: random key; by default `jax.random.key(0)`. In mode "copy" it also says which units are
      copied; by default the first ones.
    axis: the axis of the kernel, where it is another; of several layers, a dict by layer.
    of: how many units the axis holds, where each takes several positions (heads of a fused axis);
      of several layers, a dict by layer.
    parts: how many such groups of units lie side by side on the axis (3 for query, key, value); of
      several layers, a dict by layer.
    opt_state: an optimizer state over the old parameters, to be taken along; or an `nnx.Optimizer`
      or a `TrainState`, which brings its transform.
    tx: its transform.
    to: the transform over the new parameters, or a function of the new freeze mask that returns it;
      by default `tx`. Without `opt_state` it starts anew. For an `nnx.Optimizer` or `TrainState`, a
      function of the new model and freeze mask that returns the next one.
  Returns:
    A `Surgery`: the new model, the mask "old frozen, new trainable", the state, its transform, and
    a `Growth`. Old weights keep their bits but for those that mode "copy" divides. Old outputs are
    bit-equal where sums have the same order; else they differ by rounding, as the `Growth` says.
  Raises:
    ValueError: no such layer; no units to add; consumers that cannot be followed; units of two
      layers within one another; old outputs that change in a mode that keeps them (a normalisation
      over the units); a state of other parameters. Lists every layer; nothing has changed.
    TypeError: layer, units or `to` are of no kind listed.
  Example:
    >>> import jax, jax.numpy as jnp, optax, maskopt
    >>> params = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.ones((3, 1))}}
    >>> def forward(p, x):
    ...   return jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]
    >>> adam = optax.adam(0.1)
    >>> state = adam.init(params)
    >>> grown = maskopt.surgery.grow(
    ...   params, {"a": 2, "b": 1}, inputs=jnp.ones((1, 2)), forward=forward,
    ...   opt_state=state, tx=adam,
    ...   to=lambda mask: maskopt.selective_transform(adam, freeze_mask=mask),
    ... )
    >>> jax.tree.map(jnp.shape, grown.model)
    {'a': {'kernel': (2, 5)}, 'b': {'kernel': (5, 2)}}
    >>> grown.freeze_mask["b"]["kernel"].astype(int).tolist()
    [[1, 0], [1, 0], [1, 0], [0, 0], [0, 0]]
    >>> grads = jax.grad(lambda p: forward(p, jnp.ones((1, 2))).sum())(grown.model)
    >>> updates, state = grown.tx.update(grads, grown.opt_state, grown.model)
  """
  requests = _request.read(
    layer, units, _WHERE, mode=mode, consumers=consumers, axis=axis, of=of, parts=parts
  )
  _initial.check(init, _WHERE)
  state = State(opt_state, tx, to)
  state.check(_WHERE)
  old = Model(model)
  forward = _model.forward_of(old, forward)
  reaches, refusals = _reach.reached(old, requests, forward, inputs, key)
  refusals.raise_all(_WHERE)
  axes, kept = _widen.axes(reaches, refusals), _widen.outputs(reaches, refusals)
  refusals.raise_all(_WHERE)
  seed = jax.random.key(0) if key is None else key
  arrays, placements = _widen.arrays(old, axes, init, seed, _WHERE)
  new = old.rebuilt(arrays, placements)
  difference, names = None, ", ".join(r.layer for r in requests)
  if inputs is not None and forward is not None:
    given = old, new, forward, new_forward, inputs, kept, names
    difference = _preserved.difference(*given, _WHERE)
  modes = {r.mode for r in requests}
  if difference is not None and "init" not in modes:
    _preserved.check(difference, old, " and ".join(sorted(modes)), names, _WHERE)
  layers = tuple((r.layer, r.units, r.units + r.more) for r in reaches)
  growth = Growth(layers, _leaves(old, arrays, axes), difference)
  return result(model, new, placements, state, _WHERE, growth)


def _leaves(
  old: Model, arrays: Mapping[str, Any], axes: Mapping[Axis, Parts]
) -> tuple[tuple[str, tuple[int, ...], tuple[int, ...], str], ...]:
  rows = []
  for path, new in arrays.items():
    reads = {part.reads for (p, _), parts in axes.items() if p == path for part in parts}
    role = " and ".join(["makes"] * (False in reads) + ["reads"] * (True in reads))
    rows.append((path, tuple(np.shape(old.arrays[path])), tuple(new.shape), role))
  return tuple(rows)
