"""What was measured and found right on this machine before, so that it is not measured at every load.

Best effort: a memo that is missing, damaged or cannot be written costs a measurement, nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from .. import __version__
from ..bases.load import Base
from ..errors import AdapterHubError
from ..formats.files import read_regular
from ..places import cache_root
from .certificate import PROBE_SET

_LIMIT = 4 << 20
_MOST = 2000


class Memo:
    """One JSON file of certificates by what they depend on; by default in the cache folder."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or cache_root() / "certificates.json"

    def holds(self, digest: str, base: Base) -> bool:
        """Whether the version with this digest was found right on this base here."""
        found = self._read().get(_key(digest, base))
        return isinstance(found, dict) and found.get("probe_set") == PROBE_SET

    def add(self, digest: str, base: Base, figures: Mapping[str, Any]) -> None:
        """Remember it; of two processes at once the later may forget what the other one added."""
        known = self._read()
        known[_key(digest, base)] = dict(figures)
        newest = dict(list(known.items())[-_MOST:])
        scratch = self._path.with_name(f".{self._path.name}.{uuid4().hex}")
        with suppress(OSError):
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                scratch.write_text(json.dumps(newest, indent=0), "utf-8")
                scratch.replace(self._path)
            finally:
                scratch.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(read_regular(self._path, _LIMIT))
        except (AdapterHubError, OSError, ValueError, RecursionError):
            return {}
        return known if isinstance(known, dict) else {}


def _key(digest: str, base: Base) -> str:
    """All that a measurement depends on: the adapter, the base, how and by what it is computed."""
    how = (base.choices["dtype"].value, base.device.type, torch.__version__, __version__)
    return " ".join((digest, base.fingerprint.digest, *how))
