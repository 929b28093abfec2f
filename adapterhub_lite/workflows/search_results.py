"""What a search found: a table, the best first, with intervals where seeds repeat; as CSV, JSON and a picture."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..names import Ref
from ..store.fs import FileSystem, replace_file, storing
from .search_journal import Search
from .search_space import short
from .search_trials import Trial

SEED = "training.seed"
CSV, JSON, PLOT = "results.csv", "results.json", "plot.png"
# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond the last the normal distribution's.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
      2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
      2.042)  # fmt: skip
_NORMAL = 1.96


@dataclass(frozen=True)
class Repeated:
    """Trials that differ by their seed alone.

    Attributes:
        loss: mean validation loss; None where none was measured.
        interval: half the width of the mean's 95 % confidence interval (Student's t); None for a single seed.
    """

    parameters: dict[str, Any]
    trials: tuple[Trial, ...]
    loss: float | None
    interval: float | None


@dataclass(frozen=True)
class SearchResult:
    """A search as it stands.

    Attributes:
        trials: the best validation loss first; those that were not measured last.
        best: what was stored of the best trial (of a sweep: its version).
        interrupted: the exit code that a signal asked for, or 0.
    """

    kind: str
    name: str
    id: str
    trials: tuple[Trial, ...]
    best: Ref | None
    folder: Path
    files: tuple[Path, ...] = ()
    interrupted: int = 0
    head: Mapping[str, Any] = field(default_factory=dict)

    @property
    def axes(self) -> list[str]:
        """The fields that are varied."""
        return list(self.trials[0].parameters) if self.trials else []

    @property
    def seconds(self) -> float:
        """What training took, of all groups."""
        return float(self.head.get("seconds", 0.0))

    @property
    def repeats(self) -> list[Repeated]:
        """By parameters without the seed, the best mean first."""
        return repeated(self.trials)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "kind": self.kind,
            "name": self.name,
            "id": self.id,
            "sorted_by": "validation loss",
            "best": str(self.best) if self.best else None,
            "folder": str(self.folder),
            "files": [str(path) for path in self.files],
            "interrupted": bool(self.interrupted),
            "seconds": self.seconds,
            "told": self.head.get("told"),
            "space": self.head.get("space"),
            "trials": [asdict(trial) for trial in self.trials],
            "repeats": [
                {
                    "parameters": one.parameters,
                    "trials": [trial.number for trial in one.trials],
                    "loss": one.loss,
                    "interval": one.interval,
                }
                for one in self.repeats
            ],
        }


def ranked(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The best validation loss first; a tie goes to the one that came first."""
    return tuple(sorted(trials, key=lambda one: (one.loss is None, one.loss or 0.0, one.number)))


def repeated(trials: Sequence[Trial]) -> list[Repeated]:
    """Trials by their parameters without the seed, the best mean first."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        key = json.dumps({k: v for k, v in trial.parameters.items() if k != SEED}, sort_keys=True)
        groups.setdefault(key, []).append(trial)
    found = [_repeated({k: v for k, v in g[0].parameters.items() if k != SEED}, g) for g in groups.values()]
    return sorted(found, key=lambda one: (one.loss is None, one.loss or 0.0))


def _repeated(parameters: dict[str, Any], group: Sequence[Trial]) -> Repeated:
    losses = [trial.loss for trial in group if trial.loss is not None]
    mean = statistics.fmean(losses) if losses else None
    return Repeated(parameters, tuple(group), mean, interval(losses))


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of a mean (Student's t); None of less than two values."""
    if len(values) < 2:
        return None
    degrees = len(values) - 1
    quantile = _T[degrees - 1] if degrees <= len(_T) else _NORMAL
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def write_results(search: Search, result: SearchResult, out: Path | None = None) -> SearchResult:
    """Write table and picture into a folder (the search's own); returns the result with their paths."""
    from .search_plot import draw_search

    folder = out or result.folder
    folder.mkdir(parents=True, exist_ok=True)
    fs = FileSystem()
    paths = (folder / CSV, folder / JSON, folder / PLOT)
    filled = SearchResult(
        **{**vars(result), "files": paths if any(t.loss is not None for t in result.trials) else paths[:2]}
    )
    told = json.dumps(filled.to_dict(), indent=2, ensure_ascii=False, default=str) + "\n"
    with storing("write the results of a search", folder):
        replace_file(fs, folder, folder / CSV, table_csv(result.trials).encode(), 0o644)
        replace_file(fs, folder, folder / JSON, told.encode(), 0o644)
    if len(filled.files) == len(paths):
        draw_search(result, folder / PLOT)
    return filled


def table_csv(trials: Sequence[Trial]) -> str:
    """One line a trial, in the order given."""
    axes = list(dict.fromkeys(path for trial in trials for path in trial.parameters))
    measured = sorted({name for trial in trials for name in trial.metrics if name != "loss"})
    tested = sorted({name for trial in trials for name in trial.test})
    head = ["trial", *map(short, axes), "state", "validation_loss", *(f"validation_{name}" for name in measured)]
    head += [*(f"test_{name}" for name in tested), "step", "steps", "tokens", "seconds", "version", "note"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    for one in trials:
        row: list[Any] = [one.number, *(one.parameters.get(path) for path in axes), one.state or "open", one.loss]
        row += [*(one.metrics.get(name) for name in measured), *(one.test.get(name) for name in tested)]
        writer.writerow([*row, one.step, one.steps, one.tokens, one.seconds, one.ref, one.note])
    return file.getvalue()
