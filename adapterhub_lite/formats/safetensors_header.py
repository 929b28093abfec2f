"""The header of a safetensors file, read by our own strict reader before any library sees the file.

Accepts a subset of what the safetensors library accepts: in addition duplicate keys, unusual names, huge headers and
huge tensor counts are refused. Format: https://huggingface.co/docs/safetensors, 8 bytes length, JSON header, tensor
bodies.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import FormatError, UnsafeFile
from .files import open_regular, read_exactly
from .strict_json import parse_object

MAX_HEADER = 4 << 20
MAX_TENSORS = 20_000
MAX_BYTES = 1 << 46  # no tensor dimension or size beyond this is believed; products stay far below 2**63
MAX_DIMENSIONS = 16
MAX_METADATA = 1 << 20  # characters

DTYPE_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
_KEY = re.compile(r"[A-Za-z0-9_.\-]{1,512}", re.ASCII)
_LENGTH = 8
_REMEMBERED = 1 << 18  # bytes of a header that is kept for the next file
_FIELDS = {"dtype", "shape", "data_offsets"}
# What one tensor has of these signs beside its brace, and what all metadata may add.
_SIGNS: Mapping[bytes, int] = {b":": 4, b",": 8}
_ALLOWANCE = 10_000


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `begin` and `end` are byte offsets into the body (after the header)."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """All tensors of a file in header order, its metadata, and where the body begins (bytes from the file's start)."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    body_offset: int

    def span(self, name: str) -> slice:
        """The bytes of one tensor, as a slice of the whole file."""
        info = self.tensors[name]
        return slice(self.body_offset + info.begin, self.body_offset + info.end)


def read_header(path: str | Path, *, limit: int = MAX_HEADER, max_tensors: int = MAX_TENSORS) -> Header:
    """Read and check the header of a safetensors file; the body is not read.

    Raises:
        NotFound, UnsafeFile: nothing there; not a regular file; a pickle or archive by its content.
        FormatError: anything that breaks the format or a limit (`limit` bytes of header, `max_tensors`).
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = read_exactly(file, min(size, _LENGTH), path)
        length = _header_length(start, size, str(path), limit)
        head = read_exactly(file, length, path)
    return _parse(start, head, size, str(path), max_tensors)


def parse_header(
    data: bytes, what: str = "the file", *, limit: int = MAX_HEADER, max_tensors: int = MAX_TENSORS
) -> Header:
    """The same for a file held in memory. Raises as `read_header`."""
    length = _header_length(data[:_LENGTH], len(data), what, limit)
    read = _parse if length > _REMEMBERED else _parse_once
    return read(data[:_LENGTH], data[_LENGTH : _LENGTH + length], len(data), what, max_tensors)


def _header_length(start: bytes, size: int, what: str, limit: int) -> int:
    """The declared header length, checked before a byte of the header is read."""
    length = int.from_bytes(start, "little")
    if len(start) < _LENGTH or not 2 <= length <= size - _LENGTH:
        _refuse_foreign(start, what)
        raise FormatError(f"{what} is not a safetensors file: {size} bytes cannot hold a header of {length}.")
    if length > limit:
        raise FormatError(f"{what} declares a header of {length} bytes; the limit is {limit}.")
    return length


def _refuse_foreign(start: bytes, what: str) -> None:
    if start.startswith(b"PK") or (start[:1] == b"\x80" and start[1:2] in b"\x01\x02\x03\x04\x05"):
        hint = "Pickles can run code and are never read. Save it again with peft, which writes safetensors."
        raise UnsafeFile(f"{what} is a pickle or an archive, not a safetensors file.", hint)


def _parse(start: bytes, head: bytes, size: int, what: str, max_tensors: int) -> Header:
    if not head.startswith(b"{"):
        _refuse_foreign(start, what)
        raise FormatError(f"{what} is not a safetensors file: its header does not begin with '{{'.")
    _check_signs(head, what, max_tensors)
    most = len(head)
    fields = parse_object(head, f"the header of {what}", limit=most, depth=3, values=most, integer=_natural)
    metadata = _metadata(fields.pop("__metadata__", {}), what)
    if len(fields) > max_tensors:
        raise FormatError(f"{what} declares {len(fields)} tensors; the limit is {max_tensors}.")
    tensors = {_key(key, what): _tensor(key, fields.pop(key), what) for key in list(fields)}
    body = _LENGTH + len(head)
    _check_contiguous(tensors, size - body, what)
    return Header(MappingProxyType(tensors), MappingProxyType(metadata), body)


# Adapters of one recipe have the same header, byte for byte.
_parse_once = lru_cache(maxsize=16)(_parse)


def _check_signs(head: bytes, what: str, max_tensors: int) -> None:
    """Refuse a header that has more values than its tensors call for: a megabyte of them parses to fifty."""
    declared = head.count(b'"data_offsets"')  # a quote inside of a text would have a backslash before it
    if declared > max_tensors:
        raise FormatError(f"{what} declares {declared} tensors; the limit is {max_tensors}.")
    braces = head.count(b"{")
    tensors = min(braces, max_tensors)
    if braces > max_tensors + _ALLOWANCE or any(
        head.count(sign) > each * tensors + _ALLOWANCE for sign, each in _SIGNS.items()
    ):
        raise FormatError(f"{what} declares more tensors than the limit of {max_tensors}, or values beside them.")


def _natural(text: str) -> int:
    # "-0" would be 0 in Python and a float in the library: two readers, two meanings.
    if text.startswith("-") or len(text) > 20:
        raise ValueError(f"{text[:24]} is not an offset or dimension")
    return int(text)


def _metadata(value: Any, what: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FormatError(f"{what}: __metadata__ is not an object of strings.")
    if sum(len(key) + len(text) for key, text in value.items()) > MAX_METADATA:
        raise FormatError(f"{what}: __metadata__ is larger than the limit of {MAX_METADATA} characters.")
    return value


def _key(key: str, what: str) -> str:
    if not _KEY.fullmatch(key) or ".." in key:
        raise FormatError(f"{what}: tensor name {ascii(key)[:80]} is not 1 to 512 of A-Z a-z 0-9 _ . - without '..'.")
    return key


def _tensor(key: str, value: Any, what: str) -> TensorInfo:
    if not isinstance(value, dict) or set(value) != _FIELDS:
        raise FormatError(f"{what}: tensor {key} does not have exactly dtype, shape and data_offsets.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise FormatError(f"{what}: tensor {key} has the unknown dtype {ascii(dtype)[:40]}.")
    if not (_naturals(shape) and len(shape) <= MAX_DIMENSIONS and _naturals(offsets) and len(offsets) == 2):
        raise FormatError(f"{what}: tensor {key} has a shape or offsets that are not small natural numbers.")
    begin, end = offsets
    if end - begin != _size(shape, DTYPE_BYTES[dtype], key, what):
        raise FormatError(f"{what}: tensor {key} has {end - begin} bytes, but {dtype} {shape} needs another number.")
    return TensorInfo(dtype, tuple(shape), begin, end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item <= MAX_BYTES for item in value)


def _size(shape: list[int], item: int, key: str, what: str) -> int:
    """Bytes of a shape; the running product is bounded, as the library's checked arithmetic would be."""
    size = item
    for dimension in shape:
        size *= dimension
        if size > MAX_BYTES:
            raise FormatError(f"{what}: tensor {key} of shape {shape} is too large.")
    return size


def _check_contiguous(tensors: dict[str, TensorInfo], body: int, what: str) -> None:
    """Tensors follow each other without overlap or hole, from the first byte of the body to the last of the file."""
    position = 0
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            kind = "overlaps the tensor before it" if info.begin < position else "leaves a hole before it"
            raise FormatError(f"{what}: tensor {key} {kind}.")
        position = info.end
    if position != body:
        raise FormatError(f"{what}: the tensors end at byte {position} of a body of {body} bytes.")
