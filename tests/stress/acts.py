"""What a store can be asked to do, for every harness that stops it, fails it or cuts its power: worlds to start from,
and operations. `scene.py` says what must hold after them.

A world is a folder: `store`, `in` with what is imported, and `out` or `out.tar` where something is exported.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import Store
from tests.formats.build import lora_files
from tests.store.faulty import Crash, Failing, Unsynced
from tests.store.first_format import to_first_format

CARD = Card(created="2026-01-31T12:00:00Z")
WEIGHTS = "adapter_model.safetensors"
Step = Callable[[Store], object]


# -- worlds --------------------------------------------------------------------------------------------------------


def empty(world: Path) -> None:
    world.mkdir()


def populated(world: Path) -> None:
    """Three versions; `prod` names the first, `live` the third after the first."""
    empty(world)
    store = Store(world / "store", fs=Unsynced())
    for seed in range(3):
        store.put("sql", lora_files(seed), CARD)
    for alias, version in (("prod", 1), ("live", 1), ("live", 3)):
        store.alias("sql", alias, version)


def with_visitors(world: Path) -> None:
    """And what another program and another store have written, to be imported."""
    populated(world)
    plain = world / "in" / "plain"
    plain.mkdir(parents=True)
    for file, data in lora_files(5).items():
        (plain / file).write_bytes(data)
    other = Store(world / "in" / "other", fs=Unsynced())
    ref = other.put("guest", lora_files(6), CARD)
    other.export(ref, world / "in" / "guest")
    other.export(ref, world / "in" / "guest.tar")
    shutil.rmtree(other.path)


def with_leftovers(world: Path) -> None:
    populated(world)
    leave(world)


def leave(world: Path) -> None:
    """Leave a put and a removal that died, and content that no version holds."""
    store = Store(world / "store", fs=Unsynced())
    store.put("sql", lora_files(7), CARD)
    for at, step in ((9, lambda s: s.put("sql", lora_files(5), CARD)), (8, lambda s: s.remove("sql@4"))):
        with suppress(Crash):
            step(Store(store.path, fs=Failing(at, Crash())))
    digest = hashlib.sha256(b"nobody's").hexdigest()
    blob = store.path / "objects" / digest[:2] / digest
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(b"nobody's")
    for entry in (store.path / "tmp").iterdir():
        os.utime(entry, (0, 0))


def damaged(world: Path) -> None:
    """And one file that is gone and one that rots, both with a twin under another name."""
    populated(world)
    store = Store(world / "store", fs=Unsynced())
    for seed in (0, 2):
        ref = store.put("twin", lora_files(seed), CARD)
        path = store.folder(ref) / WEIGHTS
        data = path.read_bytes()
        path.unlink()
        if seed:
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def of_first_format(world: Path) -> None:
    populated(world)
    to_first_format(world / "store")


# -- operations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Act:
    """One operation.

    Of several `steps` each is whole. `takes_back`: what fails has published nothing. `spares`: it goes on past what it
    cannot read or remove, which `verify` and the next run find again.
    """

    steps: tuple[Step, ...]
    start: Callable[[Path], None] = populated
    takes_back: bool = False
    spares: bool = False

    def run(self, store: Store) -> None:
        for step in self.steps:
            step(store)


def _act(step: Step, start: Callable[[Path], None] = populated, takes_back: bool = False) -> Act:
    return Act((step,), start, takes_back)


def _beside(store: Store, name: str) -> Path:
    return store.path.parent / name


_REASON = {"metric": "accuracy", "before": 0.5, "after": 0.75}

ACTS: Mapping[str, Act] = {
    "put": _act(lambda store: store.put("sql", lora_files(3), CARD), takes_back=True),
    "put new name": _act(lambda store: store.put("topics", lora_files(3), CARD), takes_back=True),
    "put equal": _act(lambda store: store.put("sql", lora_files(0), CARD), takes_back=True),
    "put first": _act(lambda store: store.put("sql", lora_files(3), CARD), empty, takes_back=True),
    "alias": _act(lambda store: store.alias("sql", "prod", 2)),
    "alias new": _act(lambda store: store.alias("sql", "test", 2)),
    "promote": _act(lambda store: store.alias("sql", "prod", 3, event="promote", reason=_REASON)),
    "refuse": _act(lambda store: store.refuse("sql", "prod", 2, _REASON)),
    "rollback": _act(lambda store: store.rollback("sql", "live")),
    "unalias": _act(lambda store: store.unalias("sql", "prod")),
    "remove": _act(lambda store: store.remove("sql@2")),
    # Taking the alias away and removing the version are two decisions, in this order.
    "remove forced": Act((lambda store: store.unalias("sql", "prod"), lambda store: store.remove("sql@1", force=True))),
    "gc": Act((lambda store: store.gc(),), with_leftovers, spares=True),
    "import folder": _act(
        lambda store: store.import_(_beside(store, "in") / "plain", "new"), with_visitors, takes_back=True
    ),
    "import export": _act(
        lambda store: store.import_(_beside(store, "in") / "guest", "new"), with_visitors, takes_back=True
    ),
    "import tar": _act(
        lambda store: store.import_(_beside(store, "in") / "guest.tar", "sql"), with_visitors, takes_back=True
    ),
    "export folder": _act(lambda store: store.export("sql@1", _beside(store, "out"))),
    "export tar": _act(lambda store: store.export("sql@1", _beside(store, "out.tar"))),
    "migrate": _act(lambda store: store.migrate(), of_first_format),
    "migrate and put": _act(lambda store: store.put("sql", lora_files(3), CARD), of_first_format, takes_back=True),
    "migrate and alias": _act(lambda store: store.alias("sql", "prod", 2), of_first_format),
    "repair": Act((lambda store: store.repair(),), damaged, spares=True),
    "read": _act(lambda store: _reads(store)),
    "verify": _act(lambda store: _verifies(store), damaged),
}

_ANSWERS: dict[str, Any] = {}


def _reads(store: Store) -> None:
    """Ask everything: each answer is right, as the first time in this process, or refused."""
    from tests.stress.doors import answers, wrong

    seen = answers(store, store.path.parent / "told", ("sql@1", "sql:live"))
    if found := wrong(seen, _ANSWERS.setdefault("read", seen)):
        raise AssertionError(f"read wrongly: {found}")


def _verifies(store: Store) -> None:
    """Everything that is wrong is reported, whatever else is."""
    where = {finding.where for finding in store.verify()}
    if not _ANSWERS.setdefault("verify", where) <= where:
        raise AssertionError(f"verify reports {where}")
