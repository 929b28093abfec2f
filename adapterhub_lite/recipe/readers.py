"""Readers of one value each: from a node to a checked Python value, or None and a recorded problem."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

from ..errors import AdapterHubError, Problem
from . import template as templates
from .nodes import Items, Node, Scalar, Table, join

_WHOLE = re.compile(r"[+-]?(0|[1-9][0-9]{0,17})")  # a leading zero is octal in YAML 1.1 and decimal in 1.2
_NUMBER = re.compile(r"[+-]?([0-9]{1,30}(\.[0-9]{0,30})?|\.[0-9]{1,30})([eE][+-]?[0-9]{1,3})?")
_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", re.ASCII)


@dataclass(frozen=True)
class At:
    """A node, its field path, and where problems go."""

    node: Node
    path: str
    problems: list[Problem]
    line: int = 0

    def wrong(self, message: str, hint: str = "") -> None:
        """Record a problem here."""
        self.problems.append(Problem(self.path, message, hint, self.node.line or self.line))

    def expected(self, what: str) -> None:
        """Record that something else was expected."""
        quoted = isinstance(self.node, Scalar) and not self.node.plain
        number = quoted and isinstance(self.node, Scalar) and _NUMBER.fullmatch(self.node.text)
        self.wrong(f"expected {what}, found {_shown(self.node)}.", "Remove the quotes." if number else "")

    def child(self, key: str) -> At:
        """The entry `key` of this table."""
        assert isinstance(self.node, Table)  # callers have asked
        return At(self.node.entries[key], join(self.path, key), self.problems, self.node.lines.get(key, 0))

    def wrong_key(self, key: str, message: str, hint: str = "") -> None:
        """Record a problem with the key `key` of this table, where it stands."""
        line = self.node.lines.get(key, 0) if isinstance(self.node, Table) else 0
        self.problems.append(Problem(join(self.path, key), message, hint, line))


Reader = Callable[[At], Any]


def read_integer(at: At, *, low: int, high: int) -> int | None:
    """A whole number from `low` to `high`."""
    plain = _plain(at.node)
    if plain is None or not _WHOLE.fullmatch(plain) or not low <= int(plain) <= high:
        at.expected(f"a whole number from {low} to {high}")
        return None
    return int(plain)


def read_number(at: At, *, low: float, high: float, above: bool = False) -> float | None:
    """A finite number from `low` (or above it) to `high`."""
    plain = _plain(at.node)
    value = float(plain) if plain is not None and _NUMBER.fullmatch(plain) else math.nan
    if not low <= value <= high or (above and value == low):  # NaN fails every comparison
        at.expected(f"a number {'above' if above else 'from'} {low:g} {'up ' if above else ''}to {high:g}")
        return None
    return value


def read_flag(at: At) -> bool | None:
    """true or false, in any of YAML's spellings."""
    value = _FLAGS.get((_plain(at.node) or "").lower())
    if value is None:
        at.expected("true or false")
    return value


def read_text(at: At, *, limit: int = 200) -> str | None:
    """Text of 1 to `limit` characters, none of them a control character but tab and line ends."""
    node = at.node
    if not isinstance(node, Scalar) or node.is_null:
        at.expected("text")
    elif not node.text.strip():
        at.wrong("must not be empty.")
    elif len(node.text) > limit:
        at.wrong(f"is {len(node.text)} characters long; the limit is {limit}.")
    elif any(ord(character) < 32 and character not in "\t\n\r" for character in node.text):
        at.wrong("holds a control character.")
    else:
        return node.text
    return None


def read_checked(at: At, *, check: Callable[[str], str]) -> str | None:
    """Text that `check` accepts; it raises an error of this package or ValueError otherwise."""
    found = read_text(at, limit=4096)
    if found is None:
        return None
    try:
        return check(found)
    except AdapterHubError as error:
        at.wrong(error.message, error.hint)
    except ValueError as error:
        at.wrong(f"{error}.")
    return None


def read_template(at: At) -> str | None:
    """Text with at least one {column} placeholder."""
    found = read_text(at, limit=20_000)
    if found is None:
        return None
    try:
        if templates.columns(found):
            return found
        at.wrong("names no column.", "Write the columns in braces: Question: {question}")
    except ValueError as error:
        at.wrong(f"{error}.", "Use {column} for a column and {{ }} for braces.")
    return None


def read_choice(at: At, *, among: tuple[str, ...]) -> str | None:
    """One of a few words."""
    node = at.node
    if isinstance(node, Scalar) and node.text in among:
        return node.text
    near = nearest(node.text, among) if isinstance(node, Scalar) else ""
    at.wrong(f"expected one of {', '.join(among)}, found {_shown(node)}.", near)
    return None


def read_list(at: At, *, item: Reader, least: int = 1) -> tuple[Any, ...] | None:
    """A list of different entries."""
    if not isinstance(at.node, Items):
        at.expected("a list")
        return None
    values = [item(At(node, f"{at.path}[{i}]", at.problems)) for i, node in enumerate(at.node.items)]
    if len(values) < least:
        at.wrong(f"needs at least {least} entr{'y' if least == 1 else 'ies'}.")
    given = [value for value in values if value is not None]
    if len(set(given)) < len(given):
        at.wrong("names something twice.")
    return tuple(values)


def read_table(at: At, *, item: Reader, modules: bool) -> dict[str, Any] | None:
    """A mapping from text (module names, if so said) to `item`."""
    if not isinstance(at.node, Table):
        at.expected("a mapping")
        return None
    for key in at.node.entries:
        if not key or (modules and not _MODULE.fullmatch(key)):
            at.wrong_key(key, "is not a module name." if modules else "a key must not be empty.")
    return {key: item(at.child(key)) for key in at.node.entries}


def read_targets(at: At) -> str | tuple[str, ...] | None:
    """`all-linear`, or a list of module names."""
    if isinstance(at.node, Items):
        return read_list(at, item=partial(read_checked, check=_module_name))
    if isinstance(at.node, Scalar) and at.node.text == "all-linear":
        return "all-linear"
    at.expected("all-linear or a list of module names")
    return None


def _module_name(name: str) -> str:
    if not _MODULE.fullmatch(name):
        raise ValueError("is not a module name such as q_proj or attention.self.query; patterns are not read")
    return name


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint with the known word most like `word`, or an empty one."""
    near = get_close_matches(word[:64], list(known), n=1)
    return f"Did you mean '{near[0]}'?" if near else ""


def _plain(node: Node) -> str | None:
    return node.text if isinstance(node, Scalar) and node.plain else None


def _shown(node: Node) -> str:
    if isinstance(node, Table):
        return "a mapping"
    if isinstance(node, Items):
        return "a list"
    if node.is_null:
        return "nothing"
    shown = node.text if len(node.text) <= 40 else node.text[:37] + "..."
    return repr(shown) if node.plain else f"the text {shown!r}"
