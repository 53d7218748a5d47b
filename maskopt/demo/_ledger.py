"""Finished runs on disk, one small file each, so that an interrupted experiment goes on."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._errors import Problem, fail

_REMEDY = "Delete these files, and their runs are done again, or give another directory."
_PARTS = {"settings", "run", "result", "sha256"}


class Ledger:
  """The finished runs of one experiment.

    ledger.read([name])[name] = result, bit for bit, after ledger.write(name, result)

  A file holds the settings of the experiment, the name of the run, its result, and their SHA-256.
  The same run makes the same file, byte for byte.

  Args:
    folder: of the files; it must exist.
    settings: what every run of the experiment has in common; plain values that JSON holds.
  """

  def __init__(self, folder: Path, settings: Mapping[str, Any]):
    self.folder = folder
    self._settings = dict(settings)

  def path(self, name: str) -> Path:
    """Where a run's result is, or will be."""
    return self.folder / f"{name}.json"

  def write(self, name: str, result: Mapping[str, Any]) -> None:
    """Store a finished run: plain values, float32 arrays and lists of them."""
    content = {"settings": self._settings, "run": name, "result": _written(dict(result))}
    text = json.dumps(content | {"sha256": _digest(content)}, indent=1)
    # Written aside and renamed: whoever stops us leaves a whole file or none.
    aside = self.folder / f"{name}.{os.getpid()}.unfinished"
    with aside.open("w") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    aside.replace(self.path(name))

  def read(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The results of those of these runs that are finished.

    Raises:
      ValueError: a file is broken, or of another experiment; lists every one.
    """
    results: dict[str, dict[str, Any]] = {}
    problems: list[Problem] = []
    for name in names:
      path = self.path(name)
      if not os.path.lexists(path):
        continue
      try:
        results[name] = self._result(name, path)
      except _Unfit as unfit:
        problems.append(Problem(str(path), f"the run {name}", str(unfit)))
    if problems:
      fail("maskopt demo --out", problems, _REMEDY)
    return results

  def _result(self, name: str, path: Path) -> dict[str, Any]:
    try:
      content = json.loads(path.read_bytes())
    except OSError as error:
      raise _Unfit(f"what cannot be read ({error.strerror})") from error
    except ValueError as error:  # JSON, or UTF-8
      raise _Unfit("a broken file, which is no JSON") from error
    if not isinstance(content, dict) or set(content) != _PARTS:
      raise _Unfit("a file of something else")
    if content.pop("sha256") != _digest(content):
      raise _Unfit("a broken file, whose checksum is another")
    if content["run"] != name:
      raise _Unfit(f"the run {content['run']}")
    if content["settings"] != self._settings:
      raise _Unfit(f"one with {_difference(self._settings, content['settings'])}")
    return {key: _restored(value) for key, value in content["result"].items()}


class _Unfit(Exception):
  """What stands in a file in place of the run."""


def _digest(content: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
  names = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
  return ", ".join(f"{k} {theirs.get(k)} for {ours.get(k)}" for k in names)


def _written(value: Any) -> Any:
  """The value with arrays as text: their bits, little-endian."""
  if isinstance(value, np.ndarray):
    raw = base64.b64encode(value.astype("<f4", casting="equiv").tobytes()).decode()
    return {"float32": raw, "shape": list(value.shape)}
  if isinstance(value, Mapping):
    return {key: _written(x) for key, x in value.items()}
  return [_written(x) for x in value] if isinstance(value, (list, tuple)) else value


def _restored(value: Any) -> Any:
  if isinstance(value, Mapping):
    if set(value) == {"float32", "shape"}:
      flat = np.frombuffer(base64.b64decode(value["float32"]), "<f4")
      return flat.astype(np.float32).reshape(value["shape"])
    return {key: _restored(x) for key, x in value.items()}
  return [_restored(x) for x in value] if isinstance(value, list) else value
