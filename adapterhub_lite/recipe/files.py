"""Whether the data files of a recipe are there; what they hold is not looked at."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from ..errors import Problem
from .schema import FileData, Recipe


def check_files(recipe: Recipe) -> list[Problem]:
    """The data files of `recipe` that cannot be opened here."""
    problems = []
    for name, part in recipe.data.parts():
        if not isinstance(part, FileData):
            continue
        path = part.resolve(recipe.folder)
        try:
            found = path.is_file()
        except OSError:
            found = False
        if not found:
            problems.append(Problem(f"data.{name}", f"there is no file {path}.", _near_file(path)))
    return problems


def _near_file(path: Path) -> str:
    try:
        names = [other.name for other in path.parent.iterdir() if other.is_file()]
    except OSError:
        return "Paths are relative to the folder of the recipe."
    near = get_close_matches(path.name, names, n=1)
    return f"Did you mean '{near[0]}'?" if near else "Paths are relative to the folder of the recipe."
