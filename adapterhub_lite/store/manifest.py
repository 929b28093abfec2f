"""The manifest of a version: digest and size of each of its files. Its own digest is the identity of the version."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import FormatError, InvalidName
from ..formats.strict_json import dump, parse_object
from ..names import check_digest
from .layout import CARD, CONFIG, WEIGHTS

FILES = frozenset({CONFIG, WEIGHTS, CARD})
MAX_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class FileFact:
    """What a file must be: sha256 (64 hexadecimal digits) and size in bytes."""

    sha256: str
    size: int

    @classmethod
    def of(cls, data: bytes) -> FileFact:
        """The fact about these bytes."""
        return cls(sha256(data), len(data))


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of one version by name, without the manifest itself."""

    files: Mapping[str, FileFact]

    def to_bytes(self) -> bytes:
        """Canonical JSON; one set of files has one form."""
        files = {name: {"sha256": fact.sha256, "size": fact.size} for name, fact in self.files.items()}
        return dump({"files": files, "format": 1}, indent=2)

    @property
    def digest(self) -> str:
        """sha256 of the canonical bytes."""
        return sha256(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read a manifest; anything but the canonical form of exactly our files is a FormatError."""
        raw = parse_object(data, "manifest.json", limit=MAX_BYTES)
        files = raw.get("files")
        if not isinstance(files, dict) or set(files) != FILES:
            raise FormatError("manifest.json does not list exactly the files of a version.")
        manifest = cls({name: _fact(name, value) for name, value in files.items()})
        if manifest.to_bytes() != data:
            raise FormatError("manifest.json is not in its canonical form.")
        return manifest


def sha256(data: bytes) -> str:
    """64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _fact(name: str, value: object) -> FileFact:
    size = value.get("size") if isinstance(value, dict) else None
    if not isinstance(value, dict) or type(size) is not int or size < 0:
        raise FormatError(f"manifest.json has no sha256 and size for {name}.")
    try:
        return FileFact(check_digest(value.get("sha256", "")), size)
    except InvalidName as error:
        raise FormatError(f"manifest.json: {error}") from None
