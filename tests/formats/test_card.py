from __future__ import annotations

import json
import math
from typing import Any

import pytest

from adapterhub_lite.errors import FormatError
from adapterhub_lite.formats.card import Card, utc_now

CARD = Card(
    adapter={"type": "lora", "rank": 8, "alpha": 16.0},
    base={"name": "tiny", "fingerprint": {"digest": "ab"}},
    task={"name": "instruct"},
    recipe={"steps": 3},
    data={"train": {"source": "ü.jsonl", "sha256": "00", "rows": 9}},
    seed=7,
    libraries={"torch": "2"},
    metrics={"test": {"loss": 0.5}},
    effect={"max_logit_change": 0.1},
    parents=["sql@1"],
    origin={"kind": "trained"},
    created="2026-01-31T12:00:00Z",
    duration_seconds=1.5,
)


def test_round_trip_is_canonical() -> None:
    data = CARD.to_bytes()
    assert Card.from_bytes(data) == CARD
    assert Card.from_bytes(data).to_bytes() == data
    assert data.endswith(b"}\n")
    assert "ü".encode() in data
    assert list(json.loads(data)) == sorted(json.loads(data))
    assert Card.from_bytes(Card().to_bytes()).created <= utc_now()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"surprise": 1}, "'surprise': unknown key"),
        ({"adapter": {"type": "ia3"}}, "adapter: expected an object whose type is one of lora, dora, prefix"),
        ({"base": None}, "base: expected an object"),
        ({"recipe": []}, "recipe: expected an object or null"),
        ({"seed": True}, "seed: expected a whole number"),
        ({"libraries": {"torch": 2}}, "libraries: expected"),
        ({"metrics": {"test": 0.5}}, "metrics: expected"),
        ({"metrics": {"test": {"loss": "low"}}}, "metrics: expected"),
        ({"parents": "sql@1"}, "parents: expected"),
        ({"parents": [1]}, "parents: expected"),
        ({"created": "yesterday"}, "created: expected"),
        ({"created": "2026-13-31T12:00:00Z"}, "created: expected"),
        ({"created": "2026-01-31T12:00:00+02:00"}, "created: expected"),
        ({"duration_seconds": -1}, "duration_seconds: expected"),
        ({"schema": 0}, "schema: expected 1"),
        ({"schema": True}, "schema: expected 1"),
    ],
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        Card.from_bytes(json.dumps({**json.loads(CARD.to_bytes()), **changes}))


def test_missing_fields_and_all_problems_at_once() -> None:
    with pytest.raises(FormatError) as caught:
        Card.from_bytes('{"schema": 1, "seed": "x", "other": 2}')
    text = str(caught.value)
    assert "adapter: is missing" in text
    assert "'other': unknown key" in text
    assert "seed: expected" in text


def test_newer_schema_says_upgrade() -> None:
    with pytest.raises(FormatError, match=r"schema 2.*pip install --upgrade"):
        Card.from_bytes('{"schema": 2, "whatever": 1}')


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), {1, 2}])
def test_what_json_cannot_say_is_refused_on_writing(value: object) -> None:
    with pytest.raises(FormatError):
        Card(effect={"x": value}).to_bytes()


def test_wrong_types_are_refused_on_writing() -> None:
    with pytest.raises(FormatError, match="seed"):
        Card(seed="7").to_bytes()  # type: ignore[arg-type]
