"""TensorFlow's question of new units: widen a trained network and train the new weights alone.

A dense layer 128 -> 256 gets ten more units, so the next layer sees 266 features, and gets an
eleventh output. There, old and new weights are kept as variables of their own, joined by
`tf.concat` and held by `tf.stop_gradient`. Here, they are one array under a freeze mask:

| TensorFlow | maskopt |
| --- | --- |
| `W = tf.concat([W_old, W_new], 1)` | one kernel (128, 266) and a mask |
| `tf.stop_gradient(W_old)` in the graph | `("dense", maskopt.units(slice(256)))` in the mask |
| `var_list=[W_new, b_new]` | `selective_transform(optimizer, freeze_mask=...)` |
| two biases, concatenated | one bias, whose units the same rule names |
| two optimizers, two `minimize` operations | two transforms, each with its mask and its rate |
| alternating `session.run(train_old)`, `session.run(train_new)` | both steps in one `jit` |

The new units have no way into the old outputs (their weights there are zero and frozen), so the old
outputs keep their bits, whatever the new units learn.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import maskopt

from . import _data, _options
from ._data import Images
from ._options import Json, Seed, Steps
from ._report import Report
from ._ways import Tick, alternate, masked, stopped, train

PIXELS, FEATURES, OLD, NEW = 64, 128, 256, 10
CLASSES = 10  # the eleventh says: no digit
OLD_RATE, NEW_RATE = 1e-4, 3e-3
WORDS = [
  ("W = tf.concat([W_old, W_new], 1)", "one kernel (128, 266) and a mask"),
  ("tf.stop_gradient(W_old)", '("dense", maskopt.units(slice(256)))'),
  ("var_list=[W_new, b_new]", "selective_transform(optimizer, freeze_mask=...)"),
  ("two biases, concatenated", "one bias, whose units the same rule names"),
  ("two optimizers, two minimize ops", "two transforms, each with its mask and rate"),
  ("alternating session.run calls", "both steps in one jit"),
]


def small(seed: int) -> dict[str, Any]:
  """The old network: 64 pixels -> 128 features -> 256 units -> 10 outputs."""
  rng = np.random.default_rng(seed)
  return {
    "features": _layer(rng, PIXELS, FEATURES),
    "dense": _layer(rng, FEATURES, OLD),
    "output": _layer(rng, OLD, CLASSES),
  }


def _layer(rng: np.random.Generator, n: int, units: int) -> dict[str, Any]:
  kernel = rng.standard_normal((n, units), np.float32) * np.float32(np.sqrt(2 / n))
  return {"kernel": kernel, "bias": np.zeros(units, np.float32)}


def grow(old: dict[str, Any], seed: int) -> dict[str, Any]:
  """Return the grown network: 256 -> 266 units, 10 -> 11 outputs, the old weights in front.

  output/kernel[256:, :10] = 0        so that the old outputs see none of the new units
  """
  rng = np.random.default_rng(seed)
  dense, output = _layer(rng, FEATURES, NEW), _layer(rng, OLD + NEW, 1)
  padded = np.pad(old["output"]["kernel"], ((0, NEW), (0, 0)))
  return {
    "features": old["features"],
    "dense": _beside(old["dense"], dense),
    "output": _beside({"kernel": padded, "bias": old["output"]["bias"]}, output),
  }


def _beside(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
  """One layer with the units of both."""
  return {name: np.concatenate([old[name], new[name]], axis=-1) for name in old}


def small_part(grown: dict[str, Any]) -> dict[str, Any]:
  """The old network inside the grown one."""
  dense, output = grown["dense"], grown["output"]
  return {
    "features": grown["features"],
    "dense": {"kernel": dense["kernel"][:, :OLD], "bias": dense["bias"][:OLD]},
    "output": {"kernel": output["kernel"][:OLD, :CLASSES], "bias": output["bias"][:CLASSES]},
  }


def old_is_frozen(grown: dict[str, Any]) -> Any:
  """The mask that trains the new units and the new output: their kernels and their biases."""
  return maskopt.build_mask(
    grown,
    [
      ("features", True),
      ("dense", maskopt.units(slice(OLD))),
      ("output", maskopt.units(slice(CLASSES))),
    ],
  )


def new_is_frozen(grown: dict[str, Any]) -> Any:
  """The mask that trains what `small_part` is, and no zero between new units and old outputs."""
  return maskopt.build_mask(
    grown,
    [
      ("dense", maskopt.units(slice(OLD, None))),
      ("output/kernel", maskopt.train_only(np.s_[:OLD, :CLASSES])),
      ("output/bias", maskopt.units(slice(CLASSES, None))),
    ],
  )


def hidden(params: dict[str, Any], pixels: Any) -> tuple[jax.Array, jax.Array]:
  """The activities of both layers; of the old network's second one, given that."""
  first = jax.nn.relu(_dense(params["features"], pixels))
  return first, jax.nn.relu(_dense(params["dense"], first))


def _dense(layer: dict[str, Any], x: Any) -> jax.Array:
  return x @ layer["kernel"] + jnp.expand_dims(layer["bias"], 0)


def old_outputs(params: dict[str, Any], pixels: Any) -> jax.Array:
  """The ten outputs of the old network, shape (n, 10)."""
  return _dense(params["output"], hidden(params, pixels)[1])


def grown_outputs(params: dict[str, Any], pixels: Any) -> jax.Array:
  """The eleven outputs of the grown network, shape (n, 11).

  The old part is computed as the old network does. A matmul of another width may add up the same
  products in another order, which costs the last bit.
  """
  old, dense, output = small_part(params), params["dense"], params["output"]
  first, second = hidden(old, pixels)
  new = {"kernel": dense["kernel"][:, OLD:], "bias": dense["bias"][OLD:]}
  both = jnp.concatenate([second, jax.nn.relu(_dense(new, first))], axis=1)  # 266 features
  last = {"kernel": output["kernel"][:, CLASSES:], "bias": output["bias"][CLASSES:]}
  return jnp.concatenate([_dense(old["output"], second), _dense(last, both)], axis=1)


def small_loss(params: dict[str, Any], images: Images) -> jax.Array:
  """The cross-entropy of the old network by itself."""
  return _cross_entropy(old_outputs(params, images.pixels), images.labels)


def old_loss(params: dict[str, Any], images: Images) -> jax.Array:
  """The cross-entropy of the old network inside a grown one."""
  return small_loss(small_part(params), images)


def new_loss(params: dict[str, Any], images: Images) -> jax.Array:
  """The cross-entropy of the grown network."""
  return _cross_entropy(grown_outputs(params, images.pixels), images.labels)


def _cross_entropy(outputs: jax.Array, labels: Any) -> jax.Array:
  return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def with_broken(images: Images, seed: int) -> Images:
  """The images, and as many again of class 10: the top of one digit on the bottom of another."""
  rng = np.random.default_rng(seed)
  partner = rng.permutation(len(images.labels))
  other = images.labels[partner] != images.labels
  split = PIXELS // 2
  broken = np.concatenate([images.pixels[:, :split], images.pixels[partner, split:]], axis=1)[other]
  labels = np.full(len(broken), CLASSES, np.int32)
  return Images(np.concatenate([images.pixels, broken]), np.concatenate([images.labels, labels]))


class Exam(NamedTuple):
  """The test images, and as many broken ones."""

  digits: Images
  mixed: Images

  def of_old(self, params: Any) -> np.ndarray:
    """The bits of what a grown network says of the ten old classes."""
    outputs = jax.jit(grown_outputs)(params, self.digits.pixels)
    return np.asarray(outputs)[:, :CLASSES].view(np.uint32)

  def right(self, params: Any) -> float:
    """Share of all images told right among the eleven classes."""
    answers = np.argmax(jax.jit(grown_outputs)(params, self.mixed.pixels), axis=1)
    return round(float(np.mean(answers == self.mixed.labels)), 4)


def new_units(steps: Steps = 300, seed: Seed = 0, as_json: Json = False) -> None:
  """TensorFlow: ten new units and an eleventh output; old weights frozen, two learning rates."""
  title = "New units in a trained network, as in TensorFlow"
  report = Report("new-units", title, as_json=as_json, seed=seed, steps=steps)
  report.words("TensorFlow", WORDS)
  digits, test = _data.digits(seed)
  mixed, exam = with_broken(digits, seed), Exam(test, with_broken(test, seed + 1))
  with _options.progress() as bars:
    bar = bars.add_task("train", total=9 * steps, live="")
    tick = functools.partial(bars.advance, bar)
    way = stopped(optax.adam(1e-3), small_loss, False)
    old, _ = train(way, small(seed), digits.batches(steps, seed), tick)
    grown = grow(old, seed + 1)
    new_only = train_new(grown, old, list(mixed.batches(steps, seed + 1)), exam, tick)
    pairs = list(zip(digits.batches(steps, seed + 2), mixed.batches(steps, seed + 3), strict=True))
    alternated = train_both(grown, old, pairs, exam, tick)
  report.step("The old network knows ten digits; ten units and an output are added")
  report.show(maskopt.summary(grown, old_is_frozen(grown)))
  _tell_new(report, new_only)
  _tell_both(report, alternated)
  ours = [row for row in new_only if row["way"].startswith("freeze")]
  ok = all(row["old_outputs_bit_equal"] and not row["frozen_changed"] for row in ours)
  report.finish(ok, "Under the mask, every old weight and every old output kept its bits.")


def train_new(
  grown: Any, old: Any, batches: list[Images], exam: Exam, tick: Tick
) -> list[dict[str, Any]]:
  """Train the new weights alone: masked and stopped, under Adam and under AdamW."""
  mask, rows = old_is_frozen(grown), []
  # The outputs of the old network by itself, at its own size.
  before = np.asarray(jax.jit(old_outputs)(old, exam.digits.pixels)).view(np.uint32)
  for name, optimizer in (("Adam", optax.adam(NEW_RATE)), ("AdamW", optax.adamw(NEW_RATE))):
    ours: Any = None
    for kind, make in (("freeze mask", masked), ("stop_gradient", stopped)):
      params, state = train(make(optimizer, new_loss, mask), grown, batches, tick)
      audit, ours = maskopt.audit(grown, params, mask), ours or params
      rows.append(
        {
          "way": f"{kind}, {name}",
          "frozen": audit.frozen,
          "frozen_changed": audit.changed,
          "old_outputs_bit_equal": np.array_equal(exam.of_old(params), before),
          "new_weights_from_masked": _difference(new_part(params), new_part(ours)),
          "test_accuracy": exam.right(params),
          "optimizer_bytes": _bytes(state),
        }
      )
  return rows


def train_both(
  grown: Any, old: Any, pairs: list[tuple[Images, Images]], exam: Exam, tick: Tick
) -> list[dict[str, Any]]:
  """Alternate in three ways, and compare the old weights with the old network trained alone."""
  way = stopped(optax.adam(OLD_RATE), small_loss, False)
  expected, _ = train(way, old, (digits for digits, _ in pairs), tick)
  new, kept = new_is_frozen(grown), old_is_frozen(grown)
  slow, fast = optax.adam(OLD_RATE), optax.adam(NEW_RATE)
  rows = []
  for name, first, second in (
    ("two masks, two rates", masked(slow, old_loss, new), masked(fast, new_loss, kept)),
    ("stop_gradient, two Adams", stopped(slow, old_loss, new), stopped(fast, new_loss, kept)),
    ("stop_gradient, one Adam", stopped(slow, old_loss, new), stopped(slow, new_loss, kept)),
  ):
    params, states = alternate(first, second, grown, pairs, tick, shared=first.tx is second.tx)
    rows.append(
      {
        "way": name,
        "old_weights_from_alone": _difference(small_part(params), expected),
        "test_accuracy": exam.right(params),
        "optimizer_bytes": _bytes(states),
      }
    )
  return rows


def new_part(grown: dict[str, Any]) -> list[Any]:
  """The weights that `old_is_frozen` leaves to train."""
  dense, output = grown["dense"], grown["output"]
  return [
    *(dense["kernel"][:, OLD:], dense["bias"][OLD:]),
    *(output["kernel"][:, CLASSES:], output["bias"][CLASSES:]),
  ]


def _difference(a: Any, b: Any) -> float:
  """The largest difference of two trees of arrays."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return max(float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in pairs)


def _bytes(state: Any) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(state))


def _tell_new(report: Report, rows: list[dict[str, Any]]) -> None:
  report.facts["new_only"] = rows
  report.step(
    "Train the new weights alone",
    "The eleventh class is no digit: the top of one image on the bottom of another.",
  )
  report.table(
    ("way", "frozen", "outputs", "new weights", "test", "optimizer"),
    [
      (
        row["way"],
        f"CHANGED {row['frozen_changed']:,}" if row["frozen_changed"] else "kept",
        "kept" if row["old_outputs_bit_equal"] else "CHANGED",
        "-" if "mask" in row["way"] else f"{row['new_weights_from_masked']:.0e}",
        f"{row['test_accuracy']:.1%}",
        f"{row['optimizer_bytes'] / 1e3:.1f} kB",
      )
      for row in rows
    ],
  )
  report.say("Outputs: those of the ten old classes, from the old weights computed by themselves.")
  report.say("New weights: how far they end from those of the mask under the same optimizer.")


def _tell_both(report: Report, rows: list[dict[str, Any]]) -> None:
  report.facts["alternating"] = rows
  report.step(
    "Alternate in one jit: slow steps of the old network, fast ones of the grown",
    "The old weights must go where they go when the old network trains by itself.",
  )
  report.table(
    ("way", "old weights off by", "test", "optimizer"),
    [
      (
        row["way"],
        f"{row['old_weights_from_alone']:.0e}",
        f"{row['test_accuracy']:.1%}",
        f"{row['optimizer_bytes'] / 1e3:.1f} kB",
      )
      for row in rows
    ],
  )
  report.say("With one Adam, moments of the old steps move the old weights in the others.")
