"""Any bytes as a safetensors file: refused with an error of ours, or read exactly as the library reads them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

from safetensors import deserialize, safe_open

from adapterhub_lite.formats.safetensors_header import DTYPE_BYTES, Header, parse_header, read_header
from tests.formats.build import f32, lora_tensors, raw_safetensors, safetensors
from tests.fuzz.common import accepted, mutate_bytes, mutate_tree, pairs, plain

SEEDS = (
    safetensors({"a.lora_A.weight": f32(2, 3), "b": f32(2), "c": ("U8", [0], b"")}, {"format": "pt"}),
    safetensors({dtype: (dtype, [2, 1], bytes(2 * size)) for dtype, size in DTYPE_BYTES.items()}),
    safetensors(lora_tensors(layers=1), {"format": "pt", "note": '\u20ac \\ "'}),
    raw_safetensors("{}   "),
    safetensors({"scalar": ("F64", [], bytes(8))}),
)
WORDS = (b"data_offsets", b"dtype", b"shape", b"__metadata__", b"F32", b"U8", b"[0,0]", b'"a":', b"{", b"}", b"[", b"]",
         b",", b"0", b"-0", b"1e1", b"\\u0061", b"\\ud800", b"18446744073709551616")  # fmt: skip
_KEYS = ("dtype", "shape", "data_offsets", "__metadata__", "a", "b")

_FOLDER = tempfile.TemporaryDirectory(prefix="ahl-fuzz-")
_FILE = Path(_FOLDER.name) / "file"


def read(data: bytes) -> Header:
    """The parser."""
    return parse_header(data)


def fuzz(data: bytes) -> None:
    """Accepted by us: accepted by the library, with the same names, dtypes, shapes, bytes and metadata."""
    header = accepted(read, data)
    if header is None:
        return
    ours = {name: (info.dtype, list(info.shape), data[header.span(name)]) for name, info in header.tensors.items()}
    theirs = {name: (info["dtype"], info["shape"], bytes(info["data"])) for name, info in deserialize(data)}  # type: ignore[no-untyped-call]
    assert ours == theirs
    _FILE.write_bytes(data)
    assert read_header(_FILE) == header
    with safe_open(_FILE, "np") as file:  # type: ignore[no-untyped-call]
        assert (file.metadata() or {}) == header.metadata
        assert set(file.keys()) == set(header.tensors)
    _FILE.unlink()


def mutate(data: bytes, rng: Random) -> bytes:
    """Mostly of the header as a tree, with the length that belongs to it."""
    length = int.from_bytes(data[:8], "little")
    head, body = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.2 or not head.startswith(b"{"):
        return mutate_bytes(data, rng, WORDS)
    try:
        head = plain(mutate_tree(pairs(head), rng, _KEYS)) if rng.random() < 0.7 else mutate_bytes(head, rng, WORDS)
    except (ValueError, RecursionError):
        head = mutate_bytes(head, rng, WORDS)
    if rng.random() < 0.2:
        body = mutate_bytes(body, rng)
    return raw_safetensors(head, body)
