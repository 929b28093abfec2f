"""`ahl export`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..app import command, new_app
from ..guard import Failure, UsageProblem
from ..opening import open_store, silence
from ..options import JsonOption, RefArgument, StoreOption
from ..progress import reporting
from ..render import emit, printable, remark, say, width

if TYPE_CHECKING:
    from ...exporting.findings import Finding
    from ...exporting.report import ExportReport
    from ...names import Ref
    from ...store import Store

app = new_app()
_WIDEST = 100  # columns of text that are read with ease
_GLUE = "\0"  # for a space where no line ends: printable text has none


@command(
    app,
    "ahl export sql@1 ./sql-peft        # a folder that plain peft loads",
    "ahl export sql@1 sql-1.tar         # one file; imported elsewhere it has the same digest",
    "ahl export sql@1 ./sql-vllm --for vllm --base-name meta-llama/Llama-3.2-1B",
    "ahl export sql@1 --for lorax --check   # what that reader would refuse or misread",
    "ahl export sql@1 ./sql-ollama --for ollama --base-name llama3.2:1b",
    name="export",
    interrupted="interrupted; nothing was written",
)
def run(
    ref: RefArgument,
    target: Annotated[
        Path | None,
        typer.Argument(metavar="TARGET", help="A new folder, or a new file ending in .tar.", show_default=False),
    ] = None,
    reader: Annotated[
        str | None,
        typer.Option("--for", metavar="READER", help="peft, vllm, sglang, lorax, llama.cpp or ollama: a folder for it"),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Say what READER would make of it; write nothing.")] = False,
    base_name: Annotated[
        str | None, typer.Option("--base-name", metavar="NAME", help="What READER calls the base.")
    ] = None,
    max_rank: Annotated[
        int | None,
        typer.Option("--max-rank", min=1, metavar="N", help="Largest rank that READER was started with."),
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, metavar="N", help="Cut ranks to N by SVD.")] = None,
    error: Annotated[
        str | None,
        typer.Option("--error", metavar="SHARE", help="Cut ranks by SVD as far as this allows, as 1%."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="BASE", help="Catalogue name, folder or Hub id of the adapter's base."),
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a version as a folder that PEFT loads, or as one file.

    With --for, scales are folded into the matrices, ranks padded and layers named as READER reads them; what it cannot
    have is refused with the reason. The files are read back and compared with the version before they appear.
    """
    if target is None and not check:
        raise UsageProblem("Missing argument 'TARGET'.", "Name a new folder, or a new file ending in .tar.")
    opened = open_store(store)
    found = opened.resolve(ref)
    if reader is None:
        if check or any(value is not None for value in (base_name, max_rank, rank, error, base)):
            raise UsageProblem("These options are about a reader.", "Name it with --for, as in --for vllm.")
        assert target is not None
        _as_it_is(opened, found, target, as_json)
        return
    silence()
    from ...exporting.traits import Asked
    from ...workflows.export import look

    asked = Asked(max_rank, rank, _share(error), base_name)
    with reporting(terse=True) as on_event:
        pending = look(found, reader=reader, asked=asked, store=opened, base=base, on_event=on_event)
        report = pending.report
        if target is not None and not check and not report.refused:
            report = pending.write(target, on_event=on_event)
    _show(report, check, as_json)


def _as_it_is(store: Store, ref: Ref, target: Path, as_json: bool) -> None:
    path = store.export(ref, target)
    if as_json:
        emit({"ref": f"{ref.name}@{ref.version}", "digest": ref.digest, "path": str(path)})
    else:
        say(f"{ref.name}@{ref.version} -> {path}")


def _show(report: ExportReport, check: bool, as_json: bool) -> None:
    if as_json:
        emit(report.to_dict())
    else:
        points = [one for one in report.findings if one.rule != "advice"]
        told = [one.what for one in report.findings if one.rule == "advice" and not report.refused]
        blocks = [line for one in points for line in _block(one)]
        said = [line for text in report.lines() for line in _wrapped(text, width())]
        say(*blocks, *([""] if blocks else []), *said, *map(printable, told))
    if report.refused:
        if not check:
            first = report.refused[0]
            remark(printable(f"error: nothing was written. {first.what} {first.done}"))
        raise Failure("The reader cannot have this version.")


def _block(point: Finding) -> list[str]:
    """One finding: its verdict and name, and below them what the version has and what was done."""
    cost = f" (error {point.error:.2%})" if point.error is not None else ""
    done = _wrapped(f"{point.done}{cost}", min(width(), _WIDEST), "  -> ", "     ") if point.done else []
    what = _wrapped(point.what, min(width(), _WIDEST), "  ", "  ")
    return [printable(f"{point.verdict}: {point.rule}"), *what, *done]


def _wrapped(text: str, limit: int, first: str = "", rest: str = "") -> list[str]:
    """Lines of whole words; a path, and a command in backticks, stay whole and can be copied."""
    from textwrap import TextWrapper

    lines = TextWrapper(
        max(limit, 20), initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    whole = re.sub("`[^`]*`", lambda command: command[0].replace(" ", _GLUE), printable(text))
    return [line.replace(_GLUE, " ") for line in lines.wrap(whole)]


def _share(text: str | None) -> float | None:
    """`1%` or `0.01` as a number between 0 and 1."""
    if text is None:
        return None
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise UsageProblem(f"{text!r} is no error between 0 and 1.", "Write it as --error 1%, or 0.01.")
    return value
