"""A recipe's text for a place of its own."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import yaml

from .schema import DataConfig

_PARTS = [part.name for part in fields(DataConfig)]
_PLAIN = re.compile(r"[\w./-]+")


def copied_text(path: Path) -> str:
    """The YAML of a recipe file, comments and all, that trains on the same data wherever it is saved.

    Of the file's text the relative paths of `data` alone are changed, into absolute ones.
    """
    text = path.read_text("utf-8")
    for node in reversed(_relative_paths(yaml.compose(text, Loader=yaml.SafeLoader))):  # from behind: marks stay true
        absolute = str(path.parent.resolve() / node.value)
        shown = absolute if _PLAIN.fullmatch(absolute) else json.dumps(absolute)
        text = text[: node.start_mark.index] + shown + text[node.end_mark.index :]
    return text


def _relative_paths(root: yaml.Node | None) -> list[yaml.ScalarNode]:
    """The nodes of data's relative paths, in the order of the text."""
    parts = _below(_below(root).get("data"))
    named = [node for name in _PARTS if isinstance(node := parts.get(name), yaml.ScalarNode)]
    relative = [node for node in named if not Path(node.value).is_absolute()]
    return sorted(relative, key=lambda node: node.start_mark.index)


def _below(node: yaml.Node | None) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        return {}
    return {key.value: value for key, value in node.value if isinstance(key, yaml.ScalarNode)}
