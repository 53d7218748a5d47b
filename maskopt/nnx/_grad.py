"""Gradients of the trainable elements of nnx modules: `nnx.grad`, block by block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from .. import _argnums, _grad
from .._errors import Problem, fail
from . import _carried

_WHERE = "maskopt.nnx.grad(freeze_mask=...)"
_TAG = "maskopt.nnx.grad"

# Where a module stands among other arguments.
_LATER = object()

Argnums = int | nnx.DiffState | Sequence[int | nnx.DiffState]


def value_and_grad(
  fun: Callable[..., Any],
  freeze_mask: Any = None,
  argnums: Argnums = 0,
  has_aux: bool = False,
  packed: bool = False,
  *,
  holomorphic: bool = False,
  allow_int: bool = False,
) -> Callable[..., tuple[Any, Any]]:
  """Return a function that evaluates `fun` and its gradient at a module's trainable elements.

    value, g = fun(model), where g[i] = 0 if freeze_mask[i] else d fun / d parameter[i]

  A drop-in for `nnx.value_and_grad`: what `fun` changes in modules (batch statistics, RNG counts,
  new variables) is changed outside. Of the backward pass only what trainable blocks need is
  computed, as in `maskopt.value_and_grad`.

  Args:
    fun: a scalar function of modules and anything else.
    freeze_mask: a freeze mask over the parameters of the module `argnums`, a tuple of masks for
      several, or `maskopt.mask_of(optimizer.opt_state)`. None takes the masks that modules carry.
    argnums: which positional argument, or arguments, to differentiate: an int for the `nnx.Param`
      variables of a module (or for a tree of arrays), `nnx.DiffState(k, filter)` for others.
    has_aux: whether `fun` returns (value, auxiliary data); modules may be among these.
    packed: return packed leaves in place of full-shaped ones; `maskopt.nnx.Optimizer` takes both.
    holomorphic: as in `jax.value_and_grad`.
    allow_int: as in `jax.value_and_grad`.
  Returns:
    A function of the same arguments that returns (value, gradient), or ((value, aux), gradient).
    The gradient of a module is an `nnx.State` of the differentiated variables, exact zeros where
    frozen; NaN and Inf pass as in JAX.
  Raises:
    ValueError: the mask does not fit the module, or trains what a module's own mask freezes.
    TypeError: a mask leaf is not boolean.
  Example:
    >>> import jax.numpy as jnp, numpy as np, maskopt
    >>> from flax import nnx
    >>> model, mask = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {"kernel": True, "bias": np.arange(2) < 1}
    >>> value, g = maskopt.nnx.value_and_grad(lambda m: m(jnp.ones((3, 2))).sum(), mask)(model)
    >>> g["bias"][...].tolist()
    [0.0, 3.0]
  """
  _argnums.check_function(fun, "maskopt.nnx.grad(fun, ...)")
  numbers = _numbers(argnums)
  several = not isinstance(argnums, (int, nnx.DiffState))

  @functools.wraps(fun, updated=())
  @nnx.update_context(_TAG)
  def evaluated(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    call = _Call(fun, numbers, args, kwargs, has_aux)
    differentiated = _grad.value_and_grad(
      call.pure,
      call.masks(freeze_mask, several),
      argnums=tuple(range(len(numbers))) if several else 0,
      has_aux=True,
      packed=packed,
      holomorphic=holomorphic,
      allow_int=allow_int,
    )
    (value, changed), gradients = differentiated(*call.differentiated)
    aux = call.propagate(changed)
    return ((value, aux) if has_aux else value), gradients

  return evaluated


def grad(
  fun: Callable[..., Any],
  freeze_mask: Any = None,
  argnums: Argnums = 0,
  has_aux: bool = False,
  packed: bool = False,
  *,
  holomorphic: bool = False,
  allow_int: bool = False,
) -> Callable[..., Any]:
  """Return a function that evaluates the gradient of `fun` at a module's trainable elements.

    g[i] = 0 if freeze_mask[i] else d fun / d parameter[i]

  A drop-in for `nnx.grad`; see `maskopt.nnx.value_and_grad` for what is computed.

  Args:
    fun: a scalar function of modules and anything else.
    freeze_mask: a freeze mask over the parameters of the module `argnums`, a tuple of masks for
      several, or `maskopt.mask_of(optimizer.opt_state)`. None takes the masks that modules carry.
    argnums: which positional argument, or arguments, to differentiate; ints or `nnx.DiffState`s.
    has_aux: whether `fun` returns (value, auxiliary data).
    packed: return packed leaves in place of full-shaped ones.
    holomorphic: as in `jax.grad`.
    allow_int: as in `jax.grad`.
  Returns:
    A function of the same arguments that returns the gradient, or (gradient, aux).
  Raises:
    ValueError: the mask does not fit the module; TypeError: a mask leaf is not boolean.
  Example:
    >>> import jax.numpy as jnp, maskopt
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> g = maskopt.nnx.grad(lambda m: m(jnp.ones((3, 2))).sum(), {"kernel": True, "bias": False})
    >>> g(model)["kernel"][...].tolist()
    [[0.0], [0.0]]
  """
  both = value_and_grad(
    fun, freeze_mask, argnums, has_aux, packed, holomorphic=holomorphic, allow_int=allow_int
  )

  @functools.wraps(fun, updated=())
  def gradient(*args: Any, **kwargs: Any) -> Any:
    value, g = both(*args, **kwargs)
    return (g, value[1]) if has_aux else g

  return gradient


def _numbers(argnums: Argnums) -> list[nnx.DiffState]:
  several = [argnums] if isinstance(argnums, (int, nnx.DiffState)) else list(argnums)
  return [n if isinstance(n, nnx.DiffState) else nnx.DiffState(n, nnx.Param) for n in several]


def _is_node(x: Any) -> bool:
  return isinstance(x, (nnx.Pytree, nnx.Variable))


def _holds_node(x: Any) -> bool:
  return any(map(_is_node, jax.tree.leaves(x, is_leaf=_is_node)))


class _Call:
  """One call of a function of modules, split into what is differentiated and what is not.

  All modules are split together, so that a variable which two arguments share stays one.
  """

  def __init__(
    self,
    fun: Callable[..., Any],
    numbers: list[nnx.DiffState],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    has_aux: bool,
  ):
    self._fun, self._has_aux, self._args = fun, has_aux, args
    self.chosen = _positions([n.argnum for n in numbers], len(args))
    rest = [x for k, x in enumerate(args) if k not in self.chosen]
    leaves, self._rest_def = jax.tree.flatten((rest, kwargs), is_leaf=_is_node)
    self._rest = [_LATER if _is_node(x) else x for x in leaves]
    # The differentiated modules come first: a shared variable is found there.
    self._modules = [k for k in self.chosen if _holds_node(args[k])]
    nodes = [args[k] for k in self._modules] + [x for x in leaves if _is_node(x)]
    self._count = len(nodes)
    self._filters = dict(zip(self.chosen, [n.filter for n in numbers], strict=True))
    with nnx.split_context(_TAG) as context:
      wanted = [_within(i, self._filters[k]) for i, k in enumerate(self._modules)]
      self._graphdef, *states = context.split(nodes, *wanted, ...)
    self._undifferentiated = states.pop()
    self._states = [state.get(i, nnx.State({})) for i, state in enumerate(states)]

  @property
  def differentiated(self) -> list[Any]:
    """Per chosen argument its state, or the argument itself if it is no module."""
    states = dict(zip(self._modules, self._states, strict=True))
    return [states.get(k, self._args[k]) for k in self.chosen]

  def pure(self, *differentiated: Any) -> tuple[Any, Any]:
    """The value, and what a caller outside must see: the modules as they are now, and aux."""
    given = dict(zip(self.chosen, differentiated, strict=True))
    states = [nnx.State({i: given[k]}) for i, k in enumerate(self._modules)]
    with nnx.merge_context(_TAG, True) as context:
      nodes = context.merge(self._graphdef, *states, self._undifferentiated)
    given.update(zip(self._modules, nodes, strict=False))
    later = iter(nodes[len(self._modules) :])
    rest, kwargs = self._rest_def.unflatten([next(later) if x is _LATER else x for x in self._rest])
    others = iter(rest)
    args = [given[k] if k in given else next(others) for k in range(len(self._args))]
    out = self._fun(*args, **kwargs)
    value, aux = out if self._has_aux else (out, None)
    leaves, self._aux_def = jax.tree.flatten(aux, is_leaf=_is_node)
    self._aux_nodes = [_is_node(x) for x in leaves]
    with nnx.split_context(_TAG) as context:
      changed = context.split(nodes + [x for x in leaves if _is_node(x)])
    return value, (*changed, [x for x in leaves if not _is_node(x)])

  def propagate(self, changed: Any) -> Any:
    """Change the caller's modules as `pure` has changed its own; returns aux."""
    graphdef, state, leaves = changed
    with nnx.merge_context(_TAG, False) as context:
      nodes = context.merge(graphdef, state)[self._count :]
    found, others = iter(nodes), iter(leaves)
    return self._aux_def.unflatten(
      [next(found) if is_node else next(others) for is_node in self._aux_nodes]
    )

  def masks(self, freeze_mask: Any, several: bool) -> Any:
    """The mask over `differentiated`, checked against the masks that modules carry."""
    given = freeze_mask if several and freeze_mask is not None else [freeze_mask] * len(self.chosen)
    if len(given) != len(self.chosen):
      problem = Problem("", f"a tuple of {len(self.chosen)} masks", f"one of {len(given)}")
      fail(_WHERE, [problem], "Give one mask, or None, for each of argnums.")
    masks = [
      self._mask(k, params, mask)
      for k, params, mask in zip(self.chosen, self.differentiated, given, strict=True)
    ]
    return tuple(masks) if several else masks[0]

  def _mask(self, k: int, params: Any, given: Any) -> Any:
    if k not in self._modules:
      return False if given is None else given
    return _carried.agreed(self._args[k], params, given, self._filters[k], _WHERE)


def _positions(numbers: list[int], count: int) -> list[int]:
  """Arguments by their position among `count`, each once."""
  problems = [
    Problem("", f"argnums below {count}", str(n)) for n in numbers if not -count <= n < count
  ]
  if not problems and len({n % count for n in numbers}) < len(numbers):
    problems = [Problem("", "each of argnums once", str(numbers))]
  if problems:
    fail("maskopt.nnx.grad(argnums=...)", problems, "Pass differentiated arguments by position.")
  return [n % count for n in numbers]


def _within(i: int, wanted: Any) -> Callable[[Any, Any], bool]:
  """The filter for one module among several that are split together."""
  inner = nnx.filterlib.to_predicate(wanted)
  return lambda path, x: path[0] == i and inner(path[1:], x)
