"""Two operations at once: the second runs as a whole before each disk operation of the first.

What comes out is what one after the other gives, or one of them is refused and has changed nothing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.errors import AdapterHubError, NotFound, StoreError
from adapterhub_lite.store import Store
from tests.checks import assert_store_sound
from tests.store.faulty import OPERATIONS, Unsynced
from tests.stress.acts import ACTS, leave, populated, with_visitors
from tests.stress.scene import copy, scratch, view
from tests.stress.tally import LONG, Row, row

TOGETHER = ["put", "put equal", "alias", "refuse", "rollback", "unalias", "remove", "gc", "import tar", "alias third"]
STEPS: dict[str, Callable[[Store], object]] = {
    "alias third": lambda store: store.alias("sql", "live", 2),
    **{name: ACTS[name].steps[0] for name in TOGETHER if name in ACTS},
}
# What two at once may do beyond one after the other; the store is sound, and no bytes are wrong.
HARMLESS = {
    ("unalias", "unalias"): "both take it away, and both say so",
    ("remove", "remove"): "both remove it, and both say so",
    ("import tar", "import tar"): "each stores it: the look for a twin came before",
    ("gc", "gc"): "one tells an object that the other has just set free",
    ("remove", "gc"): "what is being cleared away is cleared away twice",
}
# An alias may be moved to a version between the look at its users and its tombstone, or while it is removed. It then
# names nothing: whoever asks is told that the version was removed, and `verify` says so until it is set again.
DANGLING = {("alias", "remove"), ("alias third", "remove")}
SAMPLE = [("put", "put"), ("alias", "alias"), ("remove", "alias"), ("alias", "remove"), ("rollback", "alias third")]


class Between(Unsynced):
    """Runs `other` before the `at`-th operation, once."""

    def __init__(self, at: int, other: Callable[[], object]) -> None:
        self.at, self.other, self.count = at, other, 0

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return self._counted(found) if name in OPERATIONS else found

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                self.other()
            return call(*arguments)

        return counted


def outcome(step: Callable[[Store], object], store: Store) -> str:
    """What an operation returns, or what kind of error it raises."""
    try:
        return str(step(store)).replace(str(store.path), "")
    except AdapterHubError as error:
        return type(error).__name__


def in_a_row(world: Path, first: str, second: str) -> tuple[Any, str, str]:
    told = [outcome(STEPS[name], Store(world / "store", fs=Unsynced())) for name in (first, second)]
    return view(world), told[0], told[1]


def interleaved(place: Path, first: str, second: str, found: Row) -> None:
    seed = place / "seed"
    with_visitors(seed) if "import tar" in (first, second) else populated(seed)
    if "gc" in (first, second):
        leave(seed)
    for name in ("one", "two"):
        copy(seed, place / name)
    (seen, told_first, told_second) = in_a_row(place / "one", first, second)
    allowed = [(seen, told_first, told_second)]
    seen, told_second, told_first = in_a_row(place / "two", second, first)
    allowed.append((seen, told_first, told_second))
    for name, order in ((first, 1), (second, 2)):  # the other one refused
        copy(seed, place / f"only{order}")
        told = outcome(STEPS[name], Store(place / f"only{order}" / "store", fs=Unsynced()))
        refused = StoreError.__name__
        allowed.append((view(place / f"only{order}"), *((told, refused) if order == 1 else (refused, told))))
    for at in itertools.count(1):
        world = place / f"at{at}"
        copy(seed, world)
        said: list[str] = []
        other = Store(world / "store", fs=Unsynced())
        fs = Between(at, lambda other=other, said=said: said.append(outcome(STEPS[second], other)))
        told = outcome(STEPS[first], Store(world / "store", fs=fs))
        if not said:
            return
        found.faults += 1
        found.states += 1
        seen = view(world)
        if {(first, second), (second, first)} & DANGLING and dangles(world / "store"):
            continue
        if not _agree((seen, told, said[0]), allowed, (first, second)) and (first, second) not in HARMLESS:
            found.violations.append(f"{second} before operation {at} of {first}: {told}, {said[0]}, {seen}"[:1500])
        try:
            assert_store_sound(world / "store")
        except AssertionError as error:
            found.violations.append(f"{second} before operation {at} of {first}: {error}")


def _agree(found: tuple[Any, str, str], allowed: Sequence[tuple[Any, str, str]], names: tuple[str, str]) -> bool:
    """Equal to one; but of what there is to clean up, a collection tells only what another operation did not take."""
    told = {path for _, *all_told in allowed for name, one in zip(names, all_told, strict=True) if name == "gc"
            for path in _paths(one)}  # fmt: skip

    def same(ours: str, its: str, name: str) -> bool:
        return _paths(ours) <= told if name == "gc" else ours == its

    return any(found[0] == one[0] and all(map(same, found[1:], one[1:], names)) for one in allowed)


def _paths(told: str) -> set[str]:
    """The kinds of leftovers in what a collection says; names in tmp are random."""
    return {path if path.startswith("objects") else "tmp" for path in re.findall(r"path='([^']*)'", told)}


def dangles(path: Path) -> bool:
    """Whether an alias names a version that was removed, which is told, and heals when it is set."""
    store = Store(path, fs=Unsynced())
    where = [finding.where for finding in store.verify()]
    if where not in (["sql:prod"], ["sql:live"]):
        return False
    with pytest.raises(NotFound, match="sql@2 was removed"):
        store.resolve(where[0])
    store.alias("sql", where[0].partition(":")[2], 1)
    assert_store_sound(path)
    return True


@pytest.mark.parametrize(
    ("first", "second"), list(itertools.product(TOGETHER, TOGETHER)) if LONG else SAMPLE, ids=lambda name: name
)
def test_two_at_once_are_one_after_the_other(first: str, second: str) -> None:
    with scratch() as place, row("interleaving", first) as found:
        interleaved(place, first, second, found)
