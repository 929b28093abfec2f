"""`ahl show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..app import command, new_app
from ..options import JsonOption, RefArgument, StoreOption
from ..showing import show_adapter

app = new_app()


@command(
    app,
    "ahl show sql",
    "ahl show sql@2",
    "ahl show sql:prod --json",
    "ahl show sql@2 --plot curves.png",
    "ahl show sql@2 --plot curves.png --with sql@1 --with tone",
    name="show",
)
def run(
    ref: RefArgument,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw how it was trained into this file: .png, .svg or .pdf."),
    ] = None,
    beside: Annotated[
        list[str] | None, typer.Option("--with", metavar="REF", help="Draw this one's curves over them, with --plot.")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is known of one adapter.

    The curve of its training is of its card: loss of every step (smoothed), validation, and the learning rate.
    """
    show_adapter(ref, store, as_json, plot, beside or ())
