"""Many processes on one store: none waits for another, nothing is lost, and no reader sees a mixture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.store import Store, aliases
from adapterhub_lite.store.aliases import Listed
from adapterhub_lite.store.layout import Layout
from tests.checks import assert_store_sound
from tests.store.faulty import Unsynced
from tests.store.first_format import to_first_format
from tests.stress.acts import populated
from tests.stress.scene import scratch
from tests.stress.tally import LONG, row

ROOT = Path(__file__).parents[2]
WRITERS, PUTS = (8, 200) if LONG else (4, 25)


def start(role: str, store: Path, count: int, sync: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.stress.crowd", role, str(store), str(count), sync]
    env = {**os.environ, "AHL_CACHE": str(store.parent / "cache")}
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    said = process.communicate(timeout=900)[0]
    assert process.returncode == 0
    told: dict[str, Any] = json.loads(said)
    return told


@pytest.mark.parametrize("sync", ["sync", "unsynced"] if LONG else ["unsynced"])
def test_many_writers_on_one_name_and_readers_meanwhile(sync: str, tmp_path: Path) -> None:
    """With sync on the disk that tmp_path is on, without in memory."""
    with scratch() as memory, row("processes", f"{WRITERS} x {PUTS} puts, {sync}") as found:
        store = (tmp_path if sync == "sync" else memory) / "store"
        writers = [start("write", store, PUTS, sync) for _ in range(WRITERS)]
        others = [start(role, store, PUTS, sync) for role in ("read", "read", "list", "move")]
        churning = start("churn", store, PUTS, sync)
        told = [ended(process) for process in (*writers, churning)]
        (store.parent / "done").touch()
        seen = [ended(process) for process in others]
        for one in seen:
            found.violations += one.get("wrong", [])
            found.states += one.get("looks", 0)
        numbers = sorted(number for one in told for number in one.get("numbers", ()))
        if numbers != list(range(1, WRITERS * PUTS + 1)):
            found.violations.append(f"{len(numbers)} versions, {len(set(numbers))} of them different")
        if Store(store).versions("sql") != numbers:
            found.violations.append("not every version that was acknowledged is there")
        by_number = {n: d for one in told if "numbers" in one for n, d in zip(*one.values(), strict=True)}
        fresh = Store(store)
        lost = [number for number in numbers if fresh.resolve(f"sql@{number}").digest != by_number[number]]
        found.violations += [f"sql@{number} is another one than was acknowledged" for number in lost]
        assert all(one.get("looks", 1) for one in seen), "a reader saw nothing"
        assert_store_sound(store)


def test_readers_while_a_store_is_migrated(tmp_path: Path) -> None:
    """Whatever moment a reader began at, the alias names what it named before and after."""
    with scratch() as place, row("processes", "read while migrating") as found:
        for turn in range(40 if LONG else 6):
            world = place / str(turn)
            populated(world)
            to_first_format(world / "store")
            stop = threading.Event()
            reader = threading.Thread(target=_watch, args=(world / "store", stop, found.violations))
            reader.start()
            Store(world / "store", fs=Unsynced()).migrate()
            stop.set()
            reader.join()
            found.states += 1


def _watch(path: Path, stop: threading.Event, wrong: list[str]) -> None:
    while not stop.is_set():
        try:
            told = {alias: Store(path).resolve(f"sql:{alias}").version for alias in ("prod", "live")}
            moves = [move.version for move in Store(path).alias_history("sql", "live")]
            if (told, moves) != ({"prod": 1, "live": 3}, [1, 3]):
                wrong.append(f"{told}, {moves}")
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("moment", ["before the folder is listed", "before the file is read"])
def test_a_migration_in_the_middle_of_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    populated(tmp_path / "world")
    path = tmp_path / "world" / "store"
    to_first_format(path)
    reader, name = Store(path), "listed" if "listed" in moment else "read_first"
    real = getattr(aliases, name)

    def meanwhile(layout: Layout, *more: Any) -> Listed:
        monkeypatch.setattr(aliases, name, real)
        Store(path, fs=Unsynced()).migrate()
        found: Listed = real(layout, *more)
        return found

    monkeypatch.setattr(aliases, name, meanwhile)
    assert reader.resolve("sql:live").version == 3
    assert (path / "store.json").read_text() == '{"format":2}\n'
    assert [move.version for move in reader.alias_history("sql", "live")] == [1, 3]
