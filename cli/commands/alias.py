"""`ahl alias`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..app import command, new_app
from ..guard import UsageProblem
from ..opening import open_store
from ..options import JsonOption, StoreOption
from ..render import emit, say

if TYPE_CHECKING:
    from ...store import Move

app = new_app()


@command(
    app,
    "ahl alias sql:prod 3           # promote, or go back to, version 3",
    "ahl alias sql:prod             # where it points, and pointed before",
    "ahl alias sql:prod --remove",
    name="alias",
)
def run(
    target: Annotated[str, typer.Argument(metavar="NAME:ALIAS", show_default=False)],
    version: Annotated[str | None, typer.Argument(metavar="VERSION", show_default=False)] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the alias away; the version stays.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version, look at it, or take it away."""
    from ...names import Ref, check_version

    ref = Ref.parse(target)
    if ref.alias is None:
        raise UsageProblem(f"{ref} is not an alias.", "Write NAME:ALIAS, for example sql:prod.")
    if remove and version is not None:
        raise UsageProblem("Give a version or --remove, not both.")
    opened = open_store(store)
    if remove:
        opened.unalias(ref.name, ref.alias)
    elif version is not None:
        opened.alias(ref.name, ref.alias, check_version(version.removeprefix("@")))
    elif not opened.alias_history(ref.name, ref.alias):
        opened.resolve(ref)  # says what there is
    current = opened.aliases(ref.name).get(ref.alias)
    moves = opened.alias_history(ref.name, ref.alias)
    if as_json:
        keys = ("version", "time", "event")
        told = [{key: getattr(move, key) for key in keys} | {"reason": dict(move.reason)} for move in moves]
        emit({"alias": target, "version": current, "history": told})
        return
    say(f"{target} -> {ref.name}@{current}" if current else f"{target} is taken away")
    if version is None and not remove:
        say(*(f"  {move.time}  {_told(move)}" for move in moves))


def _told(move: Move) -> str:
    if move.version is None:
        return "taken away"
    return {"set": f"version {move.version}", "refuse": f"not promoted to version {move.version}"}.get(
        move.event, f"version {move.version} ({move.event})"
    )
