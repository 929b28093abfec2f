"""The command line as operations: what its user sees when a call fails is one line, and the exit code 1."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

from adapterhub_lite.cli.app import run
from adapterhub_lite.errors import StoreError
from adapterhub_lite.store import Store
from tests.formats.build import lora_files
from tests.store.faulty import Unsynced
from tests.stress.acts import CARD, Act, Step, populated, with_leftovers, with_visitors


def _ahl(*arguments: str) -> Step:
    def step(store: Store) -> None:
        told = [argument.replace("WORLD", str(store.path.parent)) for argument in arguments]
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as said:
            code = run([*told, "--store", str(store.path)])
        line = said.getvalue()
        if code == 1 and line.startswith("error: ") and line.count("\n") == 1:
            raise StoreError(line.strip(), "It is one line.")
        if code == 2 and "is not readable" in line:  # before the command has begun
            raise StoreError(line.strip(), "The options were read in vain.")
        if code:
            raise RuntimeError(f"exit code {code}: {line}")

    return step


def many(store: Store) -> None:
    """More names than are listed without an index, then listed with it, and what was written to it read."""
    if len(store.names()) < 70:
        maker = Store(store.path, fs=Unsynced())
        for number in range(70):
            maker.put(f"n{number}", lora_files(0), CARD)
    for _ in range(2):
        store.list()


COMMANDS: Mapping[str, Act] = {
    "ahl alias": Act((_ahl("alias", "sql:prod", "2"),)),
    "ahl remove": Act((_ahl("remove", "sql@2"),)),
    "ahl import": Act((_ahl("import", "WORLD/in/guest.tar", "--name", "sql"),), with_visitors),
    "ahl export": Act((_ahl("export", "sql@1", "WORLD/out.tar"),)),
    "ahl gc": Act((_ahl("gc"),), with_leftovers, spares=True),
    "list many": Act((many,), populated),  # for its locks
}
