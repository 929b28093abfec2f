"""What a store holds, read from its folders: numbers, entries, and what a reference means.

The folders are the truth. An index may be put behind these functions; it would be derived from them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..errors import AdapterHubError, FormatError, InvalidName, NotFound, StoreCorrupt
from ..formats.card import Card
from ..names import Ref, check_name, check_version
from .aliases import aliases_of, read_alias
from .layout import CARD, TOMBSTONE, Layout, check_format
from .reading import load_manifest, read_file

_LIST = "See what there is with: ahl list"


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


def names(layout: Layout) -> list[str]:
    """Names with at least one version, in order."""
    if not check_format(layout) or not layout.adapters.is_dir():
        return []
    found = sorted(path.name for path in layout.adapters.iterdir())
    return [name for name in found if _is_name(name) and versions(layout, name)]


def versions(layout: Layout, name: str) -> list[int]:
    """The versions of a name that exist, oldest first."""
    present, removed = _numbers(layout, name)
    return sorted(present - removed)


def removed_versions(layout: Layout, name: str) -> list[int]:
    """The versions of a name that have a tombstone."""
    return sorted(_numbers(layout, name)[1])


def next_version(layout: Layout, name: str) -> int:
    """One more than every number ever used."""
    present, removed = _numbers(layout, name)
    return max(present | removed, default=0) + 1


def resolve(layout: Layout, ref: str | Ref) -> Ref:
    """Bind a reference to a version and its digest.

    Raises:
        InvalidName: not a reference.
        NotFound: with the nearest names, or the versions and aliases there are.
        StoreCorrupt: the version or alias is damaged, or is not the one that the reference was resolved to.
    """
    ref = Ref.parse(ref)
    check_format(layout)
    existing = versions(layout, ref.name)
    if not existing:
        raise _no_name(layout, ref.name)
    expected = ref.digest
    if ref.version is not None:
        version = ref.version
    elif ref.alias is not None:
        version, expected = _follow(layout, ref)
    else:
        version = existing[-1]
    if version not in existing:
        raise _no_version(layout, ref, version, existing)
    return _bind(layout, ref, version, expected)


def entries(layout: Layout) -> list[Entry]:
    """Every version, by name and number; a damaged one is listed with its problem."""
    return [entry for name in names(layout) for entry in _entries_of(layout, name)]


def card_of(layout: Layout, name: str, version: int) -> Card:
    """The checked card of a version."""
    try:
        return Card.from_bytes(read_file(layout, name, version, CARD))
    except FormatError as error:
        raise StoreCorrupt(f"{name}@{version}: {error.message}", error.hint) from None


def _follow(layout: Layout, ref: Ref) -> tuple[int, str | None]:
    record = read_alias(layout, ref.name, str(ref.alias))
    if record is None or record.version is None:
        raise NotFound(f"{ref.name} has no alias {ref.alias}. {_present(layout, ref.name)}", _LIST)
    return record.version, record.digest


def _bind(layout: Layout, ref: Ref, version: int, expected: str | None) -> Ref:
    try:
        digest = load_manifest(layout, ref.name, version).digest
    except NotFound:
        raise _no_version(layout, ref, version, versions(layout, ref.name)) from None
    if expected is not None and expected != digest:
        message = f"{ref.name}@{version} is {digest[:12]}, but {ref} stands for {expected[:12]}."
        raise StoreCorrupt(message, "Find what is damaged with: ahl verify")
    return ref.resolved(version, digest)


def _no_name(layout: Layout, name: str) -> NotFound:
    near = difflib.get_close_matches(name, names(layout), n=3)
    hint = f"Did you mean {', '.join(near)}? {_LIST}" if near else _LIST
    return NotFound(f"There is no adapter {name} in {layout.root}.", hint)


def _no_version(layout: Layout, ref: Ref, version: int, existing: list[int]) -> NotFound:
    if layout.tombstone(ref.name, version).exists():
        return NotFound(f"{ref.name}@{version} was removed. {_present(layout, ref.name)}", _LIST)
    return NotFound(f"There is no {ref.name}@{version}. {_present(layout, ref.name)}", _LIST)


def _present(layout: Layout, name: str) -> str:
    numbers = ", ".join(map(str, versions(layout, name)[-8:]))
    aliases = ", ".join(f"{alias} -> {number}" for alias, number in aliases_of(layout, name).items())
    return f"Versions: {numbers or 'none'}. Aliases: {aliases or 'none'}."


def _entries_of(layout: Layout, name: str) -> Iterable[Entry]:
    try:
        pointing = aliases_of(layout, name)
    except StoreCorrupt:
        pointing = {}  # reported by verify; a listing goes on without
    for version in versions(layout, name):
        aliases = tuple(alias for alias, number in pointing.items() if number == version)
        try:
            digest = load_manifest(layout, name, version).digest
            card = card_of(layout, name, version)
        except AdapterHubError as error:
            yield Entry(name, version, "", "", aliases, problem=str(error))
        else:
            yield Entry(name, version, digest, card.created, aliases, _summary(card))


def _summary(card: Card) -> dict[str, Any]:
    return {
        **card.adapter,
        "base": card.base.get("name"),
        "quantization": card.base.get("quantization"),
        "task": card.task.get("type"),
        "measured_by": card.task.get("metrics") or [],
        "origin": card.origin.get("kind"),
        "metrics": card.metrics,
    }


def _numbers(layout: Layout, name: str) -> tuple[set[int], set[int]]:
    """Numbers that have a folder, and numbers that have a tombstone."""
    folder = layout.versions(name)
    files = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    removed = {number for file in files if file.endswith(TOMBSTONE) for number in _number(file.removesuffix(TOMBSTONE))}
    return {number for file in files for number in _number(file)}, removed


def _number(text: str) -> list[int]:
    try:
        return [check_version(text)]
    except InvalidName:
        return []


def _is_name(text: str) -> bool:
    try:
        return bool(check_name(text))
    except InvalidName:
        return False
