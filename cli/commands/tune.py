"""`ahl tune`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..app import command, new_app
from ..guard import UsageProblem
from ..opening import open_store, silence
from ..options import JsonOption, StoreOption
from ..progress import reporting
from ..searching import (
    AnewOption,
    OutOption,
    OverrideOption,
    RecipeArgument,
    ResumeOption,
    SpaceOption,
    going_on,
    read_duration,
    show,
    told_how,
)

app = new_app()


@command(
    app,
    "ahl tune sql --budget 20m",
    "ahl tune my-recipe.yaml --trials 16 --seed 1    # the same trials each time",
    "ahl tune my-recipe.yaml --budget 1h --space space.yaml --out search/",
    "ahl tune my-recipe.yaml --trials 32 --resume    # go on, or on to more trials",
    name="tune",
    interrupted="interrupted; nothing was stored",
)
def run(
    recipe: RecipeArgument,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="TIME", help="Time to search in, as 20m, 90s or 1h30m.")
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, metavar="N", help="Trials at most.")] = None,
    space: SpaceOption = None,
    pruner: Annotated[str, typer.Option("--pruner", help="Who ends early: halving, median or none.")] = "halving",
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Of what is drawn [the recipe's].")] = None,
    together: Annotated[
        int, typer.Option("--together", min=1, metavar="N", help="Trials that are drawn and trained at once.")
    ] = 4,
    override: OverrideOption = None,
    name: Annotated[str | None, typer.Option("--name", help="Name in the store [default: the recipe's].")] = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    from_scratch: AnewOption = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search learning rate, rank and the like in a given time; store the best.

    Trials are drawn by Optuna, trained together and compared by the loss on the validation part, which the recipe must
    have; the worse half ends after a quarter and after half of the steps.
    Ctrl-C ends the search with the best so far stored; --resume goes on.
    """
    if budget is None and trials is None:
        raise UsageProblem("A search needs an end.", "Give it --budget 20m, or --trials 16, or both.")
    if resume and from_scratch:
        raise UsageProblem("--resume and --from-scratch exclude each other.", "Give one of them.")
    limit = None if budget is None else read_duration(budget)
    silence()
    from ...recipe import load_recipe

    plan = load_recipe(recipe, override or ())  # before the imports that take seconds
    opened = open_store(store)
    options: list[tuple[str, Any]] = [
        ("--budget", budget),
        ("--trials", trials),
        ("--space", space),
        ("--pruner", pruner),
        ("--seed", seed),
    ]
    options += [("--together", together), ("-o", override), ("--name", name), ("--out", out)]
    go_on = going_on(["tune", recipe], options, store)
    from ...workflows.tune import tune

    with told_how(go_on), reporting() as on_event:
        result = tune(
            plan, budget=limit, trials=trials, space=space, pruner=pruner, seed=seed, together=together,
            store=opened, name=name, resume=resume, from_scratch=from_scratch, out=out, on_event=on_event,
        )  # fmt: skip
    show(result, as_json, go_on)
