"""Which arguments of a function are differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import nnx

from ._errors import Problem, describe, fail


def check(fun: Any, argnums: Any) -> None:
  """Raise unless there is a function to differentiate, and whole numbers that say in what."""
  check_function(fun, "maskopt.grad(fun, ...)")
  numbers = argnums if isinstance(argnums, Sequence) else [argnums]
  if not all(isinstance(n, (int, np.integer)) for n in numbers):
    problem = Problem("", "an int or a tuple of ints", describe(argnums), TypeError)
    fail("maskopt.grad(argnums=...)", [problem], "Count arguments given by position, from 0.")


def check_function(fun: Any, where: str) -> None:
  """Raise unless there is a function to differentiate."""
  if not callable(fun) or isinstance(fun, (nnx.State, nnx.Module)):
    problem = Problem("", "a function that returns a scalar", describe(fun), TypeError)
    remedy = "Give it the loss itself, and not its value; the mask comes second."
    fail(where, [problem], remedy)


def chosen(
  args: tuple[Any, ...], argnums: int | Sequence[int], where: str
) -> tuple[Any, Callable[[Any], list[Any]]]:
  """The differentiated argument, or a tuple of several, and how to put another in its place."""
  several = isinstance(argnums, Sequence)
  numbers: list[int] = list(argnums) if several else [argnums]
  outside = [
    Problem("", f"argnums below {len(args)}, the number of arguments", str(n))
    for n in numbers
    if not -len(args) <= n < len(args)
  ]
  if outside:
    fail("maskopt.grad(argnums=...)", outside, "Count arguments given by position, from 0.")
  modules = [
    Problem("", "a tree of arrays", f"the module {type(args[n]).__name__}", TypeError)
    for n in numbers
    if isinstance(args[n], nnx.Module)
  ]
  if modules:
    remedy = (
      "Use maskopt.nnx.grad or value_and_grad, or differentiate the module's nnx.Param state."
    )
    fail(where, modules, remedy)
  own = tuple(args[n] for n in numbers)

  def with_params(params: Any) -> list[Any]:
    new = list(args)
    for n, value in zip(numbers, params if several else (params,), strict=True):
      new[n] = value
    return new

  return (own if several else own[0]), with_params
