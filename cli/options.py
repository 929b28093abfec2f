"""Options that several commands share, each worded once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

StoreOption = Annotated[
    Path | None,
    typer.Option("--store", metavar="DIR", help="The store's folder [default: AHL_HOME, else the user's data folder]."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
RefArgument = Annotated[str, typer.Argument(metavar="REF", help="name, name@3 or name:alias.", show_default=False)]
DeviceOption = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="BASE", help="Catalogue name, folder or Hub id [default: the adapter's own]."),
]
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        "--quantize", metavar="KIND", help="none, int8, nf4 or nf4-double [default: as the adapter was trained]."
    ),
]
TokensOption = Annotated[
    int | None,
    typer.Option("--max-new-tokens", min=1, metavar="N", help="Longest answer [default: the task's, else 256]."),
]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", min=0.0, metavar="T", help="0 takes the likeliest token, 0.7 is lively.")
]
TopPOption = Annotated[float, typer.Option("--top-p", metavar="P", help="Sample among the likeliest that make up P.")]
SeedOption = Annotated[int | None, typer.Option("--seed", metavar="N", help="Make sampling repeatable.")]
