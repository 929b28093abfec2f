"""What `ahl combine`, `ahl conflicts` and `ahl convert` share: weights and shares as text, and what was made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .guard import UsageProblem
from .render import Column, counted, emit, printable, say, table

if TYPE_CHECKING:
    from ..workflows.combine_publish import Made

AdaptersArgument = Annotated[
    list[str],
    typer.Argument(metavar="REF", help="name, name@3 or name:alias; REF=0.7 gives a weight (others then: 1)."),
]
WeightsOption = Annotated[
    str | None, typer.Option("--weights", metavar="A,B", help="One for each, in their order; negative ones subtract.")
]
RankOption = Annotated[int | None, typer.Option("--rank", min=1, metavar="N", help="Rank that every layer may have.")]
ErrorOption = Annotated[
    str | None,
    typer.Option("--error", metavar="SHARE", help="Least ranks within this relative error, as 1% or 0.01."),
]
NoEvalOption = Annotated[
    bool, typer.Option("--no-eval", help="Load no base: store it without its effect and metrics measured.")
]
RowsOption = Annotated[
    int, typer.Option("--rows", min=0, metavar="N", help="Most test rows of each parent to measure on; 0: none.")
]
ROWS = 200  # as of `workflows.combine_setting`, which a command line that is only parsed does not load

_HARDLY = 0.1  # share of the parameters; who saves less gains nothing
_COARSE = 0.1  # relative error beyond which it is said how to make less
_SHARE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{0,12})?|\.[0-9]{1,12})(?:e(-?[0-9]{1,2}))?(%?)", re.ASCII | re.IGNORECASE)


def read_share(text: str | None, option: str) -> float | None:
    """`1%` or `0.01` as 0.01.

    Raises:
        UsageProblem: it is no share between 0 and 1.
    """
    if text is None:
        return None
    match = _SHARE.fullmatch(text.strip())
    value = float(text.strip().rstrip("%")) / (100 if match and match[3] else 1) if match else 0.0
    if not 0 < value < 1:
        raise UsageProblem(f"{option} {text} is no share.", "Write it as 1% or 0.01, more than 0 and less than 1.")
    return value


def read_size(rank: int | None, error: str | None) -> float | None:
    """The share that `--error` says, if there is no `--rank` beside it."""
    if rank is not None and error is not None:
        raise UsageProblem("--rank and --error exclude each other: each decides the other.", "Give one of them.")
    return read_share(error, "--error")


def read_members(refs: Sequence[str], weights: str | None) -> tuple[list[str], list[float] | None]:
    """References and their weights, from `sql@1=0.7` (1 where others have one) or from `--weights`; None without any.

    Raises:
        UsageProblem: weights in both ways, too few, too many, or no numbers.
    """
    parts = [ref.partition("=") for ref in refs]
    names, own = [name for name, _, _ in parts], [value for _, mark, value in parts if mark]
    if own and weights is not None:
        raise UsageProblem("Weights are given both as REF=WEIGHT and with --weights.", "Give them in one way.")
    if own:
        return names, [_number(name, value) if mark else 1.0 for name, mark, value in parts]
    told = weights.split(",") if weights is not None else None
    if told is None:
        return names, None
    if len(told) != len(names):
        raise UsageProblem(
            f"{counted(len(names), 'adapters')} and {counted(len(told), 'weights')}.",
            "Give one for each adapter, in the order of the names.",
        )
    return names, [_number(name, text) for name, text in zip(names, told, strict=True)]


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value or abs(value) == float("inf"):
        raise UsageProblem(f"{text!r}, the weight of {name}, is no number.", "Write it as 0.7 or -1.")
    return value


def show_made(made: Made, as_json: bool, lines: Sequence[str]) -> None:
    """Say what was made of others.

    Args:
        lines: what is to be said of the way, below the first line.
    """
    if as_json:
        emit(made.to_dict())
        return
    card, ref = made.card, f"{made.ref.name}@{made.ref.version}"
    verb = "Combined into" if card.origin.get("kind") == "combined" else "Converted into"
    parameters = card.adapter.get("parameters")
    say(printable(f"{verb} {ref}: lora, {_ranks(card.origin)}, {counted(parameters, 'parameters')}"))
    say(*(printable(f"  {line}") for line in lines))
    moved = card.effect.get("max_logit_change")
    if moved is not None:
        say(f"  moves logits by up to {moved:.3g}")
    if made.not_measured:
        say(printable(f"  {_unmeasured(made.not_measured)}"))
    if made.measured:
        say("", *_measured(made, ref))
    say("", printable(_next(made, ref)))


def _unmeasured(reason: str) -> str:
    from ..workflows.combine_publish import NOT_ASKED

    if reason == NOT_ASKED:
        return "--no-eval: neither its effect on the base nor its metrics were measured"
    return f"effect and metrics are not measured: {reason}"


def _next(made: Made, ref: str) -> str:
    """What to do with it: it is measured again only where it was measured, on all rows where that was on some."""
    tried = f"ry it with `ahl run --adapter {ref} PROMPT`."
    if not (made.card.task.get("type") and any(split in made.card.data for split in ("test", "validation"))):
        return f"T{tried}"
    done = [one for one in made.measured if one.made is not None]
    some = any(one.rows < one.of_rows for one in done)
    word = "Measure it on all rows" if some else "Measure it again" if done else "Measure it"
    others = dict.fromkeys(one.split for one in done if one.split not in ("test", "validation"))
    more = f' or `ahl eval {ref} --split "{list(others)[-1]}"`' if len(others) > 1 else ""
    return f"{word} with `ahl eval {ref}`{more}, t{tried}"


def _ranks(origin: Mapping[str, Any]) -> str:
    told = origin.get("layers", {}).get("rank")
    if not told:
        return "no layers"
    one = told["smallest"] == told["largest"]
    return f"rank {told['largest']}" if one else f"ranks {told['smallest']} to {told['largest']}"


def error_line(origin: Mapping[str, Any]) -> str:
    """`relative error 1.2% in all, at most 3.4% (model.layers.3...)`, of a card's origin."""
    error, layers = origin.get("error"), origin.get("layers", {}).get("error") or {}
    if not error or error < 1e-9:
        return "exact: no relative error above rounding"
    worst = layers.get("largest")
    most = f", at most {share(worst)} in a layer ({layers['at']})" if worst else ""
    more = "; a larger --rank, or --error, keeps more" if error > _COARSE else ""
    return f"relative error {share(error)}{most}{more}"


def saved_line(before: int, after: int) -> str:
    """What a conversion saves, of its parameters."""
    if after > before:
        return f"{after:,} parameters, more than the {before:,} before"
    saved = 1 - after / before if before else 0.0
    told = f"{after:,} of {before:,} parameters"
    if saved < _HARDLY:
        return f"{told}: hardly any are saved; a smaller --rank, or a larger --error, saves more"
    return f"{told}: {100 * saved:.0f}% saved"


def share(value: float) -> str:
    """A share as a percentage with up to three digits: 12%, 1.25%, 0.0013%."""
    return f"{100 * value:,.0f}%" if abs(value) >= 1 else f"{100 * value:.3g}%"


def _measured(made: Made, ref: str) -> list[str]:
    """A line for each metric of each parent's test set, alone and in what was made; the reason where there is none."""
    columns = (
        Column("PARENT"),
        Column("METRIC"),
        Column("ROWS", right=True),
        Column("ALONE", right=True),
        Column(ref.upper() if len(ref) <= 12 else "NOW", right=True),
        Column("CHANGE", 1, right=True),
    )
    rows: list[list[object]] = []
    notes = []
    for one in made.measured:
        if one.reason:
            notes.append(f"{one.parent}: not measured: {one.reason}")
        if one.alone_since:
            notes.append(f"{one.parent} alone was measured {one.alone_since}, when it was made.")
        names = list(one.alone or {})
        zeros = [name for name in names if not (one.alone or {})[name]]
        if zeros:
            notes.append(f"{one.parent} alone has 0 in {', '.join(zeros)}, and 0 cannot fall: that decides nothing.")
        count = f"{one.rows:,}" if one.rows == one.of_rows else f"{one.rows:,} of {one.of_rows:,}"
        for name in names:
            before, after = (one.alone or {})[name], (one.made or {}).get(name)
            now = ["", ""] if after is None else [f"{after:.3f}", f"{after - before:+.3f}"]
            rows.append([one.parent if name == names[0] else "", name, count, f"{before:.3f}", *now])
    return [*(table(columns, rows) if rows else []), *map(printable, dict.fromkeys(notes))]


def written(path: Path | None) -> list[str]:
    """What is said of a picture that was drawn."""
    return [printable(f"It is drawn in {path}.")] if path else []
