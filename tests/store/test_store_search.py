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
        data={"train": {"source": "reviews.jsonl", "rows": 4, "path": more.pop("path", ""), "sha256": "5e" * 32}},
        created=more.pop("created", "2026-01-31T12:00:00Z"),
        **more,
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store", fs=Unsynced())
    made.put("sql", lora_files(0), card(0.7, "smollm2-135m-instruct", seed=3, path="/home/me/recipes/sql/train.jsonl"))
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
        ("data:recipes/sql", ["sql@1"]),
        ("data:me/train", ["sql@1"]),
        ("data:train.jsonl", ["sql@1"]),
        ("data:sql/recipes", []),
        ("data:home", []),
        ("data:5E5E5e", ["sql@1", "sql@2", "topics@1"]),
        ("data:e5e5e5", []),  # a digest is known by how it begins
        ("name:sql@2", ["sql@2"]),
        ("sql@2", ["sql@2"]),
        ("sql@1", ["sql@1", "topics@1"]),
        ("-sql@1", ["sql@2"]),
        ("BASE:Smollm2 ACCURACY>0.8", ["sql@2"]),
        ("Version=2", ["sql@2"]),
        ("Test.Accuracy=0.7", ["sql@1"]),
        ("created=2026-01-31T12", ["sql@1", "topics@1"]),
        ("created>2024-02-29", ["sql@1", "sql@2", "topics@1"]),
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
        ("created>2026-13", "'2026-13' is not a date"),
        ("created>2026-02-29", "is not a date"),
        ("created>2026-01-01T25", "is not a date"),
        ("created>", "is not a date"),
        ("accuracy>", "accuracy> lacks a number.*accuracy>0.8"),
        ("-accuracy<=", "accuracy<= lacks a number"),
        ("accuracy > 0.8", "'>' compares nothing.*as one word: accuracy>0.8"),
        ("name:", "name: says nothing to look for.*name:sql"),
        ("-DATA:", "data: says nothing"),
        ("version:2", "Write version=2; one version of a name is NAME@2"),
        ("rank:16", "There is no field rank:, it is compared. Write rank=16"),
        ("NAMES:x", "no field names:.*Did you mean name:"),
        ("'open", "Close the quote"),
        ("x" * 3000, "the limit is 2000"),
    ],
)
def test_queries_that_cannot_be_read(store: Store, query: str, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        store.search(query)


def test_metrics_are_found_in_any_case(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", fs=Unsynced())
    store.put("a", lora_files(0), Card(metrics={"Test": {"F1": 0.75}}))
    store.put("b", lora_files(1), Card(metrics={"test": {"f1": 0.25, "F1": 0.9}}))
    assert [one.name for one in store.search("F1>0.5")] == ["a"]
    assert [one.name for one in store.search("test.f1>=0.25")] == ["a", "b"]


def test_a_version_is_not_another_that_begins_like_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", fs=Unsynced())
    for seed in range(11):
        store.put("sql", lora_files(seed), Card(parents=["sql@10"] if seed == 10 else []))
    assert [one.version for one in store.search("name:sql@1")] == [1]
    assert store.search("parent:sql@1") == []


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
