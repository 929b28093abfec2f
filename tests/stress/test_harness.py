"""The harnesses notice mistakes: each of these makes one of them red."""

from __future__ import annotations

import pytest

from tests.stress import careless, tally
from tests.stress.scene import scratch
from tests.stress.strace import unavailable
from tests.stress.tally import LONG, Row, row
from tests.stress.test_disk_full import program, told
from tests.stress.test_flips import flips
from tests.stress.test_system_calls import swept

MISTAKES = [
    ("written in place", "migrate", "ENOSPC", 2, "store.json is damaged"),
    ("nothing is cleaned up", "put", "ENOSPC", 5, "temporary entries are left"),
    ("a lock is taken", "put", "LOCKS", 1, "flock"),
    ("unlinked before it is replaced", "migrate", "KILL", 1, "store.json is missing"),
    ("a move is published early", "alias", "KILL", 1, "sql:prod is damaged"),
    ("a move is published early", "alias", "ENOSPC", 1, "sql:prod is damaged"),
]


@pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "strace is here")
@pytest.mark.parametrize(("mistake", "name", "fault", "every", "words"), MISTAKES if LONG else MISTAKES[:3])
def test_mistakes_that_system_calls_show(mistake: str, name: str, fault: str, every: int, words: str) -> None:
    with scratch() as place:
        wrong = [one for found in swept(place, name, fault, every, mistake) for one in found.violations]
    assert any(words in one for one in wrong), wrong[:3]


@pytest.mark.parametrize("how", ["short", "room"])
def test_mistakes_that_a_small_disk_shows(library: str, how: str) -> None:
    with scratch() as place:
        found = told(program(how, place, "put", 97, "a short write is taken for a whole one"), LD_PRELOAD=library)
    assert any("damaged" in one or "mixture" in one for one in found.violations), found.violations[:3]


def test_mistakes_that_flipped_bytes_show(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Row("", "")
    with scratch() as place, careless.mistake("a move is read without its seal"):
        flips(place, "move", found, monkeypatch)
    assert any("instead of" in one for one in found.violations)


def test_a_violation_fails_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "ROWS", [])
    for seconds in (1.0, 2.0):
        tally.ROWS.append(Row("harness", "good", kills=1000, states=2, seconds=seconds))
    with pytest.raises(AssertionError, match="1 violations, such as: it tore"), row("harness", "bad") as found:
        found.violations.append("it tore")
    table = "\n".join(" ".join(line.split()) for line in tally.table())
    assert "all 2,000 0 4 1 3.0" in table
    assert ("harness good 2,000 0 4 0 3.0" if LONG else "harness 2 operations 2,000 0 4 1 3.0") in table
