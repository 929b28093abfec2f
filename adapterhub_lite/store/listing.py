"""Every version with the facts of its card: what is listed and searched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import AdapterHubError, StoreCorrupt
from ..formats.card import Card
from .catalog import Catalog, card_of, is_name, mark_of
from .layout import Layout
from .reading import load_manifest
from .received import trusted_view

if TYPE_CHECKING:
    from .index import Index

INDEXED = 64  # versions read from their cards in one listing before an index is kept


@dataclass(frozen=True)
class Entry:
    """One version in a listing; `problem` says why its facts are missing, if they are."""

    name: str
    version: int
    digest: str
    created: str
    aliases: tuple[str, ...] = ()
    summary: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def entries(layout: Layout, catalog: Catalog, open_index: Callable[[], Index]) -> list[Entry]:
    """Every version, by name and number; a damaged one is listed with its problem.

    Cards that were read once are remembered in the index: they never change. `verify` reads every byte instead.
    """
    if catalog.format() is None or not layout.adapters.is_dir():
        return []
    with_aliases = set(os.listdir(layout.all_aliases)) if layout.all_aliases.is_dir() else set()
    names = [name for name in sorted(os.listdir(layout.adapters)) if is_name(name)]
    many = len(names) > INDEXED or sum(len(catalog.versions(name)) for name in names) > INDEXED
    index = open_index() if many else None
    known = index.read() if index else {}
    folder = f"{layout.adapters}{os.sep}"
    found: list[Entry] = []
    fresh: dict[str, tuple[str, list[Any]]] = {}
    for name in names:
        # Taken before the folder is read: a change in between is then seen next time.
        mark = mark_of(folder + name) if index else None
        kept = known.get(name)
        if kept is not None and mark is not None and kept[0] == repr(mark):
            facts = kept[1]
        else:
            facts = _read(layout, catalog, name, kept[1] if kept else ())
            if mark is not None and not any(problem for *_, problem in facts):
                fresh[name] = (repr(mark), facts)
        found += _entries(catalog, name, facts, name in with_aliases)
    if index:
        index.write(fresh, gone=known.keys() - set(names))
    return found


def _read(layout: Layout, catalog: Catalog, name: str, kept: Iterable[Any]) -> list[Any]:
    known = {fact[0]: fact for fact in kept}
    facts: list[Any] = []
    for version in catalog.versions(name):
        if version in known:
            facts.append(known[version])
            continue
        try:
            manifest = load_manifest(layout, name, version)
            card = trusted_view(card_of(layout, name, version, manifest), manifest.received)
        except AdapterHubError as error:
            if not layout.tombstone(name, version).exists():  # removed meanwhile
                facts.append([version, "", "", {}, str(error)])
        else:
            facts.append([version, manifest.digest, card.created, summary(card), ""])
    return facts


def _entries(catalog: Catalog, name: str, facts: Iterable[Any], has_aliases: bool) -> list[Entry]:
    pointing: dict[int, list[str]] = {}
    trouble = ""
    if has_aliases:
        try:
            for alias, version in catalog.aliases(name).items():
                pointing.setdefault(version, []).append(alias)
        except StoreCorrupt as error:
            pointing, trouble = {}, str(error)  # none of them is known to have no alias
    return [
        Entry(name, version, digest, created, tuple(pointing.get(version, ())), told, problem or trouble)
        for version, digest, created, told, problem in facts
    ]


def summary(card: Card) -> dict[str, Any]:
    """The facts of a card that listings and searches use."""
    base = card.base
    return {
        **card.adapter,
        "base": base.get("name"),
        "revision": base.get("revision"),
        "fingerprint": (base.get("fingerprint") or {}).get("digest"),
        "quantization": base.get("quantization"),
        "task": card.task.get("type"),
        "measured_by": card.task.get("metrics") or [],
        "origin": card.origin.get("kind"),
        "metrics": card.metrics,
        "parents": card.parents,
        "data": _of_data(card, "source"),
        "data_paths": _of_data(card, "path"),
        "data_digests": _of_data(card, "sha256"),
        "seed": card.seed,
        "seconds": card.duration_seconds,
    }


def _of_data(card: Card, key: str) -> list[str]:
    return sorted({str(told[key]) for told in card.data.values() if told.get(key)})
