"""Any text as a search: refused with an error of ours, or answered, by a part of what there is."""

from __future__ import annotations

from random import Random

from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import Entry
from adapterhub_lite.store.listing import summary
from adapterhub_lite.store.search import FIELDS, NUMBERS, Query, parse_query, search
from tests.fuzz.card import SEEDS as CARDS
from tests.fuzz.common import accepted, mutate_bytes

SEEDS = (
    b"sql base:smollm2 accuracy>0.8",
    b"type:lora quant:nf4 'rank<=16' -alias:prod",
    b"data:reviews created>2026-01 size<10MB -seed=7",
    b'"two words" validation.accuracy>=50% version!=2 -name:x',
    b"-rank>4 loss<1e-3",
)
WORDS = (
    *(f"{field}:".encode() for field in FIELDS), *(f"{number}>".encode() for number in NUMBERS), b"-", b"--", b"'",
    b'"', b"\\", b">", b"<=", b"!=", b"=", b"%", b"kb", b"1e999", b"nan", b"inf", b"-0", b".5", b" ", b"\0", b"\xff",
    b"test.accuracy", b"created>2026", b"#",
)  # fmt: skip
_CARDS = [Card.from_bytes(data) for data in CARDS]
ENTRIES = [
    Entry("sql", number, f"{number:064x}", card.created, ("prod",) if number == 1 else (), summary(card))
    for number, card in enumerate(_CARDS, start=1)
] + [Entry("bad", 1, "", "", (), {}, "sql@1 is damaged")]


def read(data: bytes) -> Query:
    """The parser."""
    return parse_query(data.decode("utf-8", "surrogateescape"))


def fuzz(data: bytes) -> None:
    """Understood: what is found is a part of the sound entries, in their order."""
    if accepted(read, data) is None:
        return
    found = accepted(lambda raw: search(ENTRIES, raw.decode("utf-8", "surrogateescape")), data)
    if found is not None:
        assert found == [entry for entry in ENTRIES if entry in found]
        assert not any(entry.problem for entry in found)


def mutate(data: bytes, rng: Random) -> bytes:
    """Of bytes."""
    return mutate_bytes(data, rng, WORDS)
