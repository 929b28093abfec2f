from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.errors import (
    AdapterHubError,
    AdapterMismatch,
    FormatError,
    InvalidName,
    NoEffect,
    NotFound,
    StoreCorrupt,
    StoreError,
    StoreNewer,
    UnsafeFile,
)
from adapterhub_lite.formats.card import Card
from adapterhub_lite.formats.specs import LoraSpec
from adapterhub_lite.names import Ref
from adapterhub_lite.store import Store
from tests.checks import assert_store_sound
from tests.formats.build import BASE, f32, lora_config, lora_files, lora_tensors, safetensors
from tests.store.faulty import Unsynced

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "a store", fs=Unsynced())


def test_reading_creates_nothing(store: Store) -> None:
    assert store.list() == []
    assert store.names() == []
    assert store.versions("sql") == []
    assert store.aliases("sql") == {}
    assert store.verify() == []
    with pytest.raises(NotFound, match="ahl list"):
        store.resolve("sql")
    assert not store.path.exists()


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AHL_HOME", str(tmp_path / "home"))
    assert Store().path == tmp_path / "home"
    monkeypatch.delenv("AHL_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert "adapterhub-lite" in str(Store().path)
    assert not Store().path.exists()


def test_put_and_read_back(store: Store) -> None:
    ref = store.put("sql", lora_files(), Card(base={"name": "tiny"}, seed=3))
    assert ref.version == 1
    assert ref.digest == store.manifest("sql").digest == store.resolve("sql@1").digest
    assert store.spec(ref) == LoraSpec(rank=2, alpha=4.0, target_modules=("q_proj",), base_model="tiny")
    card = store.card("sql")
    assert card.seed == 3
    assert card.adapter["parameters"] == 32
    assert card.adapter["type"] == "lora"
    assert (store.verified_folder(ref) / WEIGHTS).read_bytes() == lora_files()[WEIGHTS]
    assert store.folder(ref) == store.path / "adapters" / "sql" / "1"
    assert_store_sound(store.path)


def test_versions_count_up_and_equal_content_is_stored_once(store: Store) -> None:
    card = Card()
    refs = [store.put("sql", lora_files(seed), card) for seed in (0, 1, 0)]
    assert [ref.version for ref in refs] == [1, 2, 3]
    assert refs[0].digest == refs[2].digest != refs[1].digest
    assert store.resolve("sql").version == 3
    first, third = (store.folder(f"sql@{n}") / WEIGHTS for n in (1, 3))
    assert os.path.samefile(first, third)
    assert first.stat().st_nlink == 3
    assert_store_sound(store.path)


def test_files_are_immutable_by_mode_and_follow_the_umask(store: Store) -> None:
    before = os.umask(0o027)
    try:
        folder = store.folder(store.put("sql", lora_files(), Card()))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o440}


def test_copies_where_links_are_impossible(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    ref = store.put("sql", lora_files(), Card())
    assert (store.verified_folder(ref) / WEIGHTS).stat().st_nlink == 1
    store.remove(ref)
    assert_store_sound(store.path)


def refused_files() -> dict[str, tuple[dict[str, Any], type[AdapterHubError], str]]:
    nan = lora_tensors()
    nan[f"{BASE}model.layers.1.self_attn.q_proj.lora_A.weight"] = f32(2, 4, value=float("nan"))
    good = lora_files()
    return {
        "third file": ({**good, "evil.py": b""}, FormatError, "An adapter is"),
        "one file": ({WEIGHTS: good[WEIGHTS]}, FormatError, "An adapter is"),
        "config": ({**good, "adapter_config.json": b"{}"}, FormatError, "peft_type"),
        "weights": ({**good, WEIGHTS: b"\x80\x04junk" * 9}, UnsafeFile, "pickle"),
        "rank": ({**good, "adapter_config.json": lora_config(r=3)}, AdapterMismatch, "rank 2"),
        "nan": ({**good, WEIGHTS: safetensors(nan)}, AdapterMismatch, "layers.1.*NaN or infinity at value 0"),
        "inf": ({**good, WEIGHTS: safetensors(lora_tensors(b=float("inf")))}, AdapterMismatch, "infinity"),
        "zero": ({**good, WEIGHTS: safetensors(lora_tensors(b=0.0))}, NoEffect, "changes nothing"),
        "minus zero": ({**good, WEIGHTS: safetensors(lora_tensors(b=-0.0))}, NoEffect, "changes nothing"),
    }


@pytest.mark.parametrize(("files", "error", "words"), refused_files().values(), ids=refused_files().keys())
def test_refused_before_anything_is_written(store: Store, files: Any, error: type[AdapterHubError], words: str) -> None:
    with pytest.raises(error, match=words):
        store.put("sql", files, Card())
    assert not store.path.exists()


def test_bad_card_and_bad_names_write_nothing(store: Store) -> None:
    with pytest.raises(FormatError, match="seed"):
        store.put("sql", lora_files(), Card(seed="x"))  # type: ignore[arg-type]
    for name in ("../x", "", "Sql", "a/b", "con", "a" * 65, "a\n"):
        with pytest.raises(InvalidName):
            store.put(name, lora_files(), Card())
        with pytest.raises(InvalidName):
            store.resolve(name)
    assert not store.path.exists()


def test_a_head_or_one_moving_module_is_an_effect(store: Store) -> None:
    head = {**lora_tensors(b=0.0), f"{BASE}score.weight": f32(3, 4)}
    config = lora_config(modules_to_save=["score"], task_type="SEQ_CLS")
    store.put("head", {"adapter_config.json": config, WEIGHTS: safetensors(head)}, Card())
    one = {**lora_tensors(b=0.0), f"{BASE}model.layers.0.self_attn.q_proj.lora_B.weight": f32(4, 2)}
    store.put("one", {"adapter_config.json": lora_config(), WEIGHTS: safetensors(one)}, Card())


def test_paths_are_read_without_following_links(store: Store, tmp_path: Path) -> None:
    paths = {}
    for name, data in lora_files().items():
        paths[name] = tmp_path / name
        paths[name].write_bytes(data)
    assert store.put("sql", paths, Card()).version == 1
    link = tmp_path / "link"
    link.symlink_to(paths[WEIGHTS])
    with pytest.raises(UnsafeFile, match="symbolic link"):
        store.put("sql", {**paths, WEIGHTS: link}, Card())


def test_unknown_references_help(store: Store) -> None:
    store.put("sql-expert", lora_files(), Card())
    store.put("sql-expert", lora_files(1), Card())
    store.alias("sql-expert", "prod", 1)
    with pytest.raises(NotFound, match=r"Did you mean sql-expert\?.*ahl list"):
        store.resolve("sql-expart")
    with pytest.raises(NotFound, match=r"no sql-expert@7. Versions: 1, 2. Aliases: prod -> 1"):
        store.resolve("sql-expert@7")
    with pytest.raises(NotFound, match=r"no alias test. Versions: 1, 2. Aliases: prod -> 1"):
        store.resolve("sql-expert:test")


def test_aliases_move_and_remember(store: Store) -> None:
    for seed in (0, 1):
        store.put("sql", lora_files(seed), Card())
    assert store.alias("sql", "prod", 1) == Ref("sql", 1, "prod", store.resolve("sql@1").digest)
    store.alias("sql", "prod", 2)
    assert store.resolve("sql:prod").version == 2
    assert store.aliases("sql") == {"prod": 2}
    assert [move.version for move in store.alias_history("sql", "prod")] == [1, 2]
    store.unalias("sql", "prod")
    assert store.aliases("sql") == {}
    assert [m.version for m in store.alias_history("sql", "prod")] == [1, 2, None]
    with pytest.raises(NotFound):
        store.unalias("sql", "prod")
    with pytest.raises(NotFound):
        store.alias("sql", "prod", 9)
    with pytest.raises(InvalidName):
        store.alias("sql", "../x", 1)
    with pytest.raises(InvalidName):
        store.alias("sql", "3", 1)
    assert_store_sound(store.path)


def test_a_resolved_reference_is_held_to_its_digest(store: Store) -> None:
    ref = store.put("sql", lora_files(), Card())
    assert store.resolve(ref) == ref
    with pytest.raises(StoreCorrupt, match="stands for 000000000000"):
        store.resolve(Ref("sql", 1, digest="0" * 64))


def test_listing(store: Store) -> None:
    store.put("b", lora_files(), Card(base={"name": "tiny"}, origin={"kind": "trained"}, metrics={"test": {"f1": 0.5}}))
    store.put("a", lora_files(1), Card())
    store.put("b", lora_files(2), Card())
    store.alias("b", "prod", 1)
    entries = store.list()
    assert [(entry.name, entry.version, entry.aliases) for entry in entries] == [
        ("a", 1, ()),
        ("b", 1, ("prod",)),
        ("b", 2, ()),
    ]
    assert entries[1].summary["base"] == "tiny"
    assert entries[1].summary["metrics"] == {"test": {"f1": 0.5}}
    assert entries[1].digest == store.resolve("b@1").digest
    assert entries[1].created.endswith("Z")
    os.unlink(store.folder("a@1") / "card.json")
    assert "card.json" in store.list()[0].problem
    assert len(store.list()) == 3


def test_removal_is_refused_while_in_use(store: Store) -> None:
    parent = store.put("sql", lora_files(), Card())
    store.put("sql", lora_files(1), Card())
    store.put("child", lora_files(2), Card(parents=["sql@1"]))
    store.put("other", lora_files(3), Card(parents=[str(parent.digest)]))
    store.alias("sql", "prod", 1)
    with pytest.raises(StoreError, match="in use by sql:prod, child@1, other@1"):
        store.remove("sql@1")
    assert store.resolve("sql@1") == parent
    store.remove("sql@1", force=True)
    assert store.versions("sql") == [2]
    assert store.aliases("sql") == {}
    assert_store_sound(store.path)


def test_a_removed_number_is_never_used_again(store: Store) -> None:
    for seed in (0, 1):
        store.put("sql", lora_files(seed), Card())
    weights = store.manifest("sql@2").files[WEIGHTS].sha256
    assert store.remove("sql@2").version == 2
    assert not (store.path / "objects" / weights[:2] / weights).exists()
    with pytest.raises(NotFound, match=r"sql@2 was removed\. Versions: 1"):
        store.resolve("sql@2")
    assert store.put("sql", lora_files(2), Card()).version == 3
    store.remove("sql@1")
    store.remove("sql")
    assert store.names() == []
    assert store.versions("sql") == []
    with pytest.raises(NotFound):
        store.resolve("sql")
    assert store.put("sql", lora_files(), Card()).version == 4
    assert_store_sound(store.path)


def test_removal_keeps_what_others_share(store: Store) -> None:
    card = Card()
    store.put("a", lora_files(), card)
    store.put("b", lora_files(), card)
    store.remove("a")
    assert store.verified_folder("b").is_dir()
    assert_store_sound(store.path)


def test_newer_damaged_and_missing_store_files(store: Store) -> None:
    store.put("sql", lora_files(), Card())
    file = store.path / "store.json"
    for content, error in (
        ('{"format": 3}', StoreNewer),
        ("{", StoreCorrupt),
        ('{"format": "1"}', StoreCorrupt),
        (None, StoreCorrupt),
    ):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_text(content)
        for act in (lambda: store.resolve("sql"), lambda: store.list(), lambda: store.put("sql", lora_files(), Card())):
            with pytest.raises(error):
                act()
        assert [finding.where for finding in store.verify()] == ["store.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_store_reads(store: Store) -> None:
    store.put("sql", lora_files(), Card())
    for folder in [store.path, *[path for path in store.path.rglob("*") if path.is_dir()]]:
        folder.chmod(0o555)
    assert store.verified_folder("sql")
    assert store.verify() == []
    with pytest.raises(StoreError, match="Permission denied"):
        store.put("sql", lora_files(1), Card())


def test_findings(store: Store) -> None:
    store.put("sql", lora_files(), Card())
    (store.folder("sql") / "notes.txt").write_text("x")
    (store.path / "adapters" / "Bad Name").mkdir()
    (store.path / "objects" / "ab").mkdir(exist_ok=True)
    (store.path / "objects" / "ab" / "junk").write_text("x")
    text = "\n".join(map(str, store.verify()))
    assert "sql@1: holds files that are not part of it: notes.txt" in text
    assert "adapters/Bad Name: is not an adapter name" in text
    assert "objects/ab/junk" in text
    assert len(store.verify("sql")) == 1
    assert store.verify("absent")[0].where == "absent"


def test_no_heavy_imports() -> None:
    heavy = "torch transformers peft numpy datasets safetensors"
    code = (
        "import sys, adapterhub_lite.store, adapterhub_lite.formats.adapter_files as f;"
        f"sys.exit(any(name in sys.modules for name in '{heavy}'.split()))"
    )
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.getcwd()}).returncode == 0


def test_card_bytes_on_disk_are_the_canonical_ones(store: Store) -> None:
    ref = store.put("sql", lora_files(), Card())
    data = (store.folder(ref) / "card.json").read_bytes()
    assert data == store.card(ref).to_bytes()
    assert list(json.loads(data)) == sorted(json.loads(data))
