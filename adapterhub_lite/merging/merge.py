"""Carry out a merge plan: a folder that plain transformers loads, staged until it has been verified.

What dies on the way leaves no folder called `out`, but a hidden one beside it (`journal`), from which the same merge
goes on: shards that were durable are looked at and taken over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..errors import BaseUnavailable, StoreError
from ..events import Listener, Note, Progress, ignore
from ..store.fs import MUTABLE, FileSystem, ensure_folder, storing, write_file
from .besides import besides
from .checkpoint import index_json
from .journal import Work, claimed, remove_others, tell_others
from .plan import MergePlan
from .writer import is_written, shard_header, write_shard

REPORT = "merge_report.json"
INDEX = "model.safetensors.index.json"


@contextmanager
def staged_merge(
    plan: MergePlan, base: Path, out: Path, *, fs: FileSystem | None = None, on_event: Listener = ignore
) -> Iterator[Path]:
    """Write the merged checkpoint beside `out` and yield that folder; leaving the block well moves it to `out`.

    An exception in the block, or a crash, leaves no folder called `out`. If the merge itself is refused or fails for
    a reason that would come again, nothing is left; after a kill, an interrupt or an error of the disk, shards that
    are done are kept for the same merge.

    Raises:
        StoreError: `out` is a link, or exists and is not an empty folder; another process merges into it; StoreFull: no
            space left.
    """
    fs = fs or FileSystem()
    with staged_folder(
        plan_digest(plan),
        out,
        plan.nbytes,
        lambda work: _write(fs, plan, base, work, on_event),
        fs=fs,
        on_event=on_event,
    ) as folder:
        yield folder


@contextmanager
def staged_folder(
    identity: str,
    out: Path,
    nbytes: int,
    write: Callable[[Work], None],
    *,
    fs: FileSystem | None = None,
    on_event: Listener = ignore,
) -> Iterator[Path]:
    """`staged_merge` for what `write` puts into `work.checkpoint`, about `nbytes`.

    Args:
        identity: digest of all that decides the result.
    """
    fs = fs or FileSystem()
    out = out.expanduser().absolute()
    check_out(out)
    ensure_folder(fs, out.parent, next(parent for parent in out.parents if parent.is_dir()))
    with ExitStack() as stack:
        with storing(f"merge into {out}", out.parent):
            work = stack.enter_context(claimed(fs, out, identity))
        try:
            with storing(f"merge into {out}", out.parent, nbytes):
                check_out(out)  # whoever held the folder before may just have put his there
                tell_others(out, work.folder, on_event)
                write(work)
            yield work.checkpoint
            with storing(f"publish {out}", out.parent):
                work.publish()
        except BaseException as error:
            _leave(work, error)
            raise
        with storing(f"publish {out}", out.parent, hint="It is there, but a power cut may take it."):
            fs.fsync_dir(out.parent)
        work.remove()
        remove_others(fs, out, work.folder, on_event)


def plan_digest(plan: MergePlan) -> str:
    """Digest of what a plan would write, so far as it can be told without writing it."""
    listing = [(file, [(t.name, str(t.dtype), t.shape) for t in tensors]) for file, tensors in plan.shards.items()]
    told = [plan.identity, listing, json.dumps(plan.config, sort_keys=True, default=str)]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def write_report(folder: Path, report: dict[str, object], fs: FileSystem | None = None) -> None:
    """Put merge_report.json beside the weights."""
    data = json.dumps(report, indent=2, sort_keys=True) + "\n"
    write_file(fs or FileSystem(), folder / REPORT, data.encode(), MUTABLE)


def _leave(work: Work, error: BaseException) -> None:
    """Keep what another attempt can go on from, remove the rest."""
    # What is no failure of the machine (a disk, memory, a stop) would come again: nothing could go on from it.
    lasting = isinstance(error, Exception) and not isinstance(error, OSError | MemoryError)
    if lasting or isinstance(error, BaseUnavailable) or not work.shards:
        work.remove()
    elif isinstance(error, StoreError):
        kept = f"{len(work.shards)} of the files are done and kept in {work.folder}: the same merge goes on from there."
        error.hint = f"{error.hint} {kept}"


def _write(fs: FileSystem, plan: MergePlan, base: Path, work: Work, on_event: Listener) -> None:
    written = 0

    def done(count: int) -> None:
        nonlocal written
        written += count
        on_event(Progress("merging", written, plan.nbytes, "B"))

    kept = 0
    for file, tensors in plan.shards.items():
        header, path = shard_header(plan.checkpoint, file, tensors), work.checkpoint / file
        if file in work.shards:
            if is_written(path, header, tensors):
                kept += 1
                done(sum(t.nbytes for t in tensors))
                continue
            work.drop(file)
        if kept:
            on_event(_taken_over(kept, plan))
            kept = 0
        write_shard(fs, path, header, tensors, done)
        work.note(file)
    if kept:
        on_event(_taken_over(kept, plan))
    if plan.checkpoint is not None:
        plan.checkpoint.check_unchanged()
    _write_others(fs, plan, base, work.checkpoint)


def _taken_over(count: int, plan: MergePlan) -> Note:
    return Note(f"{count} of {len(plan.shards)} shards were done by a merge that was interrupted; they are taken over.")


def _write_others(fs: FileSystem, plan: MergePlan, base: Path, folder: Path) -> None:
    if len(plan.shards) > 1:
        write_file(fs, folder / INDEX, index_json(plan.shards), MUTABLE)
    config = json.dumps(plan.config, indent=2, sort_keys=True) + "\n"
    write_file(fs, folder / "config.json", config.encode(), MUTABLE)
    for name in besides(base).copied:
        if "/" in name and not (folder / name).parent.is_dir():
            fs.mkdir((folder / name).parent)
        write_file(fs, folder / name, (base / name).read_bytes(), MUTABLE)
    for inner in sorted({(folder / name).parent for name in besides(base).copied} - {folder}):
        fs.fsync_dir(inner)


def check_out(out: Path) -> None:
    """Raise StoreError unless `out` is absent or an empty folder."""
    hint = "Name a folder that does not exist yet."
    if out.is_symlink():
        raise StoreError(f"{out} is a symbolic link.", hint)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise StoreError(f"{out} exists and is not an empty folder.", hint)
