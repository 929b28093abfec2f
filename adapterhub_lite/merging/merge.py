"""Carry out a merge plan: a folder that plain transformers loads, staged until it has been verified."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import StoreError
from ..events import Listener, Progress, ignore
from ..store.fs import MUTABLE, FileSystem, discard, ensure_folder, new_tmp, storing, write_file
from .checkpoint import index_json, write_shard
from .plan import MergePlan

# What a checkpoint folder needs besides weights; nothing else of the base's folder is copied.
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
REPORT = "merge_report.json"


@contextmanager
def staged_merge(
    plan: MergePlan, base: Path, out: Path, *, fs: FileSystem | None = None, on_event: Listener = ignore
) -> Iterator[Path]:
    """Write the merged checkpoint beside `out` and yield that folder; leaving the block well moves it to `out`.

    An exception in the block, or a crash, leaves no folder called `out`.

    Raises:
        StoreError: `out` is a link, or exists and is not an empty folder; StoreFull: no space left.
    """
    fs = fs or FileSystem()
    out = out.expanduser().absolute()
    check_out(out)
    ensure_folder(fs, out.parent, next(parent for parent in out.parents if parent.is_dir()))
    staged = new_tmp(out.parent)
    try:
        with storing(f"merge into {out}", out.parent, plan.nbytes):
            fs.mkdir(staged)
            _write(fs, plan, base, staged, on_event)
        yield staged
        with storing(f"publish {out}", out.parent):
            fs.fsync_dir(staged)
            fs.rename(staged, out)
    except BaseException:
        discard(fs, staged)
        raise
    fs.fsync_dir(out.parent)


def write_report(folder: Path, report: dict[str, object], fs: FileSystem | None = None) -> None:
    """Put merge_report.json beside the weights."""
    data = json.dumps(report, indent=2, sort_keys=True) + "\n"
    write_file(fs or FileSystem(), folder / REPORT, data.encode(), MUTABLE)


def _write(fs: FileSystem, plan: MergePlan, base: Path, staged: Path, on_event: Listener) -> None:
    written = 0

    def done(count: int) -> None:
        nonlocal written
        written += count
        on_event(Progress("merging", written, plan.nbytes, "bytes"))

    for file, tensors in plan.shards.items():
        write_shard(fs, staged / file, tensors, done)
    if len(plan.shards) > 1:
        write_file(fs, staged / "model.safetensors.index.json", index_json(plan.shards), MUTABLE)
    config = json.dumps(plan.config, indent=2, sort_keys=True) + "\n"
    write_file(fs, staged / "config.json", config.encode(), MUTABLE)
    for name in _COPIED:
        if (base / name).is_file():
            write_file(fs, staged / name, (base / name).read_bytes(), MUTABLE)


def check_out(out: Path) -> None:
    """Raise StoreError unless `out` is absent or an empty folder."""
    hint = "Name a folder that does not exist yet."
    if out.is_symlink():
        raise StoreError(f"{out} is a symbolic link.", hint)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise StoreError(f"{out} exists and is not an empty folder.", hint)
