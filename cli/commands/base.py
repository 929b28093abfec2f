"""`ahl base`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..app import command, new_app
from ..bases import base_facts, list_bases, pull_base
from ..options import JsonOption
from ..progress import reporting
from ..render import Column, emit, fields, say, size, table

app = new_app("List, fetch and show base models.", no_args_is_help=True)
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Catalogue name, folder or Hub id.", show_default=False)
]


@command(app, "ahl base list", name="list")
def listing(as_json: JsonOption = False) -> None:
    """List the bases known by name, and whether they are here."""
    found = list_bases()
    if as_json:
        emit({"bases": found})
        return
    columns = (Column("BASE"), Column("KIND", 2), Column("HERE"), Column("ABOUT", 1))
    say(*table(columns, [(b["name"], b["kind"], "yes" if b["folder"] else "no", b["about"]) for b in found]))
    say("", "`ahl base pull NAME` fetches one. Any folder or Hub id (org/name) of a transformers model works too.")


@command(app, "ahl base pull smollm2-135m-instruct", "ahl base pull gpt2-org/gpt2", name="pull")
def pull(name: NameArgument, as_json: JsonOption = False) -> None:
    """Fetch a base, so that it is here without a network."""
    with reporting() as on_event:
        told = pull_base(name, on_event)
    if as_json:
        emit(told)
    else:
        say(f"{name} ({told['origin']}) -> {told['folder']}")


@command(app, "ahl base show minilm-l6", "ahl base show ./my-model --json", name="show")
def show(name: NameArgument, as_json: JsonOption = False) -> None:
    """Show what is known of a base. Fetches nothing."""
    told = base_facts(name)
    if as_json:
        emit(told)
        return
    told["bytes"] = size(told["bytes"])
    say(*fields((key, value) for key, value in told.items()))
    if not told["folder"]:
        say("", f"It is not here; fetch it with `ahl base pull {name}`.")
