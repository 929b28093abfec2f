"""The rows a stored version was trained and tested on, found again by what its card says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import DataError
from ..formats.card import Card
from ..tasks.rows import Rows, read_hub, read_jsonl

HUB, TASK = "hub", "task"
"""Keys of a split in the card of a version made of others: its dataset on the Hub, as a recipe names it, its task."""
_MADE_HERE = ("combined", "converted")  # kinds of origin without a recipe whose card was written by this package


def split_rows(card: Card, split: str) -> Rows | None:
    """The rows of a split, if they are where the recipe had them and unchanged; None otherwise."""
    recorded = card.data.get(split)
    if not recorded or not (card.recipe or card.origin.get("kind") in _MADE_HERE):
        return None
    try:
        rows = _read(card, split)
    except DataError:
        return None
    return rows if rows is not None and rows.sha256 == recorded["sha256"] else None


def split_task(card: Card, split: str) -> dict[str, Any]:
    """The task in which a split's rows are asked: the version's own, unless it was made of others of unlike tasks."""
    told = (card.data.get(split) or {}).get(TASK)
    return told if isinstance(told, dict) and told.get("type") else card.task


def _read(card: Card, split: str) -> Rows | None:
    source = ((card.recipe or {}).get("data") or {}).get(split) or card.data[split].get(HUB)
    if isinstance(source, dict) and source.get("hub"):
        return read_hub(source["hub"], source["split"], source.get("config"), source.get("revision"))
    path = (card.data[split]).get("path")
    return read_jsonl(Path(path)) if path else None
