"""Write a shard of a merged checkpoint: bytes that stay are copied by the system, rows that change are made ahead.

A shard is written from its first byte to its last. Blocks of rows are read and computed on other threads while the ones
before are written; a few blocks of about `BLOCK` bytes are all that is in memory, however large a tensor is. Where all
names, dtypes and shapes stay, so does the header, byte for byte.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import AdapterHubError, AdapterMismatch
from ..store.fs import MUTABLE, FileSystem
from .checkpoint import DTYPES, Checkpoint, Place, Planned, block_rows, bytes_of, cut_short, header_bytes, not_finite
from .dense import OpenEdit

BLOCK = 1 << 21
_CHUNK = 1 << 23  # bytes that the system copies at once; they end where the source has a multiple of it
_SYNC = 1 << 25  # bytes after which the disk is told to begin
_SAMPLE = 4  # rows at each end of a tensor that are made again to see whether a shard is what it should be
_NO_COPY = frozenset({errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.EPERM})


@dataclass(frozen=True)
class Run:
    """Bytes of a file that are written as they are."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Rows:
    """Rows start, ..., stop - 1 of a tensor that is made of another one's."""

    planned: Planned
    opened: OpenEdit | None
    start: int
    stop: int


@dataclass(frozen=True)
class Whole:
    """A tensor that is made at once."""

    planned: Planned


Piece = Run | Rows | Whole


class Sources:
    """Files that are read, opened once."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __getitem__(self, path: Path) -> int:
        if path not in self._files:
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self._stack.callback(os.close, fd)
            self._files[path] = fd
        return self._files[path]


class Slot:
    """Memory of one block, as it is read and as it is written."""

    def __init__(self) -> None:
        self._source, self._target = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)

    def blocks(self, rows: int, place: Place, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, columns] of the source's dtype and of the target's; the same memory where both are one."""
        self._source, source = _room(self._source, rows, place.columns, place.dtype)
        if dtype == place.dtype:
            return source, source
        self._target, target = _room(self._target, rows, place.columns, dtype)
        return source, target


def _room(memory: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    need = rows * columns * dtype.itemsize
    if memory.numel() < need:
        memory = torch.empty(need, dtype=torch.uint8)
    return memory, memory[:need].view(dtype).view(rows, columns)


def shard_header(checkpoint: Checkpoint | None, file: str, tensors: list[Planned]) -> bytes | Run:
    """The beginning of a shard: that of the checkpoint's own file where its tensors are the same."""
    if checkpoint is not None and file in checkpoint.shards:
        tensors_of, stored = checkpoint.shards[file], checkpoint.headers[file].tensors
        own = [(name, DTYPES.get(t.dtype), t.shape) for name, t in tensors_of.items()]
        if tensors_of.keys() == stored.keys() and own == [(p.name, p.dtype, p.shape) for p in tensors]:
            return Run(checkpoint.folder / file, 0, checkpoint.headers[file].body_offset)
    return header_bytes(tensors)


def pieces(tensors: list[Planned]) -> Iterator[Piece]:
    """What a shard's body is written of, in order; runs of neighbours are one."""
    run: Run | None = None
    for planned in tensors:
        source = planned.source
        if source is not None and planned.verbatim:
            if run is not None and (run.path, run.offset + run.nbytes) == (source.path, source.offset):
                run = Run(run.path, run.offset, run.nbytes + source.nbytes)
                continue
            if run is not None:
                yield run
            run = Run(source.path, source.offset, source.nbytes)
            continue
        if run is not None:
            yield run
            run = None
        yield from _made_of(planned)
    if run is not None:
        yield run


def _made_of(planned: Planned) -> Iterator[Piece]:
    source = planned.source
    if source is None:
        yield Whole(planned)
        return
    opened = None if planned.edit is None else planned.edit.open()
    rows = block_rows(source, planned.edit, BLOCK)
    for start in range(0, source.rows if source.nbytes else 0, rows):
        yield Rows(planned, opened, start, min(source.rows, start + rows))


def made_rows(piece: Rows, sources: Sources, slot: Slot) -> memoryview:
    """The bytes of some rows; they are the slot's memory.

    Raises:
        AdapterMismatch: a value is not finite, or too large for the dtype it is to have.
    """
    planned, place = piece.planned, piece.planned.source
    assert place is not None
    source, target = slot.blocks(piece.stop - piece.start, place, planned.dtype)
    place.read(sources[place.path], piece.start, source)
    if piece.opened is not None:
        if not piece.opened.into(source, piece.start, target):
            place.read(sources[place.path], piece.start, source)  # it may have been written over
            raise _unwritable(piece, source)
    elif target is not source:
        target.copy_(source)
        _check_room(planned, source, target)
    return bytes_of(target)


def _unwritable(piece: Rows, source: torch.Tensor) -> AdapterHubError:
    """Why made rows are not finite: a dtype that is too narrow, the adapter, or the base."""
    assert piece.opened is not None
    exact = torch.empty(source.shape, dtype=torch.float32)
    if piece.opened.into(source, piece.start, exact):
        return _too_large(piece.planned)
    return not_finite(piece.planned.name, source)


def _check_room(planned: Planned, exact: torch.Tensor, rounded: torch.Tensor) -> None:
    if planned.dtype == torch.float16 and bool((torch.isinf(rounded) & torch.isfinite(exact)).any()):
        raise _too_large(planned)


def _too_large(planned: Planned) -> AdapterMismatch:
    dtype = str(planned.dtype).removeprefix("torch.")
    text = f"{planned.name} holds values that {dtype} has no room for."
    return AdapterMismatch(text, "Merge to bfloat16 or float32.")


def made_whole(planned: Planned) -> memoryview:
    """The bytes of a tensor that is made at once."""
    exact = planned.make()
    made = exact.to(planned.dtype).contiguous()
    _check_room(planned, exact, made)
    if tuple(made.shape) != planned.shape:
        raise ValueError(f"{planned.name}: made {tuple(made.shape)}, planned {planned.shape}")
    return bytes_of(made)


def write_shard(
    fs: FileSystem,
    path: Path,
    header: bytes | Run,
    tensors: list[Planned],
    done: Callable[[int], None],
) -> None:
    """Write a safetensors file; durable when it returns.

    Args:
        done: called with the bytes written since it was called last.
        workers: threads that read and compute beside this one, which writes.
    """
    fd = fs.create(path, MUTABLE)
    try:
        with Sources() as sources:
            out = _Out(fs, fd, sources, done)
            out.put(header if isinstance(header, Run) else memoryview(header))
            workers = min(4, max(1, (os.cpu_count() or 2) - 1))
            for part in _ahead(pieces(tensors), sources, workers):
                out.put(part)
        fs.fsync(fd)
    finally:
        fs.close(fd)


class _Out:
    """A file that is written from its beginning to its end."""

    def __init__(self, fs: FileSystem, fd: int, sources: Sources, done: Callable[[int], None]) -> None:
        self._fs, self._fd, self._sources, self._done = fs, fd, sources, done
        self._at = self._begun = 0
        self._copies = True

    def put(self, part: Run | memoryview) -> None:
        if isinstance(part, Run):
            self._copy(part)
            return
        while part:
            count = self._fs.write(self._fd, part)
            part = part[count:]
            self._wrote(count)

    def _copy(self, run: Run) -> None:
        source, at, end = self._sources[run.path], run.offset, run.offset + run.nbytes
        while at < end:
            most = min(end, (at // _CHUNK + 1) * _CHUNK) - at
            count = self._copied(source, at, most) if self._copies else self._passed(source, at, most)
            if count is None:
                continue
            if not count:
                raise cut_short(run.path)
            at += count
            self._wrote(count)

    def _copied(self, source: int, at: int, most: int) -> int | None:
        """Bytes that the system copied; None where it does not."""
        try:
            return self._fs.copy_range(source, self._fd, at, most)
        except OSError as error:
            if error.errno not in _NO_COPY:
                raise
            self._copies = False
            return None

    def _passed(self, source: int, at: int, most: int) -> int:
        data = memoryview(os.pread(source, min(most, BLOCK), at))
        return self._fs.write(self._fd, data) if data else 0

    def _wrote(self, count: int) -> None:
        self._at += count
        self._done(count)
        if self._at - self._begun >= _SYNC:
            self._fs.begin_sync(self._fd, self._begun, self._at - self._begun)
            self._begun = self._at


def _ahead(found: Iterator[Piece], sources: Sources, workers: int) -> Iterator[Run | memoryview]:
    """The parts in order; rows are made by other threads while those before them are written."""
    free = [Slot() for _ in range(workers + 1)]
    waiting: deque[tuple[Piece, Slot | None, Future[memoryview] | None]] = deque()
    with ThreadPoolExecutor(workers, "merge") as pool:
        try:
            more = True
            while more or waiting:
                while more and free:
                    piece = next(found, None)
                    if piece is None:
                        more = False
                        break
                    slot = free.pop() if isinstance(piece, Rows) else None
                    job = None if slot is None else pool.submit(_rows, piece, sources, slot)
                    waiting.append((piece, slot, job))
                    if slot is None and len(waiting) > workers:
                        break
                if not waiting:
                    break
                piece, slot, job = waiting.popleft()
                if isinstance(piece, Run):
                    yield piece
                elif isinstance(piece, Whole):
                    yield made_whole(piece.planned)
                else:
                    assert job is not None
                    assert slot is not None
                    yield job.result()
                    free.append(slot)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _rows(piece: Piece, sources: Sources, slot: Slot) -> memoryview:
    assert isinstance(piece, Rows)
    return made_rows(piece, sources, slot)


def is_written(path: Path, header: bytes | Run, tensors: list[Planned]) -> bool:
    """Whether a shard has the size, the header and, in a sample of each tensor, the values that it should have.

    The sample is the first and the last rows; tensors that are made at once are left out.
    """
    with Sources() as sources:
        head = os.pread(sources[header.path], header.nbytes, 0) if isinstance(header, Run) else header
        size = len(head) + sum(t.nbytes for t in tensors)
        if path.stat().st_size != size:
            return False
        fd, at = sources[path], len(head)
        if os.pread(fd, at, 0) != head:
            return False
        for planned in tensors:
            if planned.source is not None and planned.nbytes and not _sampled(planned, planned.source, fd, at, sources):
                return False
            at += planned.nbytes
    return True


def _sampled(planned: Planned, source: Place, fd: int, at: int, sources: Sources) -> bool:
    edit = planned.edit
    opened = None if edit is None else edit.open()
    step = _SAMPLE if edit is None else source.rows if not edit.step else max(_SAMPLE, edit.step)
    for start in {0, (source.rows - 1) // step * step}:
        piece = Rows(planned, opened, start, min(source.rows, start + step))
        expected = made_rows(piece, sources, Slot())
        if os.pread(fd, len(expected), at + start * source.columns * planned.dtype.itemsize) != bytes(expected):
            return False
    return True
