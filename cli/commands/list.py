"""`ahl list`."""

from __future__ import annotations

from ..app import command, new_app
from ..listing import list_adapters
from ..options import JsonOption, StoreOption

app = new_app()


@command(app, "ahl list", "ahl list --json | jq -r '.adapters[].ref'", name="list")
def run(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List the stored adapters."""
    list_adapters(store, as_json)
