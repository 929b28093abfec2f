"""One row of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub_lite.errors import AdapterHubError
from adapterhub_lite.names import Ref
from adapterhub_lite.store import Store


@dataclass(frozen=True)
class Attack:
    """What comes in by which door, and what becomes of it.

    Attributes:
        id: the row of the matrix in front (I1 to I17 are inputs, S1 to S20 stores), then what it is.
        door: a key of `doors.DOORS`.
        what: what that door takes, or a function of no argument that makes it.
        error: the exact class of the refusal; None where it is taken in, and must be harmless.
        words: a regular expression that the message matches.
        header: refused by the header alone, in little memory.
        harmless: what must hold of the version that was stored.
    """

    id: str
    door: str
    what: Any
    error: type[AdapterHubError] | None
    words: str = ""
    header: bool = False
    harmless: Callable[[Store, Ref], object] | None = None


def rows(
    row: str, door: str, error: type[AdapterHubError] | None, cases: Mapping[str, tuple[Any, str]], **more: Any
) -> list[Attack]:
    """Attacks of one row, door and error: name -> (what, words)."""
    return [Attack(f"{row} {name}", door, what, error, words, **more) for name, (what, words) in cases.items()]
