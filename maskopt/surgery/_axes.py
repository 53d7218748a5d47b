"""What each primitive does to axes: which of its results' axes are which of its operands'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .._slicer._rules_shape import ELEMENTWISE, UNARY_SHARDING
from ._network import Network, Value

Relate = Callable[[Network, Any, Sequence[Value], Sequence[Value]], None]
_RELATIONS: dict[str, Relate] = {}

# Results that read no axis of an array; their sizes are the program's own.
_MADE = """
  iota random_bits random_fold_in random_seed random_split random_unwrap random_wrap rng_uniform
  threefry2x32 empty
""".split()
_ALONG = "cumsum cummax cummin cumprod cumlogsumexp".split()
_REDUCING = """
  argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor
""".split()


def relate(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  """Tell the network what one equation does to axes; what has no rule lets no unit through."""
  relation = _RELATIONS.get(eqn.primitive.name, _closed)
  relation(network, eqn, ins, outs)


def _relation(*names: str) -> Callable[[Relate], Relate]:
  def register(relation: Relate) -> Relate:
    _RELATIONS.update(dict.fromkeys(names, relation))
    return relation

  return register


def _closed(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  for value in (*ins, *outs):
    network.block(value, range(len(value.shape)), _name(eqn))


def _name(eqn: Any) -> str:
  return f"the primitive {eqn.primitive.name}"


@_relation(*_MADE)
def _made(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  del network, eqn, ins, outs


@_relation(*ELEMENTWISE, *UNARY_SHARDING)
def _elementwise(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  (out,) = outs
  for v in ins:
    # Axes of size 1 stretch; a scalar has none.
    for axis in range(len(v.shape)):
      if v.shape[axis] == out.shape[axis]:
        network.same((v, axis), (out, axis))


@_relation("bitcast_convert_type")
def _bitcast(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  if ins[0].shape == outs[0].shape:
    _parallel(network, eqn, ins, outs)
  else:  # to a dtype of another width
    _closed(network, eqn, ins, outs)


@_relation("optimization_barrier")
def _parallel(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  for v, out in zip(ins, outs, strict=True):
    for axis in range(len(v.shape)):
      network.same((v, axis), (out, axis))


@_relation(*_ALONG)
def _along(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  _parallel(network, eqn, ins, outs)


@_relation("transpose")
def _transpose(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  for axis, source in enumerate(eqn.params["permutation"]):
    network.same((ins[0], int(source)), (outs[0], axis))


@_relation("broadcast_in_dim")
def _broadcast(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  source, target = ins[0], outs[0]
  for axis, to in enumerate(eqn.params["broadcast_dimensions"]):
    if source.shape[axis] == target.shape[int(to)]:
      network.same((source, axis), (target, int(to)))


@_relation("reshape", "squeeze", "expand_dims")
def _reshape(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  network.reshape(ins[0], outs[0])


@_relation(*_REDUCING)
def _reduce(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  """Units that are summed up end here; whether that keeps the function shows in the numbers."""
  gone = {int(a) for a in eqn.params["axes"]}
  kept = [axis for axis in range(len(ins[0].shape)) if axis not in gone]
  for axis, source in enumerate(kept):
    network.same((ins[0], source), (outs[0], axis))


@_relation("sort")
def _sort(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  along = eqn.params["dimension"]
  for v, out in zip(ins, outs, strict=True):
    for axis in range(len(v.shape)):
      if axis != along:
        network.same((v, axis), (out, axis))
    network.block(v, [along], _name(eqn))


@_relation("dot_general")
def _dot_general(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  lhs, rhs = ins
  (contract_l, contract_r), (batch_l, batch_r) = eqn.params["dimension_numbers"]
  for a, b in zip(contract_l, contract_r, strict=True):
    network.contract((lhs, int(a)), (rhs, int(b)))
  for axis, (a, b) in enumerate(zip(batch_l, batch_r, strict=True)):
    network.same((lhs, int(a)), (outs[0], axis))
    network.same((rhs, int(b)), (outs[0], axis))
  at = len(batch_l)
  for v, used in ((lhs, {*contract_l, *batch_l}), (rhs, {*contract_r, *batch_r})):
    for axis in range(len(v.shape)):
      if axis not in used:
        network.same((v, axis), (outs[0], at))
        at += 1


@_relation("conv_general_dilated")
def _conv(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  (lhs, rhs), out = ins, outs[0]
  spec, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
  batch, feature = spec.lhs_spec[:2]
  makes, reads = spec.rhs_spec[:2]
  network.same((lhs, batch), (out, spec.out_spec[0]))
  network.same((rhs, makes), (out, spec.out_spec[1]))
  if eqn.params["batch_group_count"] > 1:
    network.block(lhs, [batch], "a convolution in groups")
  if groups == 1:
    network.contract((lhs, feature), (rhs, reads))
  elif rhs.shape[reads] == 1 and rhs.shape[makes] == groups:  # one channel, one filter
    network.same((lhs, feature), (out, spec.out_spec[1]))
  else:
    for value, axis in ((lhs, feature), (rhs, reads), (rhs, makes)):
      network.block(value, [axis], "a convolution in groups")
  for value, axes in ((lhs, spec.lhs_spec), (rhs, spec.rhs_spec), (out, spec.out_spec)):
    network.block(value, axes[2:], "the pixels of a convolution")


@_relation("concatenate")
def _concatenate(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  along, start = eqn.params["dimension"], 0
  for v in ins:
    for axis in range(len(v.shape)):
      if axis != along:
        network.same((v, axis), (outs[0], axis))
    network.window((outs[0], along), (v, along), start)
    network.flow((v, along), (outs[0], along))
    start += v.shape[along]


@_relation("split")
def _split(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  along, start = eqn.params["axis"], 0
  for out in outs:
    for axis in range(len(out.shape)):
      if axis != along:
        network.same((ins[0], axis), (out, axis))
    network.window((ins[0], along), (out, along), start)
    network.flow((ins[0], along), (out, along))
    start += out.shape[along]


@_relation("slice")
def _slice(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  strides = eqn.params["strides"] or (1,) * len(ins[0].shape)
  for axis, (start, step) in enumerate(zip(eqn.params["start_indices"], strides, strict=True)):
    if ins[0].shape[axis] == outs[0].shape[axis]:
      network.same((ins[0], axis), (outs[0], axis))
    elif step == 1:
      network.window((ins[0], axis), (outs[0], axis), start)
      network.flow((ins[0], axis), (outs[0], axis))
    else:
      network.block(ins[0], [axis], "a slice with steps")
      network.block(outs[0], [axis], "a slice with steps")


@_relation("dynamic_slice", "dynamic_update_slice")
def _dynamic(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  for axis in range(len(outs[0].shape)):
    picks = eqn.primitive.name == "dynamic_slice"
    for v in ins[:1] if picks else ins[:2]:
      if v.shape[axis] == outs[0].shape[axis]:
        network.same((v, axis), (outs[0], axis))
      elif not (picks and outs[0].shape[axis] == 1):  # one entry, as of a vocabulary, ends here
        network.block(v, [axis], _name(eqn))


@_relation("pad")
def _pad(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  for axis, (low, high, inner) in enumerate(eqn.params["padding_config"]):
    if low == high == inner == 0:
      network.same((ins[0], axis), (outs[0], axis))
    elif inner == 0 and low >= 0 and high >= 0:
      network.window((outs[0], axis), (ins[0], axis), low)
      network.flow((ins[0], axis), (outs[0], axis))
    else:
      network.block(ins[0], [axis], _name(eqn))
      network.block(outs[0], [axis], _name(eqn))


@_relation("rev")
def _rev(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  for axis in range(len(outs[0].shape)):
    if axis in eqn.params["dimensions"]:
      network.block(ins[0], [axis], _name(eqn))
      network.block(outs[0], [axis], _name(eqn))
    else:
      network.same((ins[0], axis), (outs[0], axis))


@_relation("gather")
def _gather(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  """Axes taken whole pass; an axis from which one entry is picked (a vocabulary) ends here."""
  numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
  dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
  kept = [axis for axis in range(len(ins[0].shape)) if axis not in dropped]
  for source, axis in zip(kept, numbers.offset_dims, strict=True):
    if sizes[source] == ins[0].shape[source]:
      network.same((ins[0], source), (outs[0], axis))
    elif sizes[source] != 1:
      network.block(ins[0], [source], _name(eqn))
      network.block(outs[0], [axis], _name(eqn))
  network.block(ins[0], numbers.operand_batching_dims, _name(eqn))
  batch = [axis for axis in range(len(outs[0].shape)) if axis not in numbers.offset_dims]
  for source, axis in enumerate(batch):
    network.same((ins[1], source), (outs[0], axis))


@_relation("reduce_window_max", "reduce_window_sum", "reduce_window_min", "reduce_window")
def _window(network: Network, eqn: Any, ins: Sequence[Value], outs: Sequence[Value]) -> None:
  for axis, size in enumerate(eqn.params["window_dimensions"]):
    if size == 1:
      network.same((ins[0], axis), (outs[0], axis))
    else:
      network.block(ins[0], [axis], "the pixels of a pooling window")
      network.block(outs[0], [axis], "the pixels of a pooling window")
