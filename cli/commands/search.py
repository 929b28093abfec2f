"""`ahl search`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..app import command, new_app
from ..listing import search_adapters
from ..options import JsonOption, StoreOption

app = new_app()


@command(
    app,
    "ahl search sql base:smollm2 'accuracy>0.8'",
    "ahl search type:lora quant:nf4 'rank<=16' -alias:prod",
    "ahl search data:reviews 'created>2026-01' 'size<10MB'",
    name="search",
)
def run(
    query: Annotated[list[str], typer.Argument(metavar="QUERY...", show_default=False)],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find adapters by words, base and metrics; everything must hold.

    Words are looked for in every field. Fields: name, alias, digest, base, revision, type, task, quant, origin, parent,
    data (a file, the folders above it, or the beginning of its sha256). Numbers compared with < <= > >= = !=: any
    metric, rank, alpha, parameters, size, tokens, seed, seconds, version, created. A - before a term turns it round.
    """
    search_adapters(" ".join(query), store, as_json)
