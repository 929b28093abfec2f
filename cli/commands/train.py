"""`ahl train`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..app import command, new_app
from ..listing import primary_metric
from ..opening import open_store, silence
from ..options import JsonOption, StoreOption
from ..progress import reporting
from ..render import emit, metrics, say

app = new_app()


@command(
    app,
    "ahl train sql",
    "ahl train my-recipe.yaml --name support",
    "ahl train sentiment -o training.epochs=1 -o adapter.tokens=10",
    "ahl recipes show sql > my-recipe.yaml    # to start one of your own",
    name="train",
    interrupted="interrupted; nothing was stored",
)
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A built-in recipe's name, or a YAML file.")],
    override: Annotated[
        list[str] | None, typer.Option("--override", "-o", metavar="KEY=VALUE", help="Change a field of the recipe.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name in the store [default: the recipe's].")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the adapter that a recipe describes and store it.

    Everything about the recipe and its data is checked before the base is loaded. Ctrl-C stops the training and stores
    nothing.
    """
    silence()
    from ...recipe import load_recipe

    plan = load_recipe(recipe, override or ())  # before the imports that take seconds
    opened = open_store(store)
    from ...workflows.train import train

    with reporting() as on_event:
        ref = train(plan, store=opened, name=name, on_event=on_event)
    card = opened.card(ref)
    where = opened.folder(ref)
    if as_json:
        figures = {"metrics": card.metrics, "effect": card.effect, "seconds": card.duration_seconds}
        emit({"ref": str(ref), "digest": ref.digest, "path": str(where), "adapter": card.adapter, **figures})
        return
    split = (primary_metric(card.metrics, card.task.get("metrics") or ()) or {}).get("split")
    measured = f": {split} {metrics(card.metrics[split])}" if split else ""
    say(f"{ref}{measured}", f"Try it with `ahl run --adapter {ref} PROMPT`; `ahl show {ref}` tells more.")
