"""`ahl gc`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import StoreError
from ..app import command, new_app
from ..guard import Failure
from ..opening import open_store
from ..options import JsonOption, StoreOption
from ..render import counted, emit, printable, say, size

if TYPE_CHECKING:
    from ...store import Leftover, Store, Swept
    from ...training.runs.folders import BrokenOff
    from ...workflows.search_trials import Kept

app = new_app()
_HOURS = 24.0


@command(
    app, "ahl gc --dry-run", "ahl gc", "ahl gc --older-than 0    # when nothing else works on the store", name="gc"
)
def run(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    hours: Annotated[
        float | None,
        typer.Option("--older-than", min=0.0, metavar="HOURS", help="Age of unfinished work that is given up [24]."),
    ] = None,
    runs: Annotated[
        bool,
        typer.Option(
            "--runs",
            help="Remove training runs that were broken off or diverged, and searches, too; --resume has nothing then.",
        ),
    ] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove what crashed or finished work has left behind.

    Nothing that a version or an alias needs is touched; `ahl remove` takes versions away. Exits with 1 when something
    could not be removed.
    """
    opened = open_store(store)
    opened.require()
    hours = _HOURS if hours is None else hours
    swept = opened.sweep(dry_run, hours * 3600)
    waiting, searches = _runs(opened, runs and not dry_run), _searches(opened, runs and not dry_run)
    if as_json:
        told = [{**asdict(one), "folder": str(one.folder)} for one in waiting]
        more = {"searches": [{**asdict(one), "folder": str(one.folder)} for one in searches]}
        emit({"store": str(opened.path), "dry_run": dry_run, **_report(swept), "runs": told, **more})
        if swept.kept:
            raise Failure("Not everything could be removed.")
        return
    for one in swept.gone:
        say(f"{size(one.bytes):>8}  {printable(one.path)}  ({one.reason})")
    would = "would go" if dry_run else "gone"
    if swept.gone:
        say(f"{counted(len(swept.gone), 'leftovers')} {would}, {size(_total(swept.gone))}")
    elif not (swept.kept or waiting or searches):
        say("Nothing is left over.")
    say(*_beside(swept, hours))
    for waits in waiting:
        say(_run_line(waits, runs, dry_run))
    for search in searches:
        say(_search_line(search, runs, dry_run))
    if swept.kept:
        listed = ", ".join(one.path for one in swept.kept)
        raise StoreError(
            f"{counted(len(swept.kept), 'leftovers')} could not be removed from {opened.path}: {listed}.",
            "Make the store writable and try again.",
        )


def _run_line(one: BrokenOff, wanted: bool, dry_run: bool) -> str:
    fate = "--runs removes it" if one.diverged else "`ahl train --resume` goes on with it; --runs removes it"
    if wanted:
        fate = "would go" if dry_run else "gone"
    what = f"broken off after step {one.step}"
    if one.diverged:
        what = f"{', '.join(one.diverged)} diverged after step {one.step}, and would again with this recipe"
    told = f"run of {', '.join(one.names)}, {what}: {fate}"
    return f"{size(one.bytes):>8}  {printable(f'runs/{one.folder.name}  ({told})')}"


def _search_line(one: Kept, wanted: bool, dry_run: bool) -> str:
    fate = "--runs removes it" if one.done else f"`ahl {one.kind} --resume` goes on with it; --runs removes it"
    if wanted:
        fate = "would go" if dry_run else "gone"
    told = f"{one.kind} of {one.name}, {one.ended} of {counted(one.trials, 'adapters')} done: {fate}"
    return f"{size(one.bytes):>8}  {printable(f'runs/{one.folder.name}  ({told})')}"


def _searches(store: Store, remove: bool) -> list[Kept]:
    """The searches there are; those that are gone now, if they are to be removed. Their versions stay."""
    from ...workflows.search_trials import kept_searches, remove_search

    found = kept_searches(store.path)
    return [one for one in found if remove_search(one.folder)] if remove else found


def _runs(store: Store, remove: bool) -> list[BrokenOff]:
    """The training runs that were broken off; those that are gone now, if they are to be removed."""
    from ...training.runs.folders import broken_off, remove_run

    found = broken_off(store.path)
    return [one for one in found if remove_run(one.folder)] if remove else found


def _beside(swept: Swept, hours: float) -> list[str]:
    """What was left alone, and what takes more space than it might."""
    told = []
    if swept.younger:
        left = counted(swept.younger, "operations")
        told.append(f"{left} under way, or broken off less than {hours:g} h ago: left alone (see --older-than)")
    if swept.copied:
        told.append(
            f"{size(swept.copied)} of equal content are copies: hard links between the files are missing, "
            "as on a file system without them, or in a store that was copied"
        )
    return told


def _report(swept: Swept) -> dict[str, Any]:
    return {
        "bytes": _total(swept.gone),
        "removed": [asdict(one) for one in swept.gone],
        "not_removed": [asdict(one) for one in swept.kept],
        "younger": swept.younger,
        "copied_bytes": swept.copied,
    }


def _total(some: list[Leftover]) -> int:
    return sum(one.bytes for one in some)
