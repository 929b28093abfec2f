"""Fields of the schema: each carries its own reader, so names, types, limits and defaults stand in one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from .nodes import Scalar, Table
from .readers import (
    At,
    Reader,
    nearest,
    read_checked,
    read_choice,
    read_flag,
    read_integer,
    read_list,
    read_number,
    read_table,
    read_targets,
    read_template,
    read_text,
)

_T = TypeVar("_T")
REQUIRED: Any = dataclasses.MISSING
_ENOUGH = 50  # problems, after which nobody reads on and nearest names are not worth their time


def integer(default: int | None = REQUIRED, *, low: int, high: int) -> Any:
    """A whole number from `low` to `high`."""
    return section(partial(read_integer, low=low, high=high), default)


def number(default: float | None = REQUIRED, *, low: float, high: float, above: bool = False) -> Any:
    """A number from `low` (or above it) to `high`."""
    return section(partial(read_number, low=low, high=high, above=above), default)


def flag(default: bool) -> Any:
    """true or false."""
    return section(read_flag, default)


def text(default: str | None = REQUIRED, *, limit: int = 200) -> Any:
    """Text that is not empty."""
    return section(partial(read_text, limit=limit), default)


def checked(check: Callable[[str], str], default: str | None = REQUIRED) -> Any:
    """Text that `check` accepts."""
    return section(partial(read_checked, check=check), default)


def template(default: str | None = REQUIRED) -> Any:
    """Text with {column} placeholders."""
    return section(read_template, default)


def choice(default: str = REQUIRED, *, among: tuple[str, ...]) -> Any:
    """One of a few words."""
    return section(partial(read_choice, among=among), default)


def choices(default: tuple[str, ...], *, among: tuple[str, ...]) -> Any:
    """Some of a few words."""
    return section(partial(read_list, item=partial(read_choice, among=among)), default)


def texts(default: tuple[str, ...] | None = REQUIRED, *, least: int = 1) -> Any:
    """A list of different texts."""
    return section(partial(read_list, item=read_text, least=least), default)


def words(default: None = None) -> Any:
    """A mapping from text to text."""
    return section(partial(read_table, item=read_text, modules=False), default)


def per_module(item: Reader) -> Any:
    """A mapping from module names to `item`, empty unless given."""
    read = partial(read_table, item=item, modules=True)
    return dataclasses.field(default_factory=dict, metadata={"read": read, "optional": False})


def targets(default: str) -> Any:
    """`all-linear`, or a list of module names."""
    return section(read_targets, default)


def section(read: Reader, default: Any = REQUIRED) -> Any:
    """A field with a reader of its own; a default of None makes it optional."""
    return dataclasses.field(default=default, metadata={"read": read, "optional": default is None})


def readable(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a schema class that a recipe may give."""
    return {field.name: field for field in dataclasses.fields(cls) if "read" in field.metadata}


def read_section(
    at: At,
    cls: type[_T],
    *,
    defaults: Mapping[str, Any] | None = None,
    foreign: Mapping[str, str] | None = None,
) -> _T | None:
    """Read a table into the dataclass `cls`; None, with problems added, if that is not possible.

    `defaults` replace those of the class; `foreign` says of keys of a sibling class which type they belong to.
    """
    if not isinstance(at.node, Table):
        at.expected("a mapping")
        return None
    before = len(at.problems)
    known = readable(cls)
    _refuse_unknown(at, at.node, known, foreign or {})
    values = dict(defaults or {})
    for name, field in known.items():
        if name in at.node.entries:
            values[name] = _read_field(at.child(name), field)
        elif name not in values and field.default is REQUIRED and field.default_factory is REQUIRED:
            at.wrong(f"'{name}' is missing.")
    if len(at.problems) > before:
        return None
    made = cls(**values)
    for name, message in getattr(made, "contradictions", lambda given: ())(set(at.node.entries)):
        at.wrong_key(name, message)
    return made


def _refuse_unknown(at: At, table: Table, known: Mapping[str, Any], foreign: Mapping[str, str]) -> None:
    for key in table.entries:
        if key in known:
            continue
        if key in foreign:
            at.wrong_key(key, f"'{key}' belongs to type {foreign[key]}.")
            continue
        near = nearest(key, known) if len(at.problems) < _ENOUGH else ""
        at.wrong_key(key, "unknown key.", near or f"Known: {', '.join(known)}.")


def _read_field(at: At, field: dataclasses.Field[Any]) -> Any:
    if field.metadata["optional"] and isinstance(at.node, Scalar) and at.node.is_null:
        return None
    return field.metadata["read"](at)
