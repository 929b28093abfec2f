"""`ahl run`."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Annotated

import typer

from ..answering import Question, answer_once
from ..app import command, new_app
from ..guard import UsageProblem
from ..opening import open_runtime, open_store
from ..options import (
    BaseOption,
    DeviceOption,
    JsonOption,
    QuantizeOption,
    SeedOption,
    StoreOption,
    TemperatureOption,
    TokensOption,
    TopPOption,
)
from ..progress import reporting
from ..render import emit

app = new_app()


@command(
    app,
    'ahl run "Name three colours."',
    'ahl run --adapter sentiment "The room was cold and the staff rude."',
    "cat question.txt | ahl run --adapter sql:prod",
    'ahl run --raw --temperature 0.8 --seed 1 "Once upon a time"',
    name="run",
)
def run(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The question [default: read stdin].", show_default=False)
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", "-a", metavar="REF", help="Answer with this adapter [default: the bare base]."),
    ] = None,
    base: BaseOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    max_new_tokens: TokensOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = "auto",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer one prompt, streaming.

    The prompt is asked as the adapter was trained to see it. Classifiers answer with a label, taggers with one a word.
    """
    question = Question(_prompt(prompt), raw, max_new_tokens, temperature, top_p, seed)
    opened = open_store(store)
    with reporting(terse=True) as on_event:
        runtime = open_runtime(opened, adapter, base, quantize, device, on_event)
    with closing(runtime):
        told = answer_once(runtime, adapter, question, stream=not as_json)
    if as_json:
        emit(told)


def _prompt(given: str | None) -> str:
    if given is None and sys.stdin.isatty():
        raise UsageProblem("There is no prompt.", 'Write one: ahl run "Name three colours." - or pipe one in.')
    text = sys.stdin.read().rstrip("\n") if given is None else given
    if not text.strip():
        raise UsageProblem("The prompt is empty.")
    return text
