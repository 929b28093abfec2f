"""The tree that the README draws is the tree there is."""

from __future__ import annotations

import re
from pathlib import Path

from tests.house.test_floors import FLOOR

ROOT = Path(__file__).parents[2]
_ENTRY = re.compile(r" {4}(\S+/) +(.+)")


def drawn() -> dict[str, str]:
    """Folder -> what is said of it, under 'Where things are'."""
    section = (ROOT / "README.md").read_text("utf-8").partition("\n## Where things are\n")[2]
    found: dict[str, str] = {}
    for line in section.splitlines():
        entry = _ENTRY.fullmatch(line)
        if entry:
            found[entry[1]] = entry[2]
        elif line.startswith(" " * 8):
            found[list(found)[-1]] += f" {line.strip()}"
    return found


def test_every_folder_that_is_drawn_exists():
    assert len(drawn()) >= 6
    assert [name for name in drawn() if not (ROOT / name).is_dir()] == []


def test_every_folder_with_code_or_documents_is_drawn():
    there = {path.parts[0] for kind in ("*/*.py", "*/*.md") for path in (p.relative_to(ROOT) for p in ROOT.glob(kind))}
    there -= {name for name in there if name.startswith(".") or name == "build" or name.endswith(".egg-info")}
    assert there == {name.rstrip("/") for name in drawn()}


def test_every_document_is_named_and_every_named_one_exists():
    named = re.findall(r"[\w-]+\.md", drawn()["docs/"])
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_every_room_is_named():
    rooms = drawn()["adapterhub_lite/"].removeprefix("the package: ").partition(" (")[0].split(", ")
    assert sorted(rooms) == sorted(set(FLOOR) - {"cli"})
