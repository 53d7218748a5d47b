"""Linen: the forward is the caller's, so here it gets the layers that parameters got."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import surgery_models as models
from flax import linen as nn
from surgery_models import CASES, bits, by_path, paths

import maskopt
from maskopt import surgery

KEY, SEQUENCES = jax.random.key(0), models.INPUTS["lstm"]


class Between:
  """A linen forward with one more layer after another."""

  def __init__(self, base, layer, name):
    self._base, self._layer, self._name = base, layer, name

  def apply(self, variables, x):
    extra = {"params": variables["params"][self._name]}
    kernel = extra["params"]["kernel"]
    make = nn.Conv if kernel.ndim > 2 else nn.Dense
    more = make(kernel.shape[-1], kernel.shape[:-2]) if kernel.ndim > 2 else make(kernel.shape[-1])

    def after(function, args, kwargs, context):
      out = function(*args, **kwargs)
      is_layer = (
        isinstance(context.module, nn.RNN)
        if self._layer == "cell"
        else context.module.name == self._layer
      )
      if is_layer and context.method_name == "__call__":
        return more.apply(extra, out)
      return out

    with nn.intercept_methods(after):
      return self._base.apply(variables, x)


class TestLinenGetsLayers:
  """Deepen and append leave the forward to the caller; here it is."""

  def check(self, case, done, forward, added):
    old, new = by_path(case.model()), by_path(done.model)
    for p, x in old.items():
      np.testing.assert_array_equal(bits(new[p]), bits(x))
    mask = paths(done.freeze_mask)
    assert {p for p in new if not np.all(mask[p])} == added
    before = maskopt.snapshot(models.parameters(done.model))
    after = models.trained(dataclasses.replace(case, new_forward=forward), *done[:2])
    audit = maskopt.audit(before, after, done.freeze_mask)
    assert audit.ok and audit.moved > 0

  @pytest.mark.parametrize("case", CASES[4:], ids=lambda c: c.name)
  def test_deeper(self, case):
    done = surgery.deepen(case.model(), case.layer, name="extra")
    forward = Between(case.forward, case.layer, "extra")
    np.testing.assert_allclose(
      forward.apply(done.model, case.inputs), case.apply(case.model()), rtol=1e-6, atol=1e-6
    )
    self.check(case, done, forward, {"extra/kernel", "extra/bias"})

  @pytest.mark.parametrize("case", CASES[4:], ids=lambda c: c.name)
  def test_longer(self, case):
    extra = {"kernel": jnp.eye(2) * 0.5, "bias": jnp.zeros(2)}
    done = surgery.append(case.model(), {"extra": extra})
    forward = Between(case.forward, "head", "extra")
    np.testing.assert_array_equal(
      forward.apply(done.model, case.inputs), case.apply(case.model()) * 0.5
    )
    self.check(case, done, forward, {"extra/kernel", "extra/bias"})


class Recurrent(nn.Module):
  cell: Any
  units: int = 4

  @nn.compact
  def __call__(self, x):
    return nn.Dense(2, name="head")(nn.RNN(self.cell(self.units, name="cell"))(x)[:, -1])


@pytest.mark.parametrize(
  "cell", [nn.LSTMCell, nn.GRUCell, nn.SimpleCell, nn.MGUCell], ids=lambda c: c.__name__
)
@pytest.mark.parametrize("mode", ["zero", pytest.param("copy", marks=pytest.mark.slow)])
def test_every_cell_of_linen(cell, mode):
  old, new = Recurrent(cell), Recurrent(cell, 6)
  variables = models._noisy(old.init(KEY, SEQUENCES))
  done = surgery.grow(
    variables, "cell", 2, inputs=SEQUENCES, forward=old, new_forward=new, mode=mode
  )
  np.testing.assert_allclose(
    new.apply(done.model, SEQUENCES), old.apply(variables, SEQUENCES), rtol=1e-5, atol=1e-6
  )
  case = models.Case("", "cell", SEQUENCES, lambda: variables, old, new)
  before = maskopt.snapshot(done.model["params"])
  assert maskopt.audit(before, models.trained(case, *done[:2]), done.freeze_mask).ok
