"""Where things are in a store. Only checked names, versions and digests become parts of a path.

    store.json                          {"format": 2}
    adapters/<name>/<N>/                adapter_config.json, adapter_model.safetensors, card.json, manifest.json
    adapters/<name>/<N>.removed         a tombstone: this version is gone, and its number is never used again
    aliases/<name>/<alias>@<K>/         move.json, the K-th move of an alias; the last one says what it names
    objects/<ab>/<sha256>               configurations and weights; the files of versions are hard links to them
    tmp/                                what is not published yet

Format 1 kept an alias and its history in one file, aliases/<name>/<alias>.json (see `migrate.py`).

All of it lies on one file system, so that everything is published by renaming.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..names import check_alias, check_digest, check_name, check_version

FORMAT = 2
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "card.json"
MANIFEST = "manifest.json"
TOMBSTONE = ".removed"
MOVE = "move.json"
ROOMS = frozenset({"adapters", "aliases", "objects", "tmp"})


@dataclass(frozen=True)
class Layout:
    """The paths of one store."""

    root: Path

    @cached_property
    def store_file(self) -> Path:
        """Says which format the store has."""
        return self.root / "store.json"

    @cached_property
    def adapters(self) -> Path:
        """Versions and tombstones."""
        return self.root / "adapters"

    @cached_property
    def all_aliases(self) -> Path:
        """Aliases of every name."""
        return self.root / "aliases"

    @cached_property
    def objects(self) -> Path:
        """Contents by digest."""
        return self.root / "objects"

    @cached_property
    def tmp(self) -> Path:
        """Unpublished work, on the same file system as the rest."""
        return self.root / "tmp"

    def versions(self, name: str) -> Path:
        """The folder of all versions of a name."""
        return self.adapters / check_name(name)

    def version(self, name: str, version: int) -> Path:
        """The folder of one version."""
        return self.adapters.joinpath(check_name(name), str(check_version(version)))

    def tombstone(self, name: str, version: int) -> Path:
        """Exists when the version was removed."""
        return self.adapters.joinpath(check_name(name), f"{check_version(version)}{TOMBSTONE}")

    def aliases(self, name: str) -> Path:
        """The folder of the aliases of a name."""
        return self.all_aliases / check_name(name)

    def move(self, name: str, alias: str, number: int) -> Path:
        """The folder of one move of an alias."""
        return self.aliases(name) / f"{check_alias(alias)}@{check_version(number)}"

    def first_alias(self, name: str, alias: str) -> Path:
        """The file of one alias in format 1."""
        return self.aliases(name) / f"{check_alias(alias)}.json"

    def object(self, digest: str) -> Path:
        """The file of one content."""
        return self.objects / check_digest(digest)[:2] / digest
