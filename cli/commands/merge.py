"""`ahl merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..app import command, new_app
from ..opening import checked_card, open_base, open_store
from ..options import BaseOption, DeviceOption, JsonOption, QuantizeOption, RefArgument, StoreOption
from ..progress import reporting
from ..render import emit, printable, say

app = new_app()


@command(
    app,
    "ahl merge sql@1 --out merged/",
    "ahl merge sql:prod --out merged/ --bake original --dtype bfloat16",
    name="merge",
    interrupted="interrupted; nothing was written",
)
def run(
    ref: RefArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Absent, or an empty folder.", show_default=False)],
    bake: Annotated[
        str,
        typer.Option("--bake", help="Into which weights: dequantised (those it was trained on), original, or auto."),
    ] = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto (the checkpoint's), float32, bfloat16 or float16.")
    ] = "auto",
    base: BaseOption = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = "auto",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bake an adapter into a checkpoint that plain transformers loads.

    The result is compared with base + adapter before it appears; what differs too much is not written.
    """
    opened = open_store(store)
    found = opened.resolve(ref)
    with reporting() as on_event:
        loaded = open_base(checked_card(opened, found), base, quantize, device, on_event)
        from ...workflows.merge import merge

        report = merge(found, out, store=opened, base=loaded, bake=bake, dtype=dtype, on_event=on_event)
    if as_json:
        emit(report.to_dict())
    else:
        say(*map(printable, report.lines()), f"It is in {report.out}; plain transformers loads it.")
