"""`ahl train`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import TrainingInterrupted
from ..app import command, new_app
from ..guard import UsageProblem
from ..listing import primary_metric
from ..opening import open_store, silence
from ..options import JsonOption, StoreOption
from ..progress import reporting
from ..render import emit, metrics, say
from ..watching import Watch

if TYPE_CHECKING:
    from ...names import Ref
    from ...recipe import Recipe
    from ...store import Store

app = new_app()


@command(
    app,
    "ahl train sql",
    "ahl train my-recipe.yaml --name support",
    "ahl train sentiment -o training.epochs=1 -o adapter.tokens=10",
    "ahl train my-recipe.yaml --resume    # after Ctrl-C, a crash or a power cut",
    "ahl train a.yaml b.yaml c.yaml --together --plot curves.png",
    "ahl train sql --log - | jq 'select(.event == \"step\").loss'",
    "ahl recipes show sql > my-recipe.yaml    # to start one of your own",
    name="train",
    interrupted="interrupted; nothing was stored",
)
def run(
    recipe: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="A built-in recipe's name, or a YAML file.")],
    override: Annotated[
        list[str] | None, typer.Option("--override", "-o", metavar="KEY=VALUE", help="Change a field of the recipe.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name in the store [default: the recipe's].")] = None,
    together: Annotated[
        bool, typer.Option("--together", help="Train several recipes at once on the one base that they share.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that was broken off.")] = False,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Begin anew, although there is a run to go on with.")
    ] = False,
    log: Annotated[
        str | None,
        typer.Option(
            "--log", metavar="FILE", help="Append each event to this file, a JSON object a line; - is stdout."
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option("--tensorboard", metavar="DIR", help="Write losses, rates and metrics for TensorBoard."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the curves at the end: .png, .svg or .pdf.")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the adapter that a recipe describes and store it.

    Everything about the recipe and its data is checked before the base is loaded. Ctrl-C finishes the step that runs
    and keeps the state, to go on with --resume; a second one ends at once. Nothing is stored before training is done.
    """
    _check(recipe, name, together, resume, from_scratch)
    watch = Watch(log, tensorboard, plot)
    watch.check(as_json)
    silence()
    from ...recipe import load_recipe

    plans = [load_recipe(one, override or ()) for one in recipe]  # before the imports that take seconds
    opened = open_store(store)
    try:
        refs = _trained(plans, opened, name, resume, from_scratch, watch)
    except TrainingInterrupted as error:
        hint = f"Go on with: {_command(recipe, override, name, together, store, watch)}" if error.hint else ""
        raise TrainingInterrupted(error.message, hint, error.exit_code) from error
    watch.draw(opened, refs)
    if watch.takes_stdout:
        return
    if as_json:
        told = [_report(opened, ref) for ref in refs]
        emit({"adapters": told} if together else told[0])
        return
    _say(opened, refs)


def _say(store: Store, refs: list[Ref]) -> None:
    for ref in refs:
        card = store.card(ref)
        split = (primary_metric(card.metrics, card.task.get("metrics") or ()) or {}).get("split")
        measured = f": {split} {metrics(card.metrics[split])}" if split else ""
        say(f"{ref}{measured}", f"Try it with `ahl run --adapter {ref} PROMPT`; `ahl show {ref}` tells more.")


def _check(recipes: list[str], name: str | None, together: bool, resume: bool, from_scratch: bool) -> None:
    if len(recipes) > 1 and not together:
        raise UsageProblem("Several recipes are trained at once only when asked to.", "Add --together.")
    if together and name is not None:
        raise UsageProblem("--name names one adapter; those of --together have their recipes' names.", "Leave it out.")
    if resume and from_scratch:
        raise UsageProblem("--resume and --from-scratch exclude each other.", "Give one of them.")


def _trained(
    plans: list[Recipe], store: Store, name: str | None, resume: bool, from_scratch: bool, watch: Watch
) -> list[Ref]:
    from ...workflows.train import train, train_together

    more: dict[str, Any] = {"store": store, "resume": resume, "from_scratch": from_scratch}
    names = [plan.name for plan in plans] if name is None else [name]
    with reporting() as show, watch.listening(show, names, resume) as (on_event, stored):
        if len(plans) > 1:
            refs = train_together(plans, on_event=on_event, **more)
        else:
            refs = [train(plans[0], name=name, on_event=on_event, **more)]
        stored([_report(store, ref) for ref in refs])
    return refs


def _command(
    recipes: list[str], override: list[str] | None, name: str | None, together: bool, store: Path | None, watch: Watch
) -> str:
    """The command that goes on."""
    words = ["ahl", "train", *recipes]
    words += [word for one in override or () for word in ("-o", one)]
    words += ["--name", name] if name else []
    words += ["--together"] if together else []
    words += ["--store", str(store)] if store is not None else []
    return shlex.join([*words, *watch.words(), "--resume"])


def _report(store: Store, ref: Ref) -> dict[str, Any]:
    card = store.card(ref)
    figures = {"metrics": card.metrics, "effect": card.effect, "seconds": card.duration_seconds}
    where = str(store.folder(ref))
    return {"ref": str(ref), "digest": ref.digest, "path": where, "adapter": card.adapter, **figures}
