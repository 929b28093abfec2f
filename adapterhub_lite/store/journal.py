"""The history of a name, and what an alias named before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import AdapterHubError, FormatError, NotFound
from ..formats.files import read_regular
from ..formats.strict_json import dump, parse_object
from .aliases import Move
from .catalog import Catalog, card_of
from .layout import Layout
from .listing import summary
from .manifest import sha256
from .reading import load_manifest
from .received import trusted_view

_TOMBSTONE_LIMIT = 1 << 16


@dataclass(frozen=True)
class Event:
    """Something that happened to a name.

    `kind` is made, imported, removed, or what a move of an alias was (set, promote, rollback, remove, refuse). `facts`
    are the summary of a version's card, or the reason of a move. `time` is UTC, a label; `problem` says what could not
    be read.
    """

    time: str
    kind: str
    version: int | None
    alias: str = ""
    digest: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


def log(layout: Layout, catalog: Catalog, name: str) -> list[Event]:
    """Everything that is known of a name, the latest first.

    Raises:
        NotFound: there is and was no such name.
    """
    versions, removed = catalog.versions(name), catalog.removed(name)
    if not versions and not removed:
        catalog.resolve(name)  # says what there is
    made = [_made(layout, name, version) for version in versions]
    gone = [_gone(layout, name, version) for version in removed]
    moves = [event for alias in catalog.alias_names(name) for event in _moves(catalog, name, alias)]
    # Times have seconds only: of one second, a version comes before the alias that names it.
    rank = {"made": 0, "imported": 0}
    return sorted([*made, *gone, *moves], key=lambda event: (event.time, rank.get(event.kind, 1)))[::-1]


def before(history: Sequence[Move], existing: Iterable[int]) -> int | None:
    """The version an alias named before the one it names now, of those that exist; None if there is none.

    Going back takes moves off again: after 1, 2, 3 and a rollback to 2, the version before is 1.
    """
    stack: list[int] = []
    for move in history:
        if move.event == "refuse" or move.version is None:
            continue
        if move.event == "rollback" and move.version in stack:
            while stack[-1] != move.version:
                stack.pop()
        elif not stack or stack[-1] != move.version:
            stack.append(move.version)
    there = set(existing)
    return next((version for version in reversed(stack[:-1]) if version in there and version != stack[-1]), None)


def _made(layout: Layout, name: str, version: int) -> Event:
    try:
        manifest = load_manifest(layout, name, version)
        card = trusted_view(card_of(layout, name, version, manifest), manifest.received)
    except AdapterHubError as error:
        if layout.tombstone(name, version).exists():  # removed meanwhile
            return _gone(layout, name, version)
        return Event("", "made", version, problem=str(error))
    kind = "imported" if card.origin.get("kind") == "imported" else "made"
    time = str((manifest.received or {}).get("time") or card.created)
    return Event(time, kind, version, digest=manifest.digest, facts=summary(card))


def _gone(layout: Layout, name: str, version: int) -> Event:
    try:
        data = read_regular(layout.tombstone(name, version), _TOMBSTONE_LIMIT)
        told = parse_object(data, "the tombstone", limit=_TOMBSTONE_LIMIT)
        seal = told.pop("seal", None)  # format 1 had none
        if set(told) != {"digest", "removed", "version"} or seal not in (None, sha256(dump(told))):
            raise FormatError("the tombstone does not match its seal.")
    except (FormatError, NotFound) as error:  # it counts by its name alone
        return Event("", "removed", version, problem=f"{name}@{version} was removed; {error.message}")
    return Event(str(told.get("removed", "")), "removed", version, digest=str(told.get("digest", "")))


def _moves(catalog: Catalog, name: str, alias: str) -> list[Event]:
    try:
        history = catalog.history(name, alias)
    except AdapterHubError as error:
        return [Event("", "set", None, alias, problem=str(error))]
    return [Event(move.time, move.event, move.version, alias, move.digest or "", move.reason) for move in history]
