"""From a name or a file, with overrides, to a `Recipe`."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import NotFound, Problem, RecipeError
from . import files
from .fields import read_section
from .nodes import MAX_BYTES, Node, Scalar, Table, from_python, join, parse
from .readers import At
from .schema import FileData, Recipe
from .training import LEARNING_RATES

Overrides = Mapping[str, object] | Sequence[str]
_ABOUT_RECIPE = ("source", "folder", "sha256", "lines")
_MOST = 100  # problems shown


def load_recipe(name_or_path: str | Path, overrides: Overrides = (), *, check_files: bool = True) -> Recipe:
    """Read a recipe: a built-in one by name, or a file.

    Args:
        name_or_path: `sql`, or a path that ends in .yaml or .yml, holds a separator or exists.
        overrides: `{"training.epochs": 1}` or `["training.epochs=1"]`; checked like the recipe itself. Files named
            here are relative to the working folder, those in the recipe to its own.
        check_files: whether missing data files are problems too.

    Raises:
        NotFound: no such recipe, with the nearest names.
        RecipeError: every problem at once.
    """
    path = _find(name_or_path)
    source, problems = str(name_or_path), list[Problem]()
    raw = _read(path, source)
    root = _tree(raw, problems)
    if root is not None:
        _override(root, overrides, problems)
        _respell(root, problems)
    recipe = _recipe(root, path, raw, problems)
    if recipe and not problems and check_files:
        problems += [replace(problem, line=_line(root, problem.path)) for problem in files.check_files(recipe)]
    if recipe is None or problems:
        raise RecipeError(source, problems[:_MOST])
    return recipe


def changed_recipe(recipe: Recipe, overrides: Overrides) -> Recipe:
    """A recipe that is read already with other values, checked like a new one.

    Raises:
        RecipeError: every problem at once.
    """
    problems: list[Problem] = []
    root = from_python(recipe_dict(recipe), problems, "recipe")
    found: Recipe | None = None
    if root is not None:
        _override(root, overrides, problems)
        _respell(root, problems)
        about = {key: getattr(recipe, key) for key in _ABOUT_RECIPE} | {"lines": {}}
        found = read_section(At(root, "recipe", problems), Recipe, defaults=about)
    if found is None or problems:
        raise RecipeError(recipe.source, problems[:_MOST])
    return found


def list_recipes() -> list[tuple[str, str, Path]]:
    """The built-in recipes: name, first comment line, path."""
    return [(path.stem, _headline(path), path) for path in sorted(_library().glob("*.yaml"))]


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data with every default filled in; written as YAML it is the same recipe again."""
    plain = {key: value for key, value in asdict(recipe).items() if key not in _ABOUT_RECIPE}
    for name, part in recipe.data.parts():
        if isinstance(part, FileData):
            plain["data"][name] = part.path
    listed: dict[str, Any] = _lists(plain)
    return listed


# --- finding -----------------------------------------------------------------------------------------------------


def _library() -> Path:
    """The folder of the built-in recipes: installed as a package, or beside the package in a source tree."""
    spec = importlib.util.find_spec("adapterhub_lite.recipes")
    if spec and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).parents[2] / "recipes"


def _find(wanted: str | Path) -> Path:
    text = str(wanted)
    if "\0" in text or not text:
        raise _not_found(text, text, [])
    named = [] if isinstance(wanted, Path) else [path for name, _, path in list_recipes() if name == text]
    path = named[0] if named else Path(text)
    try:
        if named or path.is_file() or (path.exists() and not path.is_dir()):
            return path
    except OSError:  # a name too long for the file system, and the like
        pass
    is_path = path.suffix in {".yaml", ".yml"} or "/" in text or "\\" in text
    if is_path:
        raise _not_found(text, path.name, _neighbours(path))
    more = " `ahl recipes` says what the built-in ones do."
    raise _not_found(text, text, [name for name, _, _ in list_recipes()], more)


def _neighbours(path: Path) -> list[str]:
    try:
        return sorted(other.name for other in path.parent.glob("*.y*ml"))
    except OSError:
        return []


def _not_found(text: str, name: str, known: list[str], more: str = "") -> NotFound:
    near = get_close_matches(name[:200].lower(), known, n=3 if more else 1)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(known[:20])}." if known else ""
    hint = hint or "Pass a built-in name or the path of a .yaml file."
    return NotFound(f"There is no recipe {ascii(text)[:200]}.", hint + more)


def _headline(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("#") and line.strip("# \n"):
                return line.strip("# \n")
            if line.strip() and not line.startswith("#"):
                break
    return ""


# --- reading -----------------------------------------------------------------------------------------------------


def _read(path: Path, source: str) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(source, [Problem("recipe", f"cannot be read: {error.strerror}.")]) from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(source, [Problem("recipe", f"is larger than {MAX_BYTES // 1024} KiB.")])
    return raw


def _tree(raw: bytes, problems: list[Problem]) -> Node | None:
    try:
        return parse(raw.decode("utf-8-sig"), problems)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problems.append(Problem("recipe", "is not UTF-8 text.", "Save it as UTF-8.", line))
        return None


def _recipe(root: Node | None, path: Path, raw: bytes, problems: list[Problem]) -> Recipe | None:
    if root is None:
        return None
    digest = hashlib.sha256(raw).hexdigest()
    about = {"source": str(path), "folder": path.absolute().parent, "sha256": digest, "lines": dict(_lines(root))}
    recipe = read_section(At(root, "recipe", problems), Recipe, defaults=about)
    if recipe is None or _given(root, "training", "learning_rate"):
        return recipe
    rate = LEARNING_RATES[recipe.adapter.type]
    return replace(recipe, training=replace(recipe.training, learning_rate=rate))


def _given(node: Node | None, *keys: str) -> bool:
    for key in keys:
        node = node.entries.get(key) if isinstance(node, Table) else None
    return node is not None


def _lines(node: Node, path: str = "") -> Iterator[tuple[str, int]]:
    """Path and line of every field."""
    if not isinstance(node, Table):
        return
    for key, child in node.entries.items():
        here = f"{path}.{key}" if path else key
        if key in node.lines:
            yield here, node.lines[key]
        yield from _lines(child, here)


def _line(node: Node | None, path: str) -> int:
    for key in path.split("."):
        node = node.entries.get(key) if isinstance(node, Table) else None
    return node.line if node else 0


# --- other spellings ----------------------------------------------------------------------------------------------

_SPELLINGS = {"from": "start_from"}  # `from` is no name in Python


def _respell(root: Node, problems: list[Problem]) -> None:
    """Let a field be written by its other name."""
    if not isinstance(root, Table):
        return
    for other, name in _SPELLINGS.items():
        if other not in root.entries:
            continue
        line = root.lines.pop(other, 0)
        if name in root.entries:
            problems.append(Problem(other, f"is the same as '{name}', which is there too.", "Leave one out.", line))
        else:
            root.lines[name] = line
            root.entries[name] = root.entries[other]
        del root.entries[other]


# --- overrides ---------------------------------------------------------------------------------------------------


def _override(root: Node, overrides: Overrides, problems: list[Problem]) -> None:
    """Put every override into the tree."""
    if isinstance(overrides, str):
        overrides = [overrides]
    if isinstance(overrides, Mapping):
        for path, value in overrides.items():
            _put(root, str(path), from_python(value, problems, str(path)), problems)
        return
    for text in overrides:
        path, equals, value_text = str(text).partition("=")
        if not equals:
            problems.append(Problem(join("", path), "is not an override.", "Write training.epochs=1."))
            continue
        _put(root, path.strip(), _value(value_text, path, problems), problems)


def _value(text: str, path: str, problems: list[Problem]) -> Node | None:
    return parse(text, problems, join("", path), lines=False) if text.strip() else Scalar("", plain=True)


def _put(root: Node, path: str, value: Node | None, problems: list[Problem]) -> None:
    *parents, last = path.split(".")
    if value is None:
        return
    if not last or not all(parents):
        problems.append(Problem(join("", path), "is not a field path.", "Write training.epochs=1."))
        return
    node = root
    for key in parents:
        if isinstance(node, Table):
            node = node.entries.setdefault(key, Table({}, {}))
    if not isinstance(node, Table):
        problems.append(Problem(join("", path), "lies in a field that is no mapping."))
        return
    node.entries[last] = _typed_here(value) if parents == ["data"] else value
    node.lines.pop(last, None)


def _typed_here(value: Node) -> Node:
    """A file named in an override, as seen from where it was typed."""
    if not isinstance(value, Scalar) or value.is_null or not value.text.strip() or "\0" in value.text:
        return value
    if value.text.startswith("~") or value.text.endswith(("/", "\\")):
        return value
    return replace(value, text=str(Path(value.text).absolute()))


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_lists(item) for item in value]
    return value
