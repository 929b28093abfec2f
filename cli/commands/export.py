"""`ahl export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..app import command, new_app
from ..opening import open_store
from ..options import JsonOption, RefArgument, StoreOption
from ..render import emit, say

app = new_app()


@command(app, "ahl export sql@1 ./sql-peft", name="export")
def run(
    ref: RefArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Absent, or an empty folder.", show_default=False)],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a version as a folder that PEFT loads."""
    opened = open_store(store)
    found = opened.resolve(ref)
    target = opened.export(found, folder)
    if as_json:
        emit({"ref": f"{found.name}@{found.version}", "digest": found.digest, "path": str(target)})
    else:
        say(f"{found.name}@{found.version} -> {target}")
