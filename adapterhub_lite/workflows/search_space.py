"""What a search varies: the points of a grid, or ranges and choices to draw from."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import AdapterHubError, InvalidName, Problem, RecipeError, Unsupported
from ..formats.files import read_regular
from ..names import check_name
from ..recipe import LoraAdapter, PrefixAdapter, Recipe, changed_recipe, recipe_dict
from ..recipe.nodes import MAX_BYTES, parse
from ..recipe.options import read_option
from ..recipe.readers import At
from ..recipe.training import LEARNING_RATES

MOST_POINTS = 256
_SHORT = {"learning_rate": "lr", "batch_size": "batch", "max_length": "length", "weight_decay": "decay"}
_LONG = {short: name for name, short in _SHORT.items()} | {"dropout": "dropout"}
_AWAY = 10.0  # times the default rate, up and down
_RANKS, _ALPHAS, _TOKENS = (4, 8, 16, 32, 64), (16.0, 32.0, 64.0), (10, 20, 40)
_DROPOUT = 0.3
_FRACTIONS = {"learning_rate", "alpha", "dropout", "epochs", "warmup", "weight_decay", "max_grad_norm"}


@dataclass(frozen=True)
class Point:
    """One recipe of a grid.

    Attributes:
        name: of the version that it becomes.
        parameters: what it sets, by the paths of the fields.
    """

    number: int
    name: str
    parameters: dict[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, drawn evenly, or evenly in their logarithm."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Choices:
    """A few values."""

    values: tuple[Any, ...]


Space = dict[str, Range | Choices]


def field_path(recipe: Recipe, key: str) -> str:
    """The path of a field by its last part, or as it is: `rank` is adapter.rank, `lr` training.learning_rate.

    Raises:
        Unsupported: it is none that a search may vary, with the nearest.
    """
    key = _LONG.get(key, key)
    known = {
        f"{part}.{field.name}": field.name
        for part, owner in (("adapter", recipe.adapter), ("training", recipe.training))
        for field in fields(owner)
        if "read" in field.metadata
    }
    found = [path for path, name in known.items() if key in (path, name)]
    if found:
        return found[0]
    if key.startswith(("adapter.", "training.")):  # a part of a part, or of another kind: the recipe says it better
        return key
    near = get_close_matches(key, [*known, *known.values()], n=1)
    raise Unsupported(
        f"{key!r} is no field of this recipe's adapter or training; a search varies those.",
        f"Did you mean {near[0]}?" if near else f"There are {', '.join(sorted(set(known.values())))}.",
    )


def grid_points(recipe: Recipe, grid: Mapping[str, Iterable[object]] | Sequence[str]) -> list[Point]:
    """Every combination of a grid's values: {"rank": [8, 16]} or ["rank=8,16"], the last key running fastest.

    Raises:
        Unsupported: no grid, or one that is too large or names a field or value twice.
        RecipeError: a value that the recipe does not take.
    """
    axes: dict[str, list[object]] = {}
    for key, values in grid.items() if isinstance(grid, Mapping) else map(_axis, grid):
        path, listed = field_path(recipe, key.strip()), list(values)
        if not listed or path in axes:
            raise Unsupported(
                f"The grid gives {path} {'twice' if path in axes else 'no value'}.", "Write rank=8,16 once a field."
            )
        axes[path] = listed
    count = math.prod(len(values) for values in axes.values())
    if not axes or count > MOST_POINTS:
        raise Unsupported(
            f"The grid has {count if axes else 0:,} points; it may have 1 to {MOST_POINTS}.",
            "Give fewer values, or let `ahl tune` draw some.",
        )
    return _combined(recipe, axes)


def grid_words(grid: Mapping[str, Iterable[object]] | Sequence[str]) -> list[str]:
    """A grid as `ahl sweep --grid` takes it."""
    if not isinstance(grid, Mapping):
        return list(grid)
    return [f"{key}={','.join(map(_word, values))}" for key, values in grid.items()]


def _word(value: object) -> str:
    listed = list(value) if isinstance(value, tuple) else value
    return value if isinstance(value, str) else json.dumps(listed)


def _combined(recipe: Recipe, axes: Mapping[str, Sequence[object]]) -> list[Point]:
    found: list[Point] = []
    for number, values in enumerate(itertools.product(*axes.values())):
        pairs = dict(zip(axes, values, strict=True))
        made = changed_recipe(recipe, _overrides(pairs))
        parameters = {path: value_at(made, path) for path in axes}
        twin = next((one for one in found if one.parameters == parameters), None)
        if twin is not None:
            raise Unsupported(f"Points {twin.number + 1} and {number + 1} of the grid are the same.", "Leave one out.")
        name = _point_name(recipe.name, parameters, number)
        found.append(Point(number, name, parameters, changed_recipe(made, {"name": name})))
    names = [point.name for point in found]
    if len(set(names)) < len(names):
        found = [_renamed(point, f"{recipe.name[:50]}-point{point.number + 1}") for point in found]
    return found


def _renamed(point: Point, name: str) -> Point:
    return Point(point.number, name, point.parameters, changed_recipe(point.recipe, {"name": name}))


def _overrides(pairs: Mapping[str, object]) -> Mapping[str, object] | Sequence[str]:
    """Texts are read as they are in `-o`; other values are what they are."""
    if any(isinstance(value, str) for value in pairs.values()):
        return [f"{path}={value}" for path, value in pairs.items()]
    return dict(pairs)


def _axis(text: str) -> tuple[str, list[object]]:
    key, equals, values = text.partition("=")
    if not equals or not key.strip():
        raise Unsupported(f"{text!r} is no axis of a grid.", "Write rank=8,16 or training.learning_rate=1e-4,3e-4.")
    return key, list(_split(values))


def _split(text: str) -> list[str]:
    """Parts between commas that stand in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _point_name(name: str, parameters: Mapping[str, Any], number: int) -> str:
    """`sql-rank8-lr1e-4`; numbered where that cannot be a name."""
    made = "-".join([name, *(f"{short(path)}{brief(value)}" for path, value in parameters.items())]).lower()
    try:
        return check_name(made)
    except InvalidName:
        return check_name(f"{name[:50]}-point{number + 1}")


def short(path: str) -> str:
    """A field's name as names and plots have it: lr, rank."""
    last = path.rpartition(".")[2]
    return _SHORT.get(last, last.replace("_", ""))


def brief(value: object) -> str:
    """A value in few characters: 1e-4, 0.05, 16, q_proj+v_proj."""
    if isinstance(value, float):
        text = f"{value:.6g}"
        if 0 < abs(value) < 0.01:
            mantissa, _, power = f"{value:.5e}".partition("e")
            text = f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
        return text
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def value_at(recipe: Recipe, path: str) -> Any:
    """What a recipe says at a path."""
    found: Any = recipe_dict(recipe)
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


# --- spaces ------------------------------------------------------------------------------------------------------


def default_space(recipe: Recipe, encoder: bool) -> Space:
    """Learning rate, and what its adapter type has of rank, alpha, tokens; dropout on an encoder.

    Rates lie around the default of the adapter's type, which for LoRA is about ten times that of full fine-tuning;
    scaling by alpha / rank keeps the best rate nearly the same over ranks ("LoRA Without Regret", Thinking Machines,
    2025), so ranks and alphas are few. The recipe's own values are always among them.
    """
    adapter, rate = recipe.adapter, recipe.training.learning_rate
    usual = LEARNING_RATES[adapter.type]
    found: Space = {"training.learning_rate": Range(min(usual / _AWAY, rate), max(usual * _AWAY, rate), log=True)}
    if isinstance(adapter, LoraAdapter):
        found["adapter.rank"] = Choices(tuple(sorted({*_RANKS, adapter.rank})))
        found["adapter.alpha"] = Choices(tuple(sorted({*_ALPHAS, adapter.alpha})))
        if encoder:
            found["adapter.dropout"] = Range(0.0, max(_DROPOUT, adapter.dropout))
    elif isinstance(adapter, PrefixAdapter):
        found["adapter.tokens"] = Choices(tuple(sorted({*_TOKENS, adapter.tokens})))
    return found


def read_space(path: Path, recipe: Recipe) -> Space:
    """A space from a YAML file: `learning_rate: {low: 1e-5, high: 1e-2, log: true}`, `rank: [4, 8, 16]`.

    Raises:
        RecipeError: every problem at once; also a value that the recipe does not take.
    """
    problems: list[Problem] = []
    try:
        text = read_regular(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(str(path), [Problem("space", "is not UTF-8 text.")]) from error
    node = parse(text, problems, "space")
    plain = None if node is None else read_option(At(node, "space", problems))
    if problems:
        raise RecipeError(str(path), problems)
    return checked_space(plain, recipe, str(path))


def checked_space(plain: object, recipe: Recipe, source: str = "space") -> Space:
    """A space from plain data. Raises as `read_space`."""
    problems: list[Problem] = []
    found: Space = {}
    if not isinstance(plain, Mapping) or not plain:
        raise RecipeError(source, [Problem("space", "names no field.", "Write rank: [4, 8, 16].")])
    for key, told in plain.items():
        try:
            path = field_path(recipe, str(key))
            found[path] = _part(path, told)
            ends = found[path]
            for value in (ends.low, ends.high) if isinstance(ends, Range) else ends.values:
                changed_recipe(recipe, {path: int(value) if isinstance(ends, Range) and ends.whole else value})
        except RecipeError as error:
            problems += error.problems
        except (AdapterHubError, ValueError) as error:
            problems.append(Problem(str(key), str(error)))
    if problems:
        raise RecipeError(source, problems)
    return found


def _part(path: str, told: object) -> Range | Choices:
    if isinstance(told, list | tuple) and told:
        return Choices(tuple(told))
    if not isinstance(told, Mapping) or not {"low", "high"} <= set(told) <= {"low", "high", "log"}:
        raise ValueError("expected a list of values, or {low: 1, high: 9} with log: true if need be.")
    low, high, log = told["low"], told["high"], told.get("log", False)
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in (low, high)) or not isinstance(log, bool):
        raise ValueError("low and high are numbers, log is true or false.")
    if not low < high or (log and low <= 0):
        raise ValueError(f"low must be less than high{', and more than 0 with log' if log else ''}.")
    whole = isinstance(low, int) and isinstance(high, int) and path.rpartition(".")[2] not in _FRACTIONS
    return Range(low, high, log, whole)


def space_dict(space: Space) -> dict[str, Any]:
    """A space as plain data, as `checked_space` takes it."""
    found: dict[str, Any] = {}
    for path, part in space.items():
        if isinstance(part, Choices):
            found[path] = list(part.values)
        else:
            found[path] = {"low": part.low, "high": part.high, "log": part.log}
    return found
