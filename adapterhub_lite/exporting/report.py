"""What an export did, as data and as lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .findings import Finding
from .prepare import Layer


@dataclass(frozen=True)
class ExportReport:
    """One export, or what it would be.

    Attributes:
        path: the folder that was written; None after a check.
        rank: of the file's matrices; None where they are as the version has them.
        layers: every module of the file, measured after it was read back.
        error: relative Frobenius error of all modules as one; None where nothing was rewritten or measured.
        base_name: the base's name in the file.
    """

    ref: str
    digest: str
    reader: str
    path: str | None
    findings: tuple[Finding, ...]
    rank: int | None
    layers: tuple[Layer, ...]
    error: float | None
    base_name: str | None
    files: tuple[str, ...] = ()

    @property
    def refused(self) -> tuple[Finding, ...]:
        """Why nothing can be written."""
        return tuple(one for one in self.findings if one.remedy == "refused")

    def to_dict(self) -> dict[str, Any]:
        """Plain form."""
        return {
            "ref": self.ref,
            "digest": self.digest,
            "reader": self.reader,
            "path": self.path,
            "findings": [one.to_dict() for one in self.findings],
            "rank": self.rank,
            "layers": [vars(layer) for layer in self.layers],
            "error": self.error,
            "base_name": self.base_name,
            "files": list(self.files),
        }

    def lines(self) -> list[str]:
        """What was written and how near it is to the version, in a few lines."""
        if self.refused:
            count = len(self.refused)
            return [f"{self.ref} cannot be written for {self.reader}: {count} point{'s' if count > 1 else ''} above."]
        if self.path is None:
            return [f"{self.ref} can be written for {self.reader}{_of_rank(self.rank)}{self._caveats()}."]
        said = [f"{self.ref} -> {self.path} for {self.reader}{_of_rank(self.rank)}{self._caveats()}."]
        if self.error is not None:
            said.append(f"Read back: {len(self.layers)} modules, relative error {self.error:.1e}{_worst(self.layers)}.")
        return said

    def _caveats(self) -> str:
        """What is written and may fail, or answer otherwise, where it is read."""
        refused, wrong, warned = (self._left(severity) for severity in ("refused", "silently wrong", "warning"))
        found = [f"older versions of {self.reader} refuse it ({refused})"] if refused else []
        found += [f"{self.reader} may read it wrongly ({wrong})"] if wrong else []
        found += [f"mind the warning above ({warned})"] if warned else []
        return ", but " + ", and ".join(found) if found else ""

    def _left(self, severity: str) -> str:
        return ", ".join(one.rule for one in self.findings if one.severity == severity and one.remedy == "told")


def _of_rank(rank: int | None) -> str:
    return "" if rank is None else f", with rank {rank}"


def _worst(layers: Sequence[Layer]) -> str:
    worst = max(layers, key=lambda layer: layer.error, default=None)
    return f", largest {worst.error:.1e} at {worst.module}" if worst is not None and worst.error > 0 else ""
