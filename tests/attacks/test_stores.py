"""Stores that were damaged or made to do harm: what they hold is not served, and nothing happens outside of them."""

from __future__ import annotations

import re
import shutil
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapterhub_lite.store.reading import Stored
from tests.attacks.build import WEIGHTS
from tests.attacks.doors import Call, Outcome, Place, copied, perform, uses
from tests.attacks.guard import Tree, changes, tree, watching
from tests.attacks.rows_stores import Damage
from tests.attacks.table import DAMAGES
from tests.formats.build import lora_files

MEMORY = 20 << 20
READING = ("resolve", "follow", "read", "folder", "card", "list", "search", "log", "verify", "show")
SHORT = (*READING, "export", "put again", "alias", "gc", "repair")


@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.id for damage in DAMAGES])
def test_damage(damage: Damage, place: Place, tmp_path: Path) -> None:
    read = copied(place, tmp_path / "read")
    damage.make(read)
    for number, label in enumerate(uses(place)):
        use = label.partition(" ")[2]
        reads = use in READING
        if not damage.leads and use not in SHORT:
            continue
        here = read if reads else copied(place, tmp_path / f"copy-{number}")
        if not reads:
            damage.make(here)
        with bounded("iB" in damage.id):
            check_use(damage, label, here, reads)
        if not reads:
            shutil.rmtree(here.root)
    assert bool(read.store.verify()) == damage.found


@contextmanager
def bounded(wanted: bool) -> Iterator[None]:
    """Memory stays small where there are large files."""
    if not wanted:
        yield
        return
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def check_use(damage: Damage, label: str, place: Place, reads: bool) -> None:
    """One use: done or refused, by the error that is wanted if one is, and nothing happens elsewhere."""
    before, shared = tree(place.root), shared_files(place)
    call = uses(place)[label]
    with watching() as watch:
        outcome = perform(call)
    assert watch.strays([place.store_path, place.outbox], []) == [], (damage.id, label)
    check_places(before, tree(place.root), reads, label)
    assert shared_files(place) <= shared, label
    if outcome.said is not None:
        check_said(damage, call, outcome)
        return
    wanted = damage.fails.get(label.removeprefix("API "))
    if wanted:
        assert type(outcome.error) is wanted[0], (damage.id, label, outcome)
        assert re.search(wanted[1], str(outcome.error)), (label, str(outcome.error))
        assert len(str(outcome.error)) < 2_000
    elif outcome.error is None and not damage.swapped:
        check_content(outcome, place)


def shared_files(place: Place) -> set[int]:
    """Files of the store that have another name outside: who writes there would change the store."""
    inside, outside = (
        {path.lstat().st_ino for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
        for folder in (place.store_path, place.outside)
    )
    return inside & outside


def check_places(before: Tree, after: Tree, reads: bool, label: str) -> None:
    """What only reads changes nothing at all; what writes changes the store and what is exported."""
    allowed = () if reads else ("store", "outbox")
    strange = [path for path in changes(before, after) if path.split("/")[0] not in allowed]
    assert strange == [], label


def check_said(damage: Damage, call: Call, outcome: Outcome) -> None:
    """The application ends with a code that is documented, without a trace."""
    said = outcome.said
    assert said is not None
    assert said.exit_code in (0, 1), (damage.id, call.label, said.stderr)
    assert "Traceback" not in said.stderr
    if call.label == "CLI verify":
        assert said.exit_code == (1 if damage.found else 0), said.stdout
    wanted = damage.fails.get(call.label.removeprefix("CLI "))
    if wanted and call.label != "CLI verify":
        assert said.exit_code == 1, (damage.id, call.label)
        assert re.search(wanted[1], said.stderr), said.stderr


def check_content(outcome: Outcome, place: Place) -> None:
    """What is served is what was stored."""
    weights = lora_files(0)[WEIGHTS]
    if isinstance(outcome.value, Stored):
        assert outcome.value.weights == weights
    exported = place.outbox / "out" / WEIGHTS
    if exported.exists():
        assert exported.read_bytes() == weights


def test_a_store_that_is_as_it_should_be_works(place: Place, tmp_path: Path) -> None:
    """The uses do their work where nothing is wrong: that they are refused above says something."""
    for number, label in enumerate(uses(place)):
        here = copied(place, tmp_path / f"copy-{number}")
        outcome = perform(uses(here)[label])
        assert outcome.said is None or outcome.said.exit_code == 0, (label, outcome.said.stderr)
        # There is nothing else that the alias named before.
        assert (outcome.error is None) == (label != "API rollback"), (label, outcome.error)


def test_every_use_is_known() -> None:
    known = {label.removeprefix("API ") for label in uses(Place(Path("x"))) if label.startswith("API ")}
    assert {use for damage in DAMAGES for use in damage.fails} <= known
