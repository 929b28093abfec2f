"""A version's training as curves: read from its card, drawn into a file.

The card keeps the loss of every step and all evaluations, so a picture can be made of any version at any time, and
none is stored. Learning rates are those that its recipe gives; the card of an early version has them no less.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ..errors import NotFound, Unsupported
from ..formats.card import Card
from ..training.schedule import rate_factor, step_counts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
_SMOOTHING = 0.9
# Okabe and Ito's colours, which people with each kind of colour blindness tell apart (jfly.uni-koeln.de/color), without
# the yellow, which is too light on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)))  # a second and third round of the colours
_LEGEND = 24  # names beside the curves
_RAW = 3  # curves with every step's loss behind them; more would hide each other
_TITLE = 70  # characters
_MARKED = 40  # evaluations, beyond which each has no mark of its own


@dataclass(frozen=True)
class Curve:
    """How one version was trained.

    Attributes:
        losses: of each step from the first on, mean over its supervised items (nats for a token or a label).
        evaluations: figures of the validation part by the step they were measured at, in order.
        rates: learning rate of each step; empty where the recipe is not known.
        kept_step: the step whose parameters were stored, where that is not the last.
        claimed: whether it is told by the card of an imported version, and so its maker's word.
    """

    name: str
    losses: tuple[float, ...] = ()
    evaluations: tuple[tuple[int, Mapping[str, float]], ...] = ()
    rates: tuple[float, ...] = ()
    kept_step: int | None = None
    claimed: bool = False

    @property
    def steps(self) -> int:
        """The last step of which something is told."""
        return max(len(self.losses), *(step for step, _ in self.evaluations), 0)

    @property
    def smoothed(self) -> list[float]:
        """A running mean of the losses that starts unbiased, as the progress of training shows it."""
        total = weight = 0.0
        found = []
        for loss in self.losses:
            total, weight = _SMOOTHING * total + (1 - _SMOOTHING) * loss, _SMOOTHING * weight + 1 - _SMOOTHING
            found.append(total / weight)
        return found

    def validation(self, metric: str = "loss") -> list[tuple[int, float]]:
        """Steps and values of one figure of the validation part."""
        return [(step, told[metric]) for step, told in self.evaluations if metric in told]


def read_curve(card: Card, name: str) -> Curve:
    """The curve that a card tells; without losses where it tells none. Values that are no numbers are left out."""
    told, recipe, claimed = card.origin, card.recipe, False
    if "losses" not in told and isinstance(card.origin.get("claimed_origin"), dict):
        told, recipe, claimed = card.origin["claimed_origin"], card.origin.get("claimed_recipe"), True
    losses = told.get("losses")
    numbers = tuple(float(value) for value in losses if _is_number(value)) if isinstance(losses, list) else ()
    kept = told.get("kept_step")
    return Curve(
        name,
        numbers,
        _evaluations(told.get("evaluations")),
        _rates(card, recipe, told, len(numbers)),
        kept if type(kept) is int and 0 < kept <= len(numbers) else None,
        claimed,
    )


def planned_steps(rows: int, training: Mapping[str, Any]) -> int:
    """Optimiser steps that the training part of a recipe, as plain data, asks for on so many rows.

    Raises:
        KeyError, TypeError, ValueError, ArithmeticError: it is not complete.
    """
    sizes = int(training["batch_size"]), int(training["gradient_accumulation"])
    return step_counts(rows, *sizes, float(training["epochs"]), training.get("max_steps"))[1]


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e300  # type: ignore[arg-type]  # False for NaN, too


def _evaluations(told: object) -> tuple[tuple[int, dict[str, float]], ...]:
    found = []
    for one in told if isinstance(told, list) else ():
        if isinstance(one, dict) and type(one.get("step")) is int and one["step"] > 0:
            figures = {str(key): float(v) for key, v in one.items() if key != "step" and _is_number(v)}
            found.append((one["step"], figures))
    return tuple(sorted(found, key=lambda pair: pair[0]))


def _rates(card: Card, recipe: object, told: Mapping[str, Any], steps: int) -> tuple[float, ...]:
    """The learning rate of each step, by the recipe. A run that ended early had more steps to come."""
    config = recipe.get("training") if isinstance(recipe, dict) else None
    try:
        rate, schedule = float(config["learning_rate"]), str(config["schedule"])  # type: ignore[index]
        total = steps
        if told.get("ended", "finished") != "finished":
            rows = int((card.data.get("train") or {})["rows"])
            total = max(steps, planned_steps(rows, config))  # type: ignore[arg-type]
        return tuple(rate * rate_factor(schedule, i, total, float(config["warmup"])) for i in range(steps))  # type: ignore[index]
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return ()


# --- drawing -----------------------------------------------------------------------------------------------------


def check_target(path: Path) -> Path:
    """The path, if a picture can be written there.

    Raises:
        Unsupported: its ending is not one of `FORMATS`, or matplotlib is missing.
        NotFound: its folder is not there.
    """
    if path.suffix.lower() not in FORMATS:
        raise Unsupported(f"{path} does not end in {', '.join(FORMATS)}.", "Name a file that does.")
    if not path.absolute().parent.is_dir():
        raise NotFound(f"The folder {path.absolute().parent} is not there.", "Make it, or name another file.")
    if path.is_dir():
        raise Unsupported(f"{path} is a folder.", "Name a file.")
    if importlib.util.find_spec("matplotlib") is None:
        raise Unsupported("Pictures need matplotlib, which is not installed.", "pip install matplotlib")
    return path


def draw_curves(curves: Sequence[Curve], path: Path) -> None:
    """Draw the loss, smoothed and of the validation part, and the learning rate of several versions over their steps.

    The file appears whole or not at all; the same curves give the same bytes.

    Raises:
        Unsupported: there is nothing to draw, or no picture can be written to such a file.
        NotFound: its folder is not there.
    """
    check_target(path)
    shown = [curve for curve in curves if curve.losses or curve.validation()]
    if not shown:
        listed = ", ".join(curve.name for curve in curves)
        raise Unsupported(f"The card of {listed} tells no losses: it was not trained here.", "Name another version.")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style(matplotlib.rcParamsDefault)):
        figure = Figure(figsize=(9, 6.5), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        _fill(figure, shown)
        _save(figure, path)


def _style(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """matplotlib's own defaults whatever the user's are, with the font that comes with it."""
    kept = {key: value for key, value in defaults.items() if not key.startswith(("backend", "date", "interactive"))}
    return {
        **kept,
        "font.family": ["DejaVu Sans"],
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e4e4e4",
        "axes.axisbelow": True,
        "svg.hashsalt": "adapterhub-lite",
        "text.parse_math": False,  # a name is text, whatever stands in it
    }


def _fill(figure: Figure, curves: Sequence[Curve]) -> None:
    with_rates = any(curve.rates for curve in curves)
    accuracy = any(curve.validation("accuracy") for curve in curves)
    heights = [3.2, *([1.3] if accuracy else []), *([1.0] if with_rates else [])]
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for index, curve in enumerate(curves):
        look = {"color": _COLOURS[index % len(_COLOURS)], "linestyle": _DASHES[index // len(_COLOURS) % len(_DASHES)]}
        _draw_loss(axes[0], curve, look, len(curves))
        if accuracy:
            _draw_points(axes[1], curve.validation("accuracy"), look, "")
        if curve.rates:
            axes[-1].plot(range(1, len(curve.rates) + 1), curve.rates, linewidth=1.4, **look)
    axes[0].set_ylabel("loss (nats)")
    _limit_loss(axes[0], curves)
    if accuracy:
        axes[1].set_ylabel("validation\naccuracy")
    if with_rates:
        axes[-1].set_ylabel("learning rate")
        axes[-1].set_ylim(bottom=0)
        axes[-1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=False)
    axes[-1].set_xlabel("optimiser step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    axes[-1].set_xlim(*_between(1, max(c.steps for c in curves), 1.0))
    figure.suptitle(_title(curves), fontsize=12)
    _legend(figure, axes[0], curves)


def _title(curves: Sequence[Curve]) -> str:
    listed = ", ".join(curve.name for curve in curves)
    listed = listed if len(listed) <= _TITLE or len(curves) == 1 else f"{len(curves)} adapters"
    word = " (by its maker's word)" if any(curve.claimed for curve in curves) else ""
    return f"Training of {listed}{word}"


def _draw_loss(axes: Axes, curve: Curve, look: dict[str, Any], count: int) -> None:
    alone, steps = count == 1, range(1, len(curve.losses) + 1)
    if count <= _RAW:
        faint = {"color": look["color"], "alpha": 0.3 if alone else 0.15}
        axes.plot(steps, curve.losses, linewidth=0.8, label="each step" if alone else "", **faint)
    few = "o" if len(curve.losses) == 1 else ""  # a line needs two points
    axes.plot(steps, curve.smoothed, linewidth=1.8, label="smoothed" if alone else curve.name, marker=few, **look)
    points = curve.validation()
    _draw_points(axes, points, {**look, "color": _COLOURS[1]} if alone else look, "validation" if alone else "")
    if curve.kept_step is not None:
        value = dict(points).get(curve.kept_step, curve.smoothed[curve.kept_step - 1])
        label = f"kept: step {curve.kept_step}" if alone else ""
        colour = "black" if alone else look["color"]
        axes.plot([curve.kept_step], [value], "*", markersize=13, color=colour, label=label, zorder=4)


def _draw_points(axes: Axes, points: Sequence[tuple[int, float]], look: dict[str, Any], label: str) -> None:
    if points:
        mark = "o" if len(points) <= _MARKED else ""
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, marker=mark, markersize=5, markeredgecolor="white", linewidth=1.0, label=label, **look)


def _limit_loss(axes: Axes, curves: Sequence[Curve]) -> None:
    """From the least to a little more than the smoothed curves reach: one wild step must not flatten the rest."""
    values = [v for c in curves for v in (*c.smoothed, *(value for _, value in c.validation()))]
    raw = [v for c in curves for v in c.losses] if len(curves) <= _RAW else []
    axes.set_ylim(*_between(min([*values, *raw]), max(values), 0.02))


def _between(low: float, high: float, least: float) -> tuple[float, float]:
    """Limits of an axis with room on both sides, `least` at least."""
    room = max((high - low) * 0.05, least)
    return low - room, high + room


def _legend(figure: Figure, axes: Axes, curves: Sequence[Curve]) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(curves) == 1:
        axes.legend(handles, labels, frameon=False, loc="upper right", fontsize=9)
        return
    more = f"\nand {len(labels) - _LEGEND} more" if len(labels) > _LEGEND else ""
    star = "\nstar: step that was kept" if any(curve.kept_step for curve in curves) else ""
    title = f"bold: smoothed loss\ndots: validation{star}{more}"
    style = {"title": title, "title_fontsize": 8, "alignment": "left", "frameon": False, "fontsize": 8}
    figure.legend(handles[:_LEGEND], labels[:_LEGEND], loc="outside right upper", **style)


def _save(figure: Figure, path: Path) -> None:
    scratch = path.with_name(f".{path.stem}.{uuid4().hex[:8]}{path.suffix.lower()}")
    dated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    try:
        figure.savefig(scratch, metadata=dated.get(path.suffix.lower()))
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
