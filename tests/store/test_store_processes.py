from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.errors import NotFound
from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import Store, reading
from adapterhub_lite.store.fs import FileSystem
from tests.checks import assert_store_sound
from tests.formats.build import lora_files

WRITER = """
import sys
from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import Store
from tests.formats.build import lora_files
from tests.store.faulty import Unsynced
store = Store(sys.argv[1], fs=Unsynced())
for seed in range(50):
    print(store.put("sql", lora_files(seed % 5), Card(seed=seed)).version)
"""


def test_two_processes_on_one_name_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "store")]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    writers = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    numbers = [int(line) for writer in writers for line in writer.communicate(timeout=120)[0].split()]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert sorted(numbers) == list(range(1, 101))
    assert Store(tmp_path / "store").versions("sql") == sorted(numbers)
    assert_store_sound(tmp_path / "store")


def test_readers_see_old_or_new_while_an_alias_moves_and_versions_go(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    digests = {store.put("sql", lora_files(seed), Card()).digest for seed in (0, 1)}
    store.alias("sql", "prod", 1)
    done = threading.Event()
    seen: list[str | None] = []

    def read() -> None:
        while not done.is_set():
            seen.append(store.resolve("sql:prod").digest)
            store.verified_folder("sql:prod")

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for turn in range(20):
        store.alias("sql", "prod", turn % 2 + 1)
        store.remove(store.put("sql", lora_files(2), Card()))
    done.set()
    for reader in readers:
        reader.join()
    assert seen
    assert set(seen) <= digests
    assert_store_sound(store.path)


class Interfering(FileSystem):
    """Lets another writer publish and remove the number that is about to be taken."""

    def __init__(self, other: Store, remove: bool) -> None:
        self.other, self.remove, self.done = other, remove, False

    def rename(self, source: Path, target: Path) -> None:
        if target.name.isdigit() and not self.done:
            self.done = True
            ref = self.other.put("sql", lora_files(9), Card())
            if self.remove:
                self.other.remove(ref)
        super().rename(source, target)


@pytest.mark.parametrize("remove", [False, True])
def test_a_number_taken_meanwhile_is_not_taken_again(tmp_path: Path, remove: bool) -> None:
    other = Store(tmp_path / "store")
    store = Store(tmp_path / "store", fs=Interfering(other, remove))
    assert store.put("sql", lora_files(), Card()).version == 2
    assert store.versions("sql") == ([2] if remove else [1, 2])
    if remove:
        with pytest.raises(NotFound, match="was removed"):
            store.resolve("sql@1")
    assert_store_sound(store.path)


def test_old_leftovers_are_swept_and_young_ones_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.put("sql", lora_files(), Card())
    old, young = store.path / "tmp" / "old", store.path / "tmp" / "young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "x").write_text("x")
    os.utime(old, (0, 0))
    store.put("sql", lora_files(), Card())
    assert not old.exists()
    assert young.exists()


LOOKS: dict[str, Callable[[Store], object]] = {
    "read": lambda store: store.read("sql@2"),
    "verified_folder": lambda store: store.verified_folder("sql@2"),
    "card": lambda store: store.card("sql@2"),
    "list": lambda store: [entry.version for entry in store.list() if entry.problem],
    "log": lambda store: [event.version for event in store.log("sql") if event.problem],
    "verify": lambda store: store.verify(),
}


@pytest.mark.parametrize("moment", range(1, 7))
@pytest.mark.parametrize("look", LOOKS)
def test_a_version_that_is_removed_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: str, moment: int
) -> None:
    """It is gone, which is what a reader is told; it is not damaged."""
    other = Store(tmp_path / "store")
    for seed in (0, 1):
        other.put("sql", lora_files(seed), Card())
    opened = 0

    def opening(real: Callable[..., Any]) -> Callable[..., Any]:
        def open_it(path: Path, *more: Any) -> Any:
            nonlocal opened
            opened += "/2/" in str(path)
            if opened == moment and 2 in other.versions("sql"):
                other.remove("sql@2")
            return real(path, *more)

        return open_it

    reader = Store(other.path)
    assert reader.resolve("sql@2")
    for name in ("read_regular", "open_regular"):
        monkeypatch.setattr(reading, name, opening(getattr(reading, name)))
    told = ""
    try:
        found = LOOKS[look](reader)
    except NotFound as error:
        told, found = str(error), []
    monkeypatch.undo()
    assert found == [] or look in ("read", "verified_folder", "card")
    assert told == "" or "sql@2 was removed" in told
    assert_store_sound(other.path)


def test_a_store_that_is_made_while_it_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look finds no store.json, the next one the adapters of a process that made the store meanwhile."""
    path = tmp_path / "store"
    real = Path.is_file

    def meanwhile(self: Path) -> bool:
        found = real(self)
        if self.name == "store.json":
            monkeypatch.setattr(Path, "is_file", real)
            Store(path).put("sql", lora_files(), Card())
        return found

    monkeypatch.setattr(Path, "is_file", meanwhile)
    assert Store(path).resolve("sql").version == 1
    assert_store_sound(path)
