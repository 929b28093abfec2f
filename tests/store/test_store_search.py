"""Finding versions by what their cards say; and the index, which may vanish, rot or lie without being believed."""

from __future__ import annotations

import json
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_lite.errors import FormatError
from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import Store
from adapterhub_lite.store.listing import INDEXED
from adapterhub_lite.store.search import parse_query
from tests.formats.build import lora_files
from tests.store.faulty import Unsynced


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AHL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def card(accuracy: float, base: str, task: str = "instruct", **more: Any) -> Card:
    mark = {"digest": "ab" * 32}
    return Card(
        base={"name": base, "quantization": "nf4", "fingerprint": mark},
        task={"type": task},
        metrics={"test": {"accuracy": accuracy}, "validation": {"loss": 1.5}},
        data={"train": {"source": "reviews.jsonl", "rows": 4}},
        created=more.pop("created", "2026-01-31T12:00:00Z"),
        **more,
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store", fs=Unsynced())
    made.put("sql", lora_files(0), card(0.7, "smollm2-135m-instruct", seed=3))
    made.put("sql", lora_files(1), card(0.9, "smollm2-135m-instruct", created="2026-03-01T00:00:00Z"))
    made.put("topics", lora_files(2), card(0.85, "minilm-l6", "classify", parents=["sql@1"]))
    made.alias("sql", "prod", 1)
    return made


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("sql base:smollm2 accuracy>0.8", ["sql@2"]),
        ("", ["sql@1", "sql@2", "topics@1"]),
        ("SQL", ["sql@1", "sql@2", "topics@1"]),  # topics has it as a parent
        ("name:sql", ["sql@1", "sql@2"]),
        ("-name:sql", ["topics@1"]),
        ("alias:prod", ["sql@1"]),
        ("accuracy>=0.85", ["sql@2", "topics@1"]),
        ("accuracy>=85%", ["sql@2", "topics@1"]),
        ("test.accuracy=0.7", ["sql@1"]),
        ("validation.loss<2 -accuracy>0.8", ["sql@1"]),
        ("task:classify", ["topics@1"]),
        ("base:abab", ["sql@1", "sql@2", "topics@1"]),
        ("quant:nf4 rank=2", ["sql@1", "sql@2", "topics@1"]),
        ("size<1kB", ["sql@1", "sql@2", "topics@1"]),
        ("size>1MB", []),
        ("created>2026-02", ["sql@2"]),
        ("created=2026-01", ["sql@1", "topics@1"]),
        ("version>1", ["sql@2"]),
        ("seed=3", ["sql@1"]),
        ("parent:sql@1", ["topics@1"]),
        ("data:reviews", ["sql@1", "sql@2", "topics@1"]),
        ('"minilm-l6"', ["topics@1"]),
        ("nothing-like-it", []),
    ],
)
def test_search(store: Store, query: str, expected: list[str]) -> None:
    assert [f"{one.name}@{one.version}" for one in store.search(query)] == expected


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("bas:x", "no field bas:.*Did you mean base:"),
        ("acuracy>0.8", "No adapter has a metric or number acuracy.*Did you mean accuracy"),
        ("accuracy>high", "'high' is not a number.*accuracy>0.8"),
        ("base>3x", "is not a number"),
        ("created>yesterday", "not a date.*created>2026-01-31"),
        ("'open", "Close the quote"),
        ("x" * 3000, "the limit is 2000"),
    ],
)
def test_queries_that_cannot_be_read(store: Store, query: str, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        store.search(query)


@given(st.text(max_size=60))
def test_any_text_is_a_query_or_a_clear_error(text: str) -> None:
    with suppress(FormatError):  # anything else fails
        assert parse_query(text).text == text


# -- the index -----------------------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store", fs=Unsynced())
    for number in range(INDEXED + 2):
        store.put(f"n{number:03}", lora_files(0), card(number / 100, "tiny"))
    store.alias("n001", "prod", 1)
    return store


def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that were changed a moment ago count as changed long ago."""
    monkeypatch.setattr("adapterhub_lite.store.catalog.SETTLED", 0)


def index_file(cache: Path) -> Path:
    (found,) = (cache / "index").glob("*.sqlite")
    return found


def test_a_listing_with_index_equals_one_without(many: Store, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = many.list()
    settled(monkeypatch)
    Store(many.path).list()
    assert index_file(cache).stat().st_size > 0
    read = []
    monkeypatch.setattr("adapterhub_lite.store.listing.card_of", lambda *a: read.append(a))
    assert Store(many.path).list() == plain
    assert read == []  # all of it came from the index


def test_changes_are_seen_through_the_index(many: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    settled(monkeypatch)
    many.list()
    other = Store(many.path, fs=Unsynced())
    many.put("n000", lora_files(1), card(0.5, "tiny"))
    many.remove("n002@1")
    many.put("new", lora_files(1), card(0.5, "tiny"))
    many.alias("n000", "prod", 2)
    many.unalias("n001", "prod")
    found = {f"{one.name}@{one.version}": one.aliases for one in other.list()}
    assert found["n000@2"] == ("prod",)
    assert found["n001@1"] == ()
    assert "n002@1" not in found
    assert "new@1" in found
    assert many.list() == other.list() == Store(many.path).list()


def test_a_lying_index_is_not_believed(many: Store, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settled(monkeypatch)
    plain = many.list()
    with sqlite3.connect(index_file(cache)) as db:
        facts = json.loads(db.execute("SELECT facts FROM names WHERE name = 'n003'").fetchone()[0])
        facts[0][3]["metrics"]["test"]["accuracy"] = 1.0
        db.execute("UPDATE names SET facts = ? WHERE name = 'n003'", (json.dumps(facts),))
    assert Store(many.path).list() == plain


@pytest.mark.parametrize("damage", ["absent", "empty", "junk", "flipped", "locked", "folder"])
def test_an_unusable_index_costs_only_time(
    many: Store, cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    settled(monkeypatch)
    plain = many.list()
    path = index_file(cache)
    holder = sqlite3.connect(path, isolation_level=None)
    if damage == "locked":
        holder.execute("BEGIN EXCLUSIVE")
        many.put("zzz", lora_files(1), card(0.5, "tiny"))
        assert len(Store(many.path).list()) == len(plain) + 1
        return
    holder.close()
    for extra in ("-wal", "-shm"):
        Path(f"{path}{extra}").unlink(missing_ok=True)
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "absent":
        middle = len(data) // 2
        path.write_bytes(
            {"empty": b"", "junk": b"x" * 5000, "flipped": data[:middle] + b"\xff" * 64 + data[middle + 64 :]}[damage]
        )
    assert Store(many.path).list() == plain
    assert Store(many.path).list() == plain


def test_every_flipped_byte_of_the_index_is_harmless(many: Store, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settled(monkeypatch)
    plain = many.list()
    path = index_file(cache)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    good = path.read_bytes()
    for position in range(0, len(good), max(1, len(good) // 150)):
        bad = bytearray(good)
        bad[position] ^= 0x10
        path.unlink(missing_ok=True)
        path.write_bytes(bytes(bad))
        assert Store(many.path).list() == plain, position
