"""`ahl conflicts`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..app import command, new_app
from ..mixing import AdaptersArgument, WeightsOption, read_members, read_share, share, written
from ..opening import open_store, silence
from ..options import BaseOption, JsonOption, StoreOption
from ..progress import reporting
from ..render import Column, emit, printable, say, table

if TYPE_CHECKING:
    from ...combining.conflicts import ConflictReport, Meeting, Place

app = new_app()


@command(
    app,
    "ahl conflicts sql@1 tone@2",
    "ahl conflicts sql@1 tone@2 rude@1 --plot conflicts.png",
    "ahl conflicts sql@1=1 rude@1=-0.5 --modules --json",
    name="conflicts",
)
def run(
    refs: AdaptersArgument,
    weights: WeightsOption = None,
    density: Annotated[
        str, typer.Option("--density", metavar="SHARE", help="The largest elements, whose signs are compared.")
    ] = "0.2",
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw adapters and layers: .png, .svg or .pdf.")
    ] = None,
    modules: Annotated[bool, typer.Option("--modules", help="Show every module instead of every layer.")] = False,
    base: BaseOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare what adapters would do to each other if they were combined.

    COSINE: 1 the same change, 0 nothing in common, -1 the opposite. INPUTS, OUTPUTS: how much of what they read and
    write is the same (0 to 1). SIGNS: opposite ones among the largest elements of both (0.50 by chance). The winner is
    whose change the sum mostly is; that is a prediction from weights, and `ahl combine` measures it.
    """
    names, numbers = read_members(refs, weights)
    kept = 1.0 if density.strip() in ("1", "1.0", "100%") else read_share(density, "--density")
    opened = open_store(store)
    silence()
    from ...workflows.conflicts import conflicts

    with reporting() as on_event:
        report = conflicts(
            names, weights=numbers, density=kept or 0.0, plot=plot, store=opened, base=base, on_event=on_event
        )
    if as_json:
        emit({**report.to_dict(), **({"plot": str(plot)} if plot else {})})
        return
    say(*_header(report, numbers is None), "", *_pairs(report), "", *_places(report, modules), "")
    advice = report.advice
    say(*map(printable, (_verdict(report), advice.why, *advice.notes)), *_approximated(report), *written(plot))


def _header(report: ConflictReport, usual: bool) -> list[str]:
    """Which weights every figure is of."""
    from ...combining.terms import weighted_sum

    told = f"{weighted_sum(zip(report.members, report.weights, strict=True))}: all figures are of this sum."
    share = 1 / len(report.members)
    other = f"No weights were given; `ahl combine` with method linear then takes {share:.2g} each." if usual else ""
    return [printable(line) for line in (told, other) if line]


def _approximated(report: ConflictReport) -> list[str]:
    return [
        printable(f"{name} is compared as a change of low rank, with a relative error of {share(error)}.")
        for name, error in zip(report.members, report.approximated, strict=True)
        if error
    ]


def _pairs(report: ConflictReport) -> list[str]:
    columns = (
        Column("A"),
        Column("B"),
        Column("COSINE", right=True),
        Column("INPUTS", 2, right=True),
        Column("OUTPUTS", 3, right=True),
        Column("SIGNS", 1, right=True),
        Column("NORMS", 4),
    )
    return table(columns, [(one.a, one.b, *_figures(one), _ratio(one)) for one in report.whole.meetings])


def _figures(one: Meeting) -> list[str]:
    cosine = "-" if one.cosine is None else f"{one.cosine:+.3f}"
    return [cosine, *("-" if v is None else f"{v:.2f}" for v in (one.inputs, one.outputs, one.sign_conflict))]


def _ratio(one: Meeting) -> str:
    return "-" if one.norm_ratio is None else f"1 : {one.norm_ratio:.3g}"


def _places(report: ConflictReport, modules: bool) -> list[str]:
    """A line for each layer: the figures of the two that agree least there, and each one's share of the sum."""
    columns = [Column("MODULE" if modules else "LAYER"), Column("COSINE", right=True), Column("INPUTS", 4, right=True)]
    columns += [Column("OUTPUTS", 5, right=True), Column("SIGNS", 3, right=True)]
    columns += [*(Column(name, 2, right=True) for name in report.members), Column("WINNER", 1)]
    return table(columns, [_place(one) for one in (report.modules if modules else report.layers)])


def _place(place: Place) -> list[object]:
    least = min(place.meetings, key=lambda one: 2.0 if one.cosine is None else one.cosine)
    shares = ["-" if one is None else f"{100 * one:.1f}%" for one in place.shares]
    return [place.name, *_figures(least), *shares, place.winner or "-"]


def _verdict(report: ConflictReport) -> str:
    shares = [
        f"{name} {share(one)}" for name, one in zip(report.members, report.whole.shares, strict=True) if one is not None
    ]
    if not shares:
        return "They cancel each other: nothing is left of the sum."
    told = f"Of the sum {', '.join(shares)}"
    return f"{told}: {report.whole.winner} is the predicted winner." if report.whole.winner else f"{told}: no winner."
