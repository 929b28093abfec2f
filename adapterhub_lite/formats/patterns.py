"""Keys of `rank_pattern` and `alpha_pattern`, matched as PEFT matches them but without a regular expression.

PEFT (`peft.utils.other.get_pattern_key`) takes the first key for which `(.*\\.)?(KEY)$` matches the module name. We
accept the keys that people and PEFT's own tools write: dotted names, with `\\.` for a dot, a leading `^` or `.*\\.` and
a trailing `$`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

MAX_KEY = 256
_KEY = re.compile(r"(?P<start>\^?)(?P<parent>(?:\.\*\\\.)?)(?P<body>(?:[A-Za-z0-9_\-.]|\\\.)+)\$?", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Pattern:
    tail: tuple[str | None, ...]  # one character each; None stands for any (an unescaped dot)
    whole: bool  # nothing may stand before the tail
    parent: bool  # something must

    def matches(self, name: str) -> bool:
        cut = len(name) - len(self.tail)
        if cut < 0 or any(want is not None and want != got for want, got in zip(self.tail, name[cut:], strict=True)):
            return False
        if self.whole:
            return cut == 0
        return name[:cut].endswith(".") or (cut == 0 and not self.parent)


def is_pattern(key: str) -> bool:
    """Whether `key` is one of the forms above; anything else would need a regular expression and is refused."""
    return len(key) <= MAX_KEY and _KEY.fullmatch(key) is not None


def first_match(keys: Iterable[str], module_name: str) -> str | None:
    """The first key that names `module_name` (a path inside the base model), or None."""
    return next((key for key in keys if _parse(key).matches(module_name)), None)


@lru_cache(maxsize=1024)
def _parse(key: str) -> _Pattern:
    match = _KEY.fullmatch(key)
    if match is None or len(key) > MAX_KEY:
        raise ValueError(f"{ascii(key)[:80]} is not a module name pattern")
    parent = bool(match["parent"])
    tail = tuple("." if part == "\\." else None if part == "." else part for part in _parts(match["body"]))
    return _Pattern(tail, whole=bool(match["start"]) and not parent, parent=parent)


def _parts(body: str) -> list[str]:
    return re.findall(r"\\\.|.", body)
