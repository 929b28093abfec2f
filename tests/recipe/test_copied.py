"""The text of a recipe that is saved elsewhere: the same recipe, on the same data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from adapterhub_lite.recipe import FileData, check_files, copied_text, list_recipes, load_recipe


@pytest.mark.parametrize("name", [name for name, _, _ in list_recipes()])
def test_copy_of_a_built_in_is_the_same_recipe(tmp_path: Path, name: str) -> None:
    path = next(path for known, _, path in list_recipes() if known == name)
    copy = tmp_path / "mine.yaml"
    copy.write_text(copied_text(path), "utf-8")
    theirs, ours = load_recipe(name), load_recipe(copy)
    assert check_files(ours) == []
    for (part, a), (_, b) in zip(theirs.data.parts(), ours.data.parts(), strict=True):
        assert isinstance(a, FileData), part
        assert isinstance(b, FileData), part
        assert b.resolve(tmp_path) == a.resolve(theirs.folder)
    about = {key: getattr(theirs, key) for key in ("data", "source", "folder", "sha256", "lines")}
    assert replace(ours, **about) == theirs
    assert [line.partition("#")[2] for line in path.read_text("utf-8").splitlines()] == [
        line.partition("#")[2] for line in copied_text(path).splitlines()
    ]


def test_paths_that_yaml_would_misread_are_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "a: b #c"
    folder.mkdir()
    (folder / "t.jsonl").write_text("{}\n")
    (folder / "r.yaml").write_text("data: {train: t.jsonl, test: 't.jsonl', validation: /far/v.jsonl}  # mine\n")
    text = copied_text(folder / "r.yaml")
    assert yaml.safe_load(text)["data"] == {
        "train": str(folder / "t.jsonl"),
        "test": str(folder / "t.jsonl"),
        "validation": "/far/v.jsonl",
    }
    assert text.endswith("# mine\n")
