"""`ahl rollback`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..app import command, new_app
from ..guard import UsageProblem
from ..opening import open_store
from ..options import JsonOption, StoreOption
from ..render import emit, say

app = new_app()


@command(app, "ahl rollback sql:prod     # again goes one further back", name="rollback")
def run(
    target: Annotated[str, typer.Argument(metavar="NAME:ALIAS", show_default=False)],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at the version it named before."""
    from ...names import Ref

    asked = Ref.parse(target)
    if asked.alias is None:
        raise UsageProblem(f"{asked} is not an alias.", "Write NAME:ALIAS, for example sql:prod.")
    opened = open_store(store)
    left = opened.resolve(asked)
    now = opened.rollback(asked.name, asked.alias)
    if as_json:
        emit({"alias": target, "version": now.version, "from": left.version, "digest": now.digest})
    else:
        say(f"{target} -> {now.name}@{now.version} (was {left.name}@{left.version})")
