"""Leftovers go, and nothing else; damage heals where sound content of the same digest is at hand."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from adapterhub_lite.errors import StoreCorrupt
from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import FileFact, Store
from adapterhub_lite.store.fs import FileSystem
from tests.checks import assert_store_sound
from tests.formats.build import lora_files
from tests.store.faulty import Crash, Failing, Unsynced

WEIGHTS = "adapter_model.safetensors"
CARD = Card(created="2026-01-31T12:00:00Z")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store", fs=Unsynced())
    for seed in (0, 1):
        made.put("sql", lora_files(seed), CARD)
    made.alias("sql", "prod", 1)
    return made


def everything(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_sound_store_has_no_leftovers(store: Store, tmp_path: Path) -> None:
    before = everything(store.path)
    assert store.gc() == []
    assert everything(store.path) == before
    assert Store(tmp_path / "none").gc() == []
    assert not (tmp_path / "none").exists()


def leave(store: Store) -> set[str]:
    """Crash a put, cut a removal short, and lose the versions of an object."""
    with pytest.raises(Crash):
        Store(store.path, fs=Failing(9, Crash())).put("sql", lora_files(5), CARD)
    with pytest.raises(Crash):
        Store(store.path, fs=Failing(8, Crash())).remove("sql@2")
    digest = hashlib.sha256(b"nobody's").hexdigest()
    blob = store.path / "objects" / digest[:2] / digest
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(b"nobody's")
    for entry in (store.path / "tmp").iterdir():
        os.utime(entry, (0, 0))
    return {str(path.relative_to(store.path)) for path in (*(store.path / "tmp").iterdir(), blob)}


def test_a_dry_run_says_what_the_run_does(store: Store) -> None:
    left = leave(store)
    before = everything(store.path)
    told = store.gc(dry_run=True)
    assert everything(store.path) == before
    assert {one.path for one in told} >= left
    assert all(one.reason for one in told)
    bytes_before = sum(map(len, everything(store.path).values()))
    gone = store.gc()
    assert {one.path for one in gone} == {one.path for one in told}
    assert not list((store.path / "tmp").iterdir())
    assert sum(one.bytes for one in gone) > 0
    assert sum(map(len, everything(store.path).values())) < bytes_before
    assert store.gc(dry_run=True) == []
    assert store.resolve("sql:prod").version == 1
    assert_store_sound(store.path)


def test_young_work_is_left_alone_unless_told(store: Store) -> None:
    young = store.path / "tmp" / ".young"
    young.mkdir()
    assert store.gc() == []
    assert young.exists()
    assert [one.path for one in store.gc(older_than=0.0)] == ["tmp/.young"]
    assert not young.exists()


class Stuck(Unsynced):
    """Nothing can be removed."""

    def unlink(self, path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    rmdir = unlink


def test_what_cannot_be_removed_is_told(store: Store) -> None:
    left = leave(store)
    told = store.gc(dry_run=True)
    swept = Store(store.path, fs=Stuck()).sweep()
    assert {one.path for one in swept.kept} >= left
    assert {one.path for one in (*swept.gone, *swept.kept)} == {one.path for one in told}
    assert not any((store.path / one.path).exists() for one in swept.gone)
    assert store.sweep().kept == []


def test_young_work_is_counted(store: Store) -> None:
    leave(store)
    (store.path / "tmp" / ".young").mkdir()
    assert store.sweep(dry_run=True).younger == 1
    assert store.sweep().younger == 1
    assert store.sweep(older_than=0.0).younger == 0


def test_copies_of_equal_content_are_told(tmp_path: Path) -> None:
    class Linkless(Unsynced):
        def link(self, source: Path, target: Path) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

    sizes = {}
    for kind, fs in (("linked", Unsynced()), ("copied", Linkless())):
        store = Store(tmp_path / kind, fs=fs)
        for name in ("a", "b", "c"):
            store.put(name, lora_files(0), CARD)
        sizes[kind] = store.sweep().copied
    assert sizes == {"linked": 0, "copied": 2 * sum(fact.size for fact in _shared(store))}


def _shared(store: Store) -> list[FileFact]:
    return [fact for file, fact in store.manifest("a@1").files.items() if file != "card.json"]


def test_an_object_is_told_as_a_copy_where_versions_have_its_content(store: Store, tmp_path: Path) -> None:
    copied = Store(shutil.copytree(store.path, tmp_path / "copied"), fs=Unsynced())  # hard links are lost
    (told, *_) = {one.reason for one in copied.gc()}
    assert told == "versions hold this content as copies of their own"
    copied.remove("sql@2")
    assert copied.gc() == []
    assert copied.verified_folder("sql@1")


def test_a_put_and_a_collection_at_the_same_time(tmp_path: Path) -> None:
    """A collection after every single operation of a put takes nothing that the put needs."""
    path = tmp_path / "store"
    Store(path, fs=Unsynced()).put("sql", lora_files(0), CARD)
    collector = Store(path, fs=Unsynced())

    class Collecting(Unsynced):
        runs = 0

        def link(self, source: Path, target: Path) -> None:
            self.collect()
            FileSystem.link(self, source, target)
            self.collect()

        def replace(self, source: Path, target: Path) -> None:
            self.collect()
            FileSystem.replace(self, source, target)
            self.collect()

        def rename(self, source: Path, target: Path) -> None:
            self.collect()
            FileSystem.rename(self, source, target)
            self.collect()

        def collect(self) -> None:
            type(self).runs += 1
            collector.gc()

    writer = Store(path, fs=Collecting())
    kept = writer.put("sql", lora_files(0), CARD)
    writer.remove(writer.put("sql", lora_files(3), CARD))
    assert writer.put("sql", lora_files(3), CARD).version == 4
    assert Collecting.runs > 10
    assert writer.verified_folder(kept)
    assert_store_sound(path)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(data))


def test_damage_in_shared_content_heals_when_it_is_stored_again(store: Store) -> None:
    twin = store.put("twin", lora_files(0), CARD)
    damage(store.folder("sql@1") / WEIGHTS)
    for ref in ("sql@1", twin):  # one file, two names
        with pytest.raises(StoreCorrupt):
            store.verified_folder(ref)
    assert store.repair() == []
    again = store.put("again", lora_files(0), CARD)
    assert store.verified_folder(again)
    healed = store.repair()
    assert [(one.where, one.file) for one in healed] == [("sql@1", WEIGHTS), ("twin@1", WEIGHTS)]
    assert_store_sound(store.path)
    inodes = {(store.folder(ref) / WEIGHTS).stat().st_ino for ref in ("sql@1", "twin@1", "again@1")}
    assert len(inodes) <= 3
    assert store.resolve("sql:prod").version == 1


def test_what_has_no_sound_twin_stays_reported(store: Store) -> None:
    damage(store.folder("sql@1") / WEIGHTS)
    assert store.repair() == []
    assert {finding.where for finding in store.verify()} >= {"sql@1"}


def test_missing_files_heal_too(store: Store) -> None:
    (store.folder("sql@2") / WEIGHTS).unlink()
    assert [one.source.split("/")[0] for one in store.repair()] == ["objects"]
    assert_store_sound(store.path)


def test_only_the_right_bytes_heal(store: Store) -> None:
    digest = store.manifest("sql@1").files[WEIGHTS].sha256
    (store.folder("sql@1") / WEIGHTS).unlink()
    blob = store.path / "objects" / digest[:2] / digest
    blob.chmod(0o644)
    blob.write_bytes(b"other")
    assert store.repair() == []


def test_a_version_that_vanished_is_found(store: Store) -> None:
    store.put("sql", lora_files(2), CARD)
    shutil.rmtree(store.folder("sql@2"))
    assert [(one.where, one.problem.split(":")[0]) for one in store.verify()] == [("sql@2", "is missing")]


@pytest.mark.parametrize("act", ["gc", "repair"])
def test_killed_while_cleaning(store: Store, tmp_path: Path, act: str) -> None:
    leave(store)
    if act == "repair":
        store.put("again", lora_files(0), CARD)
        (store.folder("sql@1") / WEIGHTS).unlink()
    for at in range(1, 60):
        path = tmp_path / "copy"
        subprocess.run(["cp", "-a", store.path, path], check=True)  # which keeps hard links
        fs = Failing(at, Crash())
        with suppress(Crash):
            getattr(Store(path, fs=fs), act)()
        getattr(Store(path, fs=Unsynced()), act)()
        assert Store(path).verified_folder("sql:prod")
        assert_store_sound(path)
        shutil.rmtree(path)
        if fs.count < at:
            assert at > 3
            return
    raise AssertionError("never completed")
