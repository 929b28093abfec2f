"""`ahl verify`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from ..app import command, new_app
from ..guard import Failure
from ..opening import open_store
from ..options import JsonOption, StoreOption
from ..render import emit, printable, say

app = new_app()


@command(app, "ahl verify", "ahl verify sql@3", "ahl verify --json", name="verify")
def run(
    ref: Annotated[
        str | None, typer.Argument(metavar="REF", help="One version [default: the whole store].", show_default=False)
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the bytes of one version, or of the whole store.

    Exits with 1 when anything is not as it was stored.
    """
    opened = open_store(store)
    if ref is not None:
        opened.resolve(ref)  # an unknown reference is an error, not a finding
    findings = opened.verify(ref)
    if as_json:
        emit({"store": str(opened.path), "sound": not findings, "findings": [asdict(one) for one in findings]})
    elif findings:
        say(*(printable(one) for one in findings))
    else:
        count = 1 if ref is not None else sum(len(opened.versions(name)) for name in opened.names())
        say(f"{ref or opened.path}: sound ({count} version{'s' if count != 1 else ''} checked)")
    if findings:
        raise Failure(f"{len(findings)} findings.")
