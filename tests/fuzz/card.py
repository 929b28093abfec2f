"""Any bytes as a card: refused with an error of ours, or written again, listed and searched without surprise."""

from __future__ import annotations

from dataclasses import asdict
from random import Random
from typing import Any

from adapterhub_lite.cli.listing import entry_dict
from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import Entry
from adapterhub_lite.store.listing import summary
from adapterhub_lite.store.received import trusted_view
from adapterhub_lite.store.search import FIELDS, NUMBERS, search
from tests.fuzz.common import accepted, mutate_bytes, mutate_tree, pairs, plain

_CARD = Card(
    adapter={"type": "lora", "rank": 2, "alpha": 4.0, "tensors": 4, "parameters": 32, "bytes": 128},
    base={"name": "tiny", "revision": None, "fingerprint": {"digest": "d", "weights": "w"}, "quantization": "nf4"},
    task={"type": "classify", "labels": ["a", "b"], "metrics": ["accuracy"]},
    recipe={"data": {"train": "train.jsonl"}, "training": {"seed": 0}},
    data={"test": {"source": "t.jsonl", "path": "/t.jsonl", "sha256": "ab", "rows": 3}},
    seed=7,
    libraries={"torch": "2.10"},
    metrics={"test": {"accuracy": 0.5}, "validation": {"accuracy": 1}},
    effect={"max_logit_change": 0.25},
    examples={"test": {"rows": [0, 2], "answers": ["x", "y"]}},
    parents=["sql@1"],
    origin={"kind": "trained", "losses": [1.0, 0.5], "steps": 2},
    created="2026-01-31T12:00:00Z",
    duration_seconds=1.5,
)
_PLAIN = _CARD.to_bytes()
_EXAMPLES = _PLAIN[_PLAIN.index(b'  "examples"') : _PLAIN.index(b'  "libraries"')]  # which schema 1 had none of
SEEDS = (
    _PLAIN,
    Card(created="2026-01-31T12:00:00Z").to_bytes(),
    _PLAIN.replace(b'"schema": 2', b'"schema": 1').replace(_EXAMPLES, b""),
)
_KEYS = (*asdict(_CARD), "type", "metrics", "labels", "rank", "tokens", "losses", "kind", "time", "source", "path")
WORDS = (*(f'"{key}":'.encode() for key in _KEYS), b"null", b"1e300", b"NaN", b"[]", b"{}", b"\\u001b")
_RECEIVED: dict[str, Any] = {"kind": "archive", "from": "x.tar", "time": "2026-01-31T12:00:00Z", "base": {"name": "m"}}


def read(data: bytes) -> Card:
    """The parser."""
    return Card.from_bytes(data)


def fuzz(data: bytes) -> None:
    """Accepted: what is written of it is read as the same; no listing or search can be broken by it."""
    card = accepted(read, data)
    if card is None:
        return
    ours = card.to_bytes()
    assert Card.from_bytes(ours) == card
    assert Card.from_bytes(ours).to_bytes() == ours
    for view in (card, trusted_view(card, _RECEIVED)):
        Card.from_bytes(view.to_bytes())
        entry = Entry("sql", 1, "0" * 64, view.created, (), summary(view))
        search([entry], "x -type:lora")
        entry_dict(entry)
        for field in FIELDS:
            search([entry], f"{field}:a")
        for number in NUMBERS:
            search([entry], f"{number}>1 -{number}=2")
    view = trusted_view(card, _RECEIVED)
    assert view.recipe is None
    assert not view.parents
    assert not any("path" in facts for facts in view.data.values())


def mutate(data: bytes, rng: Random) -> bytes:
    """Mostly of the tree."""
    try:
        if rng.random() < 0.85:
            return plain(mutate_tree(pairs(data), rng, _KEYS))
    except (ValueError, RecursionError):
        pass
    return mutate_bytes(data, rng, WORDS)
