"""`ahl import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..app import command, new_app
from ..opening import open_store
from ..options import JsonOption, StoreOption
from ..render import emit, printable, say

app = new_app()


@command(
    app,
    "ahl import ./peft-checkpoint --name mine",
    "ahl import ./peft-checkpoint --name mine --base smollm2-135m-instruct",
    name="import",
    interrupted="interrupted; nothing was stored",
)
def run(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A folder that PEFT saved.", show_default=False)],
    name: Annotated[str, typer.Option("--name", help="Name in the store.", show_default=False)],
    base: Annotated[
        str | None, typer.Option("--base", help="Its base, where the folder names one that is not here.")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store a PEFT folder as a new version.

    Only adapter_config.json and adapter_model.safetensors are read; nothing in the folder is run.
    """
    opened = open_store(store)
    ref = opened.import_(path, name, {"name": base} if base else None)
    card = opened.card(ref)
    if as_json:
        about = {"path": str(opened.folder(ref)), "adapter": card.adapter, "base": card.base.get("name")}
        emit({"ref": str(ref), "digest": ref.digest, **about})
        return
    made_for = card.base.get("name") or "a base it does not name"
    say(
        printable(f"{ref}: {card.adapter.get('type')} for {made_for}"), f"Try it with `ahl run --adapter {ref} PROMPT`."
    )
