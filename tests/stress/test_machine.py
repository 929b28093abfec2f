"""Any sequence of operations, crashes, faults, damage and time, through two stores at once, against a dictionary."""

from __future__ import annotations

import copy
import errno
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from adapterhub_lite.errors import NotFound, StoreCorrupt, StoreError
from adapterhub_lite.store import Store, catalog
from tests.checks import assert_store_sound
from tests.formats.build import lora_files
from tests.store.faulty import Crash, Failing, Unsynced
from tests.stress.acts import CARD, WEIGHTS
from tests.stress.scene import scratch
from tests.stress.tally import LONG, Row, row

NAMES, ALIASES, KINDS = ["sql", "topics"], ["prod", "next"], 3
FILES = [lora_files(kind) for kind in range(KINDS)]
NAME, ALIAS, KIND = st.sampled_from(NAMES), st.sampled_from(ALIASES), st.integers(0, KINDS - 1)
WHO, PICK, AT = st.integers(0, 1), st.integers(0, 30), st.integers(1, 24)


@dataclass
class Model:
    """What a store should hold: contents by name and version, what was removed, and the moves of each alias."""

    versions: dict[str, dict[int, int]] = field(default_factory=dict)  # name -> version -> kind of content
    highest: dict[str, int] = field(default_factory=dict)
    moves: dict[tuple[str, str], list[tuple[str, int | None]]] = field(default_factory=dict)

    def put(self, name: str, kind: int) -> int:
        number = self.highest[name] = self.highest.get(name, 0) + 1
        self.versions.setdefault(name, {})[number] = kind
        return number

    def move(self, name: str, alias: str, event: str, version: int | None) -> None:
        self.moves.setdefault((name, alias), []).append((event, version))

    def named(self, name: str, alias: str) -> int | None:
        accepted = [version for event, version in self.moves.get((name, alias), []) if event != "refuse"]
        return accepted[-1] if accepted else None

    def pointing(self, name: str, version: int) -> list[str]:
        return [alias for alias in ALIASES if self.named(name, alias) == version]

    def before(self, name: str, alias: str) -> int | None:
        """The version below the present one in the stack of those that were named; a rollback takes off its top."""
        stack: list[int] = []
        for event, version in self.moves.get((name, alias), []):
            if event == "rollback" and version in stack:
                del stack[stack.index(version, -stack[::-1].index(version) - 1) + 1 :]
            elif event in ("set", "promote", "rollback") and version is not None and stack[-1:] != [version]:
                stack.append(version)
        below = [version for version in stack[:-1] if version in self.versions[name] and version != stack[-1]]
        return below[-1] if below else None

    def remove(self, name: str, version: int) -> None:
        for alias in self.pointing(name, version):
            self.move(name, alias, "remove", None)
        del self.versions[name][version]

    def seen(self) -> dict[str, Any]:
        return {
            "versions": {name: dict(found) for name, found in self.versions.items() if found},
            "moves": {alias: list(found) for alias, found in self.moves.items()},
            "named": {alias: self.named(*alias) for alias in self.moves},
        }


class Machine(RuleBasedStateMachine):
    """Each rule does the same to the store and to the model."""

    row: Row

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=PLACE[-1])
        self.path = Path(self.folder.name) / "store"
        self.model = Model()
        self.stores = [Store(self.path, fs=Unsynced()) for _ in range(2)]
        self.made = 0

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(who=WHO, name=NAME, kind=KIND)
    def put(self, who: int, name: str, kind: int) -> None:
        assert self.stores[who].put(name, FILES[kind], CARD).version == self.model.put(name, kind)

    @rule(who=WHO, name=NAME, alias=ALIAS, pick=PICK, event=st.sampled_from(["set", "promote", "refuse"]))
    def move(self, who: int, name: str, alias: str, pick: int, event: str) -> None:
        if (version := self._pick(name, pick)) is None:
            with pytest.raises(NotFound):
                self.stores[who].alias(name, alias, 1)
        elif event == "refuse":
            self.stores[who].refuse(name, alias, version, {"pick": pick})
            self.model.move(name, alias, event, version)
        else:
            assert self.stores[who].alias(name, alias, version, event=event).version == version
            self.model.move(name, alias, event, version)

    @rule(who=WHO, name=NAME, alias=ALIAS)
    def rollback(self, who: int, name: str, alias: str) -> None:
        known = self.model.named(name, alias) is not None
        version = self.model.before(name, alias) if known else None
        if version is None:
            with pytest.raises(NotFound):
                self.stores[who].rollback(name, alias)
        else:
            assert self.stores[who].rollback(name, alias).version == version
            self.model.move(name, alias, "rollback", version)

    @rule(who=WHO, name=NAME, alias=ALIAS)
    def unalias(self, who: int, name: str, alias: str) -> None:
        if self.model.named(name, alias) is None:
            with pytest.raises(NotFound):
                self.stores[who].unalias(name, alias)
        else:
            self.stores[who].unalias(name, alias)
            self.model.move(name, alias, "remove", None)

    @rule(who=WHO, name=NAME, pick=PICK, force=st.booleans())
    def remove(self, who: int, name: str, pick: int, force: bool) -> None:
        if (version := self._pick(name, pick)) is None:
            return
        if self.model.pointing(name, version) and not force:
            with pytest.raises(StoreError, match="is in use by"):
                self.stores[who].remove(f"{name}@{version}")
        else:
            self.stores[who].remove(f"{name}@{version}", force=force)
            self.model.remove(name, version)

    @rule(who=WHO)
    def collect(self, who: int) -> None:
        self.stores[who].gc(older_than=0.0)

    @rule(who=WHO, name=NAME, pick=PICK, other=NAME, kind=st.sampled_from(["", ".tar"]))
    def travel(self, who: int, name: str, pick: int, other: str, kind: str) -> None:
        """Export and import: a version that is there already is found again, another one keeps its content."""
        if (version := self._pick(name, pick)) is None:
            return
        self.made += 1
        exported = self.stores[who].export(f"{name}@{version}", self.path.parent / f"out{self.made}{kind}")
        ref = self.stores[1 - who].import_(exported, other)
        content = self.model.versions[name][version]
        twins = [number for number, found in self.model.versions.get(other, {}).items() if found == content]
        assert ref.version == (max(twins) if twins else self.model.put(other, content))

    @rule(who=WHO)
    def reopen(self, who: int) -> None:
        self.stores[who] = Store(self.path, fs=Unsynced())

    @rule(name=NAME, kind=KIND, alias=ALIAS, pick=PICK, at=AT, what=st.integers(0, 4), how=st.integers(0, 2))
    def interrupted(self, name: str, kind: int, alias: str, pick: int, at: int, what: int, how: int) -> None:
        """A process of its own dies, or meets an error, at its `at`-th disk operation: old or new."""
        version = self._pick(name, pick)
        what, number = (what, version) if version is not None else (0, 0)
        acts: list[tuple[Callable[[Store], object], Callable[[Model], object]]] = [
            (lambda s: s.put(name, FILES[kind], CARD), lambda m: m.put(name, kind)),
            (lambda s: s.alias(name, alias, number), lambda m: m.move(name, alias, "set", number)),
            (lambda s: s.refuse(name, alias, number, {}), lambda m: m.move(name, alias, "refuse", number)),
            (lambda s: s.remove(f"{name}@{number}"), lambda m: m.remove(name, number)),
            (lambda s: s.repair(), lambda m: None),
        ]
        if what == 3 and self.model.pointing(name, number):
            what = 1
        error = (Crash(), OSError(errno.ENOSPC, "injected"), OSError(errno.EIO, "injected"))[how]
        act, change = acts[what]
        after = copy.deepcopy(self.model)
        change(after)
        acknowledged = False
        with suppress(Crash, StoreError):
            act(Store(self.path, fs=Failing(at, error, torn=bool(at % 2))))
            acknowledged = True
        self.row.kills, self.row.faults = self.row.kills + (how == 0), self.row.faults + (how > 0)
        seen = self._seen(Store(self.path))
        assert seen == after.seen() or (not acknowledged and seen == self.model.seen())
        if seen == after.seen():
            self.model = after

    @rule(who=WHO, name=NAME, pick=PICK, position=st.integers(0, 10_000))
    def rot(self, who: int, name: str, pick: int, position: int) -> None:
        """A byte flips: it is not served, and heals when the same content is stored again."""
        if (version := self._pick(name, pick)) is None:
            return
        ref = f"{name}@{version}"
        path = self.stores[who].folder(ref) / WEIGHTS
        data = bytearray(path.read_bytes())
        data[position % len(data)] ^= 1 << position % 8
        path.chmod(0o644)
        path.write_bytes(data)
        for store in (*self.stores, Store(self.path)):
            with pytest.raises(StoreCorrupt):
                store.read(ref)
            with pytest.raises(StoreCorrupt):
                store.verified_folder(ref)
        kind = self.model.versions[name][version]
        self.put(who, "healer", kind)
        assert ref in {healed.where for healed in self.stores[1 - who].repair()}

    @rule()
    def time_passes(self) -> None:
        """Later on folders count as unchanged, and what was read of them is remembered: it must still be right."""
        time.sleep(0.01)  # the clock of a file system ticks in milliseconds
        with patch.object(catalog, "time", SimpleNamespace(time_ns=lambda: time.time_ns() + 3600 * 10**9)):
            for store in self.stores:
                assert self._seen(store) == self.model.seen()

    @invariant()
    def everybody_sees_the_model(self) -> None:
        self.row.states += 1
        for store in (*self.stores, Store(self.path)):
            assert self._seen(store) == self.model.seen()
        assert_store_sound(self.path)

    def _pick(self, name: str, pick: int) -> int | None:
        there = sorted(self.model.versions.get(name, {}))
        return there[pick % len(there)] if there else None

    def _seen(self, store: Store) -> dict[str, Any]:
        versions: dict[str, dict[int, int]] = {}
        for entry in store.list():
            assert not entry.problem
            versions.setdefault(entry.name, {})[entry.version] = DIGESTS[entry.digest]
        moves: dict[tuple[str, str], list[tuple[str, int | None]]] = {}
        named = {}
        for name in NAMES:
            for alias in ALIASES:
                if found := [(move.event, move.version) for move in store.alias_history(name, alias)]:
                    moves[name, alias] = found
                    named[name, alias] = store.aliases(name).get(alias)
        return {"versions": versions, "moves": moves, "named": named}


PLACE: list[Path] = []
DIGESTS: dict[str, int] = {}


def test_any_sequence_of_operations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AHL_CACHE", str(tmp_path / "cache"))
    examples, steps = (600, 40) if LONG else (30, 14)
    with scratch() as place, row("state machine", f"{examples} sequences of {steps}") as found:
        PLACE.append(place)
        maker = Store(place / "maker", fs=Unsynced())
        DIGESTS.update({str(maker.put("made", files, CARD).digest): kind for kind, files in enumerate(FILES)})
        machine = type("Machine", (Machine,), {"row": found})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                derandomize=not LONG,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
