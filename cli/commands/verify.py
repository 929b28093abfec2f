"""`ahl verify`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..app import command, new_app
from ..guard import Failure, UsageProblem
from ..opening import open_store, silence
from ..options import JsonOption, StoreOption
from ..progress import reporting
from ..render import counted, emit, printable, say

if TYPE_CHECKING:
    from ...store import Finding, Healed, Store

app = new_app()


@command(
    app,
    "ahl verify                  # every byte of every version, alias and object",
    "ahl verify sql@3 --deep     # load it on its base and measure its effect again",
    "ahl verify --repair         # restore damaged files from equal content that is sound",
    "ahl verify --all --deep --json",
    name="verify",
)
def run(
    ref: Annotated[
        str | None, typer.Argument(metavar="REF", help="One version [default: the whole store].", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="The whole store, which is the default.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Also load each version and measure its effect.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="First restore what equal sound content allows.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the bytes of one version, or of the whole store.

    Exits with 1 when anything is not as it was stored, or where there is no store.
    """
    if ref is not None and (everything or repair):
        raise UsageProblem("REF names one version; --all and --repair are for the whole store.", "Leave REF out.")
    opened = open_store(store)
    if ref is not None:
        opened.resolve(ref)  # an unknown reference is an error, not a finding
    else:
        opened.require()
    healed = opened.repair() if repair else []
    findings = opened.verify(ref)
    measured, wrong, skipped = _deep(opened, ref, {one.where for one in findings}) if deep else (None, [], [])
    findings += wrong
    count = 1 if ref is not None else sum(len(opened.versions(name)) for name in opened.names())
    if as_json:
        emit(_report(opened, findings, healed, skipped, count, measured))
    else:
        say(*(f"healed: {one.where} {one.file}, from {one.source}" for one in healed))
        say(*(printable(one) for one in (*findings, *skipped)))
        if not findings and not count:
            say(printable(f"{opened.path}: an empty store, nothing to check"))
        elif not findings:
            also = f", {measured} measured" if deep else ""
            say(f"{ref or opened.path}: sound ({counted(count, 'versions')} checked{also})")
    if findings:
        raise Failure(f"{counted(len(findings), 'findings')}.")


def _deep(opened: Store, ref: str | None, damaged: set[str]) -> tuple[int, list[Finding], list[Finding]]:
    """How many were measured, what is wrong with them, what could not be measured; damaged versions are left out."""
    silence()
    from ...workflows.deep_verify import verify_deep

    chosen = [opened.resolve(one) for one in ([ref] if ref is not None else _refs(opened))]
    whole = [one for one in chosen if f"{one.name}@{one.version}" not in damaged]
    with reporting() as on_event:
        found, skipped = verify_deep(whole, store=opened, on_event=on_event)
    return len(whole) - len(skipped), found, skipped


def _refs(opened: Store) -> list[str]:
    return [f"{name}@{version}" for name in opened.names() for version in opened.versions(name)]


def _report(
    opened: Store,
    findings: list[Finding],
    healed: list[Healed],
    skipped: list[Finding],
    count: int,
    measured: int | None,
) -> dict[str, Any]:
    return {
        "store": str(opened.path),
        "sound": not findings,
        "versions": count,
        "measured": measured,
        "findings": [asdict(one) for one in findings],
        "not_measured": [asdict(one) for one in skipped],
        "healed": [asdict(one) for one in healed],
    }
