"""The store: immutable versions, movable aliases, lineage, verification, import and export.

Takes: adapter files and a card, or a reference.
Gives: resolved references, verified folders that plain PEFT loads, cards, specs and findings.
Never: writes but through `fs.py`, serves bytes that do not match their digest, or changes a published version.
"""

from typing import TYPE_CHECKING, Any

from .aliases import Move
from .listing import Entry
from .manifest import FileFact, Manifest
from .store import Store

if TYPE_CHECKING:
    from .check import Finding
    from .gc import Leftover, Swept
    from .journal import Event
    from .repair import Healed

__all__ = [
    "Entry", "Event", "FileFact", "Finding", "Healed", "Leftover", "Manifest", "Move", "Store", "Swept",
]  # fmt: skip

_LATER = {"Event": "journal", "Finding": "check", "Healed": "repair", "Leftover": "gc", "Swept": "gc"}


def __getattr__(name: str) -> Any:
    """What only some commands need is imported when it is asked for."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LATER[name]}", __name__), name)
