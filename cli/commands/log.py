"""`ahl log`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..app import command, new_app
from ..history import show_log
from ..options import JsonOption, StoreOption

app = new_app()


@command(app, "ahl log sql", "ahl log sql -n 10", "ahl log sql --json", name="log")
def run(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=1, metavar="N", help="Only the latest N.")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the history of a name, the latest first.

    Versions with metrics, base and parents; what each alias pointed to and when; decisions of `ahl promote`.
    """
    show_log(name, store, as_json, limit)
