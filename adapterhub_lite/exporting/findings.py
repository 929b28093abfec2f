"""What a reader elsewhere makes of a version as it is stored, and what an export does about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

_DONE = {"rewritten": "rewritten", "svd": "rewritten by SVD", "refused": "refused"}
_UNDONE = {"refused": "refused by older versions", "silently wrong": "may be silently wrong"}

Severity = Literal["refused", "silently wrong", "warning", "info"]
"""What the reader does with the version as it is stored: an error, wrong numbers without a word, what depends on the
weights it is given, or nothing wrong."""
Remedy = Literal["rewritten", "svd", "refused", "told"]
"""What the export does: rewrites without loss, by SVD with an error, not at all, or leaves as it is and says so."""


@dataclass(frozen=True)
class Finding:
    """One thing that a reader would not read as it was meant.

    Attributes:
        rule: its short name, one of `traits.TRAITS`, or `advice` for what to know when it is served.
        what: what the version has, and what the reader does with it.
        done: what was done, or why nothing can be.
        error: relative Frobenius error of what was done by SVD.
    """

    rule: str
    severity: Severity
    what: str
    remedy: Remedy
    done: str
    error: float | None = None

    @property
    def verdict(self) -> str:
        """The severity, and what is left of it in what is written."""
        done = _DONE.get(self.remedy)
        if done is None:
            return _UNDONE.get(self.severity, self.severity)
        return done if self.severity in ("info", done) else f"would be {self.severity}; {done}"

    def to_dict(self) -> dict[str, Any]:
        """Plain form."""
        told = {"rule": self.rule, "severity": self.severity, "what": self.what, "remedy": self.remedy}
        return {**told, "done": self.done, "error": self.error}


def refusals(findings: Iterable[Finding]) -> list[Finding]:
    """Those for which nothing can be written."""
    return [one for one in findings if one.remedy == "refused"]


def one_of(ways: Sequence[str]) -> str:
    """What to do, as a sentence; empty where there is nothing."""
    text = ", or ".join(ways)
    return f"{text[0].upper()}{text[1:]}." if text else ""
