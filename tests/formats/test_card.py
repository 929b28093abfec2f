from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from adapterhub_lite.errors import FormatError
from adapterhub_lite.formats.card import Card, examples_of, spread, utc_now

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
    examples={"test": {"rows": [0, 4], "answers": ["ja", "nein"]}},
    parents=["sql@1"],
    origin={"kind": "trained"},
    created="2026-01-31T12:00:00Z",
    duration_seconds=1.5,
)
FIRST = """{
  "adapter": {
    "alpha": 16.0,
    "rank": 8,
    "type": "lora"
  },
  "base": {
    "fingerprint": {
      "digest": "ab"
    },
    "name": "tiny"
  },
  "created": "2026-01-31T12:00:00Z",
  "data": {
    "train": {
      "rows": 9,
      "sha256": "00",
      "source": "ü.jsonl"
    }
  },
  "duration_seconds": 1.5,
  "effect": {
    "max_logit_change": 0.1
  },
  "libraries": {
    "torch": "2"
  },
  "metrics": {
    "test": {
      "loss": 0.5
    }
  },
  "origin": {
    "kind": "trained"
  },
  "parents": [
    "sql@1"
  ],
  "recipe": {
    "steps": 3
  },
  "schema": 1,
  "seed": 7,
  "task": {
    "name": "instruct"
  }
}
"""


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
        ({"adapter": {"type": "poly"}}, "adapter: expected an object whose type is one of lora, dora, "),
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
        ({"base": {"name": "tiny", "commit": 7}}, "base: expected"),
        ({"examples": []}, "examples: expected"),
        ({"examples": {"test": ["ja"]}}, "examples: expected"),
        ({"examples": {"test": {"rows": [0], "answers": ["ja"], "more": 1}}}, "examples: expected"),
        ({"examples": {"test": {"rows": [0]}}}, "examples: expected"),
        ({"examples": {"test": {"rows": [0, 1], "answers": ["ja"]}}}, "examples: expected"),
        ({"examples": {"test": {"rows": [-1], "answers": ["ja"]}}}, "examples: expected"),
        ({"examples": {"test": {"rows": [True], "answers": ["ja"]}}}, "examples: expected"),
        ({"examples": {"test": {"rows": [0.0], "answers": ["ja"]}}}, "examples: expected"),
        ({"examples": {"test": {"rows": [3, 3], "answers": ["ja", "nein"]}}}, "none twice"),
        ({"examples": {"test": {"rows": [0], "answers": [7]}}}, "examples: expected"),
        ({"examples": {"test": {"rows": [0], "answers": ["x" * 401]}}}, "at most 400 characters"),
        ({"examples": {"test": {"rows": [*range(9)], "answers": [""] * 9}}}, "8 at most"),
        ({"schema": 0}, "schema: expected a whole number from 1 to 2"),
        ({"schema": True}, "schema: expected"),
        ({"schema": "2"}, "schema: expected"),
        ({"schema": 1.0}, "schema: expected"),
        ({"schema": 1}, "'examples': unknown key"),
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
    with pytest.raises(FormatError, match=r"schema 3.*pip install --upgrade"):
        Card.from_bytes('{"schema": 3, "whatever": 1}')


def test_a_card_of_the_first_schema_keeps_its_bytes() -> None:
    """The digest of its version covers them."""
    card = Card.from_bytes(FIRST)
    assert card == replace(CARD, schema=1, examples={})
    assert card.to_bytes() == FIRST.encode()
    moved = replace(card, parents=[])
    assert Card.from_bytes(moved.to_bytes()) == moved


def test_a_card_of_the_first_schema_loses_no_examples() -> None:
    with pytest.raises(FormatError, match="'examples': unknown key"):
        replace(Card.from_bytes(FIRST), examples=CARD.examples).to_bytes()


def test_new_cards_are_of_the_second_schema() -> None:
    told = json.loads(Card().to_bytes())
    assert (told["schema"], told["examples"]) == (2, {})
    with pytest.raises(FormatError, match="examples: is missing"):
        Card.from_bytes(json.dumps({key: value for key, value in told.items() if key != "examples"}))


def test_examples_are_a_few_of_the_answers_evenly_spread() -> None:
    assert spread(0) == []
    assert spread(3) == [0, 1, 2]
    assert spread(80) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert spread(10, 4) == [0, 2, 5, 7]
    assert all(len(set(spread(n))) == min(n, 8) and max(spread(n)) < n for n in range(1, 100))
    found = examples_of([f"{i} " + "é" * 500 for i in range(16)])
    assert found["rows"] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert found["answers"][1] == "2 " + "é" * 398
    card = Card(examples={"test": found})
    assert Card.from_bytes(card.to_bytes()) == card


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), {1, 2}])
def test_what_json_cannot_say_is_refused_on_writing(value: object) -> None:
    with pytest.raises(FormatError):
        Card(effect={"x": value}).to_bytes()


def test_wrong_types_are_refused_on_writing() -> None:
    with pytest.raises(FormatError, match="seed"):
        Card(seed="7").to_bytes()  # type: ignore[arg-type]
