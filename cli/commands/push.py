"""`ahl push`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..app import command, new_app
from ..opening import open_store, silence
from ..options import JsonOption, RefArgument, StoreOption
from ..progress import reporting
from ..render import emit, say

app = new_app()


@command(
    app,
    "ahl push sql@1 hub:me/sql-adapter",
    "ahl push sql:prod hub:me/sql-adapter --public --without-paths",
    name="push",
    interrupted="interrupted; the repository has the whole version or is as it was",
)
def run(
    ref: RefArgument,
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="hub:owner/name; made if it is not there.", show_default=False)
    ],
    public: Annotated[bool, typer.Option("--public", help="Let everybody read it [default: private].")] = False,
    without_paths: Annotated[
        bool, typer.Option("--without-paths", help="Cut this machine's paths to file names; changes the digest.")
    ] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", metavar="TEXT", help="Of the commit.")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Upload a version to the Hugging Face Hub, with a model card, in one commit.

    Log in once with `hf auth login`. `ahl import hub:owner/name` gives the same version again, with the same digest.
    """
    silence()
    from ...workflows.hub import parse_target, push

    repo = parse_target(target)
    opened = open_store(store)
    found = opened.resolve(ref)
    with reporting() as on_event:
        pushed = push(
            found,
            repo,
            store=opened,
            private=not public,
            without_paths=without_paths,
            message=message,
            on_event=on_event,
        )
    name = f"{found.name}@{found.version}"
    if as_json:
        about = {"repo": pushed.repo, "commit": pushed.commit, "url": pushed.url}
        emit({"ref": name, "digest": pushed.digest, **about})
        return
    say(f"{name} -> hub:{pushed.repo}@{pushed.commit}", f"See {pushed.url}")
