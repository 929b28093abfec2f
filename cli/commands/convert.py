"""`ahl convert`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..app import command, new_app
from ..mixing import (
    ROWS,
    ErrorOption,
    NoEvalOption,
    RankOption,
    RowsOption,
    error_line,
    read_size,
    saved_line,
    show_made,
)
from ..opening import open_store, silence
from ..options import BaseOption, DeviceOption, JsonOption, QuantizeOption, RefArgument, StoreOption
from ..progress import reporting

app = new_app()


@command(
    app,
    "ahl convert sql@1 --rank 4",
    "ahl convert sql@1 --error 1% --name sql-small",
    "ahl convert dora@2 --rank 32 --to lora",
    name="convert",
    interrupted="interrupted; nothing was stored",
)
def run(
    ref: RefArgument,
    rank: RankOption = None,
    error: ErrorOption = None,
    to: Annotated[str, typer.Option("--to", metavar="METHOD", help="lora, which all serving engines read.")] = "lora",
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Of the new version [default: NAME-rN or NAME-lora].")
    ] = None,
    rows: RowsOption = ROWS,
    no_eval: NoEvalOption = False,
    base: BaseOption = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = "auto",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring an adapter into plain LoRA, or to another rank, as a new version.

    Each layer gets the best approximation of its rank. DoRA and IA3 need the base's weights on this disk; prefixes and
    prompts change no weights and stay what they are.
    """
    wished = read_size(rank, error)
    opened = open_store(store)
    silence()
    from ...workflows.combine_setting import Setting
    from ...workflows.convert import make_converted

    with reporting() as on_event:
        setting = Setting(opened, base, quantize, device, not no_eval, rows, on_event)
        made = make_converted(ref, setting, rank=rank, error=wished, to=to, name=name)
    origin = made.card.origin
    lines = [f"{made.card.parents[0]} ({origin['from']}) as {origin['to']}", error_line(origin)]
    show_made(made, as_json, [*lines, saved_line(origin["from_parameters"], made.card.adapter["parameters"])])
