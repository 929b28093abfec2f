"""A curve in the terminal: dots of braille, or stars where the output has none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .render import shows, width

if TYPE_CHECKING:
    from ..workflows.curves import Curve

_HEIGHT, _WIDTH = 7, 72  # lines of dots; columns, where the terminal has as many
_NARROWEST = 24  # columns, below which there is no picture
_FEWEST = 8  # steps; fewer are shown as bars in one line
_BRAILLE = 0x2800  # eight dots a character, 2 x 4, a bit each (Unicode, Braille Patterns)
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_MARK = "o"


def curve_lines(curve: Curve, columns: int | None = None) -> list[str]:
    """The smoothed loss as a picture with axes, evaluations as marks; nothing for a short run or a narrow terminal."""
    room = min(_WIDTH, width() if columns is None else columns)
    if len(curve.losses) < _FEWEST or room < _NARROWEST:
        return []
    points, smoothed = curve.validation(), list(enumerate(curve.smoothed, 1))
    values = [value for _, value in (*smoothed, *points)]
    low, high = _apart(min(values), max(values))
    labels = [f"{value:.3g}" for value in (high, low)]
    margin = max(map(len, labels))
    grid = _Grid(room - margin - 1, _HEIGHT, (1, max(curve.steps, 2)), (low, high))
    every = max(1, len(smoothed) // (4 * room))  # more points than dots would only cost time
    grid.line([*smoothed[::every], smoothed[-1]])
    for step, value in points:
        grid.mark(step, value)
    sides = [labels[0].rjust(margin), *[" " * margin] * (_HEIGHT - 2), labels[1].rjust(margin)]
    last = f"step {curve.steps:,}"
    lines = [f"{side} {row}".rstrip() for side, row in zip(sides, grid.rows(), strict=True)]
    lines.append(f"{' ' * margin} 1{last.rjust(room - margin - 2)}")
    return [*lines, f"{' ' * margin} loss, smoothed{f'; {_MARK} validation' if points else ''}"]


def _apart(low: float, high: float) -> tuple[float, float]:
    """Ends of the axis; a thousandth apart at least, or a flat curve would show how sums round."""
    missing = max(abs(low), abs(high), 1e-6) / 1000 - (high - low)
    return (low - missing / 2, high + missing / 2) if missing > 0 else (low, high)


class _Grid:
    """Characters of 2 x 4 dots, over a range of steps and one of values."""

    def __init__(self, columns: int, rows: int, steps: tuple[int, int], values: tuple[float, float]) -> None:
        self._wide, self._high = columns * 2, rows * 4
        self._steps, self._values = steps, values
        self._unicode = shows(chr(_BRAILLE))
        self._cells = [[0] * columns for _ in range(rows)]
        self._marks: set[tuple[int, int]] = set()

    def line(self, points: Sequence[tuple[int, float]]) -> None:
        """Dots from point to point."""
        places = [self._place(*point) for point in points]
        for (left, top), (right, bottom) in pairwise(places):
            count = max(abs(right - left), abs(bottom - top), 1)
            for i in range(count + 1):
                self._dot(left + round((right - left) * i / count), top + round((bottom - top) * i / count))

    def mark(self, step: int, value: float) -> None:
        """A mark in the character that holds a point."""
        x, y = self._place(step, value)
        self._marks.add((y // 4, x // 2))

    def rows(self) -> list[str]:
        """The lines, from the top."""
        return ["".join(self._character(i, j) for j in range(len(row))) for i, row in enumerate(self._cells)]

    def _place(self, step: int, value: float) -> tuple[int, int]:
        """Column and row of the dot."""
        (first, last), (low, high) = self._steps, self._values
        x = (step - first) / (last - first) * (self._wide - 1)
        y = (high - value) / (high - low) * (self._high - 1)
        return round(x), round(y)

    def _dot(self, x: int, y: int) -> None:
        self._cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]

    def _character(self, row: int, column: int) -> str:
        if (row, column) in self._marks:
            return _MARK
        dots = self._cells[row][column]
        if not dots:
            return " "
        return chr(_BRAILLE + dots) if self._unicode else "*"


def write_picture(told: Sequence[tuple[str, Any]], path: Any) -> None:
    """Draw the curves of several versions, as pairs of reference and card, into a file."""
    from ..workflows.curves import draw_curves, read_curve

    draw_curves([read_curve(card, name) for name, card in told], path)
