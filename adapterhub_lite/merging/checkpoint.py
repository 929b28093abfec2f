"""A checkpoint folder as tensors: where their bytes lie, and what is to be written in their place."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from ..bases.fingerprint import weight_files
from ..errors import AdapterMismatch, BaseUnavailable
from ..formats.safetensors_header import Header, TensorInfo, read_header
from .dense import Edit

_LIMITS = {"limit": 64 * 2**20, "max_tensors": 500_000}
_AT_ONCE = 1 << 22
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie: `offset` from the beginning of a file."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """The first dimension of a matrix; a vector has a row for each value."""
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        """All others."""
        return math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, fd: int, start: int, block: torch.Tensor) -> None:
        """Fill block [rows, columns] with rows start, ... from the open file.

        Raises:
            BaseUnavailable: the file ends before.
        """
        view = bytes_of(block)
        at = self.offset + start * self.columns * self.dtype.itemsize
        while view:
            count = os.preadv(fd, [view], at)
            if not count:
                raise cut_short(self.path)
            view, at = view[count:], at + count


def cut_short(path: Path) -> BaseUnavailable:
    """The error of a file that ends before its header says."""
    return BaseUnavailable(f"{path} ends early: it was changed meanwhile.", "Get the checkpoint anew.")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint folder by name; bodies are read when asked for.

    Attributes:
        shards: file name -> its tensors, in the order of their bytes.
        stats: file name -> (size, inode, time of change in nanoseconds) when its header was read.
    """

    folder: Path
    shards: dict[str, dict[str, TensorInfo]]
    headers: dict[str, Header]
    stats: dict[str, tuple[int, int, int]]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of a folder's safetensors files.

        Raises:
            BaseUnavailable, FormatError: no or broken checkpoint.
        """
        paths = weight_files(folder)
        stats = {path.name: _stat(path) for path in paths}
        headers = {path.name: read_header(path, **_LIMITS) for path in paths}
        # Names of no bytes may begin where others do.
        shards = {
            file: dict(sorted(header.tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
            for file, header in headers.items()
        }
        return cls(folder, shards, headers, stats)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors of all shards."""
        return {name: info for shard in self.shards.values() for name, info in shard.items()}

    @cached_property
    def _files(self) -> dict[str, str]:
        return {name: file for file, shard in self.shards.items() for name in shard}

    def place(self, name: str) -> Place:
        """Where a tensor lies. KeyError where its dtype is none of `DTYPES`."""
        file, info = self._files[name], self.tensors[name]
        return Place(self.folder / file, self.headers[file].body_offset + info.begin, DTYPES[info.dtype], info.shape)

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        return made(self.place(name), None, name)

    def check_unchanged(self) -> None:
        """Raise BaseUnavailable if a file is not the one whose header was read."""
        for file, known in self.stats.items():
            if _stat(self.folder / file) != known:
                raise BaseUnavailable(f"{self.folder / file} was changed meanwhile.", "Merge again.")

    def identity(self) -> str:
        """Digest of the files as they were found: names, sizes, times and headers."""
        whole = hashlib.sha256()
        for file, stat in sorted(self.stats.items()):
            infos = [(name, t.dtype, t.shape, t.begin) for name, t in self.shards[file].items()]
            whole.update(repr((str(self.folder.resolve() / file), stat, infos)).encode())
        return whole.hexdigest()


def _stat(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return (found.st_size, found.st_ino, found.st_mtime_ns)


@dataclass(frozen=True)
class Planned:
    """One tensor to write: its name, dtype and shape, and how to make it.

    Attributes:
        make: the tensor as a whole, in float32 before it is rounded to `dtype` where adapters change it.
        source: the bytes that it is made of, row by row; None where only `make` knows how.
        edit: what is done to them beside a change of dtype.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]
    source: Place | None = None
    edit: Edit | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its body."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def verbatim(self) -> bool:
        """Whether its bytes are those of the source."""
        return self.source is not None and self.edit is None and self.dtype == self.source.dtype


def planned(name: str, dtype: torch.dtype, source: Place, edit: Edit | None = None) -> Planned:
    """A tensor that is made of another one's rows."""
    return Planned(name, dtype, source.shape, partial(made, source, edit, name), source, edit)


def made(source: Place, edit: Edit | None, name: str) -> torch.Tensor:
    """A whole tensor: as it is stored, or edited in float32."""
    fd = os.open(source.path, os.O_RDONLY)
    try:
        dtype = source.dtype if edit is None else torch.float32
        whole = torch.empty(source.rows, source.columns, dtype=dtype)
        if edit is None:
            source.read(fd, 0, whole)
            return whole.view(source.shape)
        opened, rows = edit.open(), block_rows(source, edit, _AT_ONCE)
        for start in range(0, source.rows, rows):
            block = torch.empty(min(rows, source.rows - start), source.columns, dtype=source.dtype)
            source.read(fd, start, block)
            if not opened.into(block, start, whole[start : start + len(block)]):
                source.read(fd, start, block)
                raise not_finite(name, block)
        return whole.view(source.shape)
    finally:
        os.close(fd)


def same_bytes(one: Place, other: Place) -> bool:
    """Whether two tensors are stored alike: dtype, shape and every byte; compared some rows at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    rows = block_rows(one, None, _AT_ONCE)
    with ExitStack() as stack:
        files = []
        for place in (one, other):
            files.append(os.open(place.path, os.O_RDONLY))
            stack.callback(os.close, files[-1])
        for start in range(0, one.rows if one.nbytes else 0, rows):
            blocks = [torch.empty(min(rows, one.rows - start), one.columns, dtype=one.dtype) for _ in files]
            for place, fd, block in zip((one, other), files, blocks, strict=True):
                place.read(fd, start, block)
            if bytes_of(blocks[0]) != bytes_of(blocks[1]):
                return False
    return True


def block_rows(source: Place, edit: Edit | None, nbytes: int) -> int:
    """How many rows of a tensor are about so many bytes and may be made at once."""
    step = 1 if edit is None else edit.step
    if not step:
        return max(1, source.rows)
    most = nbytes // max(1, source.columns * source.dtype.itemsize)
    return max(step, most // step * step)


def not_finite(name: str, own: torch.Tensor) -> AdapterMismatch | BaseUnavailable:
    """The error of values that are no numbers: the adapter's fault, unless the base's `own` are none already."""
    if not bool(torch.isfinite(own).all()):
        return BaseUnavailable(f"The checkpoint's {name} holds values that are not finite.", "Get it anew.")
    return AdapterMismatch(f"Merging into {name} gives values that are not finite.", "Do not use this adapter.")


def index_json(shards: dict[str, list[Planned]]) -> bytes:
    """model.safetensors.index.json of several shards."""
    total = sum(t.nbytes for tensors in shards.values() for t in tensors)
    where = {t.name: file for file, tensors in shards.items() for t in tensors}
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2, sort_keys=True) + "\n"
    ).encode()


def header_bytes(tensors: list[Planned]) -> bytes:
    """The beginning of a safetensors file whose tensors follow each other in this order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for t in tensors:
        entries[t.name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # bodies start aligned, as the format asks
    return len(text).to_bytes(8, "little") + text
