"""Every row of the table through every door: refused by its right error, or harmless; and nothing else happens."""

from __future__ import annotations

import re
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest

from adapterhub_lite.errors import AdapterHubError
from adapterhub_lite.names import Ref
from adapterhub_lite.store import Store
from tests.attacks.attack import Attack
from tests.attacks.doors import DOORS, Call, Outcome, Place, perform, told_error
from tests.attacks.guard import ROOT, Tree, changes, tree, watching
from tests.attacks.table import ATTACKS, DAMAGES, ELSEWHERE
from tests.checks import assert_store_sound

MEMORY = 20 << 20  # bytes beyond what was there, for what is refused by its header
LONGEST = 16_000  # characters of a refusal
STORED = {"adapter_config.json", "adapter_model.safetensors", "card.json", "manifest.json"}


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.id for attack in ATTACKS])
def test_attack(attack: Attack, place: Place, costs: dict[str, tuple[float, int]]) -> None:
    what = attack.what() if callable(attack.what) and attack.door in ("files", "archive") else attack.what
    before: Tree = {}
    names = place.store.names()
    for call in DOORS[attack.door](place, what):
        before = before or tree(place.root)
        with watching() as watch:
            outcome = perform(call)
        assert watch.strays([place.store_path, place.outbox], [place.inbox, Path("/dev/zero")]) == [], call.label
        changed = changes(before, tree(place.root))
        if attack.error is None:
            stored = check_harmless(attack, call, outcome, place, names)
            assert all(path.startswith("store") for path in changed), (call.label, changed)
            before, names = {}, place.store.names()
        else:
            check_refused(attack, call, outcome)
            assert changed == [], call.label
        if attack.header and attack.id not in costs:
            check_cost(attack, call, costs)
    if attack.error is None:
        check_shown(place, stored)
        assert_store_sound(place.store_path)


def check_refused(attack: Attack, call: Call, outcome: Outcome) -> None:
    """The right class, the right words; on the command line an exit code, lines without a trace, and an object."""
    assert attack.error is not None
    if outcome.said is None:
        assert type(outcome.error) is attack.error, (call.label, outcome)
        check_message(attack, str(outcome.error), call)
        return
    said = outcome.said
    assert said.exit_code == call.code, (call.label, said.stderr, said.stdout)
    first, *rest = said.stderr.splitlines()
    assert first.startswith("error: "), (call.label, said.stderr)
    assert all(line.startswith("  ") for line in rest), said.stderr
    assert all(character.isprintable() for line in (first, *rest) for character in line), said.stderr
    assert "Traceback" not in said.stderr
    error = told_error(said)
    assert error["type"] == attack.error.__name__, (call.label, error)
    check_message(attack, f"{error['message']} {error['hint']}".rstrip(), call)


def check_message(attack: Attack, message: str, call: Call) -> None:
    """It says what it should, and is no flood."""
    assert re.search(attack.words, message), (call.label, message[:500])
    assert len(message) < LONGEST
    assert "Traceback" not in message


def check_harmless(attack: Attack, call: Call, outcome: Outcome, place: Place, names: list[str]) -> Ref:
    """Exactly one version more, of exactly the files that a version has."""
    if outcome.said is not None:
        assert outcome.said.exit_code == 0, (call.label, outcome.said.stderr)
        assert outcome.said.stderr == ""
    assert outcome.error is None, call.label
    store = Store(place.store_path)
    (name,) = set(store.names()) - set(names)
    ref = store.resolve(name)
    assert (store.versions(name), {path.name for path in store.folder(ref).iterdir()}) == ([1], STORED)
    if attack.harmless is not None:
        attack.harmless(store, ref)
    return ref


def check_shown(place: Place, ref: Ref) -> None:
    """What is in the store can be shown, and steers no terminal."""
    shown = (["list"], ["show", ref.name], ["log", ref.name], ["search", "accuracy>0.1"], ["diff", ref.name, "sql@1"])
    searches = (["search", "seed>1"], ["search", "tokens>1"], ["search", "x", "type:lora", "data:x", "task:x"])
    for words in (*shown, *searches):
        said = perform(Call("", cli=(*words, "--store", str(place.store_path)))).said
        assert said is not None
        assert said.exit_code == 0, (words, said.stderr)
        steering = [character for character in said.stdout if not character.isprintable() and character != "\n"]
        assert steering == [], words


def check_cost(attack: Attack, call: Call, costs: dict[str, tuple[float, int]]) -> None:
    """Memory is bounded; the time is told at the end, and bounded only where nothing else runs."""
    begin = time.perf_counter()
    perform(call)
    seconds = time.perf_counter() - begin
    tracemalloc.start()
    try:
        perform(call)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY, (call.label, peak)
    costs[attack.id] = (seconds, peak)


# The table itself


def test_every_row_of_the_matrix_is_tried() -> None:
    wanted = {f"I{number}" for number in range(1, 18)} | {f"S{number}" for number in range(1, 21)}
    here = {row.id.split()[0] for row in (*ATTACKS, *DAMAGES)}
    assert wanted <= here | ELSEWHERE.keys()
    for row, path in ELSEWHERE.items():
        assert (ROOT / path).is_file(), (row, path)


def test_ids_are_unique_and_say_their_row() -> None:
    ids = [row.id for row in (*ATTACKS, *DAMAGES)]
    assert len(set(ids)) == len(ids)
    assert all(re.match(r"[ISCM]\d+ ", one) for one in ids)


# The check itself


def open_outside(place: Place) -> None:
    (place.outside / "precious.txt").read_text()


def write_outside(place: Place) -> None:
    (place.outside / "x").write_text("x")


def write_home(place: Place) -> None:
    Path("~/x").expanduser().write_text("x")


def connect(place: Place) -> None:
    import socket

    with socket.socket() as one:
        one.connect(("127.0.0.1", 9))


def run(place: Place) -> None:
    import subprocess

    subprocess.run(["true"], check=True)


@pytest.mark.parametrize("harm", [open_outside, write_outside, write_home, connect, run])
def test_the_watch_sees_what_must_not_happen(harm: object, place: Place) -> None:
    with watching() as watch, suppress(OSError):
        harm(place)  # type: ignore[operator]
    assert watch.strays([place.store_path, place.outbox], [place.inbox])


def test_an_attack_that_gets_through_is_noticed(place: Place) -> None:
    loose = Attack("I0", "files", {}, ValueError, "x")  # type: ignore[arg-type]
    for outcome in (Outcome(value=1), Outcome(error=AdapterHubError("x"))):
        with pytest.raises(AssertionError):
            check_refused(loose, Call(""), outcome)
    before = tree(place.root)
    (place.outside / "precious.txt").write_text("yours")
    assert changes(before, tree(place.root)) == ["outside/precious.txt"]
