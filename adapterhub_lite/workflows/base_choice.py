"""Which base a stored version is to be loaded on, and whether that may be done unasked. Loads nothing itself."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..bases.catalog import CATALOG, recognised
from ..bases.fetch import expanded, is_hub_id
from ..formats.card import Card
from ..names import Ref

BASE_GIVEN = "base_given"
"""Key of an imported version's origin: the base that its user named. What a foreign card says of its origin is never
there (`store.received`), so that only an import on this machine writes it."""


def base_name(card: Card) -> str | None:
    """What to load the adapter's base by: a catalogue name where there is one, which also works offline."""
    name = card.base.get("name")
    return recognised(name) or name


def is_trusted(card: Card) -> bool:
    """Whether the base a card names may be loaded unasked: it was trained on here, is of the catalogue, or was named
    by the user at the import.
    """
    if card.origin.get("kind") != "imported" or base_name(card) in CATALOG:
        return True
    given = card.origin.get(BASE_GIVEN)
    return given is not None and given == card.base.get("name")


def run_command(ref: Ref, card: Card, store: Path | None = None) -> str:
    """The command that lets an imported version answer, with the base it needs; BASE stands for one that nobody told.

    Args:
        store: the folder of its store, where that is not the default one.
    """
    words = ["ahl", "run", "--adapter", str(ref)]
    if not is_trusted(card) or not base_name(card):
        name = base_name(card)
        words += ["--base", name if name and _can_be_here(name) else "BASE"]
    if store is not None:
        words += ["--store", str(store)]
    return shlex.join([*words, "PROMPT"])


def _can_be_here(name: str) -> bool:
    """Whether a base that a foreign file names is a Hub id or a folder of this disk; no other machine is asked."""
    if name.startswith(("//", "\\\\")):
        return False
    return is_hub_id(name) or expanded(name).is_dir()
