"""Run a recipe as a user does."""

import json
import sys
from unittest import mock

import pytest

from maskopt.cli import main


def told(capsys, *args):
  """What `maskopt demo ARGS` says: (exit code, standard output)."""
  with mock.patch.object(sys, "argv", ["maskopt", "demo", *args]):
    with pytest.raises(SystemExit) as stopped:
      main()
  return stopped.value.code, capsys.readouterr().out


def facts(capsys, *args):
  """What `maskopt demo ARGS --json` says; standard output holds nothing else."""
  code, out = told(capsys, *args, "--json")
  assert code == 0, out
  return json.loads(out)
