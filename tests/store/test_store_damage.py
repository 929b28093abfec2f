from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from adapterhub_lite.errors import StoreCorrupt
from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import Store, reading
from tests.checks import assert_store_sound
from tests.formats.build import lora_files
from tests.store.faulty import Unsynced

FILES = ["adapter_config.json", "adapter_model.safetensors", "card.json", "manifest.json"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store", fs=Unsynced())
    for seed in (0, 1):
        made.put("sql", lora_files(seed), Card(created="2026-01-31T12:00:00Z"))
    made.alias("sql", "prod", 1)
    return made


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.parametrize("file", FILES)
def test_one_flipped_byte_is_never_served(store: Store, file: str) -> None:
    ref = store.resolve("sql@1")
    path = store.folder(ref) / file
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        bad = bytearray(good)
        bad[position] ^= 0x01
        overwrite(path, bytes(bad))
        with pytest.raises(StoreCorrupt):
            store.verified_folder(ref)
        assert any(finding.where == "sql@1" for finding in store.verify()) or file == "manifest.json"
        assert store.verify()
    overwrite(path, good)
    assert store.verified_folder(ref)


def test_the_damaged_file_is_named(store: Store) -> None:
    path = store.folder("sql@1") / "adapter_model.safetensors"
    overwrite(path, path.read_bytes() + b"\0")
    with pytest.raises(StoreCorrupt, match=r"sql@1 is damaged: adapter_model.safetensors has \d+ bytes instead of \d+"):
        store.verified_folder("sql@1")
    assert store.verified_folder("sql@2")


def test_swapped_files_of_another_version(store: Store) -> None:
    one, two = (store.folder(f"sql@{n}") / "adapter_model.safetensors" for n in (1, 2))
    overwrite(one, two.read_bytes())
    with pytest.raises(StoreCorrupt, match="does not match its digest"):
        store.verified_folder("sql@1")


def test_a_whole_other_version_in_place_is_noticed_by_alias_and_digest(store: Store) -> None:
    ref = store.resolve("sql@1")
    shutil.rmtree(store.folder("sql@1"))
    shutil.copytree(store.folder("sql@2"), store.path / "adapters" / "sql" / "1")
    for reference in (ref, "sql:prod"):
        with pytest.raises(StoreCorrupt, match="stands for"):
            store.verified_folder(reference)


def test_every_flipped_byte_of_an_alias_is_noticed(store: Store) -> None:
    path = store.path / "aliases" / "sql" / "prod@1" / "move.json"
    good = path.read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 0x01
        overwrite(path, bytes(bad))
        with pytest.raises(StoreCorrupt, match="sql:prod is damaged"):
            Store(store.path).resolve("sql:prod")
        assert [finding.where for finding in store.verify()] == ["sql:prod"]
    overwrite(path, good)
    assert Store(store.path).resolve("sql:prod").version == 1


@pytest.mark.parametrize("file", FILES)
def test_missing_files_and_links(store: Store, file: str) -> None:
    path = store.folder("sql@1") / file
    other = store.folder("sql@2") / file
    path.unlink()
    with pytest.raises(StoreCorrupt, match=file):
        store.verified_folder("sql@1")
    path.symlink_to(other)
    with pytest.raises(StoreCorrupt, match=file):
        store.verified_folder("sql@1")


def test_putting_the_content_again_heals_the_object(store: Store) -> None:
    digest = store.manifest("sql@1").files["adapter_model.safetensors"].sha256
    overwrite(store.path / "objects" / digest[:2] / digest, b"broken")
    again = store.put("sql", lora_files(0), Card())
    assert store.verified_folder(again)
    store.remove("sql@1", force=True)
    assert_store_sound(store.path)


@pytest.mark.parametrize("beside", [True, False])
def test_what_was_made_of_damaged_bytes_is_not_returned(
    store: Store, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the digest is formed before the work or beside it, and whether the work goes through or not."""
    monkeypatch.setattr(reading, "_WORTH_A_THREAD", 0 if beside else 1 << 20)
    path = store.folder("sql@1") / "adapter_model.safetensors"
    good = path.read_bytes()
    assert store.read_while("sql@1", lambda stored: stored.weights) == good
    with pytest.raises(ZeroDivisionError):
        store.read_while("sql@1", lambda stored: 1 // 0)
    overwrite(path, good[:-1] + bytes([good[-1] ^ 1]))
    for work in (lambda stored: stored.weights, lambda stored: 1 // 0):
        with pytest.raises(StoreCorrupt, match="does not match its digest"):
            store.read_while("sql@1", work)
    assert [thread.name for thread in threading.enumerate() if "digest" in thread.name] == []
