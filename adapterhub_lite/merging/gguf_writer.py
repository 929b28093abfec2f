"""A GGUF file, streamed: header, metadata and the table of tensors first, then bodies in blocks of rows.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3, little endian). Bodies begin at multiples
of 32 bytes, and a reader takes each offset to be the padded sum of the bodies before it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType as GgmlType
from gguf import GGUFValueType as ValueType

from ..errors import FormatError, StoreError, Unsupported
from ..events import Listener, Progress, ignore
from ..store.fs import MUTABLE, FileSystem, discard, new_tmp, storing

ALIGNMENT = int(gguf.GGUF_DEFAULT_ALIGNMENT)
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_TYPES = {"f32": GgmlType.F32, "f16": GgmlType.F16, "q8_0": GgmlType.Q8_0}
_HALF = 65504.0  # the largest float16
_LARGEST = {GgmlType.F32: math.inf, GgmlType.F16: _HALF, GgmlType.Q8_0: 127 * _HALF}
_BLOCK = 2**20  # values made and written at a time
# Tables that llama.cpp reads as float32 whatever the rest is.
_FULL = ("_norm.weight", "position_embd.weight")
_QUANTISABLE = (".weight", ".lora_a", ".lora_b")


class Metadata:
    """The key-value part of a GGUF file, in the order of adding; a key that comes again is replaced."""

    def __init__(self) -> None:
        self._entries: dict[str, bytes] = {}

    def integer(self, key: str, value: int) -> None:
        """An unsigned 32-bit number."""
        self._add(key, ValueType.UINT32, struct.pack("<I", value))

    def real(self, key: str, value: float) -> None:
        """A 32-bit float."""
        self._add(key, ValueType.FLOAT32, struct.pack("<f", value))

    def flag(self, key: str, value: bool) -> None:
        """A truth value."""
        self._add(key, ValueType.BOOL, struct.pack("<?", value))

    def text(self, key: str, value: str) -> None:
        """A string."""
        self._add(key, ValueType.STRING, _string(value))

    def texts(self, key: str, values: Sequence[str]) -> None:
        """A list of strings, which may be empty."""
        self._array(key, ValueType.STRING, len(values), b"".join(map(_string, values)))

    def integers(self, key: str, values: Sequence[int]) -> None:
        """A list of signed 32-bit numbers."""
        self._array(key, ValueType.INT32, len(values), struct.pack(f"<{len(values)}i", *values))

    def reals(self, key: str, values: Sequence[float]) -> None:
        """A list of 32-bit floats."""
        self._array(key, ValueType.FLOAT32, len(values), struct.pack(f"<{len(values)}f", *values))

    def packed(self) -> bytes:
        """All entries as the file holds them."""
        return b"".join(_string(key) + entry for key, entry in self._entries.items())

    def __len__(self) -> int:
        return len(self._entries)

    def _add(self, key: str, kind: ValueType, value: bytes) -> None:
        self._entries[key] = struct.pack("<I", kind) + value

    def _array(self, key: str, kind: ValueType, count: int, values: bytes) -> None:
        self._add(key, ValueType.ARRAY, struct.pack("<IQ", kind, count) + values)


@dataclass(frozen=True)
class Body:
    """One tensor of the file.

    Attributes:
        shape: as torch has it, rows first; the file lists it the other way round.
        make: gives the tensor, in `shape` once `transposed` and with its rows in `order`.
        order: for each row of the file the row of the tensor it is; None: as they are.
    """

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]
    transposed: bool = False
    order: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes without padding."""
        values, size = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // int(values) * int(size)

    def blocks(self) -> Iterator[memoryview]:
        """The bytes, some rows at a time; each block is gone before the next is made.

        Raises:
            FormatError: a value is not finite; Unsupported: one is too large for the type.
        """
        tensor = self.make()
        tensor = tensor.T if self.transposed else tensor
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"{self.name}: made {tuple(tensor.shape)}, planned {self.shape}")
        rows = tensor[:, None] if tensor.dim() == 1 else tensor
        step = max(1, _BLOCK // rows.shape[1])
        for start in range(0, rows.shape[0], step):
            stop = start + step
            block = rows[start:stop] if self.order is None else rows[self.order[start:stop]]
            yield _encoded(self.name, block.to(torch.float32).contiguous(), self.kind)


def type_of(name: str, shape: Sequence[int], kind: str) -> GgmlType:
    """How a tensor is stored in a file of one kind (f32, f16, q8_0), as llama.cpp's converter decides it.

    Vectors, norms, biases and positions are float32; rows that are no whole blocks of Q8_0 are float16.
    """
    if len(shape) < 2 or name.endswith(_FULL) or not name.endswith(_QUANTISABLE):
        return GgmlType.F32
    wanted = _TYPES[kind]
    return GgmlType.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def check_kind(kind: str, kinds: Sequence[str]) -> None:
    """Raise Unsupported unless `kind` is one of `kinds`."""
    if kind not in kinds:
        raise Unsupported(f"{kind!r} is not a kind of GGUF file that is written here.", f"Use {', '.join(kinds)}.")


def write_file(
    fs: FileSystem, path: Path, metadata: Metadata, bodies: Sequence[Body], on_event: Listener = ignore
) -> None:
    """Write a GGUF file, whole or not at all; durable when it returns.

    Raises:
        StoreError: there is a file of that name, or it could not be written; StoreFull: no space left.
        FormatError, Unsupported: values that the file cannot hold.
    """
    if path.is_symlink() or path.exists():
        raise StoreError(f"{path} exists.", "Name a file that does not exist yet.")
    staged = new_tmp(path.parent)
    try:
        with storing(f"write {path.name}", path.parent, sum(body.nbytes for body in bodies)):
            _write(fs, staged, metadata, bodies, on_event)
            fs.replace(staged, path)
    except BaseException:
        discard(fs, staged)
        raise
    fs.fsync_dir(path.parent)


def _write(fs: FileSystem, path: Path, metadata: Metadata, bodies: Sequence[Body], on_event: Listener) -> None:
    total, written = sum(body.nbytes for body in bodies), 0
    fd = fs.create(path, MUTABLE)
    try:
        _write_all(fs, fd, _padded([_header(metadata, bodies)]))
        for body in bodies:
            _write_all(fs, fd, _padded(body.blocks(), body.nbytes))
            written += body.nbytes
            on_event(Progress("writing GGUF", written, total, "B"))
        fs.fsync(fd)
    finally:
        fs.close(fd)


def _header(metadata: Metadata, bodies: Sequence[Body]) -> bytes:
    parts = [struct.pack("<IIQQ", gguf.GGUF_MAGIC, gguf.GGUF_VERSION, len(bodies), len(metadata)), metadata.packed()]
    at = 0
    for body in bodies:
        sizes = struct.pack(f"<I{len(body.shape)}Q", len(body.shape), *reversed(body.shape))
        parts += [_string(body.name), sizes, struct.pack("<IQ", body.kind, at)]
        at += body.nbytes + -body.nbytes % ALIGNMENT
    return b"".join(parts)


def _padded(blocks: Iterable[bytes | memoryview], expected: int | None = None) -> Iterator[bytes | memoryview]:
    """The blocks, then zeros up to the alignment."""
    count = 0
    for block in blocks:
        count += len(block)
        yield block
    if expected is not None and count != expected:
        raise ValueError(f"made {count} bytes, planned {expected}")
    yield bytes(-count % ALIGNMENT)


def _write_all(fs: FileSystem, fd: int, blocks: Iterable[bytes | memoryview]) -> None:
    for block in blocks:
        view = memoryview(block)
        while view:
            view = view[fs.write(fd, view) :]


def _encoded(name: str, rows: torch.Tensor, kind: GgmlType) -> memoryview:
    """float32 rows as bytes of one type."""
    low, high = torch.aminmax(rows)
    largest = max(-float(low), float(high))
    if not math.isfinite(largest):
        raise FormatError(f"{name} holds values that are not finite.", "The checkpoint or an adapter is broken.")
    if largest > _LARGEST[kind]:
        raise Unsupported(
            f"{name} holds {largest:.6g}, and {kind.name} ends at {_LARGEST[kind]:.6g}.",
            "Write safetensors in bfloat16 or float32.",
        )
    if kind == GgmlType.Q8_0:  # blocks of 32 follow one another over all rows, so these may be one
        return _bytes_of(torch.from_numpy(gguf.quantize(rows.reshape(1, -1).numpy(), kind)))
    return _bytes_of(rows.to(torch.float16) if kind == GgmlType.F16 else rows)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data
