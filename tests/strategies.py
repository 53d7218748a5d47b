"""Hypothesis strategies: small parameter trees, masks over them, and their oracles."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

# Few shapes, so that eager operations find their compiled programs again.
SHAPES = ((), (1,), (5,), (4, 3), (1, 6), (3, 2, 4))


@st.composite
def leaf_masks(draw, shape):
  """A mask leaf in one of its forms, and the same as a full NumPy array."""
  form = draw(st.sampled_from(("bool", "full", "broadcast", "block")))
  if form == "bool" or shape == ():
    value = draw(st.booleans())
    return value, np.full(shape, value)
  if form == "full":
    mask = draw(hnp.arrays(np.bool_, shape))
    return mask, mask
  if form == "broadcast":
    keep = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    small = tuple(n if k else 1 for n, k in zip(shape, keep, strict=True))
    if int(np.prod(small)) == 1 and int(np.prod(shape)) > 1:
      small = shape  # one element on a larger leaf is refused
    mask = draw(hnp.arrays(np.bool_, small))
    strip = draw(st.integers(0, next((i for i, n in enumerate(small) if n > 1), 0)))
    return mask.reshape(small[strip:]), np.array(np.broadcast_to(mask, shape))
  mask = np.ones(shape, bool)
  starts = [draw(st.integers(0, n - 1)) for n in shape]
  stops = [draw(st.integers(i + 1, n)) for i, n in zip(starts, shape, strict=True)]
  mask[tuple(slice(a, b) for a, b in zip(starts, stops, strict=True))] = False
  return mask, mask


@st.composite
def problems(draw, max_leaves=3):
  """Parameters, a freeze mask over them and the mask as full arrays: three parallel dicts."""
  params, mask, full = {}, {}, {}
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  for i in range(draw(st.integers(1, max_leaves))):
    name = f"layer_{i}"
    shape = draw(st.sampled_from(SHAPES))
    params[name] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    mask[name], full[name] = draw(leaf_masks(shape))
  return params, mask, full


def gradients(seed, params):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
