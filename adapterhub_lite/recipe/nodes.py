"""A strict subset of YAML as a small tree that still knows its lines.

No tags, anchors, aliases, duplicate keys or second documents, and no guessing of types: a scalar stays text until the
field that reads it says what it should be. So `no` can be a label and `1e-3` a number: YAML 1.1 gets both wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import yaml

from ..errors import Problem

MAX_BYTES = 256 * 1024
MAX_DEPTH = 20


@dataclass(frozen=True)
class Scalar:
    """One value as it was written; `plain` unless it stood in quotes or a block."""

    text: str
    plain: bool
    line: int = 0

    @property
    def is_null(self) -> bool:
        """Whether it stands for "no value"."""
        return self.plain and self.text in {"", "~", "null", "Null", "NULL"}


@dataclass(frozen=True)
class Items:
    """A list."""

    items: tuple[Node, ...]
    line: int = 0


@dataclass(frozen=True)
class Table:
    """A mapping; `lines` are those of the keys."""

    entries: dict[str, Node]
    lines: dict[str, int]
    line: int = 0


Node = Scalar | Items | Table


class _Stop(Exception):
    """Reading cannot go on; the problem is already recorded."""


def parse(text: str, problems: list[Problem], path: str = "recipe", *, lines: bool = True) -> Node | None:
    """The tree of one YAML document; None, with problems added, when it has none.

    `lines` is False for a text that is no file, whose line numbers would mislead.
    """
    try:
        return _Builder(text, problems, path, lines).document()
    except _Stop:
        return None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark and lines else 0
        problems.append(Problem(path, f"not valid YAML: {error.problem}.", line=line))
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML lets bad escapes through as ValueError
        problems.append(Problem(path, f"not valid YAML: {str(error).splitlines()[0]}."))
    return None


def from_python(value: object, problems: list[Problem], path: str) -> Node | None:
    """The tree of a Python value, as given in overrides."""
    if value is None or isinstance(value, bool | int | float):
        return Scalar("null" if value is None else str(value).lower(), plain=True)
    if isinstance(value, str):
        return Scalar(value, plain=False)
    children: list[tuple[str, Node | None]] = []
    if isinstance(value, Mapping):
        children = [(str(key), from_python(item, problems, f"{path}.{key}")) for key, item in value.items()]
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        children = [(str(i), from_python(item, problems, f"{path}[{i}]")) for i, item in enumerate(value)]
    else:
        problems.append(Problem(path, f"a {type(value).__name__} cannot stand in a recipe."))
        return None
    found = {key: node for key, node in children if node is not None}
    return Table(found, {}) if isinstance(value, Mapping) else Items(tuple(found.values()))


class _Builder:
    """Builds the tree from PyYAML's events: they come one by one, so limits hold before anything large exists."""

    def __init__(self, text: str, problems: list[Problem], path: str, lines: bool) -> None:
        self.events: Iterator[yaml.Event] = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        self.problems = problems
        self.root = path
        self.lines = lines

    def document(self) -> Node | None:
        next(self.events)  # stream start
        if isinstance(next(self.events), yaml.StreamEndEvent):
            self._problem(self.root, "is empty.", 0)
            return None
        node = self._node(next(self.events), self.root, 0)
        next(self.events)  # document end
        if not isinstance(after := next(self.events), yaml.StreamEndEvent):
            self._problem(self.root, "holds more than one document ('---').", self._line(after))
        return node

    def _node(self, event: yaml.Event, path: str, depth: int) -> Node:
        line = self._line(event)
        if depth > MAX_DEPTH:
            self._problem(path, f"is nested deeper than {MAX_DEPTH} levels.", line)
            raise _Stop
        self._refuse_cleverness(event, path, line)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._items(path, depth, line)
        if isinstance(event, yaml.MappingStartEvent):
            return self._table(path, depth, line)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path, line)
        return Scalar("", plain=False, line=line)  # an alias, already refused

    def _refuse_cleverness(self, event: yaml.Event, path: str, line: int) -> None:
        if isinstance(event, yaml.AliasEvent):
            self._problem(path, f"aliases (*{event.anchor}) are not read.", line, "Write the value out.")
        elif anchor := getattr(event, "anchor", None):
            self._problem(path, f"anchors (&{anchor}) are not read.", line, "Remove it.")
        if tag := getattr(event, "tag", None):
            self._problem(path, f"tags ({tag}) are not read.", line, "Remove it.")

    def _scalar(self, event: yaml.ScalarEvent, path: str, line: int) -> Scalar:
        try:
            event.value.encode()
        except UnicodeEncodeError:
            self._problem(path, "holds half a character (a lone surrogate).", line)
            return Scalar("", plain=False, line=line)
        return Scalar(event.value, event.style is None, line)

    def _items(self, path: str, depth: int, line: int) -> Items:
        items: list[Node] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self._node(event, f"{path}[{len(items)}]", depth + 1))
        return Items(tuple(items), line)

    def _table(self, path: str, depth: int, line: int) -> Table:
        table = Table({}, {}, line)
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self._node(event, path, depth + 1)
            at = self._line(event)
            name = key.text if isinstance(key, Scalar) else ""
            value = self._node(next(self.events), join(path, name), depth + 1)
            if not isinstance(key, Scalar):
                self._problem(path, "a key must be one word.", at)
            elif name in table.entries:
                self._problem(join(path, name), "is given twice.", at, f"First on line {table.lines[name]}.")
            else:
                table.entries[name] = value
                table.lines[name] = at
        return table

    def _line(self, event: yaml.Event) -> int:
        return event.start_mark.line + 1 if self.lines and event.start_mark else 0

    def _problem(self, path: str, message: str, line: int, hint: str = "") -> None:
        self.problems.append(Problem(path, message, hint, line))


def join(path: str, key: str) -> str:
    """The field path of `key` below `path`, short and printable."""
    shown = key if key.isprintable() and len(key) <= 60 else ascii(key)[:60]
    return shown if path in {"", "recipe"} else f"{path}.{shown}"
