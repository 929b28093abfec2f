"""`ahl eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..app import command, new_app
from ..opening import checked_card, open_base, open_store
from ..options import BaseOption, DeviceOption, JsonOption, QuantizeOption, RefArgument, StoreOption
from ..progress import reporting
from ..render import Column, emit, printable, say, table

if TYPE_CHECKING:
    from ...workflows.evaluate import EvaluationReport

app = new_app()


@command(
    app,
    "ahl eval sql",
    "ahl eval sql@1 --split validation --no-base",
    "ahl eval topics --data fresh.jsonl --json",
    name="eval",
)
def run(
    ref: RefArgument,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="F.jsonl", help="Rows to measure on [default: the data its card names]."),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "test",
    no_base: Annotated[bool, typer.Option("--no-base", help="Do not measure the bare base too.")] = False,
    base: BaseOption = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = "auto",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure an adapter against its bare base."""
    opened = open_store(store)
    found = opened.resolve(ref)
    with reporting() as on_event:
        loaded = open_base(checked_card(opened, found), base, quantize, device, on_event)
        from ...workflows.evaluate import evaluate

        report = evaluate(
            found, store=opened, base=loaded, data=data, split=split, compare=not no_base, on_event=on_event
        )
    if as_json:
        emit(report.to_dict())
    else:
        _render(report)


def _render(report: EvaluationReport) -> None:
    after, before = report.metrics, report.base_metrics
    names = sorted(after, key=lambda name: (name != report.primary_metric, name))
    columns = [Column("METRIC"), Column(report.ref, right=True)]
    rows: list[list[object]] = [[name, f"{after[name]:.3f}"] for name in names]
    if before is not None:
        columns += [Column("BASE", right=True), Column("GAIN", 1, right=True)]
        for row, name in zip(rows, names, strict=True):
            row += [f"{before[name]:.3f}", f"{after[name] - before[name]:+.3f}"]
    say(*table(columns, rows), printable(f"{report.rows} rows of {report.source} (sha256 {report.sha256[:12]})"))
