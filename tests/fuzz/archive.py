"""Any bytes as an archive: refused with an error of ours, or read exactly as the standard library reads them."""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

from adapterhub_lite.errors import AdapterHubError
from adapterhub_lite.formats.archive import is_archive, read_archive
from tests.formats.archives import (
    BLOCK,
    END,
    FILES,
    Zipped,
    checked,
    file,
    good,
    good_zip,
    head,
    pax,
    raw_zip,
    with_tarfile,
    with_zipfile,
    zip_of_a_pipe,
)
from tests.fuzz.common import LARGEST, mutate_bytes

SEEDS = (
    *(with_tarfile({**FILES, "notes/README": b"x"}, form, "lora") for form in (0, 1, 2)),
    pax({"path": "l/card.json", "uid": "7"}) + file("cut", b"{}") + file("L", b"l/x\0", kind=b"L") + file("y") + END,
    with_zipfile({**FILES, "notes/README": b"x"}, "lora"),
    raw_zip(*good_zip(), Zipped(b"x", extra=b"UT\5\0\3abcd"), comment=b"hello"),
    zip_of_a_pipe(FILES),
    gzip.compress(good() + END, mtime=0),
)
WORDS = (
    b"/", b"..", b"\0", b"\\", b"ustar  \0", b"ustar\00000", b"\x80", b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\7",
    b"card.json", b"adapter_config.json", END[:BLOCK], head("card.json", 1), file("a"), pax({"path": "card.json"}),
    pax({"size": "1"}), file("L", b"card.json", kind=b"L"), head("d/", 0, b"5"),
)  # fmt: skip
_UNPACKED = 4 << 20  # bytes that mutations compress again

LIMITS = {"adapter_config.json": 1 << 16, "adapter_model.safetensors": 1 << 20, "card.json": 1 << 16}

_FOLDER = tempfile.TemporaryDirectory(prefix="ahl-fuzz-")
_FILE = Path(_FOLDER.name) / "archive"


def read(data: bytes) -> tuple[dict[str, bytes], list[str]]:
    """The parser."""
    _FILE.write_bytes(data)
    return read_archive(_FILE, LIMITS)


def mutate(data: bytes, rng: Random) -> bytes:
    """Of what is compressed as well, and with the checksums of tar headers right again."""
    packed = data.startswith(b"\x1f\x8b") and rng.random() < 0.8
    if packed:
        try:
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(_UNPACKED)
        except (OSError, EOFError, zlib.error):
            packed = False
    data = mutate_bytes(data, rng, WORDS)
    if rng.random() < 0.7:
        blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
        data = b"".join(checked(b) if len(b) == BLOCK and b[257:262] == b"ustar" else b for b in blocks)
    return gzip.compress(data[:_UNPACKED], 1, mtime=0) if packed else data


def fuzz(data: bytes) -> None:
    """Raises AssertionError where `data` breaks a promise of `read_archive`; any other error is a bug as well."""
    if len(data) > LARGEST:
        return
    refused = ""
    try:
        wanted, ignored = read(data)
    except AdapterHubError as error:
        refused = str(error)
    if refused:
        assert len(refused) < 600
        assert refused.isascii()
        return
    assert is_archive(_FILE)
    expected, others = by_standard_library(data)
    assert wanted == expected
    if all(path.isascii() and len(path) <= 78 for path in others):  # others are escaped, shortened, or decoded by taste
        assert ignored == others


def by_standard_library(data: bytes) -> tuple[dict[str, bytes], list[str]]:
    """What `read_archive` should return, said again in the words of tarfile and zipfile."""
    readers = _zip(data) if data.startswith(b"PK") else _tar(data)
    places = {path for path in readers if not (path.startswith("__MACOSX/") or path.split("/")[-1].startswith("._"))}
    tops = {path.split("/")[0] if "/" in path else "" for path in places - {"/"}}
    inside = f"{tops.pop()}/".lstrip("/") if len(tops) == 1 else ""
    wanted = {inside + name: name for name in LIMITS if inside + name in readers}
    others = sorted(path.removeprefix(inside) for path in readers if path not in {*wanted, inside, "/"})
    return {name: readers[path]() for path, name in wanted.items()}, others


def _tar(data: bytes) -> dict[str, Callable[[], bytes]]:
    """How to read each member, by path; folders have a slash at the end."""
    archive = tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
    found = {}
    for member in archive:
        assert member.isdir() or member.isreg()
        assert not member.issparse()
        found[_path(member.name, member.isdir())] = partial(_read, archive, member)
    return found


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    source = archive.extractfile(member)
    assert source is not None
    return source.read()


def _zip(data: bytes) -> dict[str, Callable[[], bytes]]:
    archive = zipfile.ZipFile(io.BytesIO(data))
    return {_path(info.filename, info.is_dir()): partial(archive.read, info) for info in archive.infolist()}


def _path(name: str, folder: bool) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", ".")) + "/" * folder
