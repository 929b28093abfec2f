"""A damaged version becomes whole again when its own export is imported; nothing else may."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from adapterhub_lite.errors import StoreCorrupt
from adapterhub_lite.formats.card import Card
from adapterhub_lite.names import Ref
from adapterhub_lite.store import Store
from tests.checks import assert_store_sound
from tests.formats.build import lora_files
from tests.store.faulty import Crash, Failing, Unsynced

WEIGHTS = "adapter_model.safetensors"
FILES = ["adapter_config.json", WEIGHTS, "card.json"]
CARD = Card(created="2026-01-31T12:00:00Z")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store", fs=Unsynced())
    for seed in (0, 1):
        made.put("sql", lora_files(seed), CARD)
    made.alias("sql", "prod", 1)
    return made


@pytest.fixture
def exported(store: Store, tmp_path: Path) -> Path:
    return store.export("sql@1", tmp_path / "sql-1.tar")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["flipped", "missing", "a link"])
@pytest.mark.parametrize("file", FILES)
def test_an_export_heals_the_version_it_equals(
    store: Store, exported: Path, tmp_path: Path, file: str, how: str
) -> None:
    ref = store.resolve("sql@1")
    path = store.folder(ref) / file
    if how == "flipped":
        flip(path)
    else:
        path.unlink()
    if how == "a link":
        (tmp_path / "precious").write_bytes(b"mine")
        path.symlink_to(tmp_path / "precious")
        assert (tmp_path / "precious").read_bytes() == b"mine"
    assert store.import_(exported, "sql") == ref
    shared = ["sql@2"] if file == "adapter_config.json" and how == "flipped" else []  # one file, two names
    assert [one.where for one in store.healed] == [*shared, "sql@1"]
    assert {(one.file, one.source) for one in store.healed} == {(file, "what was imported")}
    assert store.versions("sql") == [1, 2]
    assert store.verified_folder("sql:prod")
    assert not path.is_symlink()
    assert_store_sound(store.path)  # the object of the same content, too


def test_what_is_whole_is_left_alone(store: Store, exported: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.path.rglob("*")}
    store.import_(exported, "sql")
    assert store.healed == []
    assert {path: path.stat().st_mtime_ns for path in store.path.rglob("*")} == before


def test_a_card_does_not_become_an_object(store: Store, exported: Path) -> None:
    objects = {path.name for path in (store.path / "objects").glob("*/*")}
    (store.folder("sql@1") / "card.json").unlink()
    store.import_(exported, "sql")
    assert {path.name for path in (store.path / "objects").glob("*/*")} == objects


def test_a_version_whose_manifest_is_damaged_does_not_stand_in_the_way(store: Store, exported: Path) -> None:
    digest = store.resolve("sql@1").digest
    for version in (1, 2):
        (store.folder(f"sql@{version}") / "manifest.json").unlink()
    opened = Store(store.path, fs=Unsynced())
    assert opened.import_(exported, "sql") == Ref("sql").resolved(3, str(digest))
    assert opened.verified_folder("sql@3")


def test_killed_while_healing(store: Store, exported: Path, tmp_path: Path) -> None:
    for file in FILES:
        flip(store.folder("sql@1") / file)
    for at in range(1, 60):
        path = tmp_path / "copy"
        subprocess.run(["cp", "-a", store.path, path], check=True)  # which keeps hard links
        fs = Failing(at, Crash())
        with suppress(Crash):
            Store(path, fs=fs).import_(exported, "sql")
        assert Store(path).resolve("sql@1").digest == store.resolve("sql@1").digest
        assert Store(path, fs=Unsynced()).import_(exported, "sql").version == 1
        assert Store(path).verified_folder("sql:prod")
        assert_store_sound(path)
        shutil.rmtree(path)
        if fs.count < at:
            assert at > 10
            return
    raise AssertionError("never completed")


@pytest.mark.parametrize("file", FILES)
def test_damage_is_told_with_what_heals_it(store: Store, file: str) -> None:
    (store.folder("sql@1") / file).unlink()
    for look in (store.verified_folder, store.read):
        with pytest.raises(StoreCorrupt, match=r"`ahl verify --repair` restores it.*importing the same export"):
            look("sql@1")
    assert any("ahl verify --repair" in finding.problem for finding in store.verify("sql@1"))


def test_what_repair_cannot_heal_does_not_name_it(store: Store) -> None:
    (store.folder("sql@1") / "manifest.json").unlink()
    with pytest.raises(StoreCorrupt, match="from a copy of the store") as caught:
        Store(store.path).verified_folder("sql@1")
    assert "--repair" not in str(caught.value)
