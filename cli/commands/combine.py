"""`ahl combine`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..app import command, new_app
from ..mixing import (
    ROWS,
    AdaptersArgument,
    ErrorOption,
    NoEvalOption,
    RankOption,
    RowsOption,
    WeightsOption,
    error_line,
    read_members,
    read_share,
    read_size,
    show_made,
)
from ..opening import open_store, silence
from ..options import BaseOption, DeviceOption, JsonOption, QuantizeOption, StoreOption
from ..progress import reporting

app = new_app()


@command(
    app,
    "ahl combine sql@1 tone@2 --name mix",
    "ahl combine sql@1=0.7 tone@2=0.3 --method ties --density 0.2",
    "ahl combine sql@1 rude@1 --method task_arithmetic --weights 1,-0.5",
    "ahl combine sql@1 sql@2 sql@3 --method svd --error 1% --no-eval",
    name="combine",
    interrupted="interrupted; nothing was stored",
)
def run(
    refs: AdaptersArgument,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="linear (the exact sum), cat, svd, ties, dare_linear, dare_ties, magnitude_prune, slerp or "
            "task_arithmetic.",
        ),
    ] = "linear",
    weights: WeightsOption = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Of the new version [default: the names, and -mix].")
    ] = None,
    rank: RankOption = None,
    error: ErrorOption = None,
    density: Annotated[
        str, typer.Option("--density", metavar="SHARE", help="Elements that ties, DARE and pruning keep.")
    ] = "0.5",
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="What DARE drops.")] = 0,
    majority: Annotated[
        str, typer.Option("--majority", metavar="HOW", help="How signs are elected: total (by size) or frequency.")
    ] = "total",
    head: Annotated[
        str | None, typer.Option("--head", metavar="REF", help="Whose classification head is kept.")
    ] = None,
    rows: RowsOption = ROWS,
    no_eval: NoEvalOption = False,
    base: BaseOption = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = "auto",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Combine adapters of one base into a new version, measured on their test data.

    Weights are equal and add up to 1 where none are given; 1 each for task_arithmetic, ties and dare_ties. The card has
    parents, weights and errors. Where the base is not on this disk, the version is stored unmeasured.
    """
    names, numbers = read_members(refs, weights)
    wished = read_size(rank, error)
    kept = 1.0 if density.strip() in ("1", "1.0", "100%") else read_share(density, "--density")
    opened = open_store(store)
    silence()
    from ...combining.combine import Options
    from ...combining.terms import weighted_sum
    from ...workflows.combine import make_combined
    from ...workflows.combine_setting import Setting

    options = Options(rank=rank, error=wished, density=kept or 0.0, seed=seed, majority_sign=majority)  # type: ignore[arg-type]
    with reporting() as on_event:
        setting = Setting(opened, base, quantize, device, not no_eval, rows, on_event)
        made = make_combined(
            names, method, options, setting, weights=numbers, name=name, head=head, choose_head="--head {}"
        )
    origin = made.card.origin
    parts = weighted_sum((one["ref"], one["weight"]) for one in origin["members"])
    show_made(made, as_json, [f"{parts}, by {origin['method']}", error_line(origin)])
