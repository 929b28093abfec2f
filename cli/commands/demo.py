"""`ahl demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..app import command, new_app
from ..opening import open_store, silence
from ..options import StoreOption
from ..progress import reporting
from ..render import say

app = new_app()


@command(app, "ahl demo", "ahl demo --json figures.json", name="demo")
def run(
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write all figures to FILE as JSON.", show_default=False),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Show everything once, on real models: train, swap, mix, merge.

    Trains two adapters of different kinds on one base, compares each with the bare base, swaps and mixes them on the
    live model, and merges one into a checkpoint that plain transformers loads. About five minutes on two CPU cores.
    """
    silence()
    from ...workflows.demo import run_demo

    with reporting() as on_event:
        run_demo(json_path, store=open_store(store), say=say, on_event=on_event)
