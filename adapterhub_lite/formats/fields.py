"""Taking typed values out of parsed JSON, with every problem collected and none thrown away."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import FormatError

MOST = 50  # problems told

T = TypeVar("T")
Check = Callable[[Any], T]  # returns the value, or raises ValueError with what is expected


class Fields:
    """The keys of one JSON object, taken one by one; `finish` refuses what was wrong and what was not taken."""

    def __init__(self, raw: Mapping[str, Any], what: str) -> None:
        self._left = dict(raw)
        self._what = what
        self.problems: list[str] = []

    def take(self, key: str, check: Check[T], default: T) -> T:
        """The checked value of `key`; `default` when it is absent or wrong (a wrong one is also a problem)."""
        if key not in self._left:
            return default
        return self._checked(key, self._left.pop(key), check, default)

    def need(self, key: str, check: Check[T], stand_in: T) -> T:
        """As `take`, but an absent key is a problem; `stand_in` is never seen by callers, since `finish` raises."""
        if key not in self._left:
            self.problems.append(f"{key}: is missing")
            return stand_in
        return self._checked(key, self._left.pop(key), check, stand_in)

    def neutral(self, key: str, *values: object, reason: str) -> None:
        """Accept `key` only with one of `values` (same type); anything else is refused for `reason`."""
        value = self._left.pop(key, values[0])
        if not any(type(value) is type(allowed) and value == allowed for allowed in values):
            self.problems.append(f"{key}: {shown(value)} is not supported ({reason})")

    def finish(self) -> None:
        """Raise one FormatError with every problem, if there is any."""
        self.problems += [f"{ascii(key)[1:-1][:80]}: unknown key" for key in self._left]
        if self.problems:
            raise problems_error(self._what, self.problems)

    def _checked(self, key: str, value: Any, check: Check[T], default: T) -> T:
        try:
            return check(value)
        except ValueError as error:
            self.problems.append(f"{key}: {error}, got {shown(value)}")
            return default


def problems_error(what: str, problems: list[str]) -> FormatError:
    """One error for many problems, one line each; the first of them where there are very many."""
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
    more = [f"and {len(problems) - MOST} more"] if len(problems) > MOST else []
    return FormatError("\n  ".join([f"{what}: {count}", *problems[:MOST], *more]))


def shown(value: object) -> str:
    """A short printable form of a foreign value."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def boolean(value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def integer(low: int, high: int) -> Check[int]:
    """A whole number in [low, high]."""

    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")
        return value

    return check


def number(low: float, high: float, *, open_low: bool = False) -> Check[float]:
    """A finite number in [low, high], or (low, high] with `open_low`; text is not a number."""

    def check(value: Any) -> float:
        good = type(value) in (int, float) and low <= value <= high  # false for NaN
        if not good or (open_low and value == low):
            raise ValueError(f"expected a number {'above' if open_low else 'from'} {low:g} to {high:g}")
        return float(value)

    return check


def text(limit: int) -> Check[str]:
    """Printable text of at most `limit` characters."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or len(value) > limit or not value.isprintable():
            raise ValueError(f"expected printable text of at most {limit} characters")
        return value

    return check


def optional(check: Check[T]) -> Check[T | None]:
    """null, or what `check` accepts."""
    return lambda value: None if value is None else check(value)


def strings(item: Check[str], limit: int) -> Check[tuple[str, ...]]:
    """null or a list of at most `limit` strings, returned sorted and without repetitions."""

    def check(value: Any) -> tuple[str, ...]:
        if value is None:
            return ()
        if not isinstance(value, list) or len(value) > limit:
            raise ValueError(f"expected a list of at most {limit} texts")
        return tuple(sorted({item(entry) for entry in value}))

    return check
