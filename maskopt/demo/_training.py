"""One jitted step for any optimizer, and runs that train side by side."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from ._data import Images

Step = Callable[[Any, Any, Images], tuple[Any, Any]]


@dataclasses.dataclass
class Run:
  """One way to train, as it goes.

  Attributes:
    name: of its column in the table.
    params: the network's parameters now.
    state: the optimizer's state now.
    step: from parameters, state and a batch to parameters and state; donates the first two.
    seconds: of every step, waited for.
    curve: (step, scores) of every look.
  """

  name: str
  params: Any
  state: Any
  step: Step
  seconds: list[float] = dataclasses.field(default_factory=list)
  curve: list[tuple[int, Any]] = dataclasses.field(default_factory=list)

  @property
  def state_bytes(self) -> int:
    """Bytes of every array in the optimizer's state, masks and indices included."""
    return sum(x.nbytes for x in jax.tree.leaves(self.state))

  @property
  def milliseconds(self) -> float:
    """The median step; the first one compiles, so it counts only if it is alone."""
    return 1e3 * float(np.median(self.seconds[1:] or self.seconds))


def start(
  name: str,
  graph: Any,
  params: Any,
  tx: optax.GradientTransformation,
  apply_updates: Callable[[Any, Any], Any] = optax.apply_updates,
  grad: Callable[[Any], Any] = jax.grad,
) -> Run:
  """Begin a run from a copy of the parameters, for its steps overwrite them."""
  params = jax.tree.map(lambda x: x.copy(), params)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, images):
    def loss(params):
      logits = nnx.merge(graph, params)(images.pixels)
      return optax.softmax_cross_entropy_with_integer_labels(logits, images.labels).mean()

    updates, state = tx.update(grad(loss)(params), state, params)
    return apply_updates(params, updates), state

  return Run(name, params, tx.init(params), step)


def train(runs: list[Run], batches: Iterable[Images], *, tick: Callable[[int], None]) -> None:
  """Take every run's step on each batch in turn, so that their times are measured side by side."""
  for count, batch in enumerate(batches, start=1):
    first = count % len(runs)  # nobody is always the one that follows a look
    for run in runs[first:] + runs[:first]:
      begin = time.perf_counter()
      run.params, run.state = run.step(run.params, run.state, batch)
      jax.block_until_ready(run.params)
      run.seconds.append(time.perf_counter() - begin)
    tick(count)
