"""`ahl recipes`."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated

import typer

from ...errors import NotFound
from ..app import command, new_app
from ..guard import guarded
from ..options import JsonOption
from ..render import Column, emit, say, table

app = new_app("List the built-in recipes, or print one.", invoke_without_command=True)


@app.callback()
def listing(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the built-in recipes, or print one."""
    if context.invoked_subcommand is None:
        raise typer.Exit(guarded(_list, as_json=as_json))


def _list(as_json: bool) -> None:
    from ...recipe import list_recipes

    found = list_recipes()
    if as_json:
        emit({"recipes": [{"name": name, "about": about, "path": str(path)} for name, about, path in found]})
        return
    say(*table((Column("RECIPE"), Column("ABOUT")), [(name, about) for name, about, _ in found]))
    say("", "`ahl train NAME` runs one; `ahl recipes show NAME > mine.yaml` starts one of your own.")


@command(app, "ahl recipes show sql", "ahl recipes show sql > recipes-of-mine/sql.yaml", name="show")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A built-in recipe.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Print a recipe's YAML.

    Paths of data are printed in full, so that a copy anywhere trains on the same rows; point them at files of your own.
    """
    from ...recipe import copied_text, list_recipes

    paths = {known: path for known, _, path in list_recipes()}
    if name not in paths:
        near = get_close_matches(name.lower(), paths, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(paths)}."
        raise NotFound(f"There is no built-in recipe {name!a}.", f"{hint} `ahl recipes` says what they do.")
    path = paths[name]
    text = copied_text(path)
    if as_json:
        emit({"name": name, "path": str(path), "yaml": text})
    else:
        say(text.rstrip("\n"))
