"""Any text as a reference, name, alias, version or digest: refused by its rule, or safe in every path we build."""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath
from random import Random

from adapterhub_lite.names import Ref, check_alias, check_digest, check_name, check_version
from adapterhub_lite.store.layout import Layout
from tests.fuzz.common import accepted, mutate_bytes

SEEDS = (b"sql", b"sql@3", b"sql:prod", b"a.b-c_9@999999999", b"x" * 64, b"0" * 64)
WORDS = (
    b"@", b":", b"..", b".", b"/", b"\\", b"\0", b"\n", b" ", b"~", b"-", b"con", b"nul.x", b"LORA", b"0", b"00", b"+1",
    "\u202e".encode(), "\uff41".encode(), "\u0661".encode(), "\u017f".encode(), b"%2e%2e", b"$HOME", b".removed",
)  # fmt: skip
_LAYOUT = Layout(Path("/store"))


def read(data: bytes) -> Ref:
    """The parser."""
    return Ref.parse(_text(data))


def fuzz(data: bytes) -> None:
    """Accepted: it reads back as itself, and its paths stay where they belong on any system."""
    ref = accepted(read, data)
    if ref is not None:
        assert Ref.parse(str(ref)) == ref
        assert str(ref) == _text(data)
        _check_paths(ref.name, ref.alias or "prod", ref.version or 1)
    for check in (check_name, check_alias, check_digest, check_version):
        found = accepted(lambda raw, check=check: check(_text(raw)), data)  # type: ignore[misc,operator]
        assert found is None or str(found) == _text(data)
        if found is not None and check in (check_name, check_alias):
            _check_paths(str(found), "prod", 1)
    if accepted(lambda raw: check_digest(_text(raw)), data) is not None:
        _check_path(_LAYOUT.object(_text(data)), 3)


def _check_paths(name: str, alias: str, version: int) -> None:
    _check_path(_LAYOUT.version(name, version), 3)
    _check_path(_LAYOUT.tombstone(name, version), 3)
    _check_path(_LAYOUT.move(name, alias, version), 3)
    _check_path(_LAYOUT.first_alias(name, alias), 3)


def _check_path(path: Path, deep: int) -> None:
    assert os.path.normpath(path) == str(path)
    assert len(path.relative_to(_LAYOUT.root).parts) == deep
    for part in path.relative_to(_LAYOUT.root).parts:
        assert part.isascii()
        assert part.isprintable()
        assert part == part.lower()
        assert len(part) < 100
        assert not PureWindowsPath(part).is_reserved(), part
        assert not part.endswith((".", " "))
        assert not part.startswith(("-", "."))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def mutate(data: bytes, rng: Random) -> bytes:
    """Of bytes."""
    return mutate_bytes(data, rng, WORDS)
