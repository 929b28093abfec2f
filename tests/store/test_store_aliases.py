"""The log of an alias: complete, in one order, whoever writes; and going back in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapterhub_lite.errors import NotFound, StoreCorrupt, StoreError
from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import Store
from tests.checks import assert_store_sound
from tests.formats.build import lora_files
from tests.store.faulty import Unsynced

MOVER = """
import sys
from adapterhub_lite.store import Store
from tests.store.faulty import Unsynced
store = Store(sys.argv[1], fs=Unsynced())
for turn in range(60):
    store.alias("sql", "prod", turn % 3 + 1, reason={"by": sys.argv[2], "turn": turn})
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store", fs=Unsynced())
    for seed in (0, 1, 2):
        made.put("sql", lora_files(seed), Card(created=f"2026-01-0{seed + 1}T12:00:00Z"))
    return made


def test_no_move_of_two_processes_is_lost(store: Store) -> None:
    command = [sys.executable, "-c", MOVER, str(store.path)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    movers = [subprocess.Popen([*command, who], env=env) for who in ("a", "b")]
    assert [mover.wait(timeout=120) for mover in movers] == [0, 0]
    history = store.alias_history("sql", "prod")
    assert [move.number for move in history] == list(range(1, 121))
    for who in ("a", "b"):
        assert [move.reason["turn"] for move in history if move.reason["by"] == who] == list(range(60))
    assert store.resolve("sql:prod").version == history[-1].version
    assert_store_sound(store.path)


def test_a_move_that_was_overtaken_is_refused(store: Store) -> None:
    store.alias("sql", "prod", 1)
    seen = store.alias_history("sql", "prod")[-1]
    Store(store.path, fs=Unsynced()).alias("sql", "prod", 2)
    with pytest.raises(StoreError, match="sql:prod was moved meanwhile"):
        store.alias("sql", "prod", 3, expected=seen)
    assert store.resolve("sql:prod").version == 2
    assert store.alias("sql", "prod", 3, expected=store.alias_history("sql", "prod")[-1]).version == 3


def test_a_refused_promotion_is_kept_and_moves_nothing(store: Store) -> None:
    store.alias("sql", "prod", 1)
    store.refuse("sql", "prod", 2, {"metric": "accuracy", "candidate_value": 0.5})
    assert store.resolve("sql:prod").version == 1
    assert store.aliases("sql") == {"prod": 1}
    last = store.alias_history("sql", "prod")[-1]
    assert (last.event, last.version, last.reason["metric"]) == ("refuse", 2, "accuracy")
    store.refuse("sql", "never", 2, {})
    assert store.aliases("sql") == {"prod": 1}
    with pytest.raises(NotFound):
        store.resolve("sql:never")
    assert_store_sound(store.path)


@pytest.mark.parametrize(
    ("moves", "expected"),
    [
        ([1, 2, 3], [2, 1, None]),
        ([1, 1, 2], [1, None]),
        ([1, 2, 1], [2, 1, None]),
        ([1, 2, "back", 3], [1, None]),
        ([1], [None]),
        ([1, None, 2], [1, None]),
        ([3, "refuse 1", 2], [3, None]),
    ],
)
def test_rollback_goes_back_and_further_back(
    store: Store, moves: list[int | str | None], expected: list[int | None]
) -> None:
    for move in moves:
        if move is None:
            store.unalias("sql", "prod")
        elif move == "back":
            store.rollback("sql", "prod")
        elif isinstance(move, str):
            store.refuse("sql", "prod", 1, {})
        else:
            store.alias("sql", "prod", move)
    for version in expected:
        if version is None:
            with pytest.raises(NotFound, match="named no other version"):
                store.rollback("sql", "prod")
        else:
            assert store.rollback("sql", "prod").version == version
            assert store.resolve("sql:prod").version == version
    assert store.alias_history("sql", "prod")[-1].event in ("rollback", "set")
    assert_store_sound(store.path)


def test_rollback_passes_over_what_was_removed(store: Store) -> None:
    for version in (1, 2, 3):
        store.alias("sql", "prod", version)
    store.remove("sql@2")
    assert store.rollback("sql", "prod").version == 1


def test_a_damaged_last_move_is_not_passed_over(store: Store) -> None:
    store.alias("sql", "prod", 1)
    store.alias("sql", "prod", 2)
    path = store.path / "aliases" / "sql" / "prod@2" / "move.json"
    path.unlink()
    with pytest.raises(StoreCorrupt, match="sql:prod is damaged: move 2"):
        Store(store.path).resolve("sql:prod")
    with pytest.raises(StoreCorrupt):
        Store(store.path).rollback("sql", "prod")
    store.alias("sql", "prod", 3)
    assert store.resolve("sql:prod").version == 3


def test_a_move_of_another_alias_is_not_believed(store: Store) -> None:
    store.alias("sql", "prod", 1)
    store.alias("sql", "next", 2)
    one, other = (store.path / "aliases" / "sql" / f"{alias}@1" / "move.json" for alias in ("prod", "next"))
    data = other.read_bytes()
    one.unlink()
    one.write_bytes(data)
    with pytest.raises(StoreCorrupt, match="sql:prod is damaged"):
        Store(store.path).resolve("sql:prod")


def test_the_log_tells_everything_latest_first(store: Store) -> None:
    store.alias("sql", "prod", 1)
    store.refuse("sql", "prod", 2, {"metric": "accuracy"})
    store.remove("sql@3")
    log = store.log("sql")
    told = [(event.kind, event.version, event.alias) for event in log]
    assert told[-2:] == [("made", 2, ""), ("made", 1, "")]
    assert set(told[:-2]) == {("set", 1, "prod"), ("refuse", 2, "prod"), ("removed", 3, "")}
    assert [event.time for event in log] == sorted((event.time for event in log), reverse=True)
    assert log[-1].facts["type"] == "lora"
    with pytest.raises(NotFound, match="Did you mean sql"):
        store.log("sq1")
    store.remove("sql@1", force=True)
    store.remove("sql@2")
    assert {event.kind for event in store.log("sql")} == {"removed", "set", "remove", "refuse"}
