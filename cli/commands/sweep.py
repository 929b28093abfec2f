"""`ahl sweep`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..app import command, new_app
from ..guard import UsageProblem
from ..opening import open_store, silence
from ..options import JsonOption, StoreOption
from ..progress import reporting
from ..searching import AnewOption, OutOption, OverrideOption, RecipeArgument, ResumeOption, going_on, show, told_how

app = new_app()


@command(
    app,
    "ahl sweep sql --grid rank=8,16 --grid learning_rate=1e-4,3e-4,1e-3",
    "ahl sweep my-recipe.yaml --grid lr=3e-4,1e-3 --grid seed=0,1,2    # with intervals over seeds",
    "ahl sweep sql --grid adapter.targets=all-linear,[q_proj,v_proj] --set training.epochs=1 --out sweep/",
    name="sweep",
    interrupted="interrupted; adapters that were done are stored",
)
def run(
    recipe: RecipeArgument,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid", metavar="FIELD=A,B", help="Values of a field of adapter or training; as many as wanted."
        ),
    ] = None,
    override: OverrideOption = None,
    name: Annotated[str | None, typer.Option("--name", help="First part of the names [default: the recipe's].")] = None,
    together: Annotated[
        int | None, typer.Option("--together", min=1, metavar="N", help="Most that are trained at once [what fits].")
    ] = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    from_scratch: AnewOption = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train every point of a grid together, store each, and compare them.

    The versions are called NAME-POINT, as sql-rank8-lr3e-4. The table is sorted by the loss on the validation part,
    which the recipe must have; where seeds repeat, it has the mean with its 95 % interval.
    """
    if not grid:
        raise UsageProblem("A sweep needs a grid.", "Add --grid rank=8,16, as often as there are fields to vary.")
    if resume and from_scratch:
        raise UsageProblem("--resume and --from-scratch exclude each other.", "Give one of them.")
    silence()
    from ...recipe import load_recipe

    plan = load_recipe(recipe, override or ())  # before the imports that take seconds
    opened = open_store(store)
    options = [("--grid", grid), ("-o", override), ("--name", name), ("--together", together), ("--out", out)]
    go_on = going_on(["sweep", recipe], options, store)
    from ...workflows.sweep import sweep

    with told_how(go_on), reporting() as on_event:
        result = sweep(
            plan, grid, store=opened, name=name, together=together, resume=resume, from_scratch=from_scratch,
            out=out, on_event=on_event,
        )  # fmt: skip
    show(result, as_json, go_on)
