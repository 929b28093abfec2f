"""The store: immutable versions, movable aliases, lineage, verification, import and export.

Takes: adapter files and a card, or a reference.
Gives: resolved references, verified folders that plain PEFT loads, cards, specs and findings.
Never: writes but through `fs.py`, serves bytes that do not match their digest, or changes a published version.
"""

from .catalog import Entry
from .check import Finding
from .manifest import FileFact, Manifest
from .store import Store

__all__ = ["Entry", "FileFact", "Finding", "Manifest", "Store"]
