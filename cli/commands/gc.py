"""`ahl gc`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from ..app import command, new_app
from ..opening import open_store
from ..options import JsonOption, StoreOption
from ..render import emit, printable, say, size

app = new_app()


@command(
    app, "ahl gc --dry-run", "ahl gc", "ahl gc --older-than 0    # when nothing else works on the store", name="gc"
)
def run(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    hours: Annotated[
        float | None,
        typer.Option("--older-than", min=0.0, metavar="HOURS", help="Age of unfinished work that is given up [24]."),
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove what crashed or finished work has left behind.

    Nothing that a version or an alias needs is touched; `ahl remove` takes versions away.
    """
    opened = open_store(store)
    gone = opened.gc(dry_run, None if hours is None else hours * 3600)
    total = sum(one.bytes for one in gone)
    if as_json:
        emit({"store": str(opened.path), "dry_run": dry_run, "bytes": total, "removed": [asdict(one) for one in gone]})
        return
    for one in gone:
        say(f"{size(one.bytes):>8}  {printable(one.path)}  ({one.reason})")
    would = "would go" if dry_run else "gone"
    say(f"{len(gone)} leftovers {would}, {size(total)}" if gone else "Nothing is left over.")
