"""A search as a picture: a heat map or lines of a grid, the trials of a search by their learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .curves import _COLOURS, _save, _style, check_target
from .search_results import Repeated, SearchResult
from .search_space import brief, short
from .search_trials import COMPLETE, CUT, PRUNED, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RATE = "training.learning_rate"
_LOSS = "validation loss (nats)"
_MARKS = {COMPLETE: "o", PRUNED: "v", CUT: "s"}
_SAID = {COMPLETE: "complete", PRUNED: "ended early (worse half)", CUT: "cut by the budget"}
_MOST_LINES = 14


def draw_search(result: SearchResult, path: Path) -> None:
    """Draw a search into a file that appears whole or not at all.

    Raises:
        Unsupported: there is nothing to draw, or matplotlib is missing.
    """
    check_target(path)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style(matplotlib.rcParamsDefault)):
        figure = Figure(figsize=(8.4, 5.2), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        if result.kind == "tune":
            _draw_tune(figure, result)
        else:
            _draw_sweep(figure, result)
        _save(figure, path)


# --- a grid ------------------------------------------------------------------------------------------------------


def _draw_sweep(figure: Figure, result: SearchResult) -> None:
    axes = figure.add_subplot()
    repeats = [one for one in result.repeats if one.loss is not None]
    varied = [path for path, values in _values(repeats).items() if len(values) > 1]
    if len(varied) == 2:
        _heat_map(figure, axes, repeats, varied)
    else:
        _lines(figure, axes, repeats, varied)
    seeds = max((len(one.trials) for one in repeats), default=1)
    more = f", mean of {seeds} seeds" if seeds > 1 else ""
    axes.set_title(f"Sweep of {result.name}: validation loss{more}", fontsize=12)


def _values(repeats: Sequence[Repeated]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for one in repeats:
        for path, value in one.parameters.items():
            if value not in found.setdefault(path, []):
                found[path].append(value)
    return {path: sorted(values, key=_order) for path, values in found.items()}


def _order(value: object) -> tuple[bool, float, str]:
    """Numbers in their order, before texts in theirs."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (not number, float(value) if number else 0.0, str(value))  # type: ignore[arg-type]


def _heat_map(figure: Figure, axes: Axes, repeats: Sequence[Repeated], varied: Sequence[str]) -> None:
    values = _values(repeats)
    down, across = values[varied[0]], values[varied[1]]
    cells = [[float("nan")] * len(across) for _ in down]
    texts: dict[tuple[int, int], str] = {}
    for one in repeats:
        i, j = down.index(one.parameters[varied[0]]), across.index(one.parameters[varied[1]])
        cells[i][j] = one.loss if one.loss is not None else float("nan")
        texts[i, j] = f"{one.loss:.4f}" + (f"\n± {one.interval:.4f}" if one.interval is not None else "")
    axes.grid(False)
    image = axes.imshow(cells, cmap="viridis_r", aspect="auto")
    low, high = min(v for r in cells for v in r if v == v), max(v for r in cells for v in r if v == v)
    best = min(((v, i, j) for i, row in enumerate(cells) for j, v in enumerate(row) if v == v))[1:]
    for (i, j), text in texts.items():
        dark = high > low and (cells[i][j] - low) / (high - low) > 0.5
        weight = "bold" if (i, j) == best else "normal"
        axes.text(
            j, i, text, ha="center", va="center", fontsize=9, color="black" if not dark else "white", weight=weight
        )
    axes.set_yticks(range(len(down)), [brief(value) for value in down])
    axes.set_xticks(range(len(across)), [brief(value) for value in across])
    axes.set_ylabel(_title(varied[0]))
    axes.set_xlabel(_title(varied[1]))
    figure.colorbar(image, ax=axes, label=_LOSS)


def _lines(figure: Figure, axes: Axes, repeats: Sequence[Repeated], varied: Sequence[str]) -> None:
    """The learning rate along, or what has most values; a line for each combination of the rest."""
    values = _values(repeats)
    along = _RATE if _RATE in varied else max(varied, key=lambda path: len(values[path]), default=None)
    numeric = along is not None and all(not _order(value)[0] for value in values[along])
    lines: dict[str, list[Repeated]] = {}
    for one in repeats:
        rest = ", ".join(f"{short(p)} {brief(one.parameters[p])}" for p in varied if p != along)
        lines.setdefault(rest, []).append(one)
    for index, (label, group) in enumerate(list(lines.items())[:_MOST_LINES]):
        places = [values[along].index(one.parameters[along]) if along else 0 for one in group]
        order = sorted(range(len(group)), key=lambda i: places[i])
        xs = [group[i].parameters[along] if numeric and along else places[i] for i in order]
        ys = [group[i].loss or 0.0 for i in order]
        errors = [group[i].interval or 0.0 for i in order]
        colour = _COLOURS[index % len(_COLOURS)]
        style = ("-" if index < len(_COLOURS) else "--") if numeric else ""
        axes.errorbar(xs, ys, yerr=errors if any(errors) else None, marker="o", color=colour, label=label, capsize=3,
                      linestyle=style, linewidth=1.4)  # fmt: skip
    if along and not numeric:
        axes.set_xticks(range(len(values[along])), [brief(value) for value in values[along]])
    if along == _RATE:
        _log_rates(axes, values[_RATE])
    axes.set_xlabel(_title(along) if along else "")
    axes.set_ylabel(_LOSS + (", 95 % interval" if any(one.interval for one in repeats) else ""))
    if any(lines):
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)


def _title(path: str) -> str:
    return path.rpartition(".")[2].replace("_", " ")


def _log_rates(axes: Axes, ticks: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    if len(ticks) <= 8:
        axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: brief(float(f"{value:.3g}"))))


# --- a search ----------------------------------------------------------------------------------------------------


def _draw_tune(figure: Figure, result: SearchResult) -> None:
    axes = figure.add_subplot()
    known = [trial for trial in result.trials if trial.loss is not None]
    along = _RATE if _RATE in result.axes else next(iter(result.axes), None)
    second = next((path for path in ("adapter.rank", "adapter.tokens") if path in result.axes), None)
    colours = _colours_of([trial.parameters.get(second) for trial in known] if second else [None])
    for trial in known:
        colour, mark = colours[trial.parameters.get(second) if second else None], _MARKS.get(trial.state, "o")
        filled = colour if trial.state == COMPLETE else "white"
        axes.plot([_place(trial, along)], [trial.loss or 0.0], mark, color=colour, markerfacecolor=filled, markersize=7,
                  markeredgewidth=1.4)  # fmt: skip
    best = known[0]
    axes.plot([_place(best, along)], [best.loss or 0.0], "*", color="black", markersize=15, markerfacecolor="none")
    label = f"trial {best.number}: {best.loss:.4f}"
    axes.annotate(label, (_place(best, along), best.loss or 0.0), xytext=(0, -16), textcoords="offset points",
                  ha="center", fontsize=9)  # fmt: skip
    if along == _RATE:
        axes.set_xscale("log")
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: brief(float(f"{value:.3g}"))))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.12)
    beyond = _limit(axes, known, along, second, colours)
    axes.set_xlabel(_title(along) if along else "")
    axes.set_ylabel(_LOSS)
    failed = sum(trial.loss is None for trial in result.trials)
    more = f", {failed} of them without a figure" if failed else ""
    axes.set_title(f"Search of {result.name}: {len(result.trials)} trials{more}", fontsize=12)
    _legend(figure, second, colours, {trial.state for trial in known}, beyond)


def _place(trial: Trial, along: str | None) -> Any:
    return trial.parameters.get(along) if along else trial.number


def _limit(
    axes: Axes, known: Sequence[Trial], along: str | None, second: str | None, colours: Mapping[Any, str]
) -> float | None:
    """A rate that is far too large must not flatten the rest: what lies above is drawn at the upper edge.

    Returns:
        The largest of what lies above; None where nothing does.
    """
    losses = sorted(trial.loss or 0.0 for trial in known)
    low, middle = losses[0], losses[len(losses) // 2]
    top = middle + 4 * max(middle - low, 1e-3)
    if losses[-1] > top:
        high = max(value for value in losses if value <= top)
        room = 0.12 * max(high - low, 1e-3)
        axes.set_ylim(low - 2 * room, high + 2 * room)
        for trial in known:
            if (trial.loss or 0.0) > top:
                colour = colours[trial.parameters.get(second) if second else None]
                axes.plot([_place(trial, along)], [high + 2 * room], "^", color=colour, markersize=8, clip_on=False)
        return losses[-1]
    return None


def _colours_of(values: Sequence[Any]) -> Mapping[Any, str]:
    distinct = sorted(set(values), key=_order)
    return {value: _COLOURS[i % len(_COLOURS)] for i, value in enumerate(distinct)}


def _legend(
    figure: Figure, second: str | None, colours: Mapping[Any, str], states: set[str], beyond: float | None
) -> None:
    from matplotlib.lines import Line2D

    handles = []
    if second:
        handles = [
            Line2D([], [], marker="o", linestyle="", color=colour, label=f"{_title(second)} {brief(value)}")
            for value, colour in colours.items()
        ]
    for state in (COMPLETE, PRUNED, CUT):
        if state in states:
            face = "#555555" if state == COMPLETE else "white"
            handles.append(Line2D([], [], marker=_MARKS[state], linestyle="", color="#555555", markerfacecolor=face,
                                  label=_SAID[state]))  # fmt: skip
    if beyond is not None:
        label = f"above the picture, up to {beyond:.3g}"
        handles.append(Line2D([], [], marker="^", linestyle="", color="#555555", label=label))
    handles.append(Line2D([], [], marker="*", linestyle="", color="black", markerfacecolor="none", label="best"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
