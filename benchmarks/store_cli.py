"""The command line: whole processes of `ahl`, beside a bare typer script, `import peft` and an empty Python."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from .rows import Row, faster, in_turn, skip, slower, timed
from .store_make import name_of

CLI = "command line"
TYPER_GOAL, PEFT_GOAL = 2.0, 20.0
_TYPER = """import typer


def main(name: str = "world") -> None:
    print(f"Hello {name}")


typer.run(main)
"""
_AT_ONCE = ("list", "show", "--help")  # the commands that the goals are about
_NONE, _BARE, _PEFT = "python -c pass", "typer", "import peft"


def commands(folder: Path, few: tuple[Path, int], many: tuple[Path, int], rounds: int, peft: int) -> Iterator[Row]:
    """Commands on a store of few and of many adapters; `peft` of the rounds import it, as that takes so long."""
    ours, absent = _commands(few, many)
    for label, why in absent.items():
        yield skip(CLI, label, why)
    script = folder / "hello.py"
    script.write_text(_TYPER)
    peers = {_NONE: [sys.executable, "-c", "pass"]}
    if find_spec("typer"):
        peers[_BARE] = [sys.executable, str(script)]
    if peft and find_spec("peft"):
        peers[_PEFT] = [sys.executable, "-c", "import peft"]
    every = {_PEFT: max(1, rounds // peft)} if peft else {}
    works: dict[str, Callable[[int], list[float]]] = {
        label: partial(_running, command, store, every.get(label, 1))
        for label, (command, store) in {**ours, **{label: (peer, few[0]) for label, peer in peers.items()}}.items()
    }
    found = in_turn(works, rounds)
    for label, (_, store) in ours.items():
        # The goals are for stores that people look at: what a long table costs is not the start of a program.
        aimed = store == few[0] and label.split()[1].rstrip(",") in _AT_ONCE
        if _BARE in found:
            yield slower(CLI, label, found[label], _BARE, found[_BARE], TYPER_GOAL if aimed else None)
        if _PEFT in found:
            yield faster(CLI, label, found[label], _PEFT, found[_PEFT], PEFT_GOAL if aimed else None)
        yield slower(CLI, label, found[label], _NONE, found[_NONE])


def _commands(
    few: tuple[Path, int], many: tuple[Path, int]
) -> tuple[dict[str, tuple[list[str], Path]], dict[str, str]]:
    """Label -> command and store, and label -> why there is none: each is run once and must work."""
    found, absent = {}, {}
    first = name_of(0)
    plans = [
        (["--help"], few),
        (["list"], few),
        (["show", first], few),
        (["log", first], few),
        (["search", first], few),
    ]
    plans += [(["list"], many), (["search", first], many)]
    for arguments, (store, count) in plans:
        shown = " ".join("NAME" if word == first else word for word in arguments)
        label = f"ahl {shown}" if arguments[0] == "--help" else f"ahl {shown}, {count:,} adapters"
        command = [*_ahl(), *arguments]
        done = subprocess.run(command, env=_env(store), capture_output=True, text=True)
        if done.returncode != 0:
            absent[label] = f"it ends with {done.returncode}: {_last_line(done.stderr)}"
        elif arguments[0] != "--help" and first not in done.stdout:
            absent[label] = f"it does not show {first}"
        else:
            found[label] = (command, store)
    return found, absent


def _running(command: list[str], store: Path, every: int, turn: int) -> list[float]:
    if turn % every and turn >= 0:
        return []
    none = subprocess.DEVNULL
    return [timed(lambda: subprocess.run(command, env=_env(store), check=True, stdout=none, stderr=none))]


def _ahl() -> list[str]:
    """The installed command, or the same without it."""
    installed = Path(sys.executable).with_name("ahl")
    return [str(installed)] if installed.exists() else [sys.executable, "-m", "adapterhub_lite.cli"]


def _env(store: Path) -> dict[str, str]:
    return {**os.environ, "AHL_HOME": str(store)}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing said"])[-1][:120]
