"""`ahl show`."""

from __future__ import annotations

from ..app import command, new_app
from ..options import JsonOption, RefArgument, StoreOption
from ..showing import show_adapter

app = new_app()


@command(app, "ahl show sql", "ahl show sql@2", "ahl show sql:prod --json", name="show")
def run(ref: RefArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show what is known of one adapter."""
    show_adapter(ref, store, as_json)
