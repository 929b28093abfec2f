"""MLflow's model registry as a peer: a venv of its own under build/, and a process there that answers in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

PINS = ("mlflow-skinny==3.17.2", "sqlalchemy==2.1.9", "alembic==1.20.1")
BUILD = Path(__file__).parents[1] / "build"
_VENV = BUILD / "mlflow-venv"
_SCRIPT = Path(__file__).with_name("mlflow_registry.py")
_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}


def install() -> float:
    """Make the venv if it is not there with these pins; the seconds it took."""
    begun = time.perf_counter()
    mark = _VENV / "pins.txt"
    if not mark.is_file() or mark.read_text() != "\n".join(PINS):
        print(f"   installing {', '.join(PINS)} in {_VENV}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(_VENV)], check=True)
        pip = [str(_python()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PINS]
        subprocess.run(pip, check=True)
        mark.write_text("\n".join(PINS))
    return time.perf_counter() - begun


class Registry:
    """A process with an MLflow client on a SQLite file of `count` models, which are made once and kept in build/.

    Between questions it waits for its input and takes no processor time.
    """

    def __init__(self, count: int) -> None:
        print(f"   opening MLflow's registry of {count:,} models (made once, in minutes)", flush=True)
        self._log: IO[bytes] = open(BUILD / "mlflow.log", "wb")  # noqa: SIM115  # closed with the process
        command = [str(_python()), str(_SCRIPT), str(BUILD / f"mlflow-{count}.db"), str(count)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**os.environ, **_QUIET},
        )  # fmt: skip
        told = self._read()
        self.versions: dict[str, str] = told["versions"]
        self.seconds: float = told["seconds"]
        """Seconds that making the models took; 0 where they were there."""
        self.calls: list[str] = told["calls"]

    def ask(self, call: str, names: list[str]) -> list[float]:
        """Seconds of one lookup a name."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"call": call, "names": names}) + "\n")
        self._process.stdin.flush()
        found: list[float] = self._read()["seconds"]
        return found

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"MLflow's process has ended; {BUILD / 'mlflow.log'} says why")
        found: dict[str, Any] = json.loads(line)
        return found


def _python() -> Path:
    return _VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
