"""After losing power at any moment the store is sound, what was acknowledged is there, and the next call works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub_lite.store import Store
from tests.formats.build import lora_files
from tests.store.faulty import Recording
from tests.store.power_loss import Disk, Tree, write_tree
from tests.stress.acts import ACTS, CARD
from tests.stress.scene import Scene, scratch
from tests.stress.tally import LONG, Row, row

CHANGING = [name for name in ACTS if name not in ("read", "verify")]
MOST = 4096 if LONG else 5  # choices of names at one moment
EVERY = {"export folder": 9, "export tar": 9, "migrate and put": 4}  # moments of the sample; the last one always
CARELESS = ["put", "alias", "remove", "export tar", "migrate", "repair"]


@pytest.fixture
def place() -> Iterator[Path]:
    with scratch() as made:
        yield made


def lose_power(scene: Scene, fs: Recording, found: Row) -> None:
    """Run an operation, and look at the disks that may be left at each moment of it."""
    world = scene.world()
    disk, ends = Disk(world), []
    store = Store(world / "store", fs=fs)
    for step in scene.act.steps:
        step(store)
        ends.append(len(fs.log))
    seen: set[str] = set()
    every = 1 if LONG else EVERY.get(scene.name, 1)
    for number, operation in enumerate(fs.log, start=1):
        disk.apply(operation)
        if number % every and number not in ends:
            continue
        found.faults += 1
        acknowledged = sum(number >= end for end in ends)
        for tree in disk.states(MOST):
            key = repr((_sorted(tree), acknowledged))
            if key in seen:
                continue
            seen.add(key)
            wrong = _look(scene, world.parent / "disk", tree, acknowledged)
            found.violations += [f"{scene.name}, after {operation[0]} ({number}): {one}" for one in wrong]
        if found.violations:
            break
    found.states += len(seen)


def _look(scene: Scene, path: Path, tree: Tree, acknowledged: int) -> list[str]:
    write_tree(tree, path)
    try:
        return scene.problems(path, range(acknowledged, scene.last + 1))
    finally:
        shutil.rmtree(path)


def _sorted(tree: Tree) -> list[object]:
    return [(name, _sorted(node) if isinstance(node, dict) else hash(node)) for name, node in sorted(tree.items())]


@pytest.mark.parametrize("name", CHANGING)
def test_nothing_is_torn_and_nothing_acknowledged_is_lost(place: Path, name: str) -> None:
    with row("power loss", name) as found:
        lose_power(Scene(place / "scene", name), Recording(), found)
    assert found.states > 1


class NoFileSync(Recording):
    def fsync(self, fd: int) -> None:
        pass


class NoFolderSync(Recording):
    def fsync_dir(self, path: Path) -> None:
        pass


@pytest.mark.parametrize("careless", [NoFileSync, NoFolderSync])
@pytest.mark.parametrize("name", CARELESS)
def test_the_model_sees_a_missing_sync(place: Path, careless: type[Recording], name: str) -> None:
    found = Row("", "")
    lose_power(Scene(place / "scene", name), careless(), found)
    if name == "remove" and careless is NoFileSync:
        assert found.violations == []  # a tombstone counts by its name alone
    else:
        assert found.violations


def test_store_json_is_whole(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", fs=Recording())
    store.put("sql", lora_files(), CARD)
    assert json.loads((store.path / "store.json").read_bytes()) == {"format": 2}
