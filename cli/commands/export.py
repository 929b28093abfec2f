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


@command(
    app,
    "ahl export sql@1 ./sql-peft        # a folder that plain peft loads",
    "ahl export sql@1 sql-1.tar         # one file; imported elsewhere it has the same digest",
    name="export",
)
def run(
    ref: RefArgument,
    target: Annotated[
        Path,
        typer.Argument(metavar="TARGET", help="A new folder, or a new file ending in .tar.", show_default=False),
    ],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a version as a folder that PEFT loads, or as one file."""
    opened = open_store(store)
    found = opened.resolve(ref)
    path = opened.export(found, target)
    if as_json:
        emit({"ref": f"{found.name}@{found.version}", "digest": found.digest, "path": str(path)})
    else:
        say(f"{found.name}@{found.version} -> {path}")
