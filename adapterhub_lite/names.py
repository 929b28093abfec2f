"""The only place where text becomes part of a path.

Takes: text from a user, a file or a request. Gives: checked names, aliases, versions, digests and `Ref`.
Never: opens or builds a path itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .errors import InvalidName

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_VERSION = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
# Names that Windows gives to devices: a store must stay readable when it is copied there.
_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10))})
_RULE = "1 to 64 of a-z 0-9 . _ -, beginning with a letter or digit, without '..' and not ending in '.'"


def check_name(text: str, what: str = "adapter name") -> str:
    """Return `text` if it is a valid name.

    Raises:
        InvalidName: with the rule.
    """
    ok = isinstance(text, str) and _NAME.fullmatch(text) is not None
    if ok and text.split(".")[0] in _DEVICES:
        message = f"{_shown(text)} is not a valid {what}: it is the name of a device on Windows."
        raise InvalidName(message, f"Use {_RULE}, such as my-{text[:60]}: a store must stay readable there.")
    if not ok or ".." in text or text.endswith("."):
        raise InvalidName(f"{_shown(text)} is not a valid {what}.", f"Use {_RULE}.")
    return text


def check_alias(text: str) -> str:
    """Return `text` if it is a valid alias (same rule as names; a bare number is a version, not an alias)."""
    if isinstance(text, str) and text.isdigit():
        raise InvalidName(f"{_shown(text)} is not a valid alias.", "A bare number is a version: write name@number.")
    return check_name(text, "alias")


def check_digest(text: str) -> str:
    """Return `text` if it is 64 lower-case hexadecimal digits (sha256)."""
    if not (isinstance(text, str) and _DIGEST.fullmatch(text)):
        raise InvalidName(f"{_shown(text)} is not a sha256 digest.", "Expected 64 lower-case hexadecimal digits.")
    return text


def check_version(text: str | int) -> int:
    """Return the version as a number from 1 on."""
    if isinstance(text, bool) or not _VERSION.fullmatch(str(text)):
        raise InvalidName(f"{_shown(text)} is not a version.", "Versions are 1, 2, 3, ...: write name@3.")
    return int(text)


@dataclass(frozen=True)
class Ref:
    """A reference: `name` (newest version), `name@3` (immutable) or `name:prod` (alias).

    A *resolved* reference has `version` and `digest`; `alias` is then how it was asked for.
    """

    name: str
    version: int | None = None
    alias: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str | Ref) -> Ref:
        """Read `name`, `name@3` or `name:prod`.

        Raises:
            InvalidName: with the rule that was broken.
        """
        if isinstance(text, Ref):
            return text
        if not isinstance(text, str):
            raise InvalidName(f"{_shown(text)} is not a reference.", "Write name, name@3 or name:prod.")
        if "@" in text:
            name, _, version = text.partition("@")
            return cls(check_name(name), version=check_version(version))
        if ":" in text:
            name, _, alias = text.partition(":")
            return cls(check_name(name), alias=check_alias(alias))
        return cls(check_name(text))

    def resolved(self, version: int, digest: str) -> Ref:
        """The same reference, bound to one immutable version."""
        return replace(self, version=check_version(version), digest=check_digest(digest))

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.name}@{self.version}"
        return f"{self.name}:{self.alias}" if self.alias else self.name


def _shown(text: object) -> str:
    """A short, printable form of hostile text."""
    shown = ascii(text)
    return shown if len(shown) <= 80 else shown[:76] + "...'"
