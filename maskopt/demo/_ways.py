"""Training a part while the rest holds still: by a mask in the optimizer, or in the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import maskopt

from ._data import Images

Loss = Callable[[Any, Images], jax.Array]
Tick = Callable[[], None]


class Way(NamedTuple):
  """One way to train a part and hold the rest still.

  Attributes:
    tx: the transformation.
    gradient: of parameters, state and images.
    apply_updates: as Optax's.
  """

  tx: optax.GradientTransformation
  gradient: Callable[[Any, Any, Images], Any]
  apply_updates: Callable[[Any, Any], Any] = optax.apply_updates

  def step(self, params: Any, state: Any, images: Images) -> tuple[Any, Any]:
    """One step of training."""
    updates, state = self.tx.update(self.gradient(params, state, images), state, params)
    return self.apply_updates(params, updates), state


def masked(optimizer: optax.GradientTransformation, loss: Loss, freeze_mask: Any) -> Way:
  """The mask in the optimizer, which hands it to the gradient."""
  tx = maskopt.selective_transform(optimizer, freeze_mask=freeze_mask)

  def gradient(params: Any, state: Any, images: Images) -> Any:
    return maskopt.grad(loss, maskopt.mask_of(state))(params, images)

  return Way(tx, gradient, maskopt.apply_updates)


def stopped(optimizer: optax.GradientTransformation, loss: Loss, freeze_mask: Any) -> Way:
  """The mask in the loss: the optimizer knows nothing of it."""

  def held(params: Any, images: Images) -> jax.Array:
    return loss(maskopt.stop_gradient(params, freeze_mask), images)

  return Way(optimizer, lambda params, state, images: jax.grad(held)(params, images))


def train(way: Way, params: Any, batches: Iterable[Images], tick: Tick = lambda: None) -> Any:
  """Train in one way; return the parameters and the optimizer's state."""
  state, step = way.tx.init(params), jax.jit(way.step)
  for images in batches:
    params, state = step(params, state, images)
    tick()
  return params, state


def alternate(
  slow: Way,
  fast: Way,
  params: Any,
  pairs: Iterable[tuple[Images, Images]],
  tick: Tick = lambda: None,
  *,
  shared: bool = False,
) -> Any:
  """Take a step of one way, then one of the other, both in one `jit`.

  Args:
    slow: the way of the old network.
    fast: the way of the grown network.
    params: of the grown network.
    pairs: images for the one and for the other.
    tick: called after each pair.
    shared: whether both ways share one optimizer's state.
  Returns:
    The parameters and the states.
  """

  @jax.jit
  def both(params: Any, states: list[Any], digits: Images, mixed: Images) -> Any:
    params, first = slow.step(params, states[0], digits)
    params, second = fast.step(params, first if shared else states[1], mixed)
    return params, [second] if shared else [first, second]

  states = [way.tx.init(params) for way in ((slow,) if shared else (slow, fast))]
  for digits, mixed in pairs:
    params, states = both(params, states, digits, mixed)
    tick()
  return params, states


def chosen(images: Images, index: np.ndarray) -> Images:
  """Some of the images, in this order."""
  return Images(images.pixels[index], images.labels[index])


def one_round(images: Images, rng: np.random.Generator, size: int = 64) -> Iterator[Images]:
  """Every image once, in batches of one size; the few that are left over wait for their turn."""
  order = rng.permutation(len(images.labels))
  for k in range(len(order) // size):
    yield chosen(images, order[k * size : (k + 1) * size])
