"""Fuzzes the parsers one after the other: `python -m tests.fuzz [TARGET...] [--seconds N] [--engine NAME]`.

Prints executions and findings of each; exits with 1 if there is a finding. What it found stays in build/fuzz.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TARGETS = (
    "safetensors_header", "adapter_config", "card", "manifest", "move", "recipe", "archive", "reference", "query",
)  # fmt: skip
ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build" / "fuzz"
_COUNT = re.compile(r"stat::number_of_executed_units:\s*(\d+)|^#(\d+)\s+DONE", re.MULTILINE)
_CRASH = re.compile(r"Test unit written to (\S+)")
_MORE = 120  # seconds for a process to begin and to end


def run(name: str, seconds: int, engine: str) -> tuple[int, str, str]:
    """Executions, where the finding is, and what went wrong ("" for none) of one target."""
    folder = KEPT / name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz.engine", name, str(seconds), engine, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds + _MORE, errors="replace"
    )
    if engine == "mutate" and done.returncode == 0:
        told = json.loads(done.stdout)
        return told["executions"], told["finding"], told["trace"]
    count = max((int(a or b) for a, b in _COUNT.findall(done.stderr)), default=0)
    crash = _CRASH.search(done.stderr)
    if done.returncode == 0 and crash is None:
        return count, "", ""
    return count, crash[1] if crash else "", done.stderr[-4000:]


def main(arguments: Sequence[str] | None = None) -> int:
    """The number of targets with a finding, at most 1."""
    default = "atheris" if importlib.util.find_spec("atheris") else "mutate"
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="for each target [60]")
    parser.add_argument("--engine", choices=("atheris", "mutate"), default=default, help=f"[{default}]")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.targets) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}")
    findings = 0
    print(f"engine {asked.engine}, {asked.seconds} s each", flush=True)
    for name in asked.targets or TARGETS:
        count, where, problem = run(name, asked.seconds, asked.engine)
        findings += bool(problem)
        print(f"{name:<20} {count:>12,} executions  {'FINDING ' + where if problem else 'none'}", flush=True)
        if problem:
            print(problem, file=sys.stderr, flush=True)
    return min(findings, 1)


if __name__ == "__main__":
    sys.exit(main())
