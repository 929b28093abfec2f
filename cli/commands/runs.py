"""`ahl runs`."""

from __future__ import annotations

from ..app import command, new_app
from ..options import JsonOption, StoreOption
from ..runs import list_runs

app = new_app()


@command(app, "ahl runs", "ahl runs --json", name="runs")
def run(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List training runs, sweeps and tunes that have not ended, and how to go on.

    KEPT says when the state that is kept was written. A run that diverged says so: with the same recipe it would again.
    `ahl gc --runs` removes those that nobody wants.
    """
    list_runs(store, as_json)
