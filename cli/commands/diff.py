"""`ahl diff`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..app import command, new_app
from ..differences import difference_lines
from ..guard import Failure, UsageProblem
from ..opening import open_base, open_store, silence
from ..options import BaseOption, DeviceOption, JsonOption, QuantizeOption, StoreOption
from ..progress import reporting
from ..render import emit, printable, remark, say

if TYPE_CHECKING:
    from ...bases.load import Base

app = new_app()


@command(
    app,
    "ahl diff sql@1 sql@2",
    "ahl diff sql:prod sql --outputs 20   # let both answer 20 rows of the test data now",
    "ahl diff sql@1 sql@2 --layers        # every module's weights",
    name="diff",
)
def run(
    a: Annotated[str, typer.Argument(metavar="A", help="name, name@3 or name:alias.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="What to compare it with.", show_default=False)],
    outputs: Annotated[
        int, typer.Option("--outputs", min=0, metavar="N", help="Load the base and let both answer N rows.")
    ] = 0,
    layers: Annotated[bool, typer.Option("--layers", help="Show the weights of every module.")] = False,
    base: BaseOption = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = "auto",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two versions: recipe, data, metrics, weights, answers.

    Weights are compared by the Frobenius norm of each change and the cosine between them: 1 is the same direction, 0
    nothing in common. Exits with 1 when --outputs cannot be had; the rest is printed.
    """
    chosen = base is not None or quantize is not None or device != "auto"
    if chosen and not outputs:
        raise UsageProblem("A base is loaded for --outputs only.", "Add --outputs N.")
    opened = open_store(store)
    one, two = opened.resolve(a), opened.resolve(b)
    silence()
    from ...workflows.diff import diff

    with reporting() as on_event:

        def chosen_base() -> Base:
            return open_base(opened.card(one), base, quantize, device, on_event)

        load = chosen_base if chosen else None
        found = diff(one, two, store=opened, base=load, outputs=outputs, on_event=on_event)
    if as_json:
        emit(found.to_dict())
    else:
        say(*difference_lines(found, layers))
    if found.outputs_refused:
        remark(printable(f"error: no answers were given now: {found.outputs_refused}", keep_lines=True))
        raise Failure("The outputs were not compared.")
