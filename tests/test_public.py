"""The public surface: exported, documented, with an example that runs."""

import importlib
import inspect
import pkgutil
import pydoc
import re

import pytest

import maskopt
import maskopt.report

PROMISED = [
  *("masked_freeze", "selective_transform", "scale_by_multiplier", "apply_updates", "mask_of"),
  *("grad", "value_and_grad", "stop_gradient", "pack", "unpack"),
  *("union", "intersection", "invert", "runtime"),
]


def public():
  return {n: v for n, v in vars(maskopt).items() if not n.startswith("_")}


def functions():
  """Public callables of the package, not its modules."""
  return {n: v for n, v in public().items() if callable(v) and not inspect.ismodule(v)}


def modules():
  for info in pkgutil.walk_packages(maskopt.__path__, "maskopt."):
    if not info.name.startswith(("maskopt.cli", "maskopt.demo")):  # these need extras
      yield importlib.import_module(info.name)


def test_what_is_promised_is_there():
  assert set(PROMISED) <= set(functions())
  assert re.fullmatch(r"\d+\.\d+\.\d+", maskopt.__version__)


def test_names_are_those_of_their_definitions():
  """The index renames nothing, so a name found in an error is found in the source."""
  assert [n for n, v in functions().items() if v.__name__ != n] == []


@pytest.mark.parametrize(
  "index", [maskopt, maskopt.nnx, maskopt.linen, maskopt.surgery, maskopt.report]
)
def test_index_is_reexports_only(index):
  """`__all__`, which `help` lists, is each of them once, in the same order."""
  source = inspect.getsource(index)
  assert re.findall(r"^\s*(?:def|class) ", source, re.M) == []
  exported = re.findall(r"(\w+) as (\w+)", source)
  assert exported and all(a == b for a, b in exported)
  assert index.__all__ == [b for _, b in exported]
  assert len(set(index.__all__)) == len(index.__all__)
  assert all(hasattr(index, name) for name in index.__all__)


def test_help_lists_the_functions():
  text = pydoc.render_doc(maskopt, renderer=pydoc.plaintext)
  assert all(f"\n    {name}(" in text for name in PROMISED)


def test_every_public_function_says_what_it_does_and_shows_it():
  for name, function in functions().items():
    doc = inspect.getdoc(function) or ""
    first = doc.partition("\n")[0]
    assert first.endswith("."), f"{name}: the first line is a sentence"
    assert ">>> " in doc, f"{name} has no example"
    if inspect.isfunction(function) and inspect.signature(function).parameters:
      assert "Args:" in doc and "Returns:" in doc, f"{name}: Args and Returns"


def test_arguments_named_freeze_mask_everywhere():
  """One polarity, one name: no public function takes a bare `mask`."""
  for name, function in functions().items():
    if inspect.isfunction(function):
      parameters = inspect.signature(function).parameters
      assert "mask" not in parameters, name


def test_every_module_says_what_it_is():
  for module in modules():
    assert module.__doc__, module.__name__


def test_files_stay_short():
  for module in modules():
    assert inspect.getsource(module).count("\n") <= 400, module.__name__
