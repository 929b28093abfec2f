"""The manifest of a version: digest and size of each of its files. Its own digest is the identity of the version.

A version that came from another store with its card keeps its identity. How it came here is written beside the files,
under a seal of its own, and is not part of the identity.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import FormatError, InvalidName
from ..formats.strict_json import dump, parse_object
from ..names import check_digest
from .layout import CARD, CONFIG, WEIGHTS

FILES = frozenset({CONFIG, WEIGHTS, CARD})
MAX_BYTES = 1 << 18
_FACT = '    "%s": {\n      "sha256": "%s",\n      "size": %d\n    }'


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
    """The files of one version by name, without the manifest itself.

    `received` says where a version came from that was not made here, and is None for one that was.
    """

    files: Mapping[str, FileFact]
    received: Mapping[str, Any] | None = None

    def to_bytes(self) -> bytes:
        """Canonical JSON; one manifest has one form."""
        if self.received is None:
            return self._identity()
        told = {"files": self._files(), "format": 2, "received": dict(self.received)}
        return dump({**told, "seal": sha256(dump(told))}, indent=2)

    @property
    def digest(self) -> str:
        """The identity: sha256 of the canonical bytes without `received`."""
        return sha256(self._identity())

    @property
    def original(self) -> Manifest:
        """The manifest as the store wrote it that made the version."""
        return replace(self, received=None)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read a manifest; anything but the canonical form of exactly our files is a FormatError."""
        raw = parse_object(data, "manifest.json", limit=MAX_BYTES)
        files, received = raw.get("files"), raw.get("received")
        if not isinstance(files, dict) or set(files) != FILES:
            raise FormatError("manifest.json does not list exactly the files of a version.")
        if received is not None and not isinstance(received, dict):
            raise FormatError("manifest.json does not say where the version came from.")
        manifest = cls({name: _fact(name, value) for name, value in files.items()}, received)
        if manifest.to_bytes() != data:
            raise FormatError("manifest.json does not match its seal, or is not in its canonical form.")
        return manifest

    def _files(self) -> dict[str, Any]:
        return {name: {"sha256": fact.sha256, "size": fact.size} for name, fact in self.files.items()}

    def _identity(self) -> bytes:
        """`dump({"files": ..., "format": 1}, indent=2)`, written out: every lookup of a new name needs it."""
        facts = ",\n".join(_FACT % (name, fact.sha256, fact.size) for name, fact in sorted(self.files.items()))
        return f'{{\n  "files": {{\n{facts}\n  }},\n  "format": 1\n}}\n'.encode()


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
