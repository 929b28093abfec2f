"""A checkpoint folder as tensors: read one at a time, written shard by shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from ..bases.fingerprint import weight_files
from ..formats.safetensors_header import TensorInfo, read_header
from ..store.fs import MUTABLE, FileSystem

_LIMITS = {"limit": 64 * 2**20, "max_tensors": 500_000}
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
class Checkpoint:
    """The tensors of a checkpoint folder by name; bodies are read when asked for."""

    folder: Path
    shards: dict[str, dict[str, TensorInfo]]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of a folder's safetensors files.

        Raises:
            BaseUnavailable, FormatError: no or broken checkpoint.
        """
        return cls(folder, {p.name: dict(read_header(p, **_LIMITS).tensors) for p in weight_files(folder)})

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors of all shards."""
        return {name: info for shard in self.shards.values() for name, info in shard.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        shard = next(file for file, tensors in self.shards.items() if name in tensors)
        with safe_open(self.folder / shard, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


@dataclass(frozen=True)
class Planned:
    """One tensor to write: its name, dtype and shape, and how to make it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its body."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def write_shard(fs: FileSystem, path: Path, planned: Iterable[Planned], done: Callable[[int], None]) -> None:
    """Write a safetensors file holding one tensor in memory at a time; durable when it returns.

    Args:
        done: called with the bytes of each tensor written.
    """
    tensors = list(planned)
    fd = fs.create(path, MUTABLE)
    try:
        _write_all(fs, fd, memoryview(_header(tensors)))
        for tensor in tensors:
            made = tensor.make().to(tensor.dtype).contiguous()
            if tuple(made.shape) != tensor.shape:
                raise ValueError(f"{tensor.name}: made {tuple(made.shape)}, planned {tensor.shape}")
            _write_all(fs, fd, memoryview(made.flatten().view(torch.uint8).numpy()))  # type: ignore[arg-type]
            done(tensor.nbytes)
        fs.fsync(fd)
    finally:
        fs.close(fd)


def index_json(shards: dict[str, list[Planned]]) -> bytes:
    """model.safetensors.index.json of several shards."""
    total = sum(t.nbytes for tensors in shards.values() for t in tensors)
    where = {t.name: file for file, tensors in shards.items() for t in tensors}
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2, sort_keys=True) + "\n"
    ).encode()


def _header(tensors: list[Planned]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for t in tensors:
        entries[t.name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # bodies start aligned, as the format asks
    return len(text).to_bytes(8, "little") + text


def _write_all(fs: FileSystem, fd: int, view: memoryview) -> None:
    while view:
        view = view[fs.write(fd, view) :]
