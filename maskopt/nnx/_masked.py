"""Flax's own layers with a freeze mask inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx

from .. import _carrying, _tree
from .._carrying import SUFFIX, StaticMask
from .._errors import Problem, fail
from . import _backward, _carried


class Masked(nnx.Module):
  """What masked layers share: attributes `<parameter>_freeze_mask`, and their own backward pass.

  A mask is static metadata of the module and never an array: `nnx.jit` would trace an array, which
  saves no FLOPs. A new mask is a new trace.
  """

  kernel_freeze_mask: StaticMask | bool
  bias_freeze_mask: StaticMask | bool

  def __setattr__(self, name: str, value: Any) -> None:
    """Take a mask in any static form and keep it hashable."""
    if name.endswith(SUFFIX):
      value = self._checked(name, value)
    super().__setattr__(name, value)

  def _checked(self, name: str, mask: Any) -> StaticMask | bool:
    where, attribute = f"{type(self).__name__}({name}=...)", name.removesuffix(SUFFIX)
    param = getattr(self, attribute, None)
    if isinstance(param, nnx.Variable):
      return _carried.static(mask, param, attribute, where)
    if mask is not False:
      remedy = "Leave the mask out, or build the layer with that parameter."
      fail(where, [Problem(attribute, "a parameter", "none")], remedy)
    return False

  def _call(self, method: Callable[..., Any], *inputs: Any, **static: Any) -> Any:
    """Run a method of Flax's layer; of the parameters' gradients only trainable blocks."""
    own = {name: mask for name, _, mask in _carrying.carried(self)}
    graphdef, state, rest = nnx.split(self, nnx.Param, ...)
    flat = _tree.flatten(state)
    names, treedef = flat.paths, flat.treedef
    params = dict(zip(names, flat.leaves, strict=True))
    masks = {name: own.get(name, False) for name in params}

    def fun(params: dict[str, Any], rest: Any, *inputs: Any) -> Any:
      state = treedef.unflatten([params[name] for name in names])
      return method(nnx.merge(graphdef, state, rest), *inputs, **static)

    return _backward.call(fun, params, masks, rest, *inputs)


class MaskedLinear(Masked, nnx.Linear):
  """`nnx.Linear` whose frozen weights get a zero gradient that costs nothing to compute.

    y = x @ kernel + bias,  d loss / d kernel[i, j] = 0 if kernel_freeze_mask[i, j]

  The gradient of the input flows through frozen weights as ever. Under a plain optimizer frozen
  weights still decay and follow old momentum: `maskopt.nnx.Optimizer` reads the masks and does not
  let them. Derivatives are reverse-mode (`jax.grad`, and `jax.hessian` on top of it); for `jax.jvp`
  take Flax's layer and give the mask to `maskopt.nnx.grad`. Masks are part of the graphdef:
  `nnx.split`, `nnx.clone`, `copy.deepcopy` and `pickle` keep them. A checkpoint of the state holds
  arrays only: restore it into a layer built with the same masks, or store
  `maskopt.nnx.freeze_mask(model)` too.

  Args:
    in_features: as in `nnx.Linear`.
    out_features: as in `nnx.Linear`.
    kernel_freeze_mask: static mask over the kernel (in, out), True = frozen: a bool, or NumPy bools
      that broadcast to it; shape (out,) freezes units, (in, 1) input rows.
    bias_freeze_mask: the same over the bias (out,).
    **options: as in `nnx.Linear`, `rngs=` among them.
  Raises:
    ValueError: a mask does not broadcast, or there is no bias; TypeError: it is a `jax.Array`, or
      not boolean.
  Example:
    >>> import jax.numpy as jnp, numpy as np, maskopt
    >>> from flax import nnx
    >>> units = np.array([True, False])
    >>> layer = maskopt.nnx.MaskedLinear(3, 2, kernel_freeze_mask=units, rngs=nnx.Rngs(0))
    >>> nnx.grad(lambda m: m(jnp.ones((1, 3))).sum())(layer)["kernel"][...].tolist()
    [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    kernel_freeze_mask: Any = False,
    bias_freeze_mask: Any = False,
    **options: Any,
  ):
    super().__init__(in_features, out_features, **options)
    self.kernel_freeze_mask = kernel_freeze_mask
    self.bias_freeze_mask = bias_freeze_mask

  def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
    """Apply the layer: (..., in) to (..., out)."""
    return self._call(nnx.Linear.__call__, inputs, out_sharding=out_sharding)


class MaskedLinearGeneral(Masked, nnx.LinearGeneral):
  """`nnx.LinearGeneral` with masks, for the projections of attention."""

  def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
    """Apply the layer."""
    return self._call(nnx.LinearGeneral.__call__, inputs, out_sharding=out_sharding)


class MaskedConv(Masked, nnx.Conv):
  """`nnx.Conv` whose frozen weights get a zero gradient that costs nothing to compute.

    d loss / d kernel[i] = 0 if kernel_freeze_mask[i]

  See `MaskedLinear` for what a mask does and what an optimizer does to it.

  Args:
    in_features: as in `nnx.Conv`.
    out_features: as in `nnx.Conv`.
    kernel_size: as in `nnx.Conv`.
    *args: as in `nnx.Conv`: the strides.
    kernel_freeze_mask: static mask over the kernel (*window, in, out), True = frozen; shape (out,)
      freezes output channels, (in, 1) input channels.
    bias_freeze_mask: the same over the bias (out,).
    **options: as in `nnx.Conv`, `rngs=` among them.
  Raises:
    ValueError: a mask does not broadcast, or there is no bias; TypeError: it is a `jax.Array`, or
      not boolean.
  Example:
    >>> import jax.numpy as jnp, numpy as np, maskopt
    >>> from flax import nnx
    >>> channels = np.array([True, False])
    >>> layer = maskopt.nnx.MaskedConv(1, 2, (3,), kernel_freeze_mask=channels, rngs=nnx.Rngs(0))
    >>> g = nnx.grad(lambda m: m(jnp.ones((1, 5, 1))).sum())(layer)["kernel"]
    >>> g[:, 0].tolist()
    [[0.0, 4.0], [0.0, 5.0], [0.0, 4.0]]
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    kernel_size: Any,
    *args: Any,
    kernel_freeze_mask: Any = False,
    bias_freeze_mask: Any = False,
    **options: Any,
  ):
    super().__init__(in_features, out_features, kernel_size, *args, **options)
    self.kernel_freeze_mask = kernel_freeze_mask
    self.bias_freeze_mask = bias_freeze_mask

  def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
    """Apply the convolution: (batch, *space, in) to (batch, *space, out)."""
    return self._call(nnx.Conv.__call__, inputs, out_sharding=out_sharding)


class MaskedEmbed(Masked, nnx.Embed):
  """`nnx.Embed` whose frozen entries get a zero gradient that costs nothing to compute.

    d loss / d embedding[i, j] = 0 if embedding_freeze_mask[i, j]

  See `MaskedLinear` for what a mask does and what an optimizer does to it. `attend` is masked too.

  Args:
    num_embeddings: as in `nnx.Embed`.
    features: as in `nnx.Embed`.
    embedding_freeze_mask: static mask over the embedding (num_embeddings, features), True = frozen;
      shape (num_embeddings, 1) freezes words, (features,) dimensions.
    **options: as in `nnx.Embed`, `rngs=` among them.
  Raises:
    ValueError: the mask does not broadcast; TypeError: it is a `jax.Array`, or not boolean.
  Example:
    >>> import jax.numpy as jnp, numpy as np, maskopt
    >>> from flax import nnx
    >>> old = np.array([[True], [True], [False]])
    >>> layer = maskopt.nnx.MaskedEmbed(3, 2, embedding_freeze_mask=old, rngs=nnx.Rngs(0))
    >>> nnx.grad(lambda m: m(jnp.array([0, 2, 2])).sum())(layer)["embedding"][...].tolist()
    [[0.0, 0.0], [0.0, 0.0], [2.0, 2.0]]
  """

  embedding_freeze_mask: StaticMask | bool

  def __init__(
    self,
    num_embeddings: int,
    features: int,
    *,
    embedding_freeze_mask: Any = False,
    **options: Any,
  ):
    super().__init__(num_embeddings, features, **options)
    self.embedding_freeze_mask = embedding_freeze_mask

  def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
    """Look integers up: (...) to (..., features)."""
    return self._call(nnx.Embed.__call__, inputs, out_sharding=out_sharding)

  def attend(self, query: Any, out_sharding: Any = None) -> Any:
    """Multiply by the transposed embedding: (..., features) to (..., num_embeddings)."""
    return self._call(nnx.Embed.attend, query, out_sharding=out_sharding)
