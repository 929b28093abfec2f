"""`ahl runs`: runs and searches that have not ended, and the command that goes on with each."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdapterHubError
from .opening import open_store
from .render import Column, age, emit, printable, say, size, table

if TYPE_CHECKING:
    from ..store import Store
    from ..workflows.search_trials import Waiting

_COLUMNS = (
    Column("RUN"),
    Column("STEP", right=True),
    Column("OF", 2, right=True),
    Column("KEPT", 1),
    Column("SIZE", 3),
)
_SEARCH_COLUMNS = (
    Column("SEARCH"),
    Column("ADAPTERS", right=True),
    Column("OF", 2, right=True),
    Column("KEPT", 1),
    Column("SIZE", 3),
)


def list_runs(store: Path | None = None, as_json: bool = False) -> None:
    """Print the runs of a store, then its searches, the latest first."""
    opened = open_store(store)
    found, searches = _runs(opened, store), _searches(opened, store)
    if as_json:
        emit({"store": str(opened.path), "runs": found, "searches": searches})
        return
    if not found and not searches:
        say(printable(f"No training run in {opened.path} waits to go on."))
        return
    for index, line in enumerate([*_lines(found), *_search_lines(searches)]):
        say(*(["", *line] if index else line))


def _lines(found: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for one in found:
        names, total = ", ".join(one["names"]), one["total"]
        row = (names, one["step"], total if total is not None else "?", age(one["time"]), size(one["bytes"]))
        lines, go_on = table(_COLUMNS, [row]), one["resume"] or one["problem"]
        if one["running"]:
            lines.append("  A process trains it now.")
        elif one["diverged"]:
            lines += [printable(f"  {name}: {told}") for name, told in one["diverged"].items()]
            lines.append("  Change the recipe and train anew; `ahl gc --runs` removes this. If the machine erred:")
            lines.append(printable(f"  {go_on}"))
        else:
            lines.append(printable(f"  {go_on}"))
        yield lines


def _search_lines(found: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for one in found:
        name = f"{one['kind']} of {one['name']}"
        row = (name, one["ended"], one["trials"] or "?", age(one["time"]), size(one["bytes"]))
        told = "A process does it now." if one["running"] else one["resume"] or one["problem"]
        yield [*table(_SEARCH_COLUMNS, [row]), printable(f"  {told}")]


def _runs(store: Store, given: Path | None) -> list[dict[str, Any]]:
    from ..training.runs.folders import checkpoints, diverged, run_folders, steps_done

    found = []
    for folder in run_folders(store.path):
        with suppress(OSError, IndexError):  # it may end while we look
            time = checkpoints(folder)[0][1].stat().st_mtime
            learners = _learners(folder)
            command, problem = _command(learners, given)
            found.append(
                {
                    "folder": str(folder),
                    "names": [str(one.get("name")) for one in learners] or [folder.name],
                    "step": steps_done(folder),
                    "total": _total(learners),
                    "time": _written(time),
                    "bytes": sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()),
                    "running": _is_running(folder),
                    "diverged": diverged(folder),
                    "resume": command,
                    "problem": problem,
                }
            )
    return found


def _searches(store: Store, given: Path | None) -> list[dict[str, Any]]:
    """Sweeps and tunes that have not come to their end."""
    from ..workflows.search_trials import waiting_searches

    found = []
    for one in waiting_searches(store.path):
        command, problem = _search_command(one, given)
        identity = one.head.get("identity")
        name = identity.get("name") if isinstance(identity, dict) else None
        found.append(
            {
                "folder": str(one.folder),
                "kind": one.head["kind"],
                "name": str(name or one.folder.name),
                "ended": sum(not trial.is_open for trial in one.trials),
                "trials": len(one.trials),
                "time": _written(one.time),
                "bytes": one.bytes,
                "running": one.running,
                "resume": command,
                "problem": problem,
            }
        )
    return found


def _search_command(one: Waiting, given: Path | None) -> tuple[str, str]:
    """The command that goes on with a search, or what stands in its way."""
    from .searching import going_on

    kind, asked, learner = one.head["kind"], one.head.get("asked"), one.head.get("identity")
    if not isinstance(asked, dict) or not isinstance(learner, dict) or asked.get("space") is False:
        more = ", space=..." if kind == "tune" else ", grid"
        return "", f"It was begun from Python: {kind}(recipe{more}, resume=True) goes on."
    try:
        source, own_name, changed = _asked(learner)
    except (AdapterHubError, LookupError, TypeError, AttributeError):
        source = str(learner.get("source") or "its recipe")
        return "", f"{source} is not what it was begun with; with the recipe as it was, `ahl {kind} ... --resume`."
    options = [(f"--{key}", _option(key, value)) for key, value in asked.items()]
    options += [("-o", changed), ("--name", learner["name"] if learner["name"] != own_name else None)]
    return going_on([kind, source], options, given), ""


def _option(key: str, value: Any) -> Any:
    """A value as the command line takes it."""
    return f"{value:.3f}".rstrip("0").rstrip(".") + "s" if key == "budget" and value is not None else value


def _written(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _learners(folder: Path) -> list[dict[str, Any]]:
    """What each learner was begun with; nothing where that is damaged."""
    from ..training.runs.folders import read_identity

    with suppress(AdapterHubError, OSError, LookupError, TypeError):
        return [one for one in read_identity(folder)["learners"] if isinstance(one, dict)]
    return []


def _is_running(folder: Path) -> bool:
    from ..training.runs.folders import LOCK, held

    try:
        number = held(folder / LOCK)
    except OSError:  # a store that can only be read: nobody trains there
        return False
    if number is not None:
        os.close(number)
    return number is None


def _total(learners: Sequence[Mapping[str, Any]]) -> int | None:
    from ..workflows.curves import planned_steps

    try:
        return max(planned_steps(int(one["data"]["train"]["rows"]), one["recipe"]["training"]) for one in learners)
    except (LookupError, TypeError, ValueError, ArithmeticError):
        return None


def _command(learners: Sequence[Mapping[str, Any]], given: Path | None) -> tuple[str, str]:
    """The command that goes on, tried out as far as its recipes go; or what stands in its way."""
    words, own_name = ["ahl", "train"], ""
    overrides: list[list[str]] = []
    try:
        for one in learners:
            source, own_name, changed = _asked(one)
            words.append(source)
            overrides.append(changed)
    except (AdapterHubError, LookupError, TypeError, AttributeError):
        overrides = []
    if not overrides or any(changed != overrides[0] for changed in overrides):
        sources = ", ".join(str(one.get("source") or "its recipe") for one in learners) or "its recipe"
        return "", f"{sources} is not what it was begun with; with the recipe as it was, `ahl train RECIPE --resume`."
    words += [word for text in overrides[0] for word in ("-o", text)]
    if len(learners) > 1:
        words.append("--together")
    elif learners[0]["name"] != own_name:
        words += ["--name", str(learners[0]["name"])]
    words += ["--store", str(given)] if given is not None else []
    return shlex.join([*words, "--resume"]), ""


def _asked(learner: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    """A recipe's name or file, the adapter's name in it, and the overrides that make it what the run was begun with.

    Raises:
        AdapterHubError: it is gone, or no overrides do.
    """
    from ..recipe import list_recipes, load_recipe, recipe_dict

    path = Path(learner["source"])
    source = next((name for name, _, known in list_recipes() if known.absolute() == path), str(path))
    wanted, plain = learner["recipe"], recipe_dict(load_recipe(source, check_files=False))
    overrides = list(_differences(plain, wanted))
    if {**recipe_dict(load_recipe(source, overrides, check_files=False)), "name": wanted["name"]} != wanted:
        raise AdapterHubError(f"{source} was changed.")
    return source, plain["name"], overrides


def _differences(now: Mapping[str, Any], wanted: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """`training.epochs=2` for what is to be another; the name is no override's."""
    for key, value in wanted.items():
        place = f"{path}{key}"
        if place == "name" or now.get(key) == value:
            continue
        if isinstance(value, Mapping) and isinstance(now.get(key), Mapping):
            yield from _differences(now[key], value, f"{place}.")
        else:
            yield f"{place}={value if isinstance(value, str) else json.dumps(value)}"
