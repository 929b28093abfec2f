"""`ahl remove`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..app import command, new_app
from ..guard import UsageProblem
from ..opening import open_store
from ..options import JsonOption, RefArgument, StoreOption
from ..render import emit, say

if TYPE_CHECKING:
    from ...names import Ref
    from ...store import Store

app = new_app()


@command(app, "ahl remove sql@1", "ahl remove sql@2 --force    # its aliases go too", name="remove")
def run(
    ref: RefArgument,
    force: Annotated[bool, typer.Option("--force", help="Also where an alias or a child depends on it.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove a version for ever.

    Its number is not used again. A bare name will do only where it has a single version. With --force the aliases that
    point to it go too, and are named.
    """
    from ...names import Ref

    opened = open_store(store)
    asked = Ref.parse(ref)
    versions = opened.versions(asked.name)
    if asked.version is None and asked.alias is None and len(versions) > 1:
        listed = ", ".join(map(str, versions))
        raise UsageProblem(f"{asked.name} has versions {listed}.", f"Say which: ahl remove {asked.name}@{versions[-1]}")
    found = opened.resolve(asked)
    aliases = _aliases(opened, found)
    gone = opened.remove(found, force)
    name = f"{gone.name}@{gone.version}"
    left = set(opened.aliases(gone.name))
    aliases = [f"{gone.name}:{alias}" for alias in aliases if alias not in left]
    if as_json:
        emit({"removed": name, "digest": gone.digest, "aliases": aliases})
        return
    also = f", and its alias{'es' if len(aliases) > 1 else ''} {', '.join(aliases)}" if aliases else ""
    say(f"removed {name}{also}")


def _aliases(store: Store, ref: Ref) -> list[str]:
    return [alias for alias, version in store.aliases(ref.name).items() if version == ref.version]
