"""Flax's own linen layers with a freeze mask inside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from .. import _tree
from .._carrying import SUFFIX
from .._errors import Problem, fail
from ..nnx import _backward, _carried


def _call(module: Any, base: type, method: Callable[..., Any], *inputs: Any) -> Any:
  """Run a method of Flax's layer; of the parameters' gradients only trainable blocks."""
  tree = module.variables.get("params")
  if module.is_initializing() or tree is None:
    out = method(module, *inputs)
    tree = module.variables["params"]
    _masks(module, _tree.flatten(tree))  # so that a mask that does not fit is heard of at once
    return out
  names = {f.name for f in dataclasses.fields(base) if f.init} - {"parent", "name"}
  plain: Any = base(**{name: getattr(module, name) for name in names}, parent=None)
  flat = _tree.flatten(tree)
  paths, treedef = flat.paths, flat.treedef

  def fun(params: dict[str, Any], *inputs: Any) -> Any:
    tree = treedef.unflatten([params[path] for path in paths])
    return plain.apply({"params": tree}, *inputs, method=method)

  params = dict(zip(paths, flat.leaves, strict=True))
  return _backward.call(fun, params, _masks(module, flat), *inputs)


def _masks(module: Any, flat: _tree.Flat) -> dict[str, Any]:
  """The mask of each parameter, checked against its shape."""
  given = {k.removesuffix(SUFFIX): v for k, v in vars(module).items() if k.endswith(SUFFIX)}
  missing = [name for name, mask in given.items() if mask is not False and name not in flat.paths]
  if missing:
    remedy = "Leave the mask out, or build the layer with that parameter."
    problems = [Problem(name, "a parameter", "none") for name in missing]
    fail(f"{type(module).__name__}({missing[0]}{SUFFIX}=...)", problems, remedy)
  masks: dict[str, Any] = {}
  for path, leaf in zip(flat.paths, flat.leaves, strict=True):
    where = f"{type(module).__name__}({path}{SUFFIX}=...)"
    mask = _carried.static(given.get(path, False), leaf, path, where)
    masks[path] = mask if isinstance(mask, bool) else mask.array
  return masks


class Masked:
  """Keep masks hashable, as modules must be that `jit` takes as static arguments."""

  def __post_init__(self) -> None:
    for name, value in list(vars(self).items()):
      if name.endswith(SUFFIX):
        object.__setattr__(self, name, _carried.hashable(value))
    super().__post_init__()  # pyright: ignore[reportAttributeAccessIssue]  # the module mixed in has it


class MaskedDense(Masked, nn.Dense):
  """`nn.Dense` whose frozen weights get a zero gradient that costs nothing to compute.

    y = x @ kernel + bias,  d loss / d kernel[i, j] = 0 if kernel_freeze_mask[i, j]

  The gradient of the input flows through frozen weights as ever. Under a plain optimizer frozen
  weights still decay and follow old momentum: give `maskopt.linen.TrainState` the masks, which
  `maskopt.linen.freeze_mask` collects; without them it raises. Derivatives are reverse-mode
  (`jax.grad`, and `jax.hessian` on top of it); for `jax.jvp` take Flax's layer and give the mask to
  `maskopt.grad`. The masks are fields of the module, not variables: a checkpoint of the parameters
  does not hold them.

  Args:
    features: as in `nn.Dense`, and so the other fields.
    kernel_freeze_mask: static mask over the kernel (in, features), True = frozen: a bool, or NumPy
      bools that broadcast to it; shape (features,) freezes units, (in, 1) input rows.
    bias_freeze_mask: the same over the bias (features,).
  Raises:
    ValueError: at the first call: a mask does not broadcast; TypeError: it is a `jax.Array`, or not
      boolean.
  Example:
    >>> import jax, jax.numpy as jnp, numpy as np, maskopt
    >>> layer = maskopt.linen.MaskedDense(2, kernel_freeze_mask=np.array([True, False]))
    >>> x = jnp.ones((1, 3))
    >>> params = layer.init(jax.random.key(0), x)
    >>> jax.grad(lambda p: layer.apply(p, x).sum())(params)["params"]["kernel"].tolist()
    [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
  """

  kernel_freeze_mask: Any = False
  bias_freeze_mask: Any = False

  @nn.compact
  def __call__(self, inputs: Any) -> Any:
    """Apply the layer: (..., in) to (..., features)."""
    return _call(self, nn.Dense, nn.Dense.__call__, inputs)


class MaskedConv(Masked, nn.Conv):
  """`nn.Conv` whose frozen weights get a zero gradient that costs nothing to compute.

    d loss / d kernel[i] = 0 if kernel_freeze_mask[i]

  See `MaskedDense` for what a mask does and what an optimizer does to it.

  Args:
    features: as in `nn.Conv`, and so the other fields.
    kernel_freeze_mask: static mask over the kernel (*window, in, features), True = frozen; shape
      (features,) freezes output channels, (in, 1) input channels.
    bias_freeze_mask: the same over the bias (features,).
  Raises:
    ValueError: at the first call: a mask does not broadcast; TypeError: it is a `jax.Array`, or not
      boolean.
  Example:
    >>> import jax, jax.numpy as jnp, numpy as np, maskopt
    >>> channels = np.array([True, False])
    >>> layer = maskopt.linen.MaskedConv(2, (3,), kernel_freeze_mask=channels)
    >>> x = jnp.ones((1, 5, 1))
    >>> params = layer.init(jax.random.key(0), x)
    >>> jax.grad(lambda p: layer.apply(p, x).sum())(params)["params"]["kernel"][:, 0].tolist()
    [[0.0, 4.0], [0.0, 5.0], [0.0, 4.0]]
  """

  kernel_freeze_mask: Any = False
  bias_freeze_mask: Any = False

  @nn.compact
  def __call__(self, inputs: Any) -> Any:
    """Apply the convolution: (batch, *space, in) to (batch, *space, features)."""
    return _call(self, nn.Conv, nn.Conv.__call__, inputs)


class MaskedEmbed(Masked, nn.Embed):
  """`nn.Embed` whose frozen entries get a zero gradient that costs nothing to compute.

    d loss / d embedding[i, j] = 0 if embedding_freeze_mask[i, j]

  See `MaskedDense` for what a mask does and what an optimizer does to it. `attend` is masked too.

  Args:
    num_embeddings: as in `nn.Embed`, and so the other fields.
    features: as in `nn.Embed`.
    embedding_freeze_mask: static mask over the embedding (num_embeddings, features), True = frozen;
      shape (num_embeddings, 1) freezes words, (features,) dimensions.
  Raises:
    ValueError: at the first call: the mask does not broadcast; TypeError: it is a `jax.Array`, or
      not boolean.
  Example:
    >>> import jax, jax.numpy as jnp, numpy as np, maskopt
    >>> old = np.array([[True], [True], [False]])
    >>> layer, i = maskopt.linen.MaskedEmbed(3, 2, embedding_freeze_mask=old), jnp.array([0, 2, 2])
    >>> params = layer.init(jax.random.key(0), i)
    >>> jax.grad(lambda p: layer.apply(p, i).sum())(params)["params"]["embedding"].tolist()
    [[0.0, 0.0], [0.0, 0.0], [2.0, 2.0]]
  """

  embedding_freeze_mask: Any = False

  def __call__(self, inputs: Any) -> Any:
    """Look integers up: (...) to (..., features)."""
    return _call(self, nn.Embed, nn.Embed.__call__, inputs)

  def attend(self, query: Any) -> Any:
    """Multiply by the transposed embedding: (..., features) to (..., num_embeddings)."""
    return _call(self, nn.Embed, nn.Embed.attend, query)
