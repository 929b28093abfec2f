"""The rows that a recipe names, and whether they are still what was read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from ..recipe import FileData, Recipe
from ..tasks.rows import Rows, read_hub, read_jsonl


def read_data(recipe: Recipe) -> dict[str, Rows]:
    """The rows of each part a recipe names.

    Raises:
        DataError: a file or dataset cannot be read.
    """
    parts = {}
    for split, source in recipe.data.parts():
        if isinstance(source, FileData):
            parts[split] = read_jsonl(source.resolve(recipe.folder))
        else:
            parts[split] = read_hub(source.hub, source.split, source.config, source.revision)
    return parts


def changed_since(rows: Mapping[str, Rows]) -> list[str]:
    """The files whose content is no longer what was read."""
    return [part.source for part in rows.values() if part.is_file and _digest(Path(part.source)) != part.sha256]


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
