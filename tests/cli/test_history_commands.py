"""Commands log, rollback, search, gc, verify --repair and --deep, and the one-file export."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import Store
from adapterhub_lite.store.fs import FileSystem
from tests.checks import assert_store_sound
from tests.cli.conftest import Shop, ahl, told
from tests.formats.build import lora_files


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three versions of sql, of which the first two were prod."""
    made = Store(tmp_path / "store")
    for seed, accuracy in enumerate((0.7, 0.9, 0.8)):
        card = Card(
            base={"name": "smollm2", "quantization": "nf4", "fingerprint": {"digest": f"{seed}a" * 32}},
            metrics={"test": {"accuracy": accuracy}},
            parents=["sql@1"] if seed == 1 else [],
            created=f"2026-01-0{seed + 1}T12:00:00Z",
            origin={"kind": "trained"},
        )
        made.put("sql", lora_files(seed), card)
    made.alias("sql", "prod", 1)
    made.alias("sql", "prod", 2)
    return made.path


def test_log_shows_versions_and_moves(store: Path) -> None:
    Store(store).refuse(
        "sql", "prod", 3, {"metric": "accuracy", "candidate_value": 0.8, "current_value": 0.9, "current": 2}
    )
    text = ahl("log", "sql", "--store", store).stdout
    assert "sql@2 (prod)  trained, lora, on smollm2 nf4 (1a1a1a1a1a1a), accuracy 0.900 (test), from sql@1" in text
    assert "sql:prod set to sql@1" in text
    assert "sql:prod NOT promoted to sql@3: accuracy 0.800, sql@2 has 0.900" in text
    assert text.splitlines()[-1].startswith("2026-01-01T12:00:00Z  sql@1")
    assert len(ahl("log", "sql", "-n", "2", "--store", store).stdout.splitlines()) == 2
    events = told("log", "sql", "--store", store)
    assert events["aliases"] == {"prod": 2}
    assert {event["kind"] for event in events["events"]} == {"made", "set", "refuse"}
    wrong = ahl("log", "sqk", "--store", store)
    assert wrong.exit_code == 1
    assert "Did you mean sql" in wrong.stderr


def test_rollback_goes_back(store: Path) -> None:
    assert ahl("rollback", "sql:prod", "--store", store).stdout == "sql:prod -> sql@1 (was sql@2)\n"
    again = ahl("rollback", "sql:prod", "--store", store)
    assert again.exit_code == 1
    assert "named no other version" in again.stderr
    assert ahl("rollback", "sql", "--store", store).exit_code == 2
    assert "rolled back to sql@1 from sql@2" in ahl("log", "sql", "--store", store).stdout


def test_search_prints_a_table(store: Path) -> None:
    lines = ahl("search", "sql", "base:smollm2", "accuracy>0.75", "--store", store).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["sql@2", "sql@3"]
    assert [one["ref"] for one in told("search", "alias:prod", "--store", store)["adapters"]] == ["sql@2"]
    assert "Nothing matches" in ahl("search", "nobody", "--store", store).stdout
    wrong = ahl("search", "acuracy>0.5", "--store", store)
    assert wrong.exit_code == 1
    assert "Did you mean accuracy" in wrong.stderr


def test_gc_says_and_does(store: Path) -> None:
    assert ahl("gc", "--store", store).stdout == "Nothing is left over.\n"
    left = store / "tmp" / ".left"
    left.write_bytes(b"x" * 1000)
    os.utime(left, (0, 0))
    assert "1.0 kB  tmp/.left  (an unfinished operation left it)" in ahl("gc", "--dry-run", "--store", store).stdout
    assert left.exists()
    assert told("gc", "--store", store)["bytes"] == 1000
    assert not left.exists()
    left.write_bytes(b"x")
    younger = "1 operation under way, or broken off less than 24 h ago: left alone (see --older-than)\n"
    assert ahl("gc", "--store", store).stdout == f"Nothing is left over.\n{younger}"
    assert told("gc", "--dry-run", "--store", store)["younger"] == 1
    assert "1 leftover gone" in ahl("gc", "--older-than", "0", "--store", store).stdout


def test_verify_repairs(store: Path) -> None:
    opened = Store(store)
    (opened.folder("sql@1") / "adapter_model.safetensors").unlink()
    assert told("verify", "--store", store, code=1)["findings"][0]["where"] == "sql@1"
    result = ahl("verify", "--repair", "--store", store)
    assert "healed: sql@1 adapter_model.safetensors, from objects/" in result.stdout
    assert result.exit_code == 0
    assert ahl("verify", "sql@1", "--repair", "--store", store).exit_code == 2
    assert told("verify", "--all", "--store", store) == told("verify", "--store", store)
    assert_store_sound(store)


def test_verify_deep_measures_again(shop: Shop, tmp_path: Path) -> None:
    store = shutil.copytree(shop.store, tmp_path / "store", copy_function=shutil.copy)
    found = told("verify", "--deep", "--store", store)
    assert (found["sound"], found["measured"], found["not_measured"]) == (True, 2, [])
    assert "2 versions checked, 2 measured" in ahl("verify", "--deep", "--store", store).stdout
    Store(store).put("foreign", lora_files(), Card())
    found = told("verify", "--deep", "--store", store)
    assert [one["where"] for one in found["not_measured"]] == ["foreign@1"]


def test_one_file_out_and_in_again(store: Path, tmp_path: Path) -> None:
    made = told("export", "sql@2", tmp_path / "sql.tar", "--store", store)
    with tarfile.open(made["path"]) as archive:
        assert len(archive.getnames()) == 4
    there = told("import", tmp_path / "sql.tar", "--name", "sql", "--store", tmp_path / "other")
    assert there["digest"] == made["digest"]
    shown = ahl("show", "sql", "--store", tmp_path / "other").stdout
    assert "sql.tar, imported" in shown
    assert "maker's word" in shown
    log = ahl("log", "sql", "--store", tmp_path / "other").stdout
    assert "sql@1  imported, lora" in log
    assert "received" not in shown + log
    assert json.loads((tmp_path / "other/adapters/sql/1/card.json").read_bytes())["origin"] == {"kind": "trained"}


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def test_import_says_what_became_of_it(store: Path, tmp_path: Path) -> None:
    digest = Store(store).resolve("sql@2").digest
    ahl("export", "sql@2", tmp_path / "sql.tar", "--store", store)
    for name, first in (("new", "new@1: lora"), ("sql", "already here as sql@2")):
        lines = ahl("import", tmp_path / "sql.tar", "--name", name, "--store", store).stdout.splitlines()
        assert lines[0].startswith(first)
        assert f"sha256 {digest}" in lines
    assert told("import", tmp_path / "sql.tar", "--name", "sql", "--store", store)["outcome"] == "present"
    damage(Store(store).folder("sql@2") / "card.json")
    text = ahl("import", tmp_path / "sql.tar", "--name", "sql", "--store", store).stdout
    assert "healed: sql@2 card.json, from what was imported" in text
    damage(Store(store).folder("sql@2") / "card.json")
    made = told("import", tmp_path / "sql.tar", "--name", "sql", "--store", store)
    assert (made["ref"], made["digest"], made["outcome"]) == ("sql@2", digest, "healed")
    assert made["healed"] == ["card.json"]
    assert_store_sound(store)


def test_rollback_without_an_earlier_version_says_where_it_stands(store: Path) -> None:
    Store(store).alias("sql", "next", 3)
    result = ahl("rollback", "sql:next", "--store", store)
    assert result.exit_code == 1
    assert "sql:next names sql@3, and named no other version" in result.stderr
    assert "ahl log sql" in result.stderr


@pytest.mark.parametrize("command", ["verify", "gc"])
def test_what_is_no_store_is_not_called_sound(tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"mine")
    for name, words in (
        ("absent", "There is no store at"),
        ("file", "is a file, where the folder of a store should be"),
        ("photos", "a folder of something else"),
    ):
        result = ahl(command, "--store", tmp_path / name)
        assert result.exit_code == 1
        assert words in result.stderr
        assert result.stdout == ""
        assert told(command, "--store", tmp_path / name, code=1)["error"]["message"]


def test_an_empty_store_is_nothing_to_check(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    Store(tmp_path / "made").prepare()
    for name in ("empty", "made"):
        result = ahl("verify", "--store", tmp_path / name)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout == f"{tmp_path / name}: an empty store, nothing to check\n"
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_store_without_its_store_file_is_damaged(store: Path) -> None:
    (store / "store.json").unlink()
    (store / "notes.txt").write_text("mine")
    result = ahl("verify", "--store", store)
    assert result.exit_code == 1
    assert "store.json is missing" in result.stdout + result.stderr


def test_gc_says_what_it_could_not_remove(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    left = store / "tmp" / ".left"
    left.write_bytes(b"x" * 1000)
    os.utime(left, (0, 0))
    monkeypatch.setattr(FileSystem, "unlink", refuse)
    result = ahl("gc", "--store", store)
    assert result.exit_code == 1
    assert "Nothing is left over" not in result.stdout
    assert "1 leftover could not be removed" in result.stderr
    assert "tmp/.left" in result.stderr
    found = told("gc", "--store", store, code=1)
    assert (found["removed"], [one["path"] for one in found["not_removed"]]) == ([], ["tmp/.left"])
    monkeypatch.undo()
    assert left.exists()


def test_gc_tells_of_copies(store: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(store, tmp_path / "copied")
    result = ahl("gc", "--store", copied)
    assert "versions hold this content as copies of their own" in result.stdout
    assert "of equal content are copies: hard links" in result.stdout
    assert "copies" not in ahl("gc", "--store", store).stdout


@pytest.mark.parametrize("command", ["run", "predict", "chat"])
def test_damage_is_found_before_the_base_is_loaded(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    store = shutil.copytree(shop.store, tmp_path / "store", copy_function=shutil.copy)
    damage(store / "adapters/parrot/1/adapter_model.safetensors")
    loaded: list[object] = []
    monkeypatch.setattr("adapterhub_lite.workflows.own_base.load_own_base", lambda *a, **n: loaded.append(a))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "say 1", "reply": "1!"}\n')
    arguments = {
        "run": ("say 1", "--adapter", "parrot"),
        "predict": ("parrot", "-i", str(rows), "-o", str(tmp_path / "out.jsonl")),
        "chat": ("--adapter", "parrot"),
    }[command]
    result = ahl(command, *arguments, "--store", store)
    assert result.exit_code == 1
    assert "parrot@1 is damaged: adapter_model.safetensors" in result.stderr
    assert loaded == []
