"""JSON as RFC 8259 means it: no duplicate keys, no NaN, no lone surrogates, bounded size and depth."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

from ..errors import FormatError

MAX_DEPTH = 16


def parse_object(
    data: bytes | str,
    what: str,
    *,
    limit: int,
    depth: int = MAX_DEPTH,
    integer: Callable[[str], int] = int,
) -> dict[str, Any]:
    """Parse one JSON object of at most `limit` bytes (UTF-8) and `depth` levels; `integer` reads its integers.

    Raises:
        FormatError: naming `what`, for anything that is not exactly that.
    """
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if len(raw) > limit:
        raise FormatError(f"{what} is {len(raw)} bytes; the limit is {limit}.")
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_constant,
            parse_float=_finite,
            parse_int=integer,
        )
    except RecursionError:
        raise FormatError(f"{what} is nested deeper than {depth} levels.") from None
    except ValueError as error:
        raise FormatError(f"{what} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not a JSON object.")
    _check(value, what, depth)
    return value


def dump(value: object, indent: int | None = None, sort_keys: bool = True) -> bytes:
    """Canonical JSON: UTF-8, one newline at the end. Raises ValueError for NaN and infinities."""
    separators = (",", ": ") if indent else (",", ":")
    text = json.dumps(
        value, ensure_ascii=False, allow_nan=False, sort_keys=sort_keys, indent=indent, separators=separators
    )
    return (text + "\n").encode("utf-8")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {ascii(twice)[:80]} occurs twice")
    return found


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _check(value: object, what: str, depth: int) -> None:
    """Depth and encodability, without recursion: the input chooses the shape."""
    stack: list[tuple[object, int]] = [(value, 1)]
    while stack:
        item, level = stack.pop()
        if level > depth + 1:
            raise FormatError(f"{what} is nested deeper than {depth} levels.")
        if isinstance(item, dict):
            stack.extend((part, level + 1) for pair in item.items() for part in pair)
        elif isinstance(item, list):
            stack.extend((part, level + 1) for part in item)
        elif isinstance(item, str) and not item.isascii():
            _check_text(item, what)


def _check_text(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError(f"{what} holds half of a surrogate pair in {ascii(text)[:80]}.") from None
