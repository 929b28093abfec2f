"""What a plan foretells of memory and time, beside what is measured: each in a fresh process of its own.

The run is the whole loop with its evaluations and checkpoints. Memory is the most the process holds, and what of it is
above the loaded base; libraries are loaded before, weights are read. Both take what the recipe or the plan says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .rows import Row, skip

PART = "plan"
MEMORY, TIME = 0.10, 0.25  # how far the plan may be off
_ROOT = Path(__file__).parents[1]
_PLAIN = "quantize=none"
_KEYS = {
    "peak memory": ("peak", "MB", 1e6),
    "memory above the base": ("above", "MB", 1e6),
    "time": ("seconds", "s", 1.0),
}


@dataclass(frozen=True)
class Trial:
    """A recipe that is planned and trained; `count` of it, with different seeds, together."""

    recipe: str
    overrides: tuple[str, ...]
    count: int = 1

    def __str__(self) -> str:
        changes = [text.partition(".")[2] or text for text in self.overrides]
        return " ".join([self.recipe, *changes, *([f"x {self.count}"] if self.count > 1 else [])])


def _sql(*overrides: str, count: int = 1) -> Trial:
    return Trial("sql", ("training.max_steps=12", *overrides), count)


TRIALS = (
    _sql(_PLAIN),
    _sql(_PLAIN, "training.batch_size=16"),
    _sql(_PLAIN, "training.checkpointing=true", "training.batch_size=8"),
    _sql(_PLAIN, "training.pack_tokens=256"),
    _sql(_PLAIN, "adapter.dropout=0.1"),
    _sql(_PLAIN, "adapter.type=dora"),
    _sql(_PLAIN, "adapter.rank=128"),
    _sql(_PLAIN, count=3),
    _sql("training.working_copies=true"),
    _sql("training.working_copies=false"),
    Trial("sentiment", ("training.max_steps=12",)),
    Trial("sql", (_PLAIN, "adapter={type: peft, method: vera}", "training.max_steps=8")),
    Trial("topics", ("training.epochs=3",)),
    Trial("topics", ("training.epochs=3", "training.pack_tokens=128", "training.checkpointing=true")),
    Trial("topics", ("adapter={type: peft, method: vera}", "training.max_steps=30")),
    Trial("entities", ("training.epochs=1",)),
)
QUICK = TRIALS[-1:]


def rows(trials: Sequence[Trial] = TRIALS) -> Iterator[Row]:
    """A figure for each recipe, and the furthest that the plan was off of memory and of time."""
    kinds = (("peak memory", MEMORY), ("memory above the base", None), ("time", TIME))
    if not Path("/proc/self/clear_refs").is_file():
        for what, _ in kinds:
            yield skip(PART, f"{what} foretold", "this system tells no peak")
        return
    off: dict[str, list[float]] = {what: [] for what, _ in kinds}
    for trial in trials:
        foretold, measured = (_run(mode, trial) for mode in ("plan", "train"))
        told = []
        for what, _ in kinds:
            key, unit, scale = _KEYS[what]
            off[what].append(foretold[key] / measured[key] - 1)
            told.append(f"{foretold[key] / scale:,.0f} / {measured[key] / scale:,.0f} {unit} {off[what][-1]:+.0%}")
        yield Row(PART, f"foretold / measured: {trial}", figure=off["peak memory"][-1], told=", ".join(told))
    for what, limit in kinds:
        worst = max(off[what], key=abs)
        goal = "" if limit is None else f"within {limit:.0%}"
        met = None if limit is None else abs(worst) <= limit
        title = f"{what} foretold, the furthest off of {len(trials)} recipes"
        yield Row(PART, title, figure=abs(worst), told=f"{worst:+.1%}", goal=goal, met=met)


def _run(mode: str, trial: Trial) -> dict[str, float]:
    job = json.dumps({"mode": mode, "recipe": trial.recipe, "overrides": trial.overrides, "count": trial.count})
    command = [sys.executable, "-m", "benchmarks.training_plan", job]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{mode} of {trial} failed: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(job: dict[str, Any]) -> None:
    """Plan or train in this process."""
    import peft  # noqa: F401  # libraries are no part of what training takes
    import transformers  # noqa: F401

    from adapterhub_lite.bases.load import load_base
    from adapterhub_lite.recipe import load_recipe
    from adapterhub_lite.workflows.plan import wanted_copies

    names = [f"learner-{i}" for i in range(job["count"])]
    plans = [load_recipe(job["recipe"], [*job["overrides"], f"name={name}"]) for name in names]
    base = load_base(plans[0].base, plans[0].quantize, working_copies=wanted_copies(plans))
    with TemporaryDirectory() as folder:
        print(json.dumps((_planned if job["mode"] == "plan" else _trained)(plans, base, Path(folder))))


def _planned(plans: Sequence[Any], base: Any, folder: Path) -> dict[str, float]:
    from adapterhub_lite.store import Store
    from adapterhub_lite.workflows.plan import plan

    made = plan(*plans, base=base, store=Store(folder))
    assert made.time is not None
    return {"peak": made.memory.peak, "above": made.memory.above, "seconds": made.time.total}


def _trained(plans: Sequence[Any], base: Any, folder: Path) -> dict[str, float]:
    from adapterhub_lite.events import ignore
    from adapterhub_lite.store import Store
    from adapterhub_lite.training.planning.calibrate import read_weights
    from adapterhub_lite.training.planning.room import Peak, held, settle
    from adapterhub_lite.training.runs.checkpoint import Checkpoints
    from adapterhub_lite.training.train import train_adapters
    from adapterhub_lite.workflows.plan import setup_of
    from adapterhub_lite.workflows.train import _assignment, _jobs

    store = Store(folder)
    assignments = [_assignment(job, base, store, len(plans) > 1, ignore) for job in _jobs(plans, store)]
    settings = setup_of(assignments, base).settings  # what a plan takes where everything fits
    began: list[float] = []

    def wish() -> int:  # asked for the first time when the loop begins
        if not began:
            began.append(time.perf_counter())
        return 0

    read_weights(base)
    settle(base.device)
    before = held(base.device)
    checkpoints = Checkpoints(folder, "", seconds=300.0)
    with Peak(base.device) as peak:
        train_adapters(assignments, base, checkpoints=checkpoints, settings=settings, wish=wish)
        seconds = time.perf_counter() - began[0]
    return {"peak": peak.bytes, "above": peak.bytes - before, "seconds": seconds}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
