"""plot: the images hold the mask and the change, and a leak cannot be overlooked."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

import maskopt
from maskopt.report import _elements, _images, _plot


def layout_of(mask, shape):
  layouts = _elements.analysed({"w": mask}, {"w": jax.ShapeDtypeStruct(shape, np.float32)}, "x")
  return layouts.static.layouts[0], layouts.index[0]


def masks():
  rng = np.random.default_rng(0)
  shape = (3, 5, 70, 300)
  return shape, {
    "bool": True,
    "units": rng.random(300) < 0.5,
    "rows": (rng.random(70) < 0.95)[:, None],
    "slice": np.arange(300) >= 30,
    "middle": (rng.random((5, 1, 300)) < 0.9),
    "scattered": rng.random(shape) < 0.97,
    "half": rng.random(shape) < 0.5,
    "runtime": maskopt.runtime(jnp.asarray(rng.random(shape) < 0.5)),
  }


@pytest.mark.parametrize("name", masks()[1])
def test_shares_are_block_means(name):
  shape, all_masks = masks()
  mask = all_masks[name]
  grid = _images.grid(shape)
  share = _images.frozen_share(*layout_of(mask, shape), grid)
  values = np.asarray(getattr(mask, "mask", mask))
  dense = np.broadcast_to(values, shape).reshape(-1, 300)
  expected = [
    [block.mean() for block in np.split(row, grid.columns[1:], axis=1)]
    for row in np.split(dense, grid.rows[1:], axis=0)
  ]
  assert share.shape == (128, 128)
  np.testing.assert_allclose(share, expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (300,), (4, 3), (2, 3, 4), (129, 1)])
def test_shares_of_small_leaves_are_their_masks(shape):
  mask = np.random.default_rng(1).random(shape) < 0.5
  if mask.size > 1:
    mask.reshape(-1)[:2] = [True, False]
  grid = _images.grid(shape)
  share = _images.frozen_share(*layout_of(mask, shape), grid)
  if max(grid.shape) <= 128:
    np.testing.assert_array_equal(share, mask.reshape(grid.shape))
  np.testing.assert_allclose(
    np.average(share, weights=np.outer(grid.heights, grid.widths)), mask.mean()
  )


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.complex64, np.int32, bool])
def test_change_is_the_largest_of_a_block_and_counts_leaks(dtype):
  shape = (300, 200)
  mask = np.arange(200) < 100
  old = np.zeros(shape, dtype)
  new = old.copy()
  new[10, 150], new[11, 151], new[299, 3] = 1, 2 if dtype is not bool else 1, 1
  grid = _images.grid(shape)
  size, leaks = _images.change(old, new, *layout_of(mask, shape), grid)
  row, column = (
    np.searchsorted(s, i, "right") - 1 for s, i in ((grid.rows, 10), (grid.columns, 150))
  )
  assert size[row, column] >= 1 and np.count_nonzero(size) <= 3
  assert size.max() == (1 if dtype is bool else 2)
  assert leaks.sum() == 1 and leaks[-1, np.searchsorted(grid.columns, 3, "right") - 1] == 1


def test_a_leak_without_distance_is_seen():
  old, new = np.zeros(4, np.float32), -np.zeros(4, np.float32)
  size, leaks = _images.change(old, new, *layout_of(True, (4,)), _images.grid((4,)))
  assert size.max() == 0 and leaks.tolist() == [[1, 1, 1, 1]]


def test_not_a_number_counts_as_a_change_without_bound():
  old = np.array([1.0, np.inf, np.nan], np.float32)
  new = np.array([np.nan, np.inf, np.nan], np.float32)
  size, leaks = _images.change(old, new, *layout_of(False, (3,)), _images.grid((3,)))
  assert size.tolist() == [[np.inf, 0, 0]] and leaks.sum() == 0
  assert isinstance(maskopt.plot({"w": new}, False, {"w": old}), Figure)


def panels(figure):
  """(titles, first images) of the axes that show leaves."""
  return [(a.get_title(), a.get_images()[0].get_array()) for a in figure.axes if a.get_images()]


def params():
  return {"d": {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3, np.float32)}}


MASK = {"d": {"kernel": np.array([True, False, False]), "bias": False}}


def test_each_leaf_has_a_panel_with_path_shape_and_share():
  figure = maskopt.plot(params(), MASK)
  (bias, strip), (kernel, image) = panels(figure)
  assert bias == "d/bias\n(3,), 0% frozen" and kernel == "d/kernel\n(4, 3), 33.3% frozen"
  assert strip.max() == 0 and image[0, 0] == 1 and image[0, -1] == 0
  assert figure.get_suptitle() == "26.7% of 15 parameters frozen"


def test_change_stands_beside_the_mask_and_a_leak_is_loud():
  before = maskopt.snapshot(params())
  after = params()
  after["d"]["bias"] += 1
  clean = maskopt.plot(after, MASK, before)
  assert "no leak" in clean.get_suptitle()
  assert [t for t, _ in panels(clean)][1] == "largest change 1\nnothing frozen"
  after["d"]["kernel"][2, 0] += 1
  figure = maskopt.plot(after, MASK, before)
  assert "LEAK: 1 of 4 frozen changed" in figure.get_suptitle()
  title, image = panels(figure)[3]
  assert title == "LEAK\n1 of 4 frozen changed"
  rows, columns = image.shape[0] // 4, image.shape[1] // 3
  leak = to_rgba(_plot._LEAK)
  np.testing.assert_allclose(image[2 * rows + 1, 1], leak)
  assert image[1, 1, 3] == 0  # a frozen element that kept its bits lets the hatching through
  assert not np.isclose(image[:, columns:], leak).all(-1).any()
  ring = next(a for a in figure.axes if a.get_title() == title).collections[0]
  assert ring.get_offsets().tolist() == [[0, 2]]


def test_many_leaves_show_leaks_then_the_largest():
  rng = np.random.default_rng(0)
  before = {f"w{i:02}": rng.normal(size=i + 1).astype(np.float32) for i in range(40)}
  after = {**before, "w00": before["w00"] + 1}
  figure = maskopt.plot(after, True, before)
  shown = [t.split("\n")[0] for t, _ in panels(figure)[::2]]
  assert shown == ["w00", *(f"w{i}" for i in range(17, 40))]
  assert "the 24 largest of 40 leaves" in figure.get_suptitle()
  assert len(panels(maskopt.plot(after, True, limit=3))) == 3


def test_figures_can_be_saved_and_pyplot_does_not_know_them(tmp_path):
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  before = maskopt.snapshot(model)
  model.kernel[...] = model.kernel[...] + 1
  figure = maskopt.plot(model, {"kernel": False, "bias": True}, before)
  figure.savefig(tmp_path / "a.png")
  assert (tmp_path / "a.png").stat().st_size > 1000
  pyplot = sys.modules.get("matplotlib.pyplot")
  assert pyplot is None or not pyplot.get_fignums()


@pytest.mark.parametrize("tree", [{}, {"w": np.ones((0, 3), np.float32)}, {"w": np.float32(1)}])
def test_nothing_much_to_draw(tree, tmp_path):
  maskopt.plot(tree, True if tree else {}, tree).savefig(tmp_path / "a.png")


def test_a_billion_abstract_elements():
  w = jax.ShapeDtypeStruct((32_768, 32_768), jnp.bfloat16)
  ((title, image),) = panels(maskopt.plot({"w": w}, {"w": np.arange(32_768) % 8 != 0}))
  assert "87.5% frozen" in title and np.allclose(image, 0.875)


def test_abstract_parameters_cannot_have_changed():
  w = jax.ShapeDtypeStruct((2,), jnp.float32)
  with pytest.raises(ValueError, match="maskopt.plot.*at w, expected an array, got an abstract"):
    maskopt.plot({"w": w}, True, {"w": np.ones(2, np.float32)})


def test_another_model_before_is_an_error():
  with pytest.raises(ValueError, match="maskopt.plot.*at v, expected no leaf"):
    maskopt.plot({"w": np.ones(2)}, True, {"v": np.ones(2)})


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch):
  for name in [n for n in sys.modules if n.startswith("matplotlib")]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  with pytest.raises(ImportError, match=r"pip install 'maskopt\[plot\]'"):
    maskopt.plot(params(), MASK)


def test_reports_print_without_matplotlib():
  code = "import sys; sys.modules['matplotlib'] = None; import maskopt; "
  code += "print(maskopt.summary({'w': 1.0})); assert 'maskopt.report._plot' in sys.modules"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert "Parameters: 1" in done.stdout
