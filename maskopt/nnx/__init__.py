"""Freezing in the words of Flax nnx: modules in, modules out."""

from ._carried import freeze_mask as freeze_mask
from ._grad import grad as grad, value_and_grad as value_and_grad
from ._optimizer import Optimizer as Optimizer
