"""After losing power at any moment the store is sound, and what was acknowledged is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from adapterhub_lite.store import Store
from tests.checks import assert_store_sound
from tests.formats.build import lora_files
from tests.store.faulty import Recording
from tests.store.power_loss import Disk, Tree, write_tree
from tests.store.test_store_crash import ACTS, CARD, Act, prepared, view


def violations(tmp_path: Path, act: Act, fs: Recording) -> tuple[int, list[str]]:
    """How many disks were looked at, and what was wrong with the first bad ones."""
    path = prepared(tmp_path / "store")
    disk, before = Disk(path), view(path)
    act(Store(path, fs=fs))
    after = view(path)
    found: list[str] = []
    seen: set[str] = set()
    for number, operation in enumerate(fs.log, start=1):
        disk.apply(operation)
        done = number == len(fs.log)
        if found:
            break
        for tree in disk.states():
            key = repr((sorted_tree(tree), done))
            if key not in seen:
                seen.add(key)
                found += problems(tmp_path / "disk", tree, [after] if done else [before, after])
    return len(seen), found


def problems(path: Path, tree: Tree, allowed: list[object]) -> list[str]:
    write_tree(tree, path)
    try:
        assert_store_sound(path)
        return [] if view(path) in allowed else ["an acknowledged change is lost, or a mixture is seen"]
    except Exception as error:  # whatever a damaged store raises is what this looks for
        return [f"{type(error).__name__}: {error}"]
    except AssertionError as error:
        return [str(error)]
    finally:
        shutil.rmtree(path)


def sorted_tree(tree: Tree) -> list[object]:
    return [(name, sorted_tree(node) if isinstance(node, dict) else hash(node)) for name, node in sorted(tree.items())]


@pytest.mark.parametrize("name", ["put", "put equal", "alias", "new alias", "unalias", "remove"])
def test_nothing_is_torn_and_nothing_acknowledged_is_lost(tmp_path: Path, name: str) -> None:
    looked_at, found = violations(tmp_path, ACTS[name], Recording())
    assert looked_at > 2
    assert found == []


def test_the_first_put(tmp_path: Path) -> None:
    path, fs = tmp_path / "store", Recording()
    path.mkdir()
    disk = Disk(path)
    Store(path, fs=fs).put("sql", lora_files(), CARD)
    for operation in fs.log:
        disk.apply(operation)
    for tree in disk.states():
        assert problems(tmp_path / "disk", tree, [view(path)]) == []


class NoFileSync(Recording):
    def fsync(self, fd: int) -> None:
        pass


class NoFolderSync(Recording):
    def fsync_dir(self, path: Path) -> None:
        pass


@pytest.mark.parametrize("careless", [NoFileSync, NoFolderSync])
@pytest.mark.parametrize("name", ["put", "alias", "remove"])
def test_the_model_sees_a_missing_sync(tmp_path: Path, careless: type[Recording], name: str) -> None:
    _, found = violations(tmp_path, ACTS[name], careless())
    if name == "remove" and careless is NoFileSync:
        assert found == []  # a tombstone counts by its name alone
    else:
        assert found


def test_store_json_is_whole(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", fs=Recording())
    store.put("sql", lora_files(), CARD)
    assert json.loads((store.path / "store.json").read_bytes()) == {"format": 2}
