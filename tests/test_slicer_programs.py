"""Effects, unknown primitives, further derivatives, odd values and the layers of current models."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slicer_programs as programs
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from test_slicer import assert_sliced, block_of

from maskopt._slicer import (
  ALL,
  NONE,
  Region,
  _rules_contract,
  analyze,
  count_flops,
  region,
  slice_program,
)

R = np.random.default_rng(0)
W = jnp.asarray(R.normal(size=(20, 20)) / 4, jnp.float32)
X = jnp.asarray(R.normal(size=(6, 20)), jnp.float32)
COLUMNS = (region(W.shape, None, [2, 3, 11]),)


def loss(w: Any, x: Any) -> Any:
  return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w) ** 2)


# --- what must not be lost -----------------------------------------------------------------------
def test_effects_happen_once_and_in_order(capfd: pytest.CaptureFixture[str]) -> None:
  def noisy(w: Any, x: Any) -> Any:
    jax.debug.print("first", ordered=True)
    y = jnp.tanh(x @ w)
    jax.debug.print("second {}", y.shape[0], ordered=True)
    return jnp.sum(y**2)

  for f in (noisy, jax.jit(noisy)):
    out = jax.jit(lambda w, x, f=f: slice_program(jax.grad(f), [COLUMNS], w, x)[0])(W, X)
    jax.block_until_ready(out)
    jax.effects_barrier()
    assert capfd.readouterr().out == "first\nsecond 6\n"


def test_callbacks_happen_once() -> None:
  seen: list[int] = []

  def noisy(w: Any, x: Any) -> Any:
    jax.debug.callback(lambda: seen.append(1))
    return loss(w, x)

  jax.block_until_ready(
    jax.jit(lambda w, x: slice_program(jax.grad(noisy), [COLUMNS], w, x)[0])(W, X)
  )
  jax.effects_barrier()
  assert seen == [1]


@pytest.mark.parametrize(
  "wrap", [jax.checkpoint, jax.jit, lambda f: f], ids=["remat", "jit", "none"]
)
def test_effects_inside_sliced_calls(wrap: Any) -> None:
  def noisy(seen: list[int]) -> Any:
    @wrap
    def body(h: Any, w: Any) -> Any:
      jax.debug.callback(lambda: seen.append(1))
      return jnp.tanh(h @ w), None

    return jax.grad(lambda w, x: jnp.sum(lax.scan(body, x, w)[0] ** 2))

  stack, counts = jnp.stack([W] * 3), ([], [])
  demand = (region(stack.shape, None, None, [1, 2, 9]),)
  jax.block_until_ready(jax.jit(noisy(counts[0]))(stack, X))
  sliced = jax.jit(lambda w, x: slice_program(noisy(counts[1]), [demand], w, x)[0])
  jax.block_until_ready(sliced(stack, X))
  jax.effects_barrier()
  assert len(counts[0]) == len(counts[1]) > 0


@pytest.mark.parametrize("layers", [[4, 5], [3, 4], [0, 1]])
def test_scan_stops_at_the_lowest_layer_that_trains(layers: list[int]) -> None:
  stack = jnp.stack([W] * 6)
  grad = jax.grad(lambda w, x: jnp.sum(lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]))
  report = assert_sliced(grad, [(region(stack.shape, layers),)], stack, X)
  unit = 2 * 6 * 20 * 20
  assert report.flops_sliced == unit * (6 + 2 * (6 - layers[0]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_pass_as_in_jax(value: float) -> None:
  x = X.at[1, 3].set(value)
  grad = jax.grad(lambda w, x: jnp.sum(jax.nn.relu(x @ w)))
  (blocks,), _ = slice_program(grad, [(region(W.shape, slice(2, 6), [2, 3]),)], W, x)
  np.testing.assert_array_equal(blocks[0], np.asarray(grad(W, x))[2:6, 2:4])


def test_frozen_leaves_are_not_computed() -> None:
  grad = jax.grad(lambda p, x: loss(p[1], x @ p[0]))
  out, report = slice_program(grad, [NONE, ALL], [W, W], X)
  np.testing.assert_allclose(out[1], grad([W, W], X)[1], rtol=1e-5)
  assert out[0] is None
  lowest = 2 * 6 * 20 * 20 * 2  # its dW and the dx that only it needs
  assert report.flops_sliced == count_flops(jax.make_jaxpr(grad)([W, W], X)) - lowest


def test_most_of_a_leaf_is_computed_whole() -> None:
  demand = (region(W.shape, None, slice(0, 15)),)
  report = assert_sliced(jax.grad(loss), [demand], W, X)
  assert report.flops_sliced == report.flops_full


@pytest.mark.parametrize("stored", ["in, out", "out, in"])
@pytest.mark.parametrize("wanted", ["rows", "columns"])
def test_weight_gradients_multiply_the_narrow_operand_first(stored: str, wanted: str) -> None:
  side, batch = 400, 2048
  w, x = (jnp.asarray(R.normal(size=(n, side)) / 20, jnp.float32) for n in (side, batch))

  def f(w: Any, x: Any) -> Any:
    w = w if stored == "in, out" else w.T
    return jnp.sum(jnp.tanh(jnp.matmul(x, w, precision=("highest", "default"))))

  demand = (region(w.shape, *([2, 3, 11],) if wanted == "rows" else (None, [2, 3, 11])),)
  assert_sliced(jax.grad(f), [demand], w, x)
  closed = jax.make_jaxpr(lambda w, x: slice_program(jax.grad(f), [demand], w, x)[0])(w, x)
  products = [e for e in closed.eqns if e.primitive.name == "dot_general"]
  (product,) = [e for e in products if set(e.outvars[0].aval.shape) == {3, side}]
  assert product.invars[0].aval.shape == (batch, 3)  # the other order is slower on a CPU


KERNEL = jnp.asarray(R.normal(size=(3, 2, 5, 9)), jnp.float32)
IMAGE = jnp.asarray(R.normal(size=(2, 6, 7, 5)), jnp.float32)


def convolved(padding: Any, stride: int = 1) -> Any:
  dims = ("NHWC", "HWIO", "NHWC")

  def f(w: Any, x: Any) -> Any:
    y = lax.conv_general_dilated(x, w, (stride, 1), padding, dimension_numbers=dims)
    return jnp.sum(jnp.sin(y))

  return jax.grad(f)


PARTS = [(None, None, None, [2, 5, 8]), ([1],), (slice(1, 3),), ([0], [1], None, [2, 5, 8])]


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((2, 0), (0, 1)), ((0, 3), (2, 2))], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_conv_kernels_by_tap_and_channel(padding: Any, stride: int) -> None:
  grad = convolved(padding, stride)
  for part in PARTS:
    # A cut along a tap is no padding of (-1, 1): XLA:CPU reads past the image for that one.
    report = assert_sliced(grad, [(region(KERNEL.shape, *part),)], KERNEL, IMAGE)
    assert not report.stops


def test_conv_kernels_convolve_the_narrow_operand() -> None:
  demand = (region(KERNEL.shape, None, None, None, [2, 5, 8]),)
  whole = jax.make_jaxpr(convolved("SAME"))(KERNEL, IMAGE)
  closed = jax.make_jaxpr(lambda *a: slice_program(convolved("SAME"), [demand], *a)[0])(
    KERNEL, IMAGE
  )
  image = [e.invars[0].aval.shape for e in closed.eqns if e.primitive.name.startswith("conv_gen")]
  assert image[-1] == (2, 6, 7, 3)  # the other order is slower on a CPU
  assert count_flops(closed) == count_flops(whole) / 3


# --- a primitive nobody knows --------------------------------------------------------------------
doubled_p = core.Primitive("slicer_test_doubled")
doubled_p.def_impl(lambda x: x * 2)
doubled_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(doubled_p, mlir.lower_fun(lambda x: x * 2, multiple_results=False))
ad.deflinear2(doubled_p, lambda ct, x: [doubled_p.bind(ct)])
batching.primitive_batchers[doubled_p] = lambda args, dims: (doubled_p.bind(*args), dims[0])


def test_unknown_primitive_is_computed_whole_and_reported() -> None:
  grad = jax.grad(lambda w, x: jnp.sum(jnp.sin(doubled_p.bind(x @ w))))
  report = assert_sliced(grad, [COLUMNS], W, X)
  (stop,) = [s for s in report.stops if s.primitive == "slicer_test_doubled"]
  assert stop.count == 1
  assert stop.reason == "no rule for this primitive"
  assert "test_slicer_programs.py" in stop.line


# --- through the sliced program ------------------------------------------------------------------
def sliced(w: Any, x: Any) -> Any:
  return slice_program(jax.grad(loss), [COLUMNS], w, x)[0][0][0]


def plain(w: Any, x: Any) -> Any:
  return jax.grad(loss)(w, x)[:, np.array([2, 3, 11])]


@pytest.mark.parametrize("of", [jax.jacfwd, jax.jacrev, jax.linearize], ids=lambda f: f.__name__)
def test_second_derivative(of: Any) -> None:
  def derivative(f: Any) -> Any:
    if of is jax.linearize:
      return jax.linearize(lambda w: f(w, X), W)[1](W)
    return of(lambda w: f(w, X))(W)

  np.testing.assert_allclose(derivative(sliced), derivative(plain), rtol=1e-4, atol=1e-4)


def test_hessian_vector_product() -> None:
  v = jnp.ones_like(W)
  got = jax.jvp(lambda w: sliced(w, X), (W,), (v,))[1]
  np.testing.assert_allclose(
    got, jax.jvp(lambda w: plain(w, X), (W,), (v,))[1], rtol=1e-4, atol=1e-4
  )


def through_products() -> dict[str, Any]:
  """(gradient, its arguments, region): those that multiply in another order on a CPU."""
  columns = (None, [2, 3, 11])
  return {
    "matmul": (jax.grad(loss), W, X, region(W.shape, *columns)),
    "conv": (convolved("SAME"), KERNEL, IMAGE, region(KERNEL.shape, None, None, None, [2, 5, 8])),
  }


@pytest.mark.parametrize("name", through_products())
def test_derivatives_through_exchanged_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(_rules_contract, "LARGE_PRODUCT", 0)
  grad, w, x, r = through_products()[name]
  v, xs = jnp.ones_like(w), jnp.stack([x, x + 1])

  def ours(w: Any, x: Any) -> Any:
    return slice_program(grad, [(r,)], w, x)[0][0][0]

  def theirs(w: Any, x: Any) -> Any:
    return grad(w, x)[..., np.asarray([2, 3, 11] if name == "matmul" else [2, 5, 8])]

  for derivative in (
    lambda f: jax.jvp(lambda w: f(w, x), (w,), (v,))[1],
    lambda f: jax.grad(lambda w: jnp.sum(jnp.sin(f(w, x))))(w),
    lambda f: jax.jit(jax.vmap(f, (None, 0)))(w, xs),
  ):
    np.testing.assert_allclose(derivative(ours), derivative(theirs), rtol=1e-3, atol=1e-3)


def test_custom_rules_survive_for_those_who_differentiate_through() -> None:
  @jax.custom_vjp
  def clipped(x: Any) -> Any:
    return x

  clipped.defvjp(lambda x: (x, None), lambda _, ct: (jnp.clip(ct, -0.1, 0.1),))

  def f(x: Any) -> Any:
    return clipped(jnp.sin(x)), jax.nn.relu(x)

  r = region((6, 20), [1, 2], None)
  for k in range(2):
    got = jax.grad(lambda x: jnp.sum(slice_program(f, [(r,), (r,)], x)[0][k][0] * 3))(X * 0)  # noqa: B023
    expected = jax.grad(lambda x: jnp.sum(f(x)[k][1:3] * 3))(X * 0)  # noqa: B023
    np.testing.assert_allclose(got, expected)


def test_vmap_outside_and_inside() -> None:
  ws = jnp.stack([W, W + 1])
  np.testing.assert_allclose(
    jax.vmap(sliced, (0, None))(ws, X), jax.vmap(plain, (0, None))(ws, X), rtol=1e-4, atol=1e-5
  )
  per_example = jax.vmap(jax.grad(loss), (None, 0))
  assert_sliced(per_example, [(region((6, 20, 20), [1], None, [2, 5]),)], W, X[:, None])


# --- layers of current models --------------------------------------------------------------------
def rotary(x: Any) -> Any:
  half = x.shape[-1] // 2
  angle = jnp.arange(6.0)[:, None] * jnp.exp(-jnp.arange(float(half)))[None]
  a, b = x[..., :half], x[..., half:]
  sin, cos = jnp.sin(angle)[None, :, None], jnp.cos(angle)[None, :, None]
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def attention_rotary(p: Any, x: Any) -> Any:
  q, k, v = (jnp.einsum("bte,ehd->bthd", x, p[n]) for n in "qkv")
  return jax.nn.dot_product_attention(rotary(q), rotary(k), v, is_causal=True)


def gated(p: Any, x: Any) -> Any:
  return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def experts(p: Any, x: Any) -> Any:
  weight, choice = lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
  send = jnp.sum(jax.nn.one_hot(choice, 4) * weight[..., None], -2)
  inner = jnp.einsum("bte,xef->xbtf", x, p["up"])
  return jnp.einsum("bte,ebtf->btf", send, jax.nn.gelu(inner))


def ragged_experts(p: Any, x: Any) -> Any:
  sizes = jnp.asarray([3, 0, 4, 5], jnp.int32)
  return lax.ragged_dot(
    jnp.tanh(lax.ragged_dot(x.reshape(12, 20), p["up"], sizes)), p["down"], sizes
  )


def transposed_conv(p: Any, x: Any) -> Any:
  return lax.conv_transpose(x, p["w"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def normed(p: Any, x: Any) -> Any:
  y = x @ p["w"]
  y = (y - jnp.mean(y, -1, keepdims=True)) * lax.rsqrt(jnp.var(y, -1, keepdims=True) + 1e-5)
  y = y * p["scale"][None, None]
  return y * lax.rsqrt(jnp.mean(y**2, -1, keepdims=True)) @ p["w2"]


def arrays(**shapes: tuple[int, ...]) -> dict[str, jax.Array]:
  return {k: jnp.asarray(R.normal(size=s) / 3, jnp.float32) for k, s in shapes.items()}


MODELS: dict[str, tuple[Any, dict[str, jax.Array], dict[str, Any]]] = {
  "attention": (attention_rotary, arrays(q=(20, 5, 4), k=(20, 5, 4), v=(20, 5, 4)), {
    n: (None, [2], None) for n in "qkv"}),
  "gated": (gated, arrays(gate=(20, 40), up=(20, 40), down=(40, 20)), {
    "gate": (None, [3, 9]), "up": (None, [3, 9]), "down": ([3, 9],)}),
  "experts": (experts, arrays(router=(20, 4), up=(4, 20, 40)), {"up": ([2],)}),
  "expert columns": (experts, arrays(router=(20, 4), up=(4, 20, 40)), {"up": (None, None, [5, 6])}),
  "ragged experts": (ragged_experts, arrays(up=(4, 20, 40), down=(4, 40, 20)), {
    "up": (None, None, [5, 6]), "down": (None, [5, 6])}),
  "transposed conv": (transposed_conv, arrays(w=(3, 20, 10)), {"w": (None, None, [4])}),
  "transposed conv taps": (transposed_conv, arrays(w=(3, 20, 10)), {"w": ([1],)}),
  "norms": (normed, arrays(w=(20, 20), scale=(20,), w2=(20, 20)), {
    "w": ([1, 4],), "scale": ([1, 4],), "w2": (None, slice(0, 2))}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_layers_of_current_models_are_sliced(name: str) -> None:
  apply, params, wanted = MODELS[name]
  demands = [
    (region(params[k].shape, *wanted[k]),) if k in wanted else NONE for k in sorted(params)
  ]
  x = jnp.asarray(R.normal(size=(2, 6, 20)), jnp.float32)
  grad = jax.grad(lambda p, x: jnp.sum(apply(p, x) ** 2))
  report = assert_sliced(grad, demands, params, x)
  assert not report.stops
  kept = jax.grad(lambda p, x: jnp.sum(apply({**params, **p}, x) ** 2))
  some = {k: params[k] for k in wanted}
  assert report.flops_sliced < count_flops(jax.make_jaxpr(kept)(some, x))


def test_branches_and_loops_are_sliced() -> None:
  def f(w: Any, x: Any) -> Any:
    y = lax.cond(jnp.sum(x) > 0, lambda x: x @ w, lambda x: jnp.sin(x @ w), x)
    return jnp.sum(lax.fori_loop(0, 3, lambda _, y: jnp.sin(y), y) ** 2)

  report = assert_sliced(jax.grad(f), [COLUMNS], W, X)
  assert not report.stops
  assert report.flops_sliced < 0.3 * report.flops_full  # columns never mix

  def g(w: Any, x: Any) -> Any:
    return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.sin(s[1]) + x @ w), (0, x))[
      1
    ]

  report = assert_sliced(g, [(region(X.shape, None, [2, 3]),)], W, X)
  assert report.flops_sliced == 0.1 * report.flops_full


def test_equal_layers_share_one_plan_and_one_trace() -> None:
  case = programs.transformer("heads", "jit", layers=6)
  closed = jax.make_jaxpr(case.grad)(*case.args)
  plan = analyze(closed, case.demands)
  inner = {id(p) for step in plan.inner.steps for p in step.plans}
  assert len(inner) <= 3  # forward, the lowest block backward, the others backward
  traced = jax.make_jaxpr(plan.emit)(closed.consts, jax.tree.leaves(case.args))
  assert len(traced.eqns) <= len(closed.eqns) + 2


def test_long_ranges_stay_symbolic() -> None:
  table = jax.ShapeDtypeStruct((50_000_000, 2), jnp.float32)
  demand = (region(table.shape, slice(1_000_000, 9_000_000)),)
  closed = jax.make_jaxpr(jax.grad(lambda t, i: jnp.sum(t[i] ** 2)))(table, jnp.arange(3))
  plan = analyze(closed, [demand])
  traced = jax.make_jaxpr(plan.emit)(*plan.abstract)
  assert sum(np.size(c) for c in traced.consts) < 10


def test_empty_regions() -> None:
  empty = Region((range(0, 0), None))
  (blocks,), _ = slice_program(jax.grad(loss), [(empty,)], W, X)
  assert blocks[0].shape == (0, 20)
  assert block_of(W, empty).shape == (0, 20)


@pytest.mark.parametrize(("share", "sliced"), [(0.1, True), (0.3, False)])
def test_loops_that_carry_much_of_a_gradient_carry_it_whole(share: float, sliced: bool) -> None:
  def loss(w: jax.Array, xs: jax.Array) -> jax.Array:
    final, _ = lax.scan(lambda h, x: (jnp.tanh(x + h @ w), None), jnp.zeros((4, 40)), xs)
    return (final**2).sum()

  r = np.random.default_rng(0)
  w, xs = jnp.asarray(r.normal(size=(40, 40)) / 6), jnp.asarray(r.normal(size=(5, 4, 40)))
  columns = region(w.shape, None, np.sort(r.choice(40, int(40 * share), replace=False)))
  (blocks,), report = slice_program(jax.grad(loss), [(columns,)], w, xs)
  full = np.asarray(jax.grad(loss)(w, xs))
  np.testing.assert_allclose(blocks[0], full[:, np.asarray(columns[1].values)], rtol=1e-5)
  assert (report.flops_sliced < report.flops_full) == sliced
