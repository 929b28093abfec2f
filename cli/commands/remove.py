"""`ahl remove`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..app import command, new_app
from ..guard import UsageProblem
from ..opening import open_store
from ..options import JsonOption, RefArgument, StoreOption
from ..render import emit, say

app = new_app()


@command(app, "ahl remove sql@1", "ahl remove sql@2 --force    # its aliases go too", name="remove")
def run(
    ref: RefArgument,
    force: Annotated[bool, typer.Option("--force", help="Also where an alias or a child depends on it.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove a version for ever.

    Its number is not used again. A bare name will do only where it has a single version.
    """
    from ...names import Ref

    opened = open_store(store)
    asked = Ref.parse(ref)
    versions = opened.versions(asked.name)
    if asked.version is None and asked.alias is None and len(versions) > 1:
        listed = ", ".join(map(str, versions))
        raise UsageProblem(f"{asked.name} has versions {listed}.", f"Say which: ahl remove {asked.name}@{versions[-1]}")
    gone = opened.remove(asked, force)
    name = f"{gone.name}@{gone.version}"
    if as_json:
        emit({"removed": name, "digest": gone.digest})
    else:
        say(f"removed {name}")
