"""`ahl chat`."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from ..app import command, new_app
from ..conversation import Conversation
from ..opening import open_runtime, open_store
from ..options import (
    BaseOption,
    DeviceOption,
    JsonOption,
    QuantizeOption,
    SeedOption,
    StoreOption,
    TemperatureOption,
    TopPOption,
)
from ..progress import reporting

app = new_app()


@command(app, "ahl chat", "ahl chat --adapter sql", "ahl chat --base ./my-model --temperature 0.7", name="chat")
def run(
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", metavar="REF", help="Adapter to begin with.")
    ] = None,
    base: BaseOption = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Longest answer.")] = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = "auto",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Talk to a base and switch its adapters as you go.

    Within it: /use REF, /base, /adapters, /reset, /help, /quit. Ctrl-C stops an answer. With --json, one object a line.
    """
    opened = open_store(store)
    with reporting(terse=True) as on_event:
        runtime = open_runtime(opened, adapter, base, quantize, device, on_event)
    with closing(runtime):
        from ...runtime.sampling import Sampling

        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
        Conversation(runtime, max_new_tokens, sampling, as_json).hold()
