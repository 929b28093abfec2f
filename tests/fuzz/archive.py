"""Any bytes as an archive: refused with an error of ours, or read exactly as the standard library reads them."""

from __future__ import annotations

import io
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from adapterhub_lite.errors import AdapterHubError
from adapterhub_lite.formats.archive import is_archive, read_archive

LIMITS = {"adapter_config.json": 1 << 16, "adapter_model.safetensors": 1 << 20, "card.json": 1 << 16}

_FOLDER = tempfile.TemporaryDirectory(prefix="ahl-fuzz-")
_FILE = Path(_FOLDER.name) / "archive"


def fuzz(data: bytes) -> None:
    """Raises AssertionError where `data` breaks a promise of `read_archive`; any other error is a bug as well."""
    _FILE.write_bytes(data)
    refused = ""
    try:
        wanted, ignored = read_archive(_FILE, LIMITS)
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
