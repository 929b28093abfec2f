"""`ahl alias`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import StoreCorrupt
from ..app import command, new_app
from ..guard import UsageProblem
from ..opening import open_store
from ..options import JsonOption, StoreOption
from ..render import emit, say

if TYPE_CHECKING:
    from ...names import Ref
    from ...store import Move, Store

app = new_app()
_DONE = {"set": "set to", "promote": "promoted to", "rollback": "rolled back to", "refuse": "NOT promoted to"}


@command(
    app,
    "ahl alias sql:prod 3           # promote, or go back to, version 3; sql@3 will do too",
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
    from ...names import Ref

    ref = Ref.parse(target)
    if ref.alias is None:
        raise UsageProblem(f"{ref} is not an alias.", "Write NAME:ALIAS, for example sql:prod.")
    if remove and version is not None:
        raise UsageProblem("Give a version or --remove, not both.")
    opened = open_store(store)
    moving = remove or version is not None
    before = _current(opened, ref, lenient=moving)
    if remove:
        opened.unalias(ref.name, ref.alias)
    elif version is not None:
        opened.alias(ref.name, ref.alias, _version(opened, ref.name, version))
    elif not opened.alias_history(ref.name, ref.alias):
        opened.resolve(ref)  # says what there is
    current = _current(opened, ref, lenient=remove)
    if as_json:
        moved = {"from": before} if moving else {}
        emit({"alias": str(ref), "version": current, **moved, "history": _history(opened, ref, lenient=moving)})
        return
    was = f" (was {ref.name}@{before})" if moving and before not in (None, current) else ""
    say(f"{ref} -> {ref.name}@{current}{was}" if current else f"{ref} is taken away{was}")
    if not moving:
        say(*(f"  {move.time}  {_told(ref, move)}" for move in opened.alias_history(ref.name, ref.alias)))


def _version(store: Store, name: str, text: str) -> int:
    """The version that 3, @3 or a reference of the same name stands for."""
    from ...names import Ref, check_version

    bare = text.removeprefix("@")
    if bare.isdigit() or ("@" not in text and ":" not in text and text != name):
        return check_version(bare)
    asked = Ref.parse(text)
    if asked.name != name:
        raise UsageProblem(f"{asked} is no version of {name}.", f"An alias of {name} names one of its own versions.")
    return store.resolve(asked).version or 0


def _current(store: Store, ref: Ref, lenient: bool) -> int | None:
    """What the alias names; with `lenient` None where its log is damaged, which moving it heals."""
    try:
        return store.aliases(ref.name).get(str(ref.alias))
    except StoreCorrupt:
        if not lenient:
            raise
        return None


def _history(store: Store, ref: Ref, lenient: bool) -> list[dict[str, Any]] | None:
    """Every move as plain data; with `lenient` None where one of them is damaged."""
    try:
        moves = store.alias_history(ref.name, str(ref.alias))
    except StoreCorrupt:
        if not lenient:
            raise
        return None
    keys = ("version", "time", "event")
    return [{key: getattr(move, key) for key in keys} | {"reason": dict(move.reason)} for move in moves]


def _told(ref: Ref, move: Move) -> str:
    if move.version is None:
        return f"{ref} taken away"
    return f"{ref} {_DONE.get(move.event, move.event)} {ref.name}@{move.version}"
