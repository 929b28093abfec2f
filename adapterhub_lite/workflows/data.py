"""The rows a stored version was trained and tested on, found again by what its card says."""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError
from ..formats.card import Card
from ..tasks.rows import Rows, read_hub, read_jsonl


def split_rows(card: Card, split: str) -> Rows | None:
    """The rows of a split, if they are where the recipe had them and unchanged; None otherwise."""
    recorded = card.data.get(split)
    if not recorded or not card.recipe:
        return None
    try:
        rows = _read(card, split)
    except DataError:
        return None
    return rows if rows is not None and rows.sha256 == recorded["sha256"] else None


def _read(card: Card, split: str) -> Rows | None:
    assert card.recipe is not None
    source = (card.recipe.get("data") or {}).get(split)
    if isinstance(source, dict) and source.get("hub"):
        return read_hub(source["hub"], source["split"], source.get("config"), source.get("revision"))
    path = (card.data[split]).get("path")
    return read_jsonl(Path(path)) if path else None
