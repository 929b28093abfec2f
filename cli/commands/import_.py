"""`ahl import`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

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
        str | None,
        typer.Option("--base", metavar="BASE", help="Catalogue name, folder or Hub id of its base; it is remembered."),
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store a PEFT folder, an archive or a Hub repository as a new version.

    Only adapter_config.json, adapter_model.safetensors and the card of an export are read; nothing is run. A revision
    of the Hub is bound to its commit, and what is stored says which. With --base an adapter that does not fit that
    base is refused, and it needs no --base afterwards.
    """
    silence()
    from ...workflows.base_choice import run_command
    from ...workflows.hub_client import refuse_address
    from ...workflows.receive import receive

    refuse_address(source)
    opened, found = open_store(store), dict[str, str]()
    present = opened.versions(name)
    if source.startswith("hub:"):
        ref, found = _pull(opened, source, name, base)
    else:
        with reporting() as on_event:
            ref = receive(source, name, store=opened, base=base, on_event=on_event)
    card = opened.card(ref)
    if as_json:
        about = {"path": str(opened.folder(ref)), "adapter": card.adapter, "base": card.base.get("name")}
        outcome = {"outcome": _outcome(opened, ref, present), "healed": [one.file for one in opened.healed]}
        emit({"ref": str(ref), "digest": ref.digest, **outcome, **about, **found})
        return
    made_for = card.base.get("name") or "a base it does not name"
    pinned = f", from hub:{found['repo']}@{found['commit']}" if found else ""
    command = run_command(ref, card, store)
    unknown = ""
    if "--base BASE" in command:
        unknown = " BASE is the one that it was made for: a name of `ahl base list`, a folder or a Hub id."
    if _outcome(opened, ref, present) != "stored":
        say(f"already here as {ref}", *(f"healed: {one.where} {one.file}, from {one.source}" for one in opened.healed))
    say(
        printable(f"{ref}: {card.adapter.get('type')} for {made_for}{pinned}"),
        f"sha256 {ref.digest}",
        printable(f"Try it with `{command}`.{unknown}"),
    )


def _outcome(store: Store, ref: Ref, present: list[int]) -> str:
    """What became of an import: stored, or found among the versions that were present, healed where it was damaged."""
    if ref.version not in present:
        return "stored"
    return "healed" if store.healed else "present"


def _pull(store: Store, source: str, name: str, base: str | None) -> tuple[Ref, dict[str, str]]:
    """The stored version, and the repository and commit it is from."""
    from ...names import check_name
    from ...workflows.hub import commit_of, parse_source, pull

    repo, revision = parse_source(source)
    check_name(name)
    commit = commit_of(repo, revision)
    with reporting() as on_event:
        ref = pull(repo, name, revision=commit, store=store, base=base, on_event=on_event)
    return ref, {"repo": repo, "commit": commit}
