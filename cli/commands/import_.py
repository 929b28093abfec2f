"""`ahl import`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..app import command, new_app
from ..opening import open_store, silence
from ..options import JsonOption, StoreOption
from ..progress import reporting
from ..render import emit, printable, say

if TYPE_CHECKING:
    from ...names import Ref
    from ...store import Store

app = new_app()


@command(
    app,
    "ahl import ./peft-checkpoint --name mine",
    "ahl import ./peft-checkpoint --name mine --base smollm2-135m-instruct",
    "ahl import sql.tar.gz --name sql",
    "ahl import hub:owner/name --name sql",
    "ahl import hub:owner/name@v1 --name sql",
    name="import",
    interrupted="interrupted; nothing was stored",
)
def run(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder that PEFT saved, a .tar, .tar.gz or .zip of one, or hub:owner/name[@revision].",
            show_default=False,
        ),
    ],
    name: Annotated[str, typer.Option("--name", help="Name in the store.", show_default=False)],
    base: Annotated[
        str | None, typer.Option("--base", help="Its base, where the folder names one that is not here.")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store a PEFT folder, an archive or a Hub repository as a new version.

    Only adapter_config.json, adapter_model.safetensors and the card of an export are read; nothing is run. A revision
    of the Hub is bound to its commit, and what is stored says which.
    """
    opened = open_store(store)
    known, found = ({"name": base} if base else None), dict[str, str]()
    if source.startswith("hub:"):
        ref, found = _pull(opened, source, name, known)
    else:
        ref = opened.import_(source, name, known)
    card = opened.card(ref)
    if as_json:
        about = {"path": str(opened.folder(ref)), "adapter": card.adapter, "base": card.base.get("name")}
        emit({"ref": str(ref), "digest": ref.digest, **about, **found})
        return
    made_for = card.base.get("name") or "a base it does not name"
    pinned = f", from hub:{found['repo']}@{found['commit']}" if found else ""
    say(
        printable(f"{ref}: {card.adapter.get('type')} for {made_for}{pinned}"),
        f"Try it with `ahl run --adapter {ref} PROMPT`.",
    )


def _pull(store: Store, source: str, name: str, known: dict[str, Any] | None) -> tuple[Ref, dict[str, str]]:
    """The stored version, and the repository and commit it is from."""
    silence()
    from ...names import check_name
    from ...workflows.hub import commit_of, parse_source, pull

    repo, revision = parse_source(source)
    check_name(name)
    commit = commit_of(repo, revision)
    with reporting() as on_event:
        ref = pull(repo, name, revision=commit, store=store, base_card=known, on_event=on_event)
    return ref, {"repo": repo, "commit": commit}
