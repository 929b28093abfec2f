"""One merge on both sides, each in a fresh process: seconds, peak memory above imports, and whether the bits are equal.

A process imports the libraries of both sides, takes note of its resident memory, sets the kernel's peak back, merges
once and tells the seconds and the peak. The copies are the whole folder by `cp -r`, and that made durable as ours is.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.adapters.sites import features, select_sites
from adapterhub_lite.bases.fetch import locate
from adapterhub_lite.bases.memory import available_bytes
from adapterhub_lite.bases.skeleton import skeleton
from adapterhub_lite.formats.specs import LoraSpec
from adapterhub_lite.merging.checkpoint import Checkpoint, Planned, header_bytes, index_json
from adapterhub_lite.merging.writer import write_shard
from adapterhub_lite.store.fs import FileSystem

from .common import BASE
from .rows import Row, Sample, faster, share, skip

SPEED, MEMORY, BITS = "merge", "merge memory", "merge bits"
_ROOT = Path(__file__).parents[1]
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RANK = 16
_LARGE = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
}  # fmt: skip
_SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 4000,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A checkpoint and an adapter for it; `dtype` is what the merged one is to have."""

    name: str
    base: Path
    adapter: Path
    dtype: str = "auto"


@dataclass
class Runs:
    """What the processes told, by side."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    above: dict[str, list[int]] = field(default_factory=dict)

    def note(self, side: str, seconds: float, above: int | None = None) -> None:
        """Keep one figure of a side."""
        self.seconds.setdefault(side, []).append(seconds)
        if above is not None:
            self.above.setdefault(side, []).append(above)


def rows(quick: bool) -> Iterator[Row]:
    """All figures of merges into float checkpoints."""
    if not _CLEAR.exists():
        yield skip(SPEED, "merging beside PEFT", "this system tells no peak of memory")
        return
    rounds = 1 if quick else 5
    with TemporaryDirectory(prefix="ahl-merging-", dir=_place()) as folder:
        place = Path(folder)
        base = synthetic(place / "small", _SMALL, 2) if quick else locate(BASE).folder
        name = "a small random checkpoint" if quick else BASE
        adapter = random_adapter(base, place / "adapter")
        for dtype in ("auto", "float32"):
            yield from case_rows(Case(name, base, adapter, dtype), rounds, place)
    if not quick:
        yield from _large_rows()


def _place() -> str | None:
    """Where checkpoints are made: a disk, and not memory."""
    return os.environ.get("AHL_BENCHMARK_PLACE")


def _large_rows() -> Iterator[Row]:
    what, need = "a random checkpoint of Llama-3.2-3B's shape", 6_430_000_000
    with TemporaryDirectory(prefix="ahl-merging-", dir=_place()) as folder:
        free = shutil.disk_usage(folder).free
        if free < 3.3 * need:
            yield skip(SPEED, what, f"{free / 1e9:.0f} GB are free, {3.3 * need / 1e9:.0f} GB are needed")
            return
        if available_bytes() < 1.5 * need:
            yield skip(SPEED, what, "the peer needs more memory than there is")
            return
        base = synthetic(Path(folder) / "base", _LARGE, 3)
        adapter = random_adapter(base, Path(folder) / "adapter")
        yield from case_rows(Case(what, base, adapter), 2, Path(folder))


def case_rows(case: Case, rounds: int, place: Path) -> Iterator[Row]:
    """The figures of one checkpoint."""
    runs, same = measured(case, rounds, place)
    what = f"{case.name}, LoRA of rank {_RANK} on all linear layers"
    what += "" if case.dtype == "auto" else f", to {case.dtype}"
    ours, peer = (Sample.of(runs.seconds[side]) for side in ("ours", "peer"))
    yield faster(SPEED, f"{what}: merge", ours, "PEFT", peer, 4.0)
    above = {side: max(found) for side, found in runs.above.items()}
    ratio = above["ours"] / above["peer"]
    told = f"{above['ours'] / 1e6:.0f} / {above['peer'] / 1e6:.0f} MB: {ratio:.3f}"
    yield Row(
        MEMORY, f"{what}: peak memory above imports", figure=ratio, told=told, goal="<= 0.125", met=ratio <= 0.125
    )
    if case.dtype == "auto":
        for side, goal in (("copy", 0.0), ("durable copy", 0.6)):
            copied = Sample.of(runs.seconds[side])
            row = share(SPEED, f"{what}: speed as a share of cp -r", ours, side, copied, copied.p50 / ours.p50, goal)
            yield row if goal else Row(row.part, row.what, ours, side, copied, row.figure, row.told)
    equal, all_ = same
    yield Row(
        BITS, f"{what}: tensors equal to PEFT's, bit for bit", figure=equal / all_, told=f"{equal} of {all_}",
        goal="all", met=equal == all_,
    )  # fmt: skip


def measured(case: Case, rounds: int, place: Path) -> tuple[Runs, tuple[int, int]]:
    """Run both sides and the copies in turn; and of how many tensors all bits are equal."""
    runs, same = Runs(), (0, 0)
    works: dict[str, Callable[[Path], None]] = {
        "ours": lambda out: runs.note("ours", *run_side("ours", case, out)),
        "peer": lambda out: runs.note("peer", *run_side("peer", case, out)),
        "copy": lambda out: runs.note("copy", _copied(case.base, out, durable=False)),
        "durable copy": lambda out: runs.note("durable copy", _copied(case.base, out, durable=True)),
    }
    for round_ in range(rounds):
        names = list(works)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            _read(case.base)
            os.sync()
            out = place / name.replace(" ", "-")
            works[name](out)
            if "copy" in name:
                shutil.rmtree(out)
        if round_ == rounds - 1:
            same = compared(place / "ours", place / "peer")
        for side in ("ours", "peer"):
            shutil.rmtree(place / side)
    return runs, same


def compared(one: Path, two: Path) -> tuple[int, int]:
    """How many tensors of two checkpoints are equal, of how many names in either."""
    first, second = Checkpoint.open(one), Checkpoint.open(two)
    names = set(first.tensors) | set(second.tensors)
    shared = set(first.tensors) & set(second.tensors)
    return sum(_equal(first.read(name), second.read(name)) for name in shared), len(names)


def _equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one, two)


def run_side(side: str, case: Case, out: Path) -> tuple[float, int]:
    """Seconds of one merge in a fresh process, and its peak memory above imports."""
    job = {"side": side, "base": str(case.base), "adapter": str(case.adapter), "out": str(out), "dtype": case.dtype}
    command = [sys.executable, "-m", "benchmarks.merging_speed", json.dumps(job)]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring a merge failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return float(found["seconds"]), int(found["above"])


def main(text: str) -> None:
    """Measure one side in this process."""
    import peft  # noqa: F401  # libraries are no part of what merging takes
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: F401

    import adapterhub_lite.merging.merge  # noqa: F401
    from adapterhub_lite.kernels.library import library

    library()
    job = json.loads(text)
    torch.ones(64, 64) @ torch.ones(64, 64)  # the products' library is no part of it either
    work = _ours if job["side"] == "ours" else _peer
    gc.collect()
    _CLEAR.write_text("5")
    before, begun = _status("VmRSS"), time.perf_counter()
    work(job)
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "above": _status("VmHWM") - before}))


def _ours(job: dict[str, Any]) -> None:
    from adapterhub_lite.adapters.adapter import read_adapter
    from adapterhub_lite.merging.merge import staged_merge
    from adapterhub_lite.merging.plan import plan_merge

    base, adapter = Path(job["base"]), read_adapter(Path(job["adapter"]))
    plan = plan_merge(
        [(adapter, 1.0)], Checkpoint.open(base), quantization="none", bake="original", dtype=job["dtype"], labels=None
    )
    with staged_merge(plan, base, Path(job["out"])):
        pass


def _peer(job: dict[str, Any]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(job["base"], dtype=job["dtype"], local_files_only=True)
    wrapped: Any = PeftModel.from_pretrained(model, job["adapter"])
    wrapped.merge_and_unload().save_pretrained(job["out"], max_shard_size="5GB")


def _status(key: str) -> int:
    """Bytes that the kernel tells of this process."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def _copied(base: Path, out: Path, *, durable: bool) -> float:
    begun = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    if durable:
        for path in [*out.iterdir(), out, out.parent]:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
    return time.perf_counter() - begun


def _read(folder: Path) -> None:
    """Bring a folder's weights into the page cache."""
    room = bytearray(1 << 24)
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass


def random_adapter(base: Path, folder: Path) -> Path:
    """A PEFT folder of a random LoRA on all linear layers but the output layer."""
    view, generator = skeleton(base, None), torch.Generator().manual_seed(0)
    output: Any = view.model.get_output_embeddings()  # type: ignore[operator]
    sites, tensors = select_sites(view.modules, "all-linear", output), {}
    for name, module in sites.items():
        n_in, n_out = features(module)
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(_RANK, n_in, generator=generator) / n_in**0.5
        tensors[f"{stem}.lora_B.weight"] = torch.randn(n_out, _RANK, generator=generator) * 0.02
    spec = LoraSpec(_RANK, 20.0, tuple(sorted(sites)), task_type="CAUSAL_LM", base_model=str(base))
    folder.mkdir()
    for name, data in Adapter(spec, tensors).files().items():
        (folder / name).write_bytes(data)
    return folder


def synthetic(folder: Path, sizes: dict[str, int], shards: int) -> Path:
    """A checkpoint of a Llama with random bfloat16 weights in several files; one tensor in memory at a time."""
    from transformers import LlamaConfig

    LlamaConfig(
        **sizes, tie_word_embeddings=True, architectures=["LlamaForCausalLM"], dtype="bfloat16"
    ).save_pretrained(folder)
    pool = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    shapes = {name: tuple(p.shape) for name, p in skeleton(folder, None).model.named_parameters()}

    def make(name: str) -> torch.Tensor:
        count = torch.Size(shapes[name]).numel()
        repeated = pool.roll(len(name) * 7919 + count).repeat(-(-count // len(pool)))
        return repeated[:count].view(shapes[name])

    planned = [Planned(n, torch.bfloat16, s, lambda n=n: make(n)) for n, s in shapes.items()]  # type: ignore[misc]
    each, at = sum(p.nbytes for p in planned) / shards, 0
    files: dict[str, list[Planned]] = {}
    for p in planned:
        number = min(shards - 1, int(at / each)) + 1
        files.setdefault(f"model-{number:05}-of-{shards:05}.safetensors", []).append(p)
        at += p.nbytes
    for file, tensors in files.items():
        write_shard(FileSystem(), folder / file, header_bytes(tensors), tensors, lambda _: None)
    (folder / "model.safetensors.index.json").write_bytes(index_json(files))
    return folder


if __name__ == "__main__":
    main(sys.argv[1])
