"""Conflicts as a picture: each adapter's share of the sum by layer, and below it how the changes of each two agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..combining.conflicts import ConflictReport, Place
from ..combining.terms import weighted_sum
from .curves import _save, _style, check_target

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_TEXTS = 14  # layers beyond which the cells hold no numbers
_MOST_TICKS = 32
_MOST_PAIRS = 30
_LONGEST_SUM = 90
_FLAT = 16  # layers beyond which their names stand upright
_NAN = float("nan")


def draw_conflicts(report: ConflictReport, path: Path) -> None:
    """Draw a report into a file that appears whole or not at all.

    Raises:
        Unsupported: no picture can be written to such a file, or matplotlib is missing.
        NotFound: its folder is not there.
    """
    check_target(path)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = _pairs(report)
    height = 1.9 + 0.42 * len(report.members) + 2 * (0.9 + 0.36 * len(pairs))
    with matplotlib.rc_context(_style(matplotlib.rcParamsDefault)):
        figure = Figure(figsize=(max(7.5, 2.5 + 0.27 * len(report.layers)), height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        heights = [len(report.members), len(pairs), len(pairs)]
        rows = list(figure.subplots(3, 1, height_ratios=heights, squeeze=False)[:, 0])
        _fill(figure, rows, report, pairs)
        _save(figure, path)


def _pairs(report: ConflictReport) -> list[int]:
    """The pairs that are shown, in their order: those that agree least, where there are many."""
    cosines = [2.0 if one.cosine is None else one.cosine for one in report.whole.meetings]
    return sorted(sorted(range(len(cosines)), key=cosines.__getitem__)[:_MOST_PAIRS])


def _fill(figure: Figure, rows: Sequence[Axes], report: ConflictReport, pairs: Sequence[int]) -> None:
    layers, met = report.layers, report.whole.meetings
    named = [f"{met[i].a}, {met[i].b}" for i in pairs]
    shares = _cells(layers, range(len(report.members)), lambda place, i: place.shares[i])
    cosines = _cells(layers, pairs, lambda place, i: place.meetings[i].cosine)
    signs = _cells(layers, pairs, lambda place, i: place.meetings[i].sign_conflict)
    _map(figure, rows[0], shares, report.members, "share of the sum", ("viridis", 0.0, 1.0))
    _map(figure, rows[1], cosines, named, "cosine", ("RdBu_r", -1.0, 1.0))
    _map(figure, rows[2], signs, named, "opposite signs", ("magma", 0.0, 1.0))
    rows[0].set_title(f"Whose change the sum is, by layer{_heaviest(report)}\n{_sum(report)}", fontsize=11)
    top = round(report.density * 100)
    some = f": the {len(pairs)} of {len(met)} pairs that agree least" if len(pairs) < len(met) else ""
    rows[1].set_title(f"How the changes agree{some}", fontsize=11)
    rows[2].set_title(f"Opposite signs among the largest {top} % of both", fontsize=11)
    step = -(-len(layers) // _MOST_TICKS)
    shown = range(0, len(layers), step)
    for axes in rows[:-1]:
        axes.set_xticks([])
    names = _short([place.name for place in layers])
    turned = len(layers) > _FLAT or max(map(len, names)) > 2
    rows[-1].set_xticks(list(shown), [names[i] for i in shown], rotation=90 if turned else 0)
    rows[-1].set_xlabel("layer")


def _sum(report: ConflictReport) -> str:
    """The weighted sum that is shared, as far as a line holds it."""
    told = weighted_sum(zip(report.members, report.weights, strict=True))
    return told if len(told) <= _LONGEST_SUM else f"{told[: _LONGEST_SUM - 3]}..."


def _heaviest(report: ConflictReport) -> str:
    return f": {report.whole.winner} in all" if report.whole.winner else ""


def _short(layers: Sequence[str]) -> list[str]:
    """The numbers of layers, as in `model.layers.3`, unless two have the same; else their names."""
    lasts = [layer.rpartition(".")[2] for layer in layers]
    found = [last if last.isdecimal() else layer for last, layer in zip(lasts, layers, strict=True)]
    return found if len(set(found)) == len(found) else list(layers)


def _cells(
    layers: Sequence[Place], lines: Sequence[int], value: Callable[[Place, int], float | None]
) -> list[list[float]]:
    found = [[value(place, i) for place in layers] for i in lines]
    return [[_NAN if one is None else one for one in line] for line in found]


def _map(
    figure: Figure,
    axes: Axes,
    cells: Sequence[Sequence[float]],
    names: Sequence[str],
    label: str,
    look: tuple[str, float, float],
) -> None:
    """A heat map within fixed limits, so that two pictures compare; what lies beyond them has the colour of the end."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    colours, low, high = look
    axes.grid(False)
    image = axes.imshow(cells, cmap=colours, norm=Normalize(low, high), aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(names)), list(names))
    axes.set_facecolor("#d9d9d9")  # where an adapter changes nothing
    figure.colorbar(image, ax=axes, label=label)
    if len(cells[0]) > _MOST_TEXTS:
        return
    for i, line in enumerate(cells):
        for j, value in enumerate(line):
            if value == value:
                red, green, blue, _ = colormaps[colours](Normalize(low, high, clip=True)(value))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                text = f"{value:.2f}"
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
