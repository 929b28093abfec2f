"""Any bytes as a move of an alias: refused with an error of ours, or exactly what we would write."""

from __future__ import annotations

import json
from random import Random

from adapterhub_lite.names import check_digest, check_version
from adapterhub_lite.store import Move
from adapterhub_lite.store import aliases as room
from tests.fuzz.common import accepted, mutate_bytes, mutate_tree, pairs, plain
from tests.fuzz.manifest import sealed

_TIME = "2026-01-31T12:00:00Z"
_MOVES = (
    Move(3, "a" * 64, _TIME, "set", {}, 1),
    Move(None, None, _TIME, "remove", {}, 2),
    Move(2, "b" * 64, _TIME, "refuse", {"metric": "accuracy", "candidate": 0.5, "current": 0.75, "margin": 0}, 3),
    Move(1, "c" * 64, _TIME, "rollback", {"from": 2}, 4),
)
SEEDS = tuple(room._dump("sql", "prod", move) for move in _MOVES)
_KEYS = ("alias", "digest", "event", "name", "number", "reason", "time", "version", "seal")
WORDS = (*(f'"{key}":'.encode() for key in _KEYS), b"null", b"promote", b"0" * 64, b"F" * 64)


def read(data: bytes) -> Move:
    """The parser."""
    return room._parse("sql", "prod", data)


def fuzz(data: bytes) -> None:
    """Accepted: it has one form, and names a version and its digest, or neither."""
    move = accepted(read, data)
    if move is None:
        return
    assert room._dump("sql", "prod", move) == data
    assert (move.version is None) == (move.digest is None)
    if move.version is not None:
        check_version(move.version)
        check_digest(str(move.digest))
    check_version(move.number)
    assert move.event in room.EVENTS
    float(sum(value for value in move.reason.values() if isinstance(value, int)))  # figures that can be shown


def mutate(data: bytes, rng: Random) -> bytes:
    """Mostly of the tree, sealed again."""
    if rng.random() < 0.2:
        return mutate_bytes(data, rng, WORDS)
    try:
        told = json.loads(plain(mutate_tree(pairs(data), rng, _KEYS)))
        return sealed(told, "seal")
    except (ValueError, RecursionError, AttributeError):
        return mutate_bytes(data, rng, WORDS)
