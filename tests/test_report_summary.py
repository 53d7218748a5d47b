"""summary: what it counts, what it costs to make, and which slips it names."""

import io
import math
import re
from collections import namedtuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import maskopt
import maskopt.nnx
from maskopt import _tree
from maskopt.report import _show


class Net(nnx.Module):
  """Attributes in an order that sorting would change."""

  def __init__(self, rngs):
    self.stem = nnx.Linear(6, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.head = nnx.Linear(4, 3, rngs=rngs)


def by_path(report):
  return {row.path: row for row in report.rows}


def mixed():
  rng = np.random.default_rng(0)
  params = {
    "a": {"kernel": np.ones((600, 500), np.float32), "bias": np.ones(500, np.float32)},
    "b": {"kernel": np.ones((64, 8), jnp.bfloat16), "bias": np.ones(8, jnp.bfloat16)},
    "ids": np.arange(3),
    "none": None,
  }
  mask = {
    "a": {"kernel": rng.random((600, 500)) < 0.99, "bias": True},
    "b": {"kernel": np.arange(64)[:, None] >= 10, "bias": False},
    "ids": True,
    "none": None,
  }
  return params, mask


def test_counts_are_those_of_numpy():
  params, mask = mixed()
  rows = by_path(maskopt.summary(params, mask))
  assert list(rows) == ["a/bias", "a/kernel", "b/bias", "b/kernel", "ids"]
  for path, row in rows.items():
    leaf, m = params, mask
    for part in path.split("/"):
      leaf, m = leaf[part], m[part]
    assert row.frozen == np.count_nonzero(np.broadcast_to(m, leaf.shape))
    assert (row.shape, row.parameters, row.dtype) == (leaf.shape, leaf.size, str(leaf.dtype))
  assert rows["a/kernel"].layout == "Elements" and rows["a/kernel"].trainable == "partial"
  assert rows["b/kernel"].layout == "Block" and rows["b/kernel"].frozen_share == 54 / 64
  assert rows["a/bias"].trainable is False and rows["b/bias"].trainable is True
  assert rows["ids"].layout == "Frozen" and rows["ids"].dense_bytes == 0


def test_totals_add_up():
  report = maskopt.summary(*mixed())
  assert report.parameters == 600 * 500 + 500 + 64 * 8 + 8 + 3
  assert report.frozen + report.trainable == report.parameters
  assert report.dense_bytes == 8 * (600 * 500 + 500) + 4 * (64 * 8 + 8)


def test_optimizer_bytes_are_those_of_adam():
  params, mask = mixed()
  params = jax.tree.map(jnp.asarray, params)
  state = maskopt.selective_transform(optax.adam(1e-3), freeze_mask=mask).init(params)
  held = sum(x.nbytes for x in jax.tree.leaves(state)) - 4  # Adam's count
  assert maskopt.summary(params, mask).optimizer_bytes == held


def test_the_mask_of_a_state_gives_the_same_rows():
  params, mask = mixed()
  params = jax.tree.map(jnp.asarray, params)
  state = maskopt.selective_transform(optax.adam(1e-3), freeze_mask=mask).init(params)
  assert maskopt.summary(params, maskopt.mask_of(state)) == maskopt.summary(params, mask)


def test_a_mask_function_is_called_once():
  calls = []

  def mask(params):
    calls.append(1)
    return jax.tree.map(lambda x: x.ndim == 1, params)

  report = maskopt.summary({"w": np.ones((2, 2)), "b": np.ones(2)}, mask)
  assert calls == [1] and report.frozen == 2


@pytest.mark.parametrize("count", [None, 2])
def test_runtime_masks_are_read_now(count):
  mask = {"w": maskopt.runtime(jnp.array([True, False, True, False]), count)}
  (row,) = maskopt.summary({"w": jnp.ones(4)}, mask).rows
  assert (row.frozen, row.trainable) == (2, "partial")
  assert row.optimizer_bytes == (2 * 4 * 4 + 4 if count is None else 2 * 2 * 4 + 2 * 4)


def test_a_traced_mask_is_refused():
  params = {"w": jnp.ones(2)}

  def traced(m):
    return maskopt.summary(params, {"w": m}).frozen

  with pytest.raises(TypeError, match=r"maskopt.summary.*freeze mask at hand.*outside jit"):
    jax.jit(traced)(jnp.array([True, False]))


def test_a_mask_that_does_not_fit_is_named():
  with pytest.raises(
    ValueError, match=r"maskopt.summary\(freeze_mask=...\)`: at v, expected a par"
  ):
    maskopt.summary({"w": jnp.ones(2)}, {"w": True, "v": True})


def test_without_a_mask_integers_and_shared_arrays_are_only_shown():
  w = jnp.ones(3)
  report = maskopt.summary({"a": w, "b": w, "n": jnp.arange(2), "key": jax.random.key(0)})
  rows = by_path(report)
  assert [rows[p].trainable for p in ("a", "b", "n", "key")] == [True, True, False, False]
  assert report.slips == ()


def test_modules_come_in_network_order_with_their_other_state():
  report = maskopt.summary(Net(nnx.Rngs(0)), {"stem": True, "norm": True, "head": False})
  layers = [row.path.split("/")[0] for row in report.rows]
  assert layers == ["stem", "stem", "norm", "norm", "head", "head"]
  assert ("BatchStat", 2, 8) in report.others
  assert "2 arrays of BatchStat (8 values)" in " ".join(str(report).split())


def test_numbered_layers_are_ordered_by_number():
  params = {f"Dense_{i}": {"kernel": np.ones((2, 2))} for i in (0, 1, 2, 10)}
  assert [r.path[6:-7] for r in maskopt.summary(params).rows] == ["0", "1", "2", "10"]


def test_numbers_in_the_names_of_a_bare_tree_count_by_value():
  layer = {"attention": {"k2": np.ones(2), "k10": np.ones(2)}, "mlp": np.ones(2)}
  params = {"embed": np.ones(2), "head": np.ones(2)} | {f"layer_{i}": layer for i in (0, 2, 10)}
  found = [row.path for row in maskopt.summary(params).rows]
  inner = ["attention/k2", "attention/k10", "mlp"]
  assert found == ["embed", "head", *(f"layer_{i}/{x}" for i in (0, 2, 10) for x in inner)]
  fields = namedtuple("Fields", ["layer_2", "layer_10", "embed"])  # an order of its own
  assert [r.path for r in maskopt.summary(fields(*[np.ones(2)] * 3)).rows] == list(fields._fields)


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))


@pytest.mark.parametrize(
  "mask",
  [
    {"Dense_0": True, "BatchNorm_0": False},
    {"params": {"Dense_0": True, "BatchNorm_0": False}},
    lambda params: {"Dense_0": True, "BatchNorm_0": False},
  ],
)
def test_linen_variables_come_apart(mask):
  variables = Linen().init(jax.random.key(0), jnp.ones((2, 4)))
  report = maskopt.summary(variables, mask)
  assert {r.path for r in report.rows if r.trainable is False} == {"Dense_0/bias", "Dense_0/kernel"}
  assert report.others == (("batch_stats", 2, 6),)


def test_a_mask_may_speak_of_every_collection():
  variables = Linen().init(jax.random.key(0), jnp.ones((2, 4)))
  report = maskopt.summary(variables, {"params": False, "batch_stats": True})
  assert report.frozen == 6 and report.others == ()


@pytest.mark.parametrize("free", [False, np.zeros(3, bool), {"BatchNorm_0": False}])
def test_collections_that_the_mask_leaves_free_are_state(free):
  variables = Linen().init(jax.random.key(0), jnp.ones((2, 4)))
  params = {"Dense_0": True, "BatchNorm_0": False}
  if isinstance(free, np.ndarray):
    free = {"BatchNorm_0": {"mean": free, "var": free}}
  report = maskopt.summary(variables, {"params": params, "batch_stats": free})
  assert str(report) == str(maskopt.summary(variables, params))
  assert report.others == (("batch_stats", 2, 6),)
  built = maskopt.build_mask(variables, [("params/Dense_0", True)])
  assert str(report) == str(maskopt.summary(variables, built))
  assert maskopt.metrics(variables, built) == maskopt.metrics(variables["params"], params)
  both = maskopt.metrics(variables, built, grad=variables)
  assert both["grad_norm_frozen"] == both["param_norm_frozen"] > 0


def test_what_a_mask_freezes_of_a_collection_stays_and_the_rest_is_state():
  variables = Linen().init(jax.random.key(0), jnp.ones((2, 4)))
  mask = maskopt.build_mask(variables, [("**/mean", True)])
  report = maskopt.summary(variables, mask)
  assert "batch_stats/BatchNorm_0/mean" in {x.path for x in report.rows}
  assert "batch_stats/BatchNorm_0/var" not in {x.path for x in report.rows}
  assert (report.frozen, report.others) == (3, (("batch_stats", 1, 3),))


def test_a_mask_for_other_collections_is_still_refused():
  variables = Linen().init(jax.random.key(0), jnp.ones((2, 4)))
  for wrong in ({"adapters": False}, {"batch_stats": {"BatchNorm_7": False}}):
    with pytest.raises(ValueError, match="expected a parameter, got none of that path"):
      maskopt.summary(variables, {"params": False, "batch_stats": False, **wrong})


def test_the_mask_of_a_linen_state_fits_its_variables():
  variables = Linen().init(jax.random.key(0), jnp.ones((2, 4)))
  tx = maskopt.selective_transform(optax.sgd(0.1), freeze_mask=True)
  for params in (variables["params"], {"params": variables["params"]}):
    assert maskopt.summary(variables, maskopt.mask_of(tx.init(params))).trainable == 0


def test_an_unknown_collection_is_not_passed_over():
  params = {"params": {"w": np.ones(2)}, "adapters": {"w": np.ones(3)}}
  assert maskopt.summary(params).parameters == 5


def test_equinox_functions_are_no_rows():
  model = eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(0))
  report = maskopt.summary(model)
  assert report.parameters == 6 + 3 + 6 + 2 and len(report.rows) == 4


def test_a_billion_abstract_elements_cost_their_rows():
  shape = jax.ShapeDtypeStruct((32_768, 32_768), jnp.bfloat16)
  params = {"kernel": shape, "bias": jax.ShapeDtypeStruct((32_768,), jnp.bfloat16)}
  units = np.arange(32_768) % 8 != 0
  report = maskopt.summary(params, {"kernel": units, "bias": ~units})
  rows = by_path(report)
  assert rows["kernel"].frozen == 7 * 2**30 // 8
  assert {s.frozen for s in report.slips} == {"kernel", "bias"}
  state = maskopt.report._elements.analysed({"kernel": units, "bias": units}, params, "x")
  assert sum(x.nbytes for x in jax.tree.leaves(state)) < 200_000


# Slips


def slips(params, mask):
  return [(s.frozen, s.trains, s.units) for s in maskopt.summary(params, mask).slips]


def test_frozen_units_whose_bias_trains_are_named():
  params = {"d": {"kernel": np.ones((4, 6)), "bias": np.ones(6)}}
  frozen = np.isin(np.arange(6), [1, 4])
  assert slips(params, {"d": {"kernel": frozen, "bias": False}}) == [("d/kernel", "d/bias", (1, 4))]
  assert slips(params, {"d": {"kernel": frozen, "bias": frozen}}) == []


def test_three_units_but_two_biases():
  params = {"kernel": np.ones((10, 5)), "bias": np.ones(5)}
  three, two = np.isin(np.arange(5), [0, 2, 4]), np.isin(np.arange(5), [0, 2])
  assert slips(params, {"kernel": three, "bias": two}) == [("kernel", "bias", (4,))]


def test_both_directions_at_once():
  params = {"kernel": np.ones((4, 3)), "bias": np.ones(3)}
  mask = {"kernel": np.array([True, False, False]), "bias": np.array([False, False, True])}
  assert slips(params, mask) == [("kernel", "bias", (0,)), ("bias", "kernel", (2,))]


def test_a_unit_with_one_trainable_weight_is_not_frozen():
  kernel = np.ones((4, 3), bool)
  kernel[2, 1] = False
  params = {"kernel": np.ones((4, 3)), "bias": np.ones(3)}
  assert slips(params, {"kernel": kernel, "bias": np.array([True, False, True])}) == []


@pytest.mark.parametrize("prefix", ["scale", "weight", "w"])
def test_siblings_by_their_names(prefix):
  bias = "b" if prefix == "w" else "bias"
  params = {prefix: np.ones(3), bias: np.ones(3)}
  assert slips(params, {prefix: True, bias: False}) == [(prefix, bias, (0, 1, 2))]


def test_equinox_units_stand_first():
  params = {"weight": np.ones((3, 4)), "bias": np.ones(3)}
  mask = {"weight": np.array([[True], [False], [False]]), "bias": False}
  assert slips(params, mask) == [("weight", "bias", (0,))]
  conv = {"weight": np.ones((3, 2, 5, 5)), "bias": np.ones((3, 1, 1))}
  first = np.array([True, False, False]).reshape(3, 1, 1)
  assert slips(conv, {"weight": first[..., None], "bias": False}) == [("weight", "bias", (0,))]
  assert slips(conv, {"weight": first[..., None], "bias": first}) == []


def test_a_square_weight_gives_no_alarm_if_either_axis_agrees():
  params = {"weight": np.ones((3, 3)), "bias": np.ones(3)}
  units = np.array([True, False, False])
  assert slips(params, {"weight": units, "bias": units}) == []
  assert slips(params, {"weight": units[:, None], "bias": units}) == []
  assert slips(params, {"weight": units[:, None], "bias": False}) == [("weight", "bias", (0,))]


def test_heads_are_units_of_two_dimensions():
  params = {"kernel": np.ones((5, 2, 3)), "bias": np.ones((2, 3))}
  head = np.array([[True], [False]])
  found = slips(params, {"kernel": head, "bias": False})
  assert found == [("kernel", "bias", ((0, 0), (0, 1), (0, 2)))]


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_scattered_kernels_are_read_unit_by_unit(share):
  rng = np.random.default_rng(1)
  kernel = rng.random((2000, 40)) >= share
  kernel[:, [3, 7]] = True
  bias = rng.random(40) < 0.3
  params = {"kernel": np.ones((2000, 40), np.float32), "bias": np.ones(40, np.float32)}
  expected = tuple(np.flatnonzero(kernel.all(0) & ~bias).tolist())
  found = {s.frozen: s for s in maskopt.summary(params, {"kernel": kernel, "bias": bias}).slips}
  assert found["kernel"].units == expected
  assert found["bias"].units == tuple(np.flatnonzero(bias & ~kernel.all(0)).tolist())


def test_slips_say_which_units():
  params = {"d": {"kernel": np.ones((2, 30)), "bias": np.ones(30)}}
  some = maskopt.summary(params, {"d": {"kernel": np.arange(30) < 2, "bias": False}})
  many = maskopt.summary(params, {"d": {"kernel": np.arange(30) < 20, "bias": False}})
  whole = maskopt.summary(params, {"d": {"kernel": True, "bias": False}})
  assert "! d/kernel is frozen and bias trains: units 0, 1" in str(some)
  assert "20 units: 0, 1, 2, 3, 4, 5, 6, 7, and 12 more" in str(many)
  assert "all 30 units" in str(whole)
  one = maskopt.summary({"w": np.ones(()), "b": np.ones(())}, {"w": True, "b": False})
  assert "! w is frozen and b trains: the only unit" in str(one) and one.slips[0].units == ((),)


def test_many_slips_are_shortened_on_screen_only():
  params = {str(i): {"kernel": np.ones((2, 3)), "bias": np.ones(3)} for i in range(9)}
  report = maskopt.summary(params, {str(i): {"kernel": True, "bias": False} for i in range(9)})
  assert len(report.slips) == 9 and str(report).count("\n! ") == 7
  assert "! and 3 more, see .slips" in str(report)


# How it shows itself


def wide():
  long = "encoder/layers/{}/self_attention_of_the_block/query_projection_with_a_name"
  leaf = jax.ShapeDtypeStruct((4096, 11008), jnp.bfloat16)
  params = {}
  for i in range(3):
    node = params
    for part in long.format(i).split("/"):
      node = node.setdefault(part, {})
    node["kernel"] = leaf
  return params


def test_lines_fit_a_hundred_columns_and_align(monkeypatch):
  monkeypatch.setenv("COLUMNS", "100")
  lines = str(maskopt.summary(wide(), True)).splitlines()
  assert max(map(len, lines)) <= 100
  rows = [line for line in lines if "4096" in line]
  assert len({line.index("(4096") for line in rows}) == 1
  assert [line.split()[0] for line in rows] == [f"encoder/layers/{i}/.../kernel" for i in range(3)]


def deep():
  """Paths that differ in the middle, at the end, or in one letter of a long name."""
  names = [
    f"model/{side}/layers/{k}/self_attention/{what}_projection/{name}"
    for side in ("encoder", "decoder")
    for k in (0, 1, 11)
    for what in ("query", "key")
    for name in ("kernel", "gate")
  ]
  names += [f"a_name_that_is_long_and_has_no_parts_{k}_but_letters_only_kernel" for k in "ab"]
  leaves = [jax.ShapeDtypeStruct((2**22, 1024), jnp.bfloat16) for _ in names]
  return names, _tree.nested(names, leaves), _tree.nested(names, [bool(k % 2) for k in range(26)])


@pytest.mark.parametrize("width", [60, 72, 80, 100, 120])
@pytest.mark.parametrize("form", ["text", "rich"])
def test_rows_are_told_apart_and_numbers_are_whole_at_any_width(width, form):
  from rich.console import Console

  names, params, mask = deep()
  report = maskopt.summary(params, mask)
  if form == "text":
    text = report._table().text(width)
  else:
    Console(file=(out := io.StringIO()), width=width).print(report)
    text = out.getvalue()
  lines = text.splitlines()
  assert max(map(len, lines)) <= width
  rules = [k for k, line in enumerate(lines) if set(line) in ({"-"}, {"\u2500"})]
  body = lines[rules[0] + 1 : rules[1]]
  # A row ends with its numbers; what stands before them, in lines of its own too, is its path.
  rows, path = [], ""
  for line in body:
    head, number, _ = line.partition("4,294,967,296")
    path += head.split("  (")[0].strip()
    if number:
      assert line.endswith(" 17.2 GB") or line.endswith(" 0 B")
      rows, path = [*rows, path], ""
  assert len(rows) == len(set(rows)) == len(names)
  for shown in rows:
    parts = [re.escape(part) for part in shown.split("...")]
    assert sum(re.fullmatch(".*".join(parts), name) is not None for name in names) == 1, shown


def test_narrow_terminals_get_narrow_tables(monkeypatch):
  monkeypatch.setenv("COLUMNS", "72")
  assert max(map(len, str(maskopt.summary(wide(), True)).splitlines())) <= 72
  monkeypatch.setenv("COLUMNS", "300")
  assert max(map(len, str(maskopt.summary(wide(), True)).splitlines())) <= 100


def test_plain_text_is_ascii():
  assert str(maskopt.summary(*mixed())).isascii()
  assert repr(maskopt.summary(*mixed())) == str(maskopt.summary(*mixed()))


def test_html_is_escaped_and_whole():
  html = maskopt.summary({"<script>": np.ones(2), "long/" * 30 + "w": np.ones(2)})._repr_html_()
  assert "<script>" not in html and "&lt;script&gt;" in html
  assert "long/" * 30 in html and html.count("<tr") == 3


@pytest.mark.parametrize("width", [70, 100])
def test_rich_draws_the_same_rows(width):
  from rich.console import Console

  out = io.StringIO()
  Console(file=out, width=width).print(maskopt.summary({"[red]w": np.ones((2, 3))}, True))
  assert "[red]w" in out.getvalue() and "(2, 3)" in out.getvalue() and "100%" in out.getvalue()
  assert max(map(len, out.getvalue().splitlines())) <= width


@pytest.mark.parametrize(
  "part, whole, text",
  [
    (0, 9, "0%"),
    (9, 9, "100%"),
    (1, 10**6, "<0.1%"),
    (10**6 - 1, 10**6, ">99.9%"),
    (1, 3, "33.3%"),
  ],
)
def test_shares_say_all_and_nothing_only_when_so(part, whole, text):
  assert _show.share(part, whole) == text


@pytest.mark.parametrize(
  "path, width, short",
  [
    ("a/kernel", 12, "a/kernel"),
    ("block/attention/query/kernel", 24, "block/.../query/kernel"),
    ("block/attention/query/kernel", 18, ".../query/kernel"),
    ("decoder/layers_12/mlp/up/kernel", 26, ".../layers_12/.../kernel"),
    ("averylongnamewithoutparts", 11, "aver...arts"),
  ],
)
def test_long_paths_lose_their_middle(path, width, short):
  assert _show.shorten(path, width) == short and len(short) <= width


@pytest.mark.parametrize("count", [0, 999, 1000, 999_949, 999_951, 10**6, 5 * 10**9])
def test_bytes_in_units(count):
  number, unit = _show.size(count).split()
  scale = 1000 ** ["B", "kB", "MB", "GB"].index(unit)
  assert math.isclose(float(number) * scale, count, rel_tol=0.06) and float(number) < 1000


class Normed(nnx.Module):
  def __init__(self):
    self.dense = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    self.head = nnx.Linear(4, 2, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("layer", ["dense", "norm", "head"])
def test_live_statistics_of_frozen_units_are_named(layer):
  model = Normed()
  mask = maskopt.build_mask(model, [(layer, True)])
  expected = () if layer == "head" else ("norm",)
  found = maskopt.summary(model, mask)
  assert found.live == expected
  assert ("norm follows the batch" in str(found)) == bool(expected)
  model.eval()
  assert maskopt.summary(model, mask).live == ()
  model.train()
  maskopt.nnx.freeze_statistics(model, {"dense": True, "norm": True, "head": False})
  assert maskopt.summary(model, mask).live == ()


def test_without_a_mask_those_that_modules_carry_are_shown():
  units = np.array([True, False, False])
  layer = maskopt.nnx.MaskedLinear(2, 3, kernel_freeze_mask=units, rngs=nnx.Rngs(0))
  model = nnx.Dict(first=layer, last=nnx.Linear(3, 2, rngs=nnx.Rngs(1)))
  report = maskopt.summary(model)
  assert report == maskopt.summary(model, maskopt.nnx.freeze_mask(model))
  assert report.frozen == 2 and "first/kernel is frozen and bias trains: unit 0" in str(report)


@pytest.mark.parametrize("kind", ["scattered", "many", "columns", "block", "rows"])
def test_what_memory_would_hold_is_what_it_holds(kind):
  rng, shape = np.random.default_rng(0), (64, 48)
  mask = {
    "scattered": rng.random(shape) < 0.9,
    "many": rng.random(shape) < 0.1,
    "columns": np.arange(48) % 3 > 0,
    "block": np.arange(64)[:, None] > 20,
    "rows": np.arange(64)[:, None] % 3 > 0,
  }[kind]
  params = {"w": jnp.ones(shape)}
  report = maskopt.summary(params, {"w": mask})
  held = {
    prefer: sum(
      x.nbytes
      for x in jax.tree.leaves(
        maskopt.selective_transform(optax.adam(0.1), freeze_mask={"w": mask}, prefer=prefer).init(
          params
        )
      )
    )
    - 4  # the count
    for prefer in ("time", "memory")
  }
  assert (report.optimizer_bytes, report.memory_bytes) == (held["time"], held["memory"])
  assert ('with prefer="memory":' in str(report)) == (held["memory"] < 0.9 * held["time"])


def test_masks_that_are_data_are_marked_and_what_they_cost_is_told():
  params = {"a": jnp.ones(9), "b": jnp.ones(9)}
  mask = jnp.arange(9) > 2
  report = maskopt.summary(params, {"a": mask, "b": maskopt.runtime(mask, count=3)})
  assert [(r.layout, r.runtime) for r in report.rows] == [("Dense", True), ("Elements", True)]
  assert "Dense (runtime)" in str(report) and "Elements (runtime)" in str(report)
  assert "! a: a mask that is a jax.Array may change at every step" in str(report)
  assert "prefer=" not in str(report)
