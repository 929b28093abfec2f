"""What `ahl sweep` and `ahl tune` share: lengths of time, the table of what was found, the command that goes on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import TrainingInterrupted
from .guard import UsageProblem
from .render import Column, counted, emit, printable, say, seconds, table

if TYPE_CHECKING:
    from ..workflows.search_results import SearchResult

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A built-in recipe's name, or a YAML file.")]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option("--override", "--set", "-o", metavar="KEY=VALUE", help="Change a field of the recipe for all."),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Folder for results.csv, results.json and plot.png.")
]
SpaceOption = Annotated[
    Path | None,
    typer.Option(
        "--space",
        metavar="FILE",
        help="What is searched, as YAML: `rank: [8, 16]`, `lr: {low: 1e-4, high: 1e-2, log: true}`.",
    ),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with what was broken off.")]
AnewOption = Annotated[
    bool, typer.Option("--from-scratch", help="Begin anew, although there is something to go on with.")
]

_PARTS = re.compile(
    r"(?:(\d{1,4}(?:\.\d{1,3})?)h)?(?:(\d{1,6}(?:\.\d{1,3})?)m(?:in)?)?(?:(\d{1,7}(?:\.\d{1,3})?)s)?", re.ASCII
)
_SHOWN = 20  # rows of a table on a screen; the files hold all


def read_duration(text: str) -> float:
    """Seconds of `20m`, `90s`, `1h30m`.

    Raises:
        UsageProblem: it is no length of time.
    """
    match = _PARTS.fullmatch(text.replace(" ", ""))
    hours, minutes, rest = (float(part or 0) for part in match.groups()) if match else (0.0, 0.0, 0.0)
    found = 3600 * hours + 60 * minutes + rest
    if not found:
        raise UsageProblem(f"{text!r} is no length of time.", "Write it as 20m, 90s or 1h30m.")
    return found


def show(result: SearchResult, as_json: bool, go_on: str) -> None:
    """Say what a search found; with how to go on, if it was interrupted.

    Raises:
        TrainingInterrupted: it was, and everything is said.
    """
    if as_json:
        emit(result.to_dict())
    else:
        _say(result)
    if result.interrupted:
        stored = f"; the best so far is {result.best}" if result.best else ""
        raise TrainingInterrupted(f"Stopped{stored}.", f"Go on with: {go_on}", result.interrupted)


def _say(result: SearchResult) -> None:
    from ..workflows.search_space import brief, short

    axes, metrics = result.axes, sorted({name for one in result.trials for name in one.metrics if name != "loss"})
    tested = sorted({name for one in result.trials for name in one.test})
    columns = [Column("TRIAL", right=True), *(Column(short(path).upper(), 1, right=True) for path in axes)]
    columns += [Column("LOSS", right=True), *(Column(name.upper(), 2, right=True) for name in metrics)]
    columns += [*(Column(f"TEST {name.upper()}", 3, right=True) for name in tested), Column("STEPS", 5, right=True)]
    columns += [Column("ENDED", 4), Column("STORED", 0)]
    rows: list[list[object]] = []
    for one in result.trials[:_SHOWN]:
        figures = [one.metrics.get(name) for name in metrics] + [one.test.get(name) for name in tested]
        row: list[object] = [one.number, *(brief(one.parameters.get(path)) for path in axes)]
        row += [_figure(one.loss, 4), *(_figure(value, 3) for value in figures)]
        rows.append([*row, f"{one.steps}", one.note if one.state == "failed" else one.state or "open", one.ref])
    say(*table(columns, rows))
    if len(result.trials) > _SHOWN:
        say(f"and {counted(len(result.trials) - _SHOWN, 'more trials')}, in {printable(result.files[0])}")
    if any(one.interval is not None for one in result.repeats):
        say("", "Over seeds, mean validation loss with its 95 % interval:")
        for group in result.repeats[:_SHOWN]:
            told = ", ".join(f"{short(path)} {brief(value)}" for path, value in group.parameters.items())
            width = f" ± {group.interval:.4f}" if group.interval is not None else ""
            say(
                printable(f"  {told or 'all'}: {_figure(group.loss, 4)}{width} ({counted(len(group.trials), 'seeds')})")
            )
    say(
        "",
        f"{counted(len(result.trials), 'trials')} in {seconds(result.seconds)} of training, sorted by validation loss",
    )
    for path in result.files:
        say(printable(f"  {path}"))
    if result.best:
        say(f"Best: {result.best}. Try it with `ahl run --adapter {result.best} PROMPT`.")


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


@contextmanager
def told_how(go_on: str) -> Iterator[None]:
    """Say how to go on, where a signal ends the block."""
    try:
        yield
    except TrainingInterrupted as error:
        raise TrainingInterrupted(error.message, f"Go on with: {go_on}", error.exit_code) from error


def going_on(words: Sequence[str], options: Sequence[tuple[str, Any]], store: Path | None) -> str:
    """The command line that goes on with a search."""
    parts = ["ahl", *words]
    for option, value in [*options, ("--store", store)]:
        for one in value if isinstance(value, list) else [value]:
            parts += [option, str(one)] if one is not None else []
    return shlex.join([*parts, "--resume"])
