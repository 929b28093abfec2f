"""Prompt templates: text with {column} placeholders and nothing else of Python's format language."""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import Formatter

_COLUMN = re.compile(r"\w[\w -]{0,63}")


def columns(template: str) -> tuple[str, ...]:
    """The columns that `template` names, in order, each once.

    Raises:
        ValueError: saying what is not a plain {column}.
    """
    found: dict[str, None] = {}
    for _, name, spec, conversion in Formatter().parse(template):
        if name is None:
            continue
        if not _COLUMN.fullmatch(name) or name.isdigit():
            raise ValueError(f"{{{name[:60]}}} is not a plain column name")
        if spec or conversion:
            raise ValueError(f"{{{name}}} must stand alone, without '!' or ':'")
        found[name] = None
    return tuple(found)


def fill(template: str, row: Mapping[str, object]) -> str:
    """`template` with every {column} replaced by the text of that column; `{{` and `}}` are braces."""
    return template.format_map({name: str(row[name]) for name in columns(template)})
