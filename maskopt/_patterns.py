"""Which parameters a rule's pattern names."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.nnx import filterlib

from . import _layers, _sides, _ties, _traced, _tree
from ._complaints import Complaint, check_takes, listing
from ._errors import describe, show as show_path

_FILTERS = (
  filterlib.WithTag,
  filterlib.PathContains,
  filterlib.PathIn,
  filterlib.OfType,
  filterlib.Any,
  filterlib.All,
  filterlib.Not,
  filterlib.Everything,
  filterlib.Nothing,
)
_KINDS = "a path, a compiled regex, a layer index or slice, an nnx filter, a function or `...`"
_NO_PATTERN = 'Write a path as a string, such as "dense/kernel", or `...` for everything else.'
_ANCHORED = "Patterns start at the root of the tree; `**/` stands for any parts in front."
# What a regex has and a path or glob seldom does.
_REGEX = re.compile(r"[\^$\\()|+]|\.\*")


class Subject:
  """The tree that patterns look at."""

  def __init__(self, source: Any, layers: Any = None) -> None:
    self.source, self.flat = source, _tree.flatten(source)
    self._layers = layers
    # Holes hold no parameter, so no pattern names them.
    self.live = [k for k, x in enumerate(self.flat.leaves) if not _tree.is_hole(x)]

  @functools.cached_property
  def layers(self) -> list[str]:
    return _layers.layer_paths(self.source, self._layers)

  @functools.cached_property
  def sides(self) -> dict[str, _sides.Side]:
    """Where output units are; of a bare tree, as `layers` knows it if that is a module."""
    return _sides.sides(self.source) or _sides.sides(self._layers)

  @functools.cached_property
  def paths(self) -> dict[int, tuple[str, ...]]:
    """Every path of each parameter: a shared nnx variable goes by any of its names."""
    others = _ties.other_names(self.source)
    return {k: (path, *others.get(path, ())) for k, path in enumerate(self.flat.paths)}

  @functools.cached_property
  def owners(self) -> dict[int, set[int | None]]:
    """The layers of each parameter; several where they share it."""
    return {
      k: {_layers.owner(self.layers, path, self.source) for path in self.paths[k]}
      for k in self.live
    }

  @functools.cached_property
  def variables(self) -> dict[str, tuple[tuple[Any, ...], Any]]:
    """Each nnx variable by its path, with the parts of that path as nnx has them."""

    def stop(x: Any) -> bool:
      return _tree.is_opaque(x) or isinstance(x, nnx.Variable)

    tree = _tree.parameters(self.source)
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)[0]
    boxes = {_tree.path_of(keys): (tuple(map(_part, keys)), node) for keys, node in found}
    for alias, path in _ties.aliases(self.source):
      parts = tuple(int(part) if part.isdecimal() else part for part in alias.split("/"))
      if path in boxes:
        boxes[alias] = (parts, boxes[path][1])
    return boxes

  def select(self, test: Callable[[str, Any], bool]) -> list[int]:
    leaves = self.flat.leaves
    return [k for k in self.live if any(test(path, leaves[k]) for path in self.paths[k])]

  def names(self) -> list[str]:
    """The paths of all parameters and of the subtrees that hold them."""
    paths = [path for k in self.live for path in self.paths[k]]
    return [n for n in dict.fromkeys(a for p in paths for a in _tree.ancestors(p)) if n]


def _part(key: Any) -> Any:
  """A path's part as nnx writes it: a name or a position."""
  for attribute in ("key", "idx", "name"):
    if hasattr(key, attribute):
      return getattr(key, attribute)
  return key


def show(pattern: Any) -> str:
  """The pattern as errors write it."""
  if pattern is ...:
    return "..."
  if isinstance(pattern, type):
    return pattern.__name__
  if isinstance(pattern, slice):
    parts = ["" if x is None else str(x) for x in (pattern.start, pattern.stop, pattern.step)]
    return "layers[" + ":".join(parts[: 2 if pattern.step is None else 3]) + "]"
  if _is_module(pattern):
    return type(pattern).__name__
  return getattr(pattern, "__qualname__", None) or repr(pattern)[:80]


def matches(pattern: Any, subject: Subject) -> list[int]:
  """Return the positions of the parameters that a pattern names, at least one.

  Raises:
    Complaint: the pattern names nothing, cannot be applied to this tree, or is none.
  """
  if pattern is ...:
    found = list(subject.live)
  elif isinstance(pattern, str):
    regex = glob(pattern)
    found = subject.select(lambda path, _: regex.fullmatch(path) is not None)
  elif isinstance(pattern, re.Pattern):
    found = subject.select(lambda path, _: pattern.search(path) is not None)
  elif isinstance(pattern, (int, np.integer, slice)) and not isinstance(pattern, bool):
    return _of_layers(pattern, subject)
  elif isinstance(pattern, (type, *_FILTERS)):
    found = _of_filter(pattern, subject)
  elif _is_module(pattern):
    raise Complaint(
      _KINDS, f"the module {type(pattern).__name__}", _where_is(pattern, subject), TypeError
    )
  elif callable(pattern):
    check_takes(pattern, ("path", "leaf"), "As pattern it returns True for what the rule names.")
    found = subject.select(functools.partial(_asked, pattern))
  else:
    _traced.refuse(pattern, _KINDS)
    several = isinstance(pattern, (list, tuple, set, frozenset))
    remedy = "Write one rule per pattern: (pattern, value)." if several else _NO_PATTERN
    raise Complaint(_KINDS, f"{type(pattern).__name__} {show(pattern)}", remedy, TypeError)
  if not found:
    expected = "a pattern that names a parameter"
    raise Complaint(expected, _nothing(pattern, subject), _advice(pattern, subject))
  return found


def _is_module(pattern: Any) -> bool:
  """Whether a pattern is a module, which is callable too and no function of (path, leaf)."""
  return isinstance(pattern, nnx.Module) or (
    callable(pattern) and not jax.tree_util.all_leaves([pattern])
  )


def _where_is(module: Any, subject: Subject) -> str:
  """How to name a module: its path, if it is part of the subject."""
  source = subject.source
  if isinstance(source, nnx.Module) and source is not module:
    for parts, x in nnx.iter_graph(source):
      if x is module:
        return f'Write its path: "{"/".join(map(str, parts))}".'
  return "Write the module's path as a string."


def glob(pattern: str) -> re.Pattern[str]:
  """Return the regex for a glob on paths; it takes in what lies below the named node.

  `*` and `?` stay inside one part, `**` crosses parts, `**/` may stand for none at all.
  """
  return re.compile("".join(_glob_parts(pattern)) + "(?:/.*)?", re.DOTALL)


def _glob_parts(pattern: str) -> Iterator[str]:
  token = re.compile(r"\*\*+/|\*\*+|\*|\?|\[!?\]?[^\]/]*\]|.", re.DOTALL)
  for match in token.finditer(pattern):
    text = match[0]
    starts_part = match.start() == 0 or pattern[match.start() - 1] == "/"
    if text.startswith("**"):
      crossing = text.endswith("/")
      yield "(?:.*/)?" if crossing and starts_part else ".*" + ("/" if crossing else "")
    elif text in ("*", "?"):
      yield "[^/]*" if text == "*" else "[^/]"
    elif text.startswith("[") and len(text) > 1:
      negated = text.startswith("[!")
      inside = text[2 if negated else 1 : -1].replace("\\", r"\\").replace("[", r"\[")
      inside = inside.replace("]", r"\]")
      yield f"[^/{inside}]" if negated else "[" + inside.replace("^", r"\^") + "]"
    else:
      yield re.escape(text)


def _advice(pattern: Any, subject: Subject) -> str:
  """What to do about a pattern that names nothing."""
  if not subject.live:
    return "Give the parameters first and the rules second."
  if subject.flat.paths == ("",):
    return "Write `...`: a lone array has no path."
  if isinstance(pattern, str):
    return _ANCHORED + (
      f" A regex is given compiled: {regex!r}." if (regex := _meant(pattern)) else ""
    )
  if isinstance(pattern, re.Pattern):
    return "A compiled regex is searched for anywhere in the path, upper and lower case apart."
  if isinstance(pattern, (type, *_FILTERS)):
    return "A filter is asked about the parameters' variables, and took none of them."
  return "The function was asked about each of them and returned False."


def _meant(pattern: str) -> re.Pattern[str] | None:
  """The regex that a string looks like."""
  try:
    return re.compile(pattern) if _REGEX.search(pattern) else None
  except (re.error, Warning):  # a nested set, say, warns; and warnings may be errors
    return None


def _asked(function: Callable[[str, Any], Any], path: str, leaf: Any) -> bool:
  answer = function(path, leaf)
  _traced.refuse(answer, "a function that returns a bool")
  if not isinstance(answer, (bool, np.bool_)):
    got = f"{describe(answer)} at {show_path(path)}"
    remedy = "A function as pattern takes (path, leaf) and returns True or False; bool() makes one."
    raise Complaint("a function that returns a bool", got, remedy, TypeError)
  return bool(answer)


def _of_layers(pattern: Any, subject: Subject) -> list[int]:
  layers = subject.layers
  known = f"the layers are {_layers.numbered(layers)}"
  _traced.refuse(pattern, "a slice of integers")
  positions = range(len(layers))
  try:
    chosen = positions[pattern] if isinstance(pattern, slice) else [positions[int(pattern)]]
  except IndexError:
    expected = f"a layer index in [{-len(layers)}, {len(layers) - 1}]"
    raise Complaint(expected, str(pattern), _sentence(known)) from None
  except TypeError:
    remedy = "Write slice(None, -3) for all layers but the last three."
    raise Complaint("a slice of integers", show(pattern), remedy, TypeError) from None
  except ValueError:
    remedy = "Leave the step out, or write -1 to count from the last layer."
    raise Complaint("a slice with a step other than 0", show(pattern), remedy) from None
  found = [k for k in subject.live if not subject.owners[k].isdisjoint(chosen)]
  if found:
    return found
  empty = f"{listing([layers[k] for k in chosen])}, without parameters" if len(chosen) else "none"
  raise Complaint("layers that hold a parameter", empty, _sentence(known))


def _sentence(text: str) -> str:
  return text[0].upper() + text[1:] + "."


def _of_filter(pattern: Any, subject: Subject) -> list[int]:
  if isinstance(pattern, type) and not issubclass(pattern, nnx.Variable):
    remedy = "Choose other leaves by a function: lambda path, leaf: ..."
    got = f"the type {pattern.__name__}"
    raise Complaint("an nnx.Variable type", got, remedy, TypeError)
  boxes = subject.variables
  if _asks_variable(pattern) and not any(isinstance(x, nnx.Variable) for _, x in boxes.values()):
    remedy = "Give the nnx.Module or its nnx.State, or write the rule as a path."
    raise Complaint("parameters in nnx variables", "a bare tree", remedy, TypeError)
  predicate = filterlib.to_predicate(pattern)

  def test(path: str, leaf: Any) -> bool:
    del leaf
    return predicate(*next(boxes[a] for a in _tree.ancestors(path) if a in boxes))

  return subject.select(test)


def _asks_variable(pattern: Any) -> bool:
  """Whether a filter looks at the variable and not only at its path."""
  if isinstance(pattern, filterlib.Not):
    return _asks_variable(pattern.predicate)
  if isinstance(pattern, (filterlib.Any, filterlib.All)):
    return any(map(_asks_variable, pattern.predicates))
  return isinstance(pattern, (type, filterlib.OfType, filterlib.WithTag))


def _nothing(pattern: Any, subject: Subject) -> str:
  """What is there instead of a match."""
  names = subject.names()
  near = _near(pattern, names) if isinstance(pattern, str) else []
  if near:
    return f"none (near paths: {', '.join(near)})"
  if isinstance(pattern, type):
    kinds = {type(x).__name__ for _, x in subject.variables.values()}
    return f"none (the variables are {listing(sorted(kinds))})"
  paths = [subject.flat.paths[k] or "the root" for k in subject.live]
  return f"none (the parameters are {listing(paths)})" if paths else "a tree without parameters"


def _near(pattern: str, names: list[str]) -> list[str]:
  """Paths that end as the pattern does, then those that are spelt much like it."""
  end = re.compile("(?:.*/)?" + "".join(_glob_parts(pattern.strip("/"))), re.DOTALL)
  tails = [name for name in names if end.fullmatch(name)]
  last = {name: name.rpartition("/")[2] for name in names}
  alike = set(difflib.get_close_matches(pattern, set(last.values()), 5, 0.7))
  spelt = difflib.get_close_matches(pattern, names, 5, 0.6)
  return list(dict.fromkeys([*tails, *spelt, *(n for n in names if last[n] in alike)]))[:5]
