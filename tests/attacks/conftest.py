"""A place made once and copied for each test; what header attacks cost is told at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.doors import Place, copied, make_place

COSTS = pytest.StashKey[dict[str, tuple[float, int]]]()


@pytest.fixture(scope="session")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("attacks") / "place")


@pytest.fixture
def place(_template: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A place of this test's own; every folder of the user is in it."""
    made = copied(_template, tmp_path / "place")
    monkeypatch.setenv("HOME", str(tmp_path / "place" / "outside"))
    monkeypatch.setenv("AHL_HOME", str(tmp_path / "ahl-home"))
    monkeypatch.setenv("AHL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AHL_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("AHL_DEBUG", raising=False)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # nothing here is about power cuts
    monkeypatch.chdir(made.inbox)
    return made


@pytest.fixture
def costs(request: pytest.FixtureRequest) -> dict[str, tuple[float, int]]:
    """Attack -> seconds and bytes that its refusal took."""
    return request.config.stash.setdefault(COSTS, {})


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The dearest refusals."""
    found = config.stash.get(COSTS, {})
    if found:
        slowest = max(found, key=lambda attack: found[attack][0])
        largest = max(found, key=lambda attack: found[attack][1])
        terminalreporter.write_line(
            f"{len(found)} attacks refused by a header alone: at most {found[slowest][0] * 1000:.0f} ms ({slowest}) "
            f"and {found[largest][1] / 1e6:.1f} MB ({largest})"
        )
