"""The `maskopt` command: what it answers, and what it says without the demo extra."""

import subprocess
import sys

import pytest

import maskopt
from maskopt import cli


@pytest.fixture
def command(monkeypatch, capsys):
  """Run `maskopt ...` and return (exit code, standard output, standard error)."""

  def run(*args):
    monkeypatch.setattr(sys, "argv", ["maskopt", *args])
    with pytest.raises(SystemExit) as stopped:
      cli.main()
    return stopped.value.code, *capsys.readouterr()

  return run


def test_version(command):
  assert command("--version") == (0, f"maskopt {maskopt.__version__}\n", "")


def test_help_names_the_demo_command(command):
  code, out, _ = command("--help")
  assert code == 0
  assert "demo" in out and "--version" in out


def test_demo_help_lists_every_demonstration(command):
  from maskopt import demo

  code, out, _ = command("demo", "--help")
  assert code == 0
  names = [c.callback.__name__.replace("_", "-") for c in demo.app.registered_commands]
  assert "digits" in names
  for name in names:
    assert name in out


def test_options_without_a_name_go_to_the_main_demonstration(command):
  code, _, err = command("demo", "--steps", "0")
  assert code == 2
  assert "demo digits" in err and "--steps" in err


@pytest.mark.parametrize(
  ("args", "said"),
  [
    (("demo", "nonsense"), "nonsense"),
    (("demo", "--seed", "-1"), "--seed"),
    (("demo", "--out", __file__), "--out"),
    (("nonsense",), "nonsense"),
  ],
)
def test_wrong_usage_exits_with_2_and_names_the_word(command, args, said):
  code, out, err = command(*args)
  assert (code, out) == (2, "")
  assert said in err


def test_a_directory_that_cannot_be_made_is_wrong_usage(command, tmp_path):
  (tmp_path / "file").touch()
  code, out, err = command("demo", "--out", str(tmp_path / "file" / "below"))
  assert (code, out) == (2, "")
  assert "cannot make the directory" in err


@pytest.mark.parametrize("package", ["typer", "matplotlib", "sklearn"])  # Flax itself brings rich
def test_without_the_demo_extra_one_line_says_what_to_install(package):
  hide = f"import sys; sys.modules[{package!r}] = None; sys.argv = ['maskopt', 'demo']"
  done = subprocess.run(
    [sys.executable, "-c", f"{hide}\nfrom maskopt.cli import main\nmain()"],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 1
  assert done.stdout == ""
  expected = f"maskopt: {package} is not installed; run `pip install 'maskopt[demo]'`"
  assert done.stderr.splitlines()[-1] == expected
  assert "Traceback" not in done.stderr


def test_other_missing_modules_are_not_blamed_on_the_extra(monkeypatch):
  def broken():
    raise ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")

  monkeypatch.setattr(cli, "_application", broken)
  with pytest.raises(ModuleNotFoundError, match="elsewhere"):
    cli.main()


def test_importing_the_package_imports_no_extra():
  code = (
    "import sys, maskopt\n"
    "found = {'typer', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
    "assert not found, found"
  )
  subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
