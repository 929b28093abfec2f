"""One flipped byte, anywhere in any file of a store: whatever is asked, the answer is right or an error."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub_lite.store import Store
from tests.formats.build import lora_files
from tests.store.faulty import Unsynced
from tests.stress.acts import CARD
from tests.stress.doors import answers, refused, wrong
from tests.stress.scene import copy, scratch
from tests.stress.tally import LONG, Row, row

REFS = ("sql@1", "sql:prod", "got@1")
VERSION = "store/adapters/sql/1/"
FILES: Mapping[str, str] = {
    "configuration": VERSION + "adapter_config.json",
    "weights": VERSION + "adapter_model.safetensors",
    "card": VERSION + "card.json",
    "manifest": VERSION + "manifest.json",
    "manifest received": "store/adapters/got/1/manifest.json",
    "move": "store/aliases/sql/prod@3/move.json",
    "move before": "store/aliases/sql/prod@2/move.json",
    "tombstone": "store/adapters/sql/3.removed",
    "store.json": "store/store.json",
    "object": "store/objects/*/*",
}
EVERY = {"object": 3} if LONG else {"store.json": 3, "move": 37, "tombstone": 19}
POINTS = 11  # of a file, in the sample


def world(path: Path) -> None:
    """Made, received and removed versions; an alias with a decision in its history."""
    path.mkdir()
    store = Store(path / "store", fs=Unsynced())
    card = replace(CARD, metrics={"test": {"accuracy": 0.5}}, recipe={"data": {"train": "train.jsonl"}})
    for seed in (0, 1, 2):
        store.put("sql", lora_files(seed), card)
    store.remove("sql@3")
    store.alias("sql", "prod", 2)
    store.refuse("sql", "prod", 1, {"metric": "accuracy"})
    store.alias("sql", "prod", 1, event="promote", reason={"metric": "accuracy"})
    other = Store(path / "other", fs=Unsynced())
    store.import_(other.export(other.put("guest", lora_files(3), card), path / "guest.tar"), "got")


def positions(kind: str, size: int) -> Iterator[int]:
    every = EVERY.get(kind, 1 if LONG else max(1, size // POINTS))
    return iter(range(size % every, size, every))


def flipped(kind: str, position: int) -> Sequence[int]:
    """Which bits: one of each byte; of the number of the format any, since 1 is a format too."""
    return range(3, 256, 1 if LONG else 31) if (kind, position) == ("store.json", 10) else (1 << position % 8,)


@pytest.mark.parametrize("kind", FILES)
def test_every_flipped_byte_is_noticed_or_harmless(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with scratch() as place, row("flip a byte", kind) as found:
        flips(place, kind, found, monkeypatch)


def flips(place: Path, kind: str, found: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every position of every file of a kind, before a store opened newly and one that remembers."""
    world(place / "world")
    if kind == "object":  # rot of its own: as on a file system without links
        copy(place / "world", place / "apart")
    top = place / ("apart" if kind == "object" else "world")
    right = answers(Store(top / "store"), top / "told", REFS)
    assert refused(right, right) == 0
    files = [path for path in top.glob(FILES[kind]) if path.is_file()]
    if kind == "object":
        apart(files)
    with monkeypatch.context() as patched:
        patched.setattr("adapterhub_lite.store.catalog.SETTLED", 0)  # what it has read it remembers at once
        old = Store(top / "store")
        assert wrong(answers(old, top / "told", REFS), right) == []
    noticed = harmless = 0
    for path in files[: None if LONG else 2]:
        good = path.read_bytes()
        path.chmod(stat.S_IRUSR | stat.S_IWUSR)
        for position in positions(kind, len(good)):
            for bits in flipped(kind, position):
                path.write_bytes(good[:position] + bytes([good[position] ^ bits]) + good[position + 1 :])
                seen = answers(Store(top / "store"), top / "told", REFS)
                with monkeypatch.context() as patched:
                    patched.setattr("adapterhub_lite.store.catalog.SETTLED", 0)
                    remembered = answers(old, top / "told", REFS)
                shut = refused(seen, right) + refused(remembered, right) + len(Store(top / "store").verify())
                told = {"opened newly": wrong(seen, right), "remembering": wrong(remembered, right)}
                found.violations += [
                    f"{path.name}[{position}] ^ {bits:#x}: {how}: {one}" for how, all_ in told.items() for one in all_
                ]
                found.faults, found.states = found.faults + 1, found.states + 1
                noticed, harmless = noticed + (shut > 0), harmless + (shut == 0)
        path.write_bytes(good)
    found.operation += f" ({noticed} noticed, {harmless} harmless)" if LONG else ""


def apart(files: list[Path]) -> None:
    """Give each object bytes of its own."""
    for path in files:
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
