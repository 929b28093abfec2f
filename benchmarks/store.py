"""The store: lookup, growth, listing, storing and the command line, beside what people use instead.

Beside folders of PEFT files, MLflow's model registry on SQLite (with --with-mlflow), `cp` and `sha256sum`, a bare typer
script and `import peft`; ours and the peers in turn. Times are medians with the 95th percentile in brackets. Stores are
measured at rest: written to disk, and last changed some seconds ago. Needs no torch. It works in the folder that TMPDIR
names, which should be on a disk.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from . import store_cli, store_lookup, store_make, store_mlflow, store_writes
from .options import add_options
from .rows import Row, machine, settle

_ONE = "one"
_FEW = 5  # adapters of the store that the command line is timed on


@dataclass(frozen=True)
class Sizes:
    """How much is done."""

    small: int = 1_000
    names: int = 10_000
    most: int = 100_000
    versions: tuple[int, int] = (100, 10_000)
    puts: tuple[tuple[int, int], ...] = ((1 << 20, 15), (20 << 20, 9), (100 << 20, 5))
    rounds: int = 15
    peft_rounds: int = 5
    writers: int = 8
    writes: int = 200
    rest: float = 3.0


QUICK = Sizes(
    small=20, names=100, most=200, versions=(3, 20), puts=((1 << 18, 2),), rounds=2, peft_rounds=0, writers=3, writes=4,
    rest=0.0,
)  # fmt: skip


class Report:
    """Prints rows as they come, and keeps them."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.machine = machine(folder)
        self.quick = quick
        self.rows: list[Row] = []
        self.set_up: dict[str, float] = {}

    def head(self) -> None:
        """Title, machine and versions."""
        print("\n== store: lookup, listing, storing and the command line")
        self._print(self.machine)

    def beside(self, versions: dict[str, str]) -> None:
        """Print and keep the versions of a peer that was found later."""
        self.machine.update(versions)
        self._print(versions)

    def take(self, rows: Iterable[Row]) -> None:
        """Print and keep rows. With few adapters no goal about time is judged."""
        for row in rows:
            if self.quick and row.part != store_writes.WRITERS:
                row = replace(row, met=None)
            self.rows.append(row)
            print(row, flush=True)

    def made(self, what: str, seconds: float) -> None:
        """Print and keep how long something took to make."""
        self.set_up[what] = seconds
        print(f"   made {what} in {seconds:.0f} s", flush=True)

    def _print(self, facts: dict[str, str]) -> None:
        print("   " + ", ".join(f"{what} {value}" for what, value in facts.items()), flush=True)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, times in seconds."""
        rows = [row.to_dict() for row in self.rows]
        return {"quick": self.quick, "machine": self.machine, "set_up_seconds": self.set_up, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it with these options, by default those of the command line."""
    options = add_options(ArgumentParser()).parse_known_args(arguments)[0]
    sizes = QUICK if options.quick else Sizes()
    if options.json:
        options.json.touch()  # a file that cannot be written is found before the long work
    with TemporaryDirectory(prefix="ahl-benchmark-") as folder:
        report = Report(Path(folder), options.quick)
        report.head()
        try:
            _run(report, sizes, Path(folder), options.with_mlflow)
        finally:
            if options.json:
                options.json.write_text(json.dumps(report.to_dict(), indent=2) + "\n")


def _run(report: Report, sizes: Sizes, folder: Path, with_mlflow: bool) -> None:
    """Everything, the quick parts first; large stores are made when they are needed."""
    report.take(store_writes.puts(folder / "puts", sizes.puts))
    report.take(store_writes.writers(folder / "writers", sizes.writers, sizes.writes))
    few, small, many, most = (folder / name for name in ("few", "small", "many", "most"))
    for path, count in ((few, _FEW), (small, sizes.small), (many, sizes.names)):
        report.made(f"a store of {count:,} names", store_make.fill_names(path, count))
    settle(sizes.rest)
    report.take(store_lookup.listings(many, sizes.names, None))
    settle(sizes.rest)
    report.take(store_cli.commands(folder, (few, _FEW), (many, sizes.names), sizes.rounds, sizes.peft_rounds))
    _lookups(report, sizes, folder, with_mlflow)
    _versions(report, sizes, folder)
    report.made(f"a store of {sizes.most:,} names", store_make.fill_names(most, sizes.most))
    settle(sizes.rest)
    report.take(store_lookup.growth(small, most, (sizes.small, sizes.most)))
    report.take(store_lookup.listings(most, sizes.most, store_lookup.LIST_SECONDS))


def _lookups(report: Report, sizes: Sizes, folder: Path, with_mlflow: bool) -> None:
    """A store of its own: a second version in the other one would be seen."""
    path, folders = folder / "lookup", folder / "peft"
    store_make.fill_names(path, sizes.names)
    report.made(f"{sizes.names:,} PEFT folders", store_make.peft_folders(folders, sizes.names))
    with ExitStack() as stack:
        registry = None
        if with_mlflow:
            report.made("MLflow's venv", store_mlflow.install())
            registry = stack.enter_context(store_mlflow.Registry(sizes.names))
            report.made(f"MLflow's registry of {sizes.names:,} models", registry.seconds)
            report.beside(registry.versions)
        settle(sizes.rest)
        report.take(store_lookup.lookups(path, folders, sizes.names, registry))


def _versions(report: Report, sizes: Sizes, folder: Path) -> None:
    few, many = folder / "few-versions", folder / "many-versions"
    for path, count in zip((few, many), sizes.versions, strict=True):
        report.made(f"a name with {count:,} versions", store_make.fill_versions(path, _ONE, count))
    settle(sizes.rest)
    report.take(store_lookup.version_growth(few, many, _ONE, sizes.versions))


if __name__ == "__main__":
    main()
