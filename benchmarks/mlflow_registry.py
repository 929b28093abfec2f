"""Run by MLflow's own venv: `mlflow_registry.py FILE COUNT` makes a registry of COUNT models in a SQLite file, if it is
not there, and then answers each line of JSON on its input, {"call", "names"}, with the seconds of each lookup.

The models are registered through the public client: one registered model and one version of it each.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

Calls = dict[str, Callable[[str], Any]]


def main(file: Path, count: int) -> None:
    """Make, then answer until the input ends."""
    seconds = 0.0 if file.exists() else make(file, count)
    calls = calls_of(client_of(file))
    versions = {name: version(name) for name in ("mlflow-skinny", "sqlalchemy")}
    tell({"versions": {**versions, "sqlite": sqlite3.sqlite_version}, "seconds": seconds, "calls": list(calls)})
    for line in sys.stdin:
        asked = json.loads(line)
        tell({"seconds": [once(calls[asked["call"]], name) for name in asked["names"]]})


def make(file: Path, count: int) -> float:
    """Register the models under another file name, which is theirs when all are there; the seconds it took."""
    begun = time.perf_counter()
    part = file.with_suffix(".part")
    part.unlink(missing_ok=True)
    client = client_of(part)
    for number in range(count):
        name = f"adapter-{number:06}"
        client.create_registered_model(name)
        client.create_model_version(name, source=str(file.parent / "models" / name))
    part.rename(file)
    return time.perf_counter() - begun


def client_of(file: Path) -> MlflowClient:
    """A client on this file."""
    return MlflowClient(tracking_uri=f"sqlite:///{file}", registry_uri=f"sqlite:///{file}")


def calls_of(client: MlflowClient) -> Calls:
    """The public calls that find a model by its name. All but the last also say which version is the newest."""

    def search(name: str) -> Any:
        return client.search_registered_models(filter_string=f"name='{name}'")[0].name

    return {
        "search_registered_models": search,
        "search_model_versions": lambda name: client.search_model_versions(f"name='{name}'", max_results=1)[0].name,
        "get_registered_model": lambda name: client.get_registered_model(name).name,
        "get_model_version": lambda name: client.get_model_version(name, "1").name,
    }


def once(call: Callable[[str], Any], name: str) -> float:
    """Seconds of one lookup, which must find the model."""
    begun = time.perf_counter()
    found = call(name)
    seconds = time.perf_counter() - begun
    if found != name:
        raise LookupError(f"asked for {name}, got {found}")
    return seconds


def tell(message: dict[str, Any]) -> None:
    """One line of JSON."""
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
