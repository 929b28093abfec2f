"""Any bytes as a manifest: refused with an error of ours, or exactly what we would write."""

from __future__ import annotations

import json
from random import Random

from adapterhub_lite.formats.strict_json import dump
from adapterhub_lite.names import check_digest
from adapterhub_lite.store import FileFact, Manifest
from adapterhub_lite.store.manifest import FILES, sha256
from adapterhub_lite.store.received import trusted_view
from tests.fuzz.card import SEEDS as CARDS
from tests.fuzz.card import read as read_card
from tests.fuzz.common import accepted, mutate_bytes, mutate_tree, pairs, plain

_FILES = {name: FileFact(f"{number:064x}", number) for number, name in enumerate(sorted(FILES))}
_RECEIVED = {
    "kind": "hub", "repo": "a/b", "from": "x.tar", "time": "2026-01-31T12:00:00Z", "ignored": ["README.md"],
    "base": {"name": "tiny", "fingerprint": {"weights": "w"}},
}  # fmt: skip
SEEDS = (Manifest(_FILES).to_bytes(), Manifest(_FILES, _RECEIVED).to_bytes(), Manifest(_FILES).to_store())
_KEYS = ("files", "format", "received", "seal", "digest", "sha256", "size", *FILES, "base", "ignored", "time")
WORDS = (*(f'"{key}":'.encode() for key in _KEYS), b"0" * 64, b"A" * 64, b"sha256:../../x", b"-1", b"1.0")
_CARD = read_card(CARDS[0])


def read(data: bytes) -> Manifest:
    """The parser."""
    return Manifest.from_bytes(data)


def fuzz(data: bytes) -> None:
    """Accepted: it has one form, its digests are digests, and the card beside it can be shown."""
    manifest = accepted(read, data)
    if manifest is None:
        return
    assert data in (manifest.to_bytes(), manifest.to_store())
    assert set(manifest.files) == FILES
    for fact in manifest.files.values():
        check_digest(fact.sha256)
        assert fact.size >= 0
    assert manifest.digest == check_digest(manifest.original.digest)
    assert Manifest.from_bytes(manifest.original.to_bytes()) == manifest.original
    read_card(trusted_view(_CARD, manifest.received).to_bytes())


def mutate(data: bytes, rng: Random) -> bytes:
    """Mostly of the tree, sealed again."""
    if rng.random() < 0.2:
        return mutate_bytes(data, rng, WORDS)
    try:
        told = json.loads(plain(mutate_tree(pairs(data), rng, _KEYS)))
        return sealed(told, "seal") if isinstance(told, dict) and "received" in told else dump(told, indent=2)
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng, WORDS)


def sealed(told: dict[str, object], key: str) -> bytes:
    """The canonical form of an object with a seal over the rest of it."""
    rest = {name: value for name, value in told.items() if name != key}
    return dump({**rest, key: sha256(dump(rest))}, indent=2)
