"""A training is not lost because the store cannot take it: it is kept elsewhere, and the printed command stores it."""

from __future__ import annotations

import errno
import shlex
import tempfile
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.errors import NoEffect, StoreError, StoreFull
from adapterhub_lite.formats.card import Card
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.store.fs import FileSystem
from adapterhub_lite.workflows import rescue
from adapterhub_lite.workflows.train import train
from tests.checks import assert_store_sound
from tests.cli.conftest import ahl
from tests.training import recipes

LORA: dict[str, Any] = {"type": "lora", "rank": 2, "alpha": 4}


class Failing(Store):
    """A store whose disk gives an error as soon as something is put into it; `taken` is what it was given."""

    def __init__(self, path: Path, number: int) -> None:
        self.disk = FailingDisk()
        super().__init__(path, self.disk)
        self.number = number
        self.taken: dict[str, bytes] = {}

    def put(self, name: str, files: Any, card: Card) -> Any:
        self.taken = dict(files)
        self.disk.number = self.number
        return super().put(name, files, card)


class FailingDisk(FileSystem):
    number = 0

    def create(self, path: Path, mode: int) -> int:
        if self.number:
            raise OSError(self.number, "no")
        return super().create(path, mode)


def trained(store: Store, folder: Path, base: Any) -> StoreError:
    with pytest.raises(StoreError) as caught:
        train(recipes.load(folder, base, LORA), store=store, base=base)
    return caught.value


def kept(error: StoreError) -> tuple[Path, list[str]]:
    """The folder and the command that an error names."""
    place = Path(error.message.partition("It is kept in ")[2].removesuffix("."))
    return place, shlex.split(error.hint.partition("Store it with: ")[2])


@pytest.mark.parametrize(("number", "kind"), [(errno.EROFS, StoreError), (errno.ENOSPC, StoreFull)])
def test_the_printed_command_gives_the_same_weights(tiny_base: Any, tmp_path: Path, number: int, kind: type) -> None:
    base, store = tiny_base("llama"), Failing(tmp_path / "my store", number)
    error = trained(store, tmp_path, base)
    assert type(error) is kind
    assert "tiny was trained, but could not be stored" in error.message
    folder, words = kept(error)
    assert words[:3] == ["ahl", "import", str(folder)]
    assert words[3:] == ["--name", "tiny", "--base", str(base.source.folder), "--store", str(store.path)]
    done = ahl(*words[1:])
    assert done.exit_code == 0, done.stderr
    again = Store(store.path)
    stored = again.read("tiny@1")
    assert stored.weights == store.taken["adapter_model.safetensors"]
    assert set(stored.card.task) > {"type", "completion"}
    assert_store_sound(store.path)
    runtime = Runtime(base, again)
    assert runtime.task("tiny@1") is not None
    assert runtime.answer("red blue", "tiny@1", max_new_tokens=4)
    runtime.close()
    assert ahl("run", "-a", "tiny@1", "--max-new-tokens", "2", "red", "--store", store.path).exit_code == 0


def test_a_default_store_needs_no_naming(tiny_base: Any, tmp_path: Path, own_home: Path) -> None:
    error = trained(Failing(own_home, errno.EIO), tmp_path, tiny_base("llama"))
    assert "--store" not in error.hint


def test_a_store_that_became_something_else(tiny_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")
    put = Store.put

    def gone(self: Store, *arguments: Any) -> Any:
        self.path.rename(tmp_path / "away")
        self.path.write_text("not a store")
        return put(self, *arguments)

    monkeypatch.setattr(Store, "put", gone)
    folder, words = kept(trained(store, tmp_path, tiny_base("llama")))
    monkeypatch.undo()
    assert ahl(*words[1:-1], tmp_path / "other").exit_code == 0
    assert (folder / "card.json").is_file()


def test_the_next_place_is_tried_and_no_half_folder_stays(
    tiny_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, free = tmp_path / "full", tmp_path / "free"
    full.mkdir()
    free.mkdir()
    monkeypatch.setenv("AHL_CACHE", str(full))
    monkeypatch.setattr(tempfile, "tempdir", str(free))
    fsync = rescue.os.fsync

    def synced(number: int) -> None:
        if any((full / "rescued").glob("*/card.json")):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    monkeypatch.setattr(rescue.os, "fsync", synced)
    folder, _ = kept(trained(Failing(tmp_path / "store", errno.ENOSPC), tmp_path, tiny_base("llama")))
    assert folder.parent == free
    assert list((full / "rescued").iterdir()) == []


def test_nowhere_to_keep_it_is_said(tiny_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescue, "_places", lambda: iter([tmp_path / "tiny.yaml" / "x"]))
    error = trained(Failing(tmp_path / "store", errno.EROFS), tmp_path, tiny_base("llama"))
    assert "could not be kept elsewhere either: " in error.message
    assert "Read-only file system" in error.message


def test_what_does_nothing_is_not_kept(tiny_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "put", lambda *_: (_ for _ in ()).throw(NoEffect("nothing")))
    monkeypatch.setattr(rescue, "_keep", lambda *_: pytest.fail("it was kept"))
    base = tiny_base("llama")
    with pytest.raises(NoEffect):
        train(recipes.load(tmp_path, base, LORA), store=Store(tmp_path / "store"), base=base)
