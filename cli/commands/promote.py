"""`ahl promote`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..app import command, new_app
from ..guard import Failure
from ..opening import checked_card, open_base, open_store, silence
from ..options import BaseOption, DeviceOption, JsonOption, QuantizeOption, RefArgument, StoreOption
from ..progress import reporting
from ..render import Column, emit, printable, say, table

if TYPE_CHECKING:
    from ...workflows.figures import Figure
    from ...workflows.promote import Decision

app = new_app()


@command(
    app,
    "ahl promote sql@4 --to prod",
    "ahl promote sql --to prod --margin 0.01 --metric exact_match",
    "ahl promote topics@2 --to prod --data fresh.jsonl --json",
    "ahl promote sql@4 --to prod --again   # measure both, whatever was measured before",
    name="promote",
)
def run(
    ref: RefArgument,
    alias: Annotated[str, typer.Option("--to", metavar="ALIAS", help="The alias to move.", show_default=False)],
    margin: Annotated[
        float, typer.Option("--margin", metavar="M", help="How much worse it may be, 0 to 1, in the metric.")
    ] = 0.0,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="NAME", help="What decides [default: its task's first metric].")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="F.jsonl", help="Rows to measure on [default: its own test data]."),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Measure anew what was measured on the same rows before.")
    ] = False,
    base: BaseOption = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = "auto",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version if it is no worse than what the alias names now.

    Both are measured on the same rows, unless that was done before: then the figure is taken from there, and it is said
    when it was measured. Exits with 1 when it is worse: the alias stays, and its log keeps the decision.
    """
    opened = open_store(store)
    found = opened.resolve(ref)
    silence()
    from ...workflows.promote import promote

    with reporting() as on_event:
        loaded = open_base(checked_card(opened, found), base, quantize, device, on_event) if base or quantize else None
        decision = promote(
            found,
            alias,
            store=opened,
            base=loaded,
            margin=margin,
            metric=metric,
            data=data,
            again=again,
            device=device,
            on_event=on_event,
        )
    if as_json:
        emit({**decision.to_dict(), "moved": decision.moved})
    else:
        _render(decision)
    if not decision.accepted:
        raise Failure(f"{found} was not promoted.")


def _render(decision: Decision) -> None:
    one, target = f"{decision.name}@{decision.candidate}", f"{decision.name}:{decision.alias}"
    before = f"{decision.name}@{decision.current}" if decision.current else None
    if decision.candidate_value is not None:
        columns, row = [Column("METRIC"), Column(one, right=True)], [decision.metric, f"{decision.candidate_value:.3f}"]
        if decision.current_value is not None:
            columns.append(Column(f"{decision.alias} ({before})", right=True))
            row.append(f"{decision.current_value:.3f}")
        say(*table(columns, [row]))
        rows = f"{decision.rows} row{'s' if decision.rows != 1 else ''}"
        say(printable(f"{rows} of {decision.data} (sha256 {decision.data_sha256[:12]})"))
        say(*_reused(one, decision.candidate_figure), *_reused(str(before), decision.current_figure))
    if decision.moved:
        say(f"{target} -> {one}" + (f" (was {before})" if before else ""))
    elif decision.accepted:
        say(f"{target} names {one} already")
    else:
        say(printable(f"refused: {decision.why}; {target} still names {before}"))


def _reused(ref: str, figure: Figure | None) -> list[str]:
    """A line on a figure that was not measured now."""
    if figure is None or figure.source == "now":
        return []
    occasion = "when it was made" if figure.source == "card" else "for an earlier decision"
    return [f"{ref}: measured {figure.time}, {occasion}; --again measures anew"]
