"""`ahl merge`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from ..app import command, new_app
from ..opening import open_store, silence
from ..options import BaseOption, DeviceOption, JsonOption, QuantizeOption, StoreOption
from ..progress import reporting
from ..render import emit, printable, remark, say

if TYPE_CHECKING:
    from ...merging.report import MergeReport, Thresholds

app = new_app()

_TERMINATED = 128 + signal.SIGTERM
_BROKEN_OFF = "broken off; no folder appeared, and the same command goes on with what is durable"
_FORMS = "auto (the checkpoint's types), float32, bfloat16, float16, nf4, int8, gguf-f16 or gguf-q8_0."
_BAKES = "Into which weights of a quantised base: dequantised (those it computed with) or original; auto tries both."
RefsArgument = Annotated[
    str,
    typer.Argument(
        metavar="REF[,REF...]", help="name, name@3 or name:alias; sql@1=0.7 gives a weight.", show_default=False
    ),
]
OutOption = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Absent, or an empty folder.", show_default=False)
]
WeightsOption = Annotated[
    str | None, typer.Option("--weights", metavar="W,W...", help="One an adapter [default: 1 each].")
]
ToOption = Annotated[str, typer.Option("--to", "--dtype", metavar="FORM", help=_FORMS)]
BakeOption = Annotated[str, typer.Option("--bake", metavar="WEIGHTS", help=_BAKES)]
ResidualOption = Annotated[
    int, typer.Option("--residual", min=0, metavar="RANK", help="Beside nf4, an adapter of what rounding lost.")
]
VerifyOption = Annotated[
    str, typer.Option("--verify", help="full, or weights: read every tensor back, and compare no logits.")
]
KlOption = Annotated[float | None, typer.Option("--max-kl", metavar="NATS", help="Largest mean KL of a token.")]
Top1Option = Annotated[
    float | None, typer.Option("--min-top1", metavar="SHARE", help="Least share of equal next tokens.")
]
LostOption = Annotated[
    float | None, typer.Option("--max-lost", metavar="SHARE", help="Largest KL as a share of the adapter's effect.")
]
DropOption = Annotated[
    float | None, typer.Option("--max-metric-drop", metavar="SHARE", help="Largest loss in a task's metric.")
]
LayerOption = Annotated[
    float | None,
    typer.Option("--max-layer-error", metavar="SHARE", help="Of any tensor [default: what its form explains]."),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="Compare on these: a prompt a line, or the task's JSON Lines."),
]
RowsOption = Annotated[
    int, typer.Option("--rows", min=0, metavar="N", help="Most test rows to measure each task on; 0: none.")
]


@command(
    app,
    "ahl merge sql@1 --out merged/",
    "ahl merge sql@1,style@2 --weights 0.7,0.3 --out merged/",
    "ahl merge sql:prod --out merged/ --to gguf-q8_0",
    "ahl merge sql:prod --out merged/ --to nf4 --residual 8 --max-kl 0.05",
    name="merge",
    interrupted=_BROKEN_OFF,
)
def run(
    refs: RefsArgument,
    out: OutOption,
    weights: WeightsOption = None,
    to: ToOption = "auto",
    bake: BakeOption = "auto",
    residual: ResidualOption = 0,
    verify: VerifyOption = "full",
    max_kl: KlOption = None,
    min_top1: Top1Option = None,
    max_lost: LostOption = None,
    max_metric_drop: DropOption = None,
    max_layer_error: LayerOption = None,
    prompts: PromptsOption = None,
    rows: RowsOption = 256,
    base: BaseOption = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = "auto",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bake adapters into a model that plain transformers, or llama.cpp, loads.

    The result is loaded and compared with base + adapters before it appears; what differs too much is not written. The
    report lies beside the weights and is kept in the store, also of a merge that failed.
    """
    opened = open_store(store)
    silence()
    with _as_interrupt(), reporting() as on_event:
        from ...workflows.merge import merge
        from ...workflows.merge_request import numbers_of

        report = merge(
            refs,
            out,
            weights=None if weights is None else numbers_of(weights),
            to=to,
            bake=bake,
            residual=residual,
            verify=verify,
            thresholds=_limits(to, max_kl, min_top1, max_lost, max_metric_drop, max_layer_error),
            prompts=prompts,
            metric_rows=rows,
            store=opened,
            base_name=base,
            quantize=quantize,
            device=device,
            on_event=on_event,
        )
    _render(report, as_json)


class _Terminated(KeyboardInterrupt):
    """SIGTERM asked to end."""


@contextmanager
def _as_interrupt() -> Iterator[None]:
    """Let SIGTERM end a merge as Ctrl-C does: what is durable is kept, what is not is cleared away."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield  # somebody else listens
        return

    def heard(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, heard)
    try:
        yield
    except _Terminated:
        remark(_BROKEN_OFF)
        raise SystemExit(_TERMINATED) from None
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _limits(to: str, *given: float | None) -> Thresholds:
    """The defaults of the target, with what was given in their place, in the order of their fields."""
    from dataclasses import fields, replace

    from ...merging.report import Thresholds

    names = [field.name for field in fields(Thresholds)]
    named = {name: value for name, value in zip(names, given, strict=True) if value is not None}
    return replace(Thresholds.of(to), **named)


def _render(report: MergeReport, as_json: bool) -> None:
    if as_json:
        emit(report.to_dict())
        return
    say(*map(printable, report.lines()))
    reader = "llama.cpp and plain transformers load" if report.to.startswith("gguf") else "plain transformers loads"
    say(printable(f"It is in {report.out}; {reader} it. The figures are in merge_report.html there."))
    if report.residual_rank:
        say("They load it without its repair: README.md there says how PEFT adds the adapter in residual/.")
