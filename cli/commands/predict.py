"""`ahl predict`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from ...errors import DataError
from ..app import command, new_app
from ..json_lines import write_rows
from ..opening import open_runtime, open_store
from ..options import BaseOption, DeviceOption, JsonOption, QuantizeOption, RefArgument, StoreOption
from ..progress import reporting
from ..render import emit, say

app = new_app()


@command(
    app,
    "ahl predict topics --input tickets.jsonl --output labelled.jsonl",
    "ahl predict mine --input rows.jsonl --output out.jsonl --field question",
    name="predict",
)
def run(
    ref: RefArgument,
    source: Annotated[
        Path, typer.Option("--input", "-i", metavar="F.jsonl", help="Rows to answer.", show_default=False)
    ],
    target: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="F.jsonl", help="Written whole, or not at all.", show_default=False),
    ],
    field: Annotated[
        str | None,
        typer.Option("--field", help="Column to read, not the one its task reads.", show_default=False),
    ] = None,
    base: BaseOption = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = "auto",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer every row of a file.

    Each row is kept; label, score and scores are added, or words, tags and scores, or the answer: as predicted_label
    and so on, where the rows have such a column already.
    """
    opened = open_store(store)
    found = opened.resolve(ref)
    from ...tasks.rows import read_jsonl

    if target.absolute().resolve() == source.absolute().resolve():
        raise DataError(f"{target} is the input itself.", "Name another file for --output.")
    rows = read_jsonl(source)  # before the base, which takes longer
    with reporting() as on_event, closing(open_runtime(opened, ref, base, quantize, device, on_event)) as runtime:
        from ...workflows.predict import predict_rows

        count = write_rows(target, predict_rows(runtime, found, rows, field=field, on_event=on_event))
    name = f"{found.name}@{found.version}"
    if as_json:
        emit({"ref": name, "input": str(source), "output": str(target.absolute()), "rows": count})
    else:
        say(f"{count} rows answered by {name} -> {target}")
