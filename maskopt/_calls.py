"""The order in which a linen module calls its parts, seen by tracing it once."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from flax import linen as nn

from . import _tree

# Ready-made modules count as one layer each, whatever modules they are made of.
_READY_MADE = (
  "flax.nnx.nn.",
  "flax.linen.attention",
  "flax.linen.linear",
  "flax.linen.normalization",
  "flax.linen.recurrent",
  "flax.linen.stochastic",
  "equinox.nn.",
)
# But these only chain modules that others give them.
_CHAINS = {"Sequential", "StatefulLayer", "Shared", "MLP", "RNN", "Bidirectional"}


def is_one_layer(kind: type) -> bool:
  """Whether modules of this class are one layer although they hold modules."""
  made = (c for c in kind.__mro__ if c.__module__.startswith(_READY_MADE))
  nearest = next(made, None)
  return nearest is not None and nearest.__name__ not in _CHAINS


def is_linen(x: Any) -> bool:
  """Whether x is a linen module, or one with keyword arguments of its call bound to it."""
  return isinstance(x.func if isinstance(x, functools.partial) else x, nn.Module)


@dataclasses.dataclass
class _Call:
  """One call under way: the module, and whether it called a layer that is not a part of it."""

  path: str
  one_layer: bool
  opened: bool = False
  # Of an `nn.Sequential`: its elements, and how many of them have had their turn.
  chain: tuple[Any, ...] = ()
  done: int = 0


class _Recorder:
  """Notes each module at its first call; functions in an `nn.Sequential` get their place too."""

  def __init__(self) -> None:
    self.calls: list[_Call] = []
    self._stack: list[_Call] = []

  def __call__(self, function: Any, args: Any, kwargs: Any, context: Any) -> Any:
    module, path = context.module, "/".join(context.module.path)
    # Lifted transforms call nameless functions on stand-ins for the module.
    is_method = context.method_name != "setup" and hasattr(type(module), context.method_name)
    if not is_method or any(c.one_layer and _tree.covers(c.path, path) for c in self._stack):
      return function(*args, **kwargs)
    if self._stack:
      self._stack[-1].opened = True
      self._pass(self._stack[-1], module)
    chain = tuple(module.layers) if isinstance(module, nn.Sequential) else ()
    call = _Call(path, is_one_layer(type(module)), chain=chain, opened=bool(chain))
    self.calls.append(call)
    self._stack.append(call)
    result = function(*args, **kwargs)
    self._pass(call, None)
    self._stack.pop()
    return result

  def _pass(self, call: _Call, module: Any) -> None:
    """Note the functions of a chain that stand before `module`, or all that are left."""
    places = [k for k, x in enumerate(call.chain) if x is module and k >= call.done]
    if module is not None and not places:
      return
    end = places[0] if places else len(call.chain)
    for k in range(call.done, end):
      if not isinstance(call.chain[k], nn.Module):
        self.calls.append(_Call(_tree.join(call.path, f"layers_{k}"), one_layer=True))
    call.done = end + 1


def call_order(module: Any, *inputs: Any) -> list[str]:
  """Return the paths of a linen module's layers in the order of their first calls.

  Args:
    module: a linen module, or `functools.partial(module, train=False)` for keyword arguments.
    inputs: example inputs, concrete or abstract; nothing is computed.
  Returns:
    Paths without the collection; parameters of a module that calls others stand where it is called.
  """
  keywords = module.keywords if isinstance(module, functools.partial) else {}
  if isinstance(module, functools.partial):
    module, inputs = module.func, (*module.args, *inputs)
  recorder = _Recorder()

  def init(*arrays: Any) -> Any:
    with nn.intercept_methods(recorder):
      return module.init(jax.random.key(0), *arrays, **keywords)

  variables = _traced(init, inputs)
  held = _tree.flatten(variables.get("params", {})).paths
  opened = {c.path for c in recorder.calls if c.opened and not c.one_layer}
  order: dict[str, None] = {}
  for call in recorder.calls:
    if call.path not in opened:
      order[call.path] = None
    else:
      order |= dict.fromkeys(p for p in held if p.rpartition("/")[0] == call.path)
  return list(order)


def _traced(init: Any, inputs: tuple[Any, ...]) -> Any:
  """The abstract result; inputs that are not arrays (a `train` flag) stay what they are."""
  arrays = [k for k, x in enumerate(inputs) if not isinstance(x, (bool, str, type(None)))]

  def call(*given: Any) -> Any:
    filled = list(inputs)
    for k, x in zip(arrays, given, strict=True):
      filled[k] = x
    return init(*filled)

  return jax.eval_shape(call, *(inputs[k] for k in arrays))
