"""Bars as SVG text: labels escaped, sizes fixed, nothing that needs a library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_BLUE, _RED, _GREY = "#0072B2", "#D55E00", "#777777"  # told apart with each kind of colour blindness
_LINE, _LABEL, _ROOM, _SIDE = 16, 330, 560, 70


@dataclass(frozen=True)
class Bar:
    """One bar; `limit` is marked on it."""

    label: str
    value: float
    limit: float | None = None


def bars(shown: Sequence[Bar], title: str, log: bool = False) -> str:
    """Horizontal bars, one a line, each with its label and figure; red beyond its limit."""
    scale = _scale([v for bar in shown for v in (bar.value, bar.limit)], log)
    height = _LINE * (len(shown) + 2)
    parts = [_text(0, _LINE - 5, title)]
    for line, bar in enumerate(shown, 1):
        top = _LINE * line + 4
        length = scale(bar.value) * _ROOM
        colour = _RED if bar.limit is not None and not bar.value <= bar.limit else _BLUE
        parts.append(_text(_LABEL - 8, top + 10, _cut(bar.label), "end"))
        parts.append(f'<rect x="{_LABEL}" y="{top}" width="{length:.1f}" height="{_LINE - 5}" fill="{colour}"/>')
        parts.append(_text(_LABEL + length + 5, top + 10, f"{bar.value:.2g}"))
        if bar.limit is not None:
            at = _LABEL + scale(bar.limit) * _ROOM
            parts.append(f'<path d="M{at:.1f} {top - 2}v{_LINE - 1}" stroke="{_GREY}" stroke-width="2"/>')
    return _svg(_LABEL + _ROOM + _SIDE, height, title, parts)


def columns(values: Sequence[float], title: str, limit: float | None = None) -> str:
    """Columns side by side, with a line at `limit`."""
    high, left = 160, 60
    scale = _scale([*values, limit], False)
    width = max(4.0, min(40.0, (_LABEL + _ROOM) / max(len(values), 1)))
    parts = [_text(0, 12, title)]
    for i, value in enumerate(values):
        length = scale(value) * high
        colour = _RED if limit is not None and not value <= limit else _BLUE
        parts.append(
            f'<rect x="{left + i * width:.1f}" y="{24 + high - length:.1f}" width="{width - 1:.1f}" '
            f'height="{length:.1f}" fill="{colour}"><title>{value:.3g}</title></rect>'
        )
    for mark in dict.fromkeys(v for v in (max(values, default=0.0), limit) if v is not None):
        at = 24 + high - scale(mark) * high
        parts.append(_text(left - 5, at + 4, f"{mark:.2g}", "end"))
        parts.append(f'<path d="M{left} {at:.1f}h{width * len(values):.1f}" stroke="{_GREY}" stroke-dasharray="4 3"/>')
    return _svg(left + width * len(values) + 10, high + 34, title, parts)


class _Scale:
    """Values to 0..1: what is not finite goes to the end, what is 0 to the beginning."""

    def __init__(self, low: float, high: float, log: bool) -> None:
        self._low, self._high, self._log = low, high, log

    def __call__(self, value: float) -> float:
        if math.isnan(value) or value >= self._high:
            return 1.0
        if value <= self._low:
            return 0.0
        if not self._log:
            return (value - self._low) / (self._high - self._low)
        return math.log(value / self._low) / math.log(self._high / self._low)


def _scale(values: Sequence[float | None], log: bool) -> _Scale:
    known = [v for v in values if v is not None and math.isfinite(v) and v > 0]
    high = max(known, default=1.0)
    low = max(min(known, default=high) / 2, high * 1e-9) if log else 0.0
    return _Scale(low, high, log)


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    inner = "\n".join(parts)
    return f'<svg {size} role="img" aria-label="{escape(title)}">\n{inner}\n</svg>\n'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _cut(label: str, most: int = 52) -> str:
    """The end of a long name is what tells it apart."""
    return label if len(label) <= most else f"…{label[-(most - 1) :]}"
