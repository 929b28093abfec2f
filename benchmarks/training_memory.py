"""Peak memory of training above the loaded base: a fresh process a side, the same rows.

A process loads the base, reads all of its weights (they may be mapped from disk), takes note of its resident memory and
sets the kernel's peak back; after training the peak less that is what training took.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch

from .rows import Row, skip
from .training_cases import Case, classify_case, instruct_case

PART = "memory"
_ROOT = Path(__file__).parents[1]
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def rows(case: Case) -> Iterator[Row]:
    """One figure: ours / Trainer's."""
    name = f"{case.base.name}{' in NF4' if case.base.quantization != 'none' else ''}"
    what = f"peak memory above the loaded base, {len(case.examples)} rows of {case.source}, {name}"
    if not _STATUS.is_file():
        yield skip(PART, what, "this system tells no peak")
        return
    ours, peer = (_measured(side, case) for side in ("ours", "peer"))
    ratio = ours["above"] / peer["above"]
    told = f"{_gb(ours)} / {_gb(peer)}: {ratio:.2f}"
    yield Row(PART, what, figure=ratio, told=told, goal="<= 0.4", met=ratio <= 0.4)


def _gb(found: dict[str, int]) -> str:
    return f"{found['above'] / 1e9:.2f} GB on {found['base'] / 1e9:.2f} GB"


def _measured(side: str, case: Case) -> dict[str, int]:
    """Bytes of the process with the base loaded, and of the peak above that."""
    with TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        name = str(case.base.source.folder) if case.base.source.origin == "folder" else case.base.name
        made = {
            "side": side, "base": name, "quantize": case.base.quantization, "updates": len(case.order()),
            "device": str(case.base.device), "dtype": str(case.base.dtype).removeprefix("torch."),
            "labels": case.labels,
        }  # fmt: skip
        start = case.export(Path(folder)) if side == "peer" else ""
        job.write_text(json.dumps({**made, "start": str(start)}))
        environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
        command = [sys.executable, "-m", "benchmarks.training_memory", str(job)]
        done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"measuring memory failed: {done.stderr[-2000:]}")
        found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        return found


def main(path: str) -> None:
    """Measure one side in this process."""
    import peft  # noqa: F401  # libraries are no part of what training takes
    import transformers  # noqa: F401
    from transformers import Trainer, TrainingArguments  # noqa: F401

    job = json.loads(Path(path).read_text())
    before = _ours(job) if job["side"] == "ours" else _peer(job)
    print(json.dumps({"base": before, "above": _status("VmHWM") - before}))


def _ours(job: dict[str, Any]) -> int:
    from adapterhub_lite.bases.load import load_base

    from .training_sides import run_ours

    base = load_base(job["base"], job["quantize"])
    case = _case(base, job)
    before = _settled(base.model)
    run_ours(case)
    return before


def _peer(job: dict[str, Any]) -> int:
    """Our base is not loaded here: it would set the allocator, too."""
    from transformers import AutoConfig, AutoTokenizer

    from adapterhub_lite.bases.devices import DTYPES
    from adapterhub_lite.bases.fetch import locate

    from .training_sides import DEFAULTS, load_plain, run_trainer, wrap

    source = locate(job["base"])
    tokenizer, device = AutoTokenizer.from_pretrained(source.folder), torch.device(job["device"])
    base: Any = SimpleNamespace(
        name=source.name,
        kind="encoder" if job["labels"] else "causal",
        source=source,
        quantization=job["quantize"],
        tokenizer=tokenizer,
        config=AutoConfig.from_pretrained(source.folder),
        device=device,
    )
    case = _case(base, job)
    model = load_plain(case, DTYPES[job["dtype"]])
    before = _settled(model)
    run_trainer(case, wrap(model, Path(job["start"])), DEFAULTS)
    return before


def _case(base: Any, job: dict[str, Any]) -> Case:
    if job["labels"]:
        return classify_case(base, job["updates"])
    return instruct_case(base, job["updates"], quantize=job["quantize"])


def _settled(model: Any) -> int:
    """Resident bytes with all weights read and nothing else left over; the peak begins anew from there."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.reshape(-1).view(torch.uint8).sum()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    """Bytes that the kernel tells of this process."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main(sys.argv[1])
