from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.errors import (
    AdapterHubError,
    AdapterMismatch,
    FormatError,
    InvalidName,
    NotFound,
    StoreCorrupt,
    StoreError,
    UnsafeFile,
)
from adapterhub_lite.formats.card import Card
from adapterhub_lite.formats.specs import LoraSpec
from adapterhub_lite.store import Store
from tests.checks import assert_store_sound
from tests.formats.build import lora_config, lora_files
from tests.store.faulty import Unsynced

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", fs=Unsynced())


@pytest.fixture
def peft_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name, data in lora_files().items():
        (folder / name).write_bytes(data)
    return folder


def test_put_export_import_keeps_the_weights(store: Store, tmp_path: Path) -> None:
    first = store.put("sql", lora_files(), Card())
    (tmp_path / "deep").mkdir()
    folder = store.export(first, tmp_path / "deep" / "out")
    assert sorted(item.name for item in folder.iterdir()) == [CONFIG, WEIGHTS, "card.json", "manifest.json"]
    second = store.import_(folder, "again")
    one, two = (store.manifest(ref).files for ref in (first, second))
    assert one[WEIGHTS] == two[WEIGHTS]
    assert one[CONFIG] == two[CONFIG]
    assert store.card(second).origin["kind"] == "imported"
    assert sorted(item.name for item in (tmp_path / "deep").iterdir()) == ["out"]
    assert_store_sound(store.path)


def test_a_card_beside_other_weights_is_not_believed(store: Store, tmp_path: Path) -> None:
    first = store.put("sql", lora_files(), Card(metrics={"test": {"accuracy": 1.0}}))
    folder = store.export(first, tmp_path / "out")
    weights = bytearray((folder / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(weights))
    with pytest.raises(FormatError, match=r"not what its manifest says.*Copy it again"):
        store.import_(folder, "again")
    for file in ("card.json", "manifest.json"):
        (folder / file).unlink()
    assert store.card(store.import_(folder, "again")).metrics == {}


def test_import_says_where_it_came_from(store: Store, peft_folder: Path) -> None:
    for name in ("README.md", "run.py", "tokenizer_config.json", "adapter_model.bin"):
        (peft_folder / name).write_text("x")
    ref = store.import_(peft_folder, "sql", {"revision": "abc", "fingerprint": {"digest": "d"}})
    card = store.card(ref)
    assert card.base == {"name": "tiny", "revision": "abc", "fingerprint": {"digest": "d"}}
    assert card.origin["kind"] == "imported"
    assert (card.origin["by"], card.origin["from"]) == ("folder", "foreign")
    assert card.origin["ignored"] == ["README.md", "adapter_model.bin", "run.py", "tokenizer_config.json"]
    assert set(card.origin["files"]) == {CONFIG, WEIGHTS}
    assert sorted(item.name for item in store.folder(ref).iterdir()) == [CONFIG, WEIGHTS, "card.json", "manifest.json"]


def test_import_rewrites_the_configuration(store: Store, peft_folder: Path) -> None:
    foreign = {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}, "target_modules": ".*q_proj"}
    (peft_folder / CONFIG).write_bytes(lora_config(**foreign))
    ref = store.import_(peft_folder, "sql")
    text = (store.folder(ref) / CONFIG).read_text()
    assert "auto_mapping" not in text
    assert ".*q_proj" not in text
    spec = store.spec(ref)
    assert isinstance(spec, LoraSpec)
    assert spec.target_modules[0] == "model.layers.0.self_attn.q_proj"


def link(folder: Path, name: str) -> None:
    (folder / name).rename(folder / "real")
    (folder / name).symlink_to("real")


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def adapterhub(folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps({"config": {}, "model_type": "bert", "version": "adapters.1.0"}))


def fifo(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda folder: link(folder, CONFIG), UnsafeFile, "symbolic link.*cp -L"),
        (lambda folder: link(folder, WEIGHTS), UnsafeFile, "symbolic link"),
        (pickled, UnsafeFile, "pickle.*save_pretrained"),
        (fifo, UnsafeFile, "not a regular file"),
        (adapterhub, FormatError, "AdapterHub"),
        (lambda folder: (folder / CONFIG).unlink(), NotFound, CONFIG),
        (lambda folder: (folder / WEIGHTS).unlink(), NotFound, WEIGHTS),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"PK\3\4" * 9), UnsafeFile, "archive"),
        (lambda folder: (folder / CONFIG).write_bytes(lora_config(r=4)), AdapterMismatch, "rank 2"),
        (lambda folder: (folder / CONFIG).write_bytes(b" " * (1 << 21)), FormatError, "the limit is"),
    ],
)
def test_import_refuses(store: Store, peft_folder: Path, change: Any, error: type[AdapterHubError], words: str) -> None:
    change(peft_folder)
    with pytest.raises(error, match=words):
        store.import_(peft_folder, "sql")
    assert not store.path.exists()


def test_import_of_no_folder(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        store.import_(tmp_path / "absent", "sql")


def test_export_into_an_empty_folder_only(store: Store, tmp_path: Path) -> None:
    ref = store.put("sql", lora_files(), Card())
    empty = tmp_path / "empty"
    empty.mkdir()
    assert store.export(ref, empty) == empty
    assert (empty / WEIGHTS).is_file()
    assert (empty / WEIGHTS).stat().st_mode & 0o200  # the user's own copy, unlike the store's files
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for target, words in (
        (empty, "not an empty folder"),
        (empty / WEIGHTS, "exists"),
        (tmp_path / "link", "symbolic link"),
        (store.path / "out", "inside the store"),
        (store.path, "inside the store"),
        (tmp_path / "x" / ".." / "store" / "out", "inside the store"),
        (empty / "..", "not an empty folder"),
    ):
        with pytest.raises(StoreError, match=words):
            store.export(ref, target)
    assert not (tmp_path / "elsewhere").exists()
    assert_store_sound(store.path)


def test_export_of_a_damaged_version_leaves_nothing(store: Store, tmp_path: Path) -> None:
    ref = store.put("sql", lora_files(), Card())
    weights = store.folder(ref) / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)
    with pytest.raises(StoreCorrupt, match=WEIGHTS):
        store.export(ref, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz", "x.tgz", "x.TAR", "X.Zip", "x.tar.bz2", "x.7z"])
def test_export_writes_no_folder_with_the_name_of_an_archive(store: Store, tmp_path: Path, name: str) -> None:
    ref = store.put("sql", lora_files(), Card())
    with pytest.raises(StoreError, match=r"another kind of archive.*ends in \.tar.*or a folder"):
        store.export(ref, tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["out", "out.tar"])
def test_export_makes_no_folders_above_its_target(store: Store, tmp_path: Path, name: str) -> None:
    ref = store.put("sql", lora_files(), Card())
    with pytest.raises(StoreError, match=r"There is no folder .*deep.*Make the folder first"):
        store.export(ref, tmp_path / "deep" / "er" / name)
    assert not (tmp_path / "deep").exists()
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(StoreError, match="is a file, where a folder should be"):
        store.export(ref, tmp_path / "file" / name)


def test_a_link_to_an_archive_is_told_as_a_link(store: Store, tmp_path: Path) -> None:
    target = store.export(store.put("sql", lora_files(), Card()), tmp_path / "real.tar")
    (tmp_path / "link.tar").symlink_to("real.tar")
    with pytest.raises(FormatError, match=rf"is a symbolic link, neither.*Give what it leads to: {target}"):
        store.import_(tmp_path / "link.tar", "sql")
    target.unlink()
    with pytest.raises(NotFound, match="leads to nothing"):
        store.import_(tmp_path / "link.tar", "sql")


@pytest.mark.parametrize("name", ["nul", "con.x", "com1"])
def test_names_of_devices_are_told_as_such(store: Store, peft_folder: Path, name: str) -> None:
    with pytest.raises(InvalidName, match=rf"'{name}' is not a valid adapter name: it is the name of a device"):
        store.import_(peft_folder, name)
