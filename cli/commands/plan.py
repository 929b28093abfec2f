"""`ahl plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..app import command, new_app
from ..guard import UsageProblem
from ..opening import open_store, silence
from ..options import JsonOption, StoreOption
from ..planning import plan_lines
from ..progress import reporting
from ..render import emit, say

app = new_app()


@command(
    app,
    "ahl plan sql",
    "ahl plan my-recipe.yaml -o training.batch_size=32",
    "ahl plan my-recipe.yaml --fit 4GB --write fitting.yaml",
    "ahl plan a.yaml b.yaml --together --json",
    name="plan",
)
def run(
    recipe: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="A built-in recipe's name, or a YAML file.")],
    override: Annotated[
        list[str] | None, typer.Option("--override", "-o", metavar="KEY=VALUE", help="Change a field of the recipe.")
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="Plan training several recipes at once on the base that they share.")
    ] = False,
    fit: Annotated[
        str | None, typer.Option("--fit", metavar="SIZE", help="Most memory of process or device, such as 8GB.")
    ] = None,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="FILE", help="Write the recipe, set so that it fits, there.")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what training a recipe would take, before the first step.

    It says how it is computed, too, and why. A few packs of the recipe's own rows are computed, and nothing is learnt,
    stored or kept of them. What is chosen changes speed and memory, not what is learnt: a step keeps its rows.
    """
    if len(recipe) > 1 and not together:
        raise UsageProblem("Several recipes are planned at once only when asked to.", "Add --together.")
    if write is not None and len(recipe) > 1:
        raise UsageProblem("--write writes one recipe.", "Plan one, or leave it out.")
    silence()
    from ...recipe import load_recipe

    plans = [load_recipe(one, override or ()) for one in recipe]  # before the imports that take seconds
    opened = open_store(store)
    from ...workflows.plan import plan, write_recipe

    with reporting() as on_event:
        made = plan(*plans, store=opened, fit=fit, on_event=on_event)
    if write is not None:
        write_recipe(plans[0], made, write)
    if as_json:
        emit(made.to_dict())
        return
    say(*plan_lines(made), "")
    if write is not None:
        say(f"Written to {write}; `ahl train {write}` trains it.")
    elif fit is not None:
        say("As overrides: " + " ".join(f"-o {one}" for one in made.overrides))
