"""The manifest of a version: digest and size of each of its files. Its own digest is the identity of the version.

A version that came from another store with its card keeps its identity. How it came here is written beside the files,
under a seal of its own, and is not part of the identity.

In a store a manifest says its own digest, so that one damaged byte of it names no other version.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import FormatError, InvalidName
from ..formats.card import MAX_BYTES as CARD_BYTES
from ..formats.card import is_base
from ..formats.strict_json import dump, finite_integer, parse_object
from ..names import check_digest
from .layout import CARD, CONFIG, WEIGHTS

FILES = frozenset({CONFIG, WEIGHTS, CARD})
MAX_BYTES = 1 << 18
LIMITS: Mapping[str, int] = {CONFIG: 1 << 20, WEIGHTS: 8 << 30, CARD: CARD_BYTES}
"""The most bytes that each file of a version may have."""
_FACT = '    "%s": {\n      "sha256": "%s",\n      "size": %d\n    }'
_WHOLE = '{\n  "files": {\n%s\n  },\n  "format": 1\n}\n'
_DIGEST = '{\n  "digest": "%s",\n'
_DIGEST_FORM = re.compile(rb'\{\n  "digest": "([0-9a-f]{64})",\n')
_NAMES = sorted(FILES)
_FACT_FORM = r'    "%s": \{\n      "sha256": "([0-9a-f]{64})",\n      "size": (0|[1-9][0-9]{0,15})\n    \}'
_FORM = re.compile(
    r'\{\n  "files": \{\n%s\n  \},\n  "format": 1\n\}\n'.replace(
        "%s", r",\n".join(_FACT_FORM % re.escape(name) for name in _NAMES)
    ).encode()
)


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

    def to_store(self) -> bytes:
        """What a store keeps: `to_bytes`, under a seal in any case."""
        if self.received is not None:
            return self.to_bytes()
        identity = self._identity()
        return (_DIGEST % sha256(identity)).encode() + identity[len(b"{\n") :]

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
        """Read what `to_bytes` or `to_store` wrote; anything but the canonical form of our files is a FormatError."""
        told = _DIGEST_FORM.match(data)
        if told is not None:
            data = b"{\n" + data[told.end() :]
            if sha256(data) != told[1].decode():
                raise FormatError("manifest.json does not match its digest.")
        plain = _FORM.fullmatch(data)
        if plain is not None:  # the form of nearly all, recognised in a few microseconds
            facts = plain.groups()
            return cls(
                {n: FileFact(s.decode(), int(z)) for n, s, z in zip(_NAMES, facts[::2], facts[1::2], strict=True)}
            )
        raw = parse_object(data, "manifest.json", limit=MAX_BYTES, integer=finite_integer)
        files, received = raw.get("files"), raw.get("received")
        if not isinstance(files, dict) or set(files) != FILES:
            raise FormatError("manifest.json does not list exactly the files of a version.")
        if received is not None:
            check_received(received)
        manifest = cls({name: _fact(name, value) for name, value in files.items()}, received)
        if manifest.to_bytes() != data:
            raise FormatError("manifest.json does not match its seal, or is not in its canonical form.")
        return manifest

    def _files(self) -> dict[str, Any]:
        return {name: {"sha256": fact.sha256, "size": fact.size} for name, fact in self.files.items()}

    def _identity(self) -> bytes:
        """`dump({"files": ..., "format": 1}, indent=2)`, written out: every lookup of a new name needs it."""
        facts = ",\n".join(_FACT % (name, fact.sha256, fact.size) for name, fact in sorted(self.files.items()))
        return (_WHOLE % facts).encode()


def check_received(told: object) -> None:
    """Raise FormatError unless this is where a version came from: texts, ignored files, and facts of its base."""
    if not isinstance(told, dict) or not all(
        is_base(value) if key == "base" else _texts(value) if key == "ignored" else isinstance(value, str)
        for key, value in told.items()
    ):
        raise FormatError("manifest.json does not say where the version came from.")


def sha256(data: bytes) -> str:
    """64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _fact(name: str, value: object) -> FileFact:
    size = value.get("size") if isinstance(value, dict) else None
    if not isinstance(value, dict) or type(size) is not int or size < 0:
        raise FormatError(f"manifest.json has no sha256 and size for {name}.")
    try:
        return FileFact(check_digest(value.get("sha256", "")), size)
    except InvalidName as error:
        raise FormatError(f"manifest.json: {error}") from None
