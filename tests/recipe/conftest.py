"""A folder with the data files that the recipes of these tests name, and a library of two recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub_lite.recipe import load as loading
from tests.recipe.build import GOOD, LEAST


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds train.jsonl, validation.jsonl and test.jsonl."""
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("{}\n")
    return tmp_path


@pytest.fixture
def library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of built-in recipes: topics and plain."""
    (folder / "topics.yaml").write_text(GOOD)
    (folder / "plain.yaml").write_text(LEAST)
    monkeypatch.setattr(loading, "_library", lambda: folder)
    return folder
