"""Runs one target for some seconds in a process of its own and prints what came of it as JSON.

    python -m tests.fuzz.engine TARGET SECONDS ENGINE FOLDER

`atheris` follows coverage (https://github.com/google/atheris); `mutate` needs nothing installed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.common import LARGEST

SLOW = 10.0  # seconds that no input may take
_MEMORY = 4096  # MiB that no process may take, libraries included


def with_mutations(target: Any, seconds: float, folder: Path, first: int) -> dict[str, Any]:
    """Mutations of the seeds, numbered from `first`: the same number makes the same input."""
    warm(target)
    begin, count = time.monotonic(), 0
    while time.monotonic() - begin < seconds:
        data = made(target, first + count)
        count += 1
        started = time.monotonic()
        try:
            target.fuzz(data)
        except Exception:
            return {"executions": count, "finding": kept(folder, data), "trace": traceback.format_exc()}
        if time.monotonic() - started > SLOW:
            return {"executions": count, "finding": kept(folder, data), "trace": f"slower than {SLOW} s"}
    return {"executions": count, "finding": "", "trace": ""}


def warm(target: Any) -> None:
    """Try the seeds: what is imported with the first of them takes longer than any input may."""
    for seed in target.SEEDS:
        target.fuzz(seed)


def made(target: Any, number: int) -> bytes:
    """The input with this number."""
    rng = Random(number)
    data: bytes = rng.choice(target.SEEDS)
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = target.mutate(data, rng)
    return data


def kept(folder: Path, data: bytes) -> str:
    """Write an input down; returns where."""
    path = folder / f"crash-{hashlib.sha1(data, usedforsecurity=False).hexdigest()}"
    path.write_bytes(data)
    return str(path)


def with_atheris(name: str, seconds: float, folder: Path) -> None:
    """Never returns: libFuzzer ends the process, with its figures on stderr."""
    import atheris

    with atheris.instrument_imports(include=["adapterhub_lite"]):
        target = importlib.import_module(f"tests.fuzz.{name}")
    warm(target)
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(target.SEEDS):
        (corpus / f"seed-{number}").write_bytes(seed)

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        rng = Random(seed)
        kind = rng.random()
        if kind < 0.25:
            return bytes(atheris.Mutate(data, len(data)))
        # A valid seed now and then: what coverage finds interesting is mostly invalid, and stays so.
        changed = made(target, seed) if kind < 0.6 else target.mutate(bytes(data), rng)
        return changed if 0 < len(changed) <= most else bytes(data)

    limits = [f"-max_total_time={int(seconds)}", f"-max_len={LARGEST}", f"-timeout={int(SLOW)}"]
    told = [f"-rss_limit_mb={_MEMORY}", f"-artifact_prefix={folder}/", "-print_final_stats=1", "-verbosity=0"]
    atheris.Setup([sys.argv[0], str(corpus), *limits, *told], target.fuzz, custom_mutator=mutator)
    atheris.Fuzz()


def main(name: str, seconds: str, engine: str, folder: str) -> None:
    """As the module says."""
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    if engine == "atheris":
        with_atheris(name, float(seconds), where)
        return
    target = importlib.import_module(f"tests.fuzz.{name}")
    print(json.dumps(with_mutations(target, float(seconds), where, time.time_ns() >> 20)))


if __name__ == "__main__":
    main(*sys.argv[1:])
