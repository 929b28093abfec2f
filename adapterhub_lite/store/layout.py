"""Where things are in a store. Only checked names, versions and digests become parts of a path.

    store.json                          {"format": 1}
    adapters/<name>/<N>/                adapter_config.json, adapter_model.safetensors, card.json, manifest.json
    adapters/<name>/<N>.removed         a tombstone: this version is gone, and its number is never used again
    aliases/<name>/<alias>.json         the version an alias names, and its history
    objects/<ab>/<sha256>               contents; the files of versions are hard links to them
    tmp/                                what is not published yet

All of it lies on one file system, so that everything is published by renaming.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import FormatError, StoreCorrupt, StoreNewer
from ..formats.files import read_regular
from ..formats.strict_json import dump, parse_object
from ..names import check_alias, check_digest, check_name, check_version
from .fs import FileSystem, ensure_folder, replace_file

FORMAT = 1
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "card.json"
MANIFEST = "manifest.json"
TOMBSTONE = ".removed"
_STORE_LIMIT = 1 << 16


@dataclass(frozen=True)
class Layout:
    """The paths of one store."""

    root: Path

    @property
    def store_file(self) -> Path:
        """Says which format the store has."""
        return self.root / "store.json"

    @property
    def adapters(self) -> Path:
        """Versions and tombstones."""
        return self.root / "adapters"

    @property
    def all_aliases(self) -> Path:
        """Aliases of every name."""
        return self.root / "aliases"

    @property
    def objects(self) -> Path:
        """Contents by digest."""
        return self.root / "objects"

    @property
    def tmp(self) -> Path:
        """Unpublished work, on the same file system as the rest."""
        return self.root / "tmp"

    def versions(self, name: str) -> Path:
        """The folder of all versions of a name."""
        return self.adapters / check_name(name)

    def version(self, name: str, version: int) -> Path:
        """The folder of one version."""
        return self.versions(name) / str(check_version(version))

    def tombstone(self, name: str, version: int) -> Path:
        """Exists when the version was removed."""
        return self.versions(name) / f"{check_version(version)}{TOMBSTONE}"

    def aliases(self, name: str) -> Path:
        """The folder of the aliases of a name."""
        return self.all_aliases / check_name(name)

    def alias(self, name: str, alias: str) -> Path:
        """The file of one alias."""
        return self.aliases(name) / f"{check_alias(alias)}.json"

    def object(self, digest: str) -> Path:
        """The file of one content."""
        return self.objects / check_digest(digest)[:2] / digest


def default_root() -> Path:
    """The folder that AHL_HOME names, else the user's data folder."""
    home = os.environ.get("AHL_HOME")
    if home:
        return Path(home).expanduser()
    import platformdirs

    return Path(platformdirs.user_data_dir("adapterhub-lite", appauthor=False))


def check_format(layout: Layout) -> bool:
    """Whether a store is there, of a format we know.

    Raises:
        StoreNewer: a newer version of this package wrote it.
        StoreCorrupt: store.json is missing beside adapters, or is damaged.
    """
    if not layout.store_file.is_file():
        if layout.adapters.is_dir() and any(layout.adapters.iterdir()):
            raise StoreCorrupt(f"{layout.store_file} is missing.", f'Write {{"format": {FORMAT}}} there to go on.')
        return False
    try:
        data = read_regular(layout.store_file, _STORE_LIMIT)
        found = parse_object(data, "store.json", limit=_STORE_LIMIT).get("format")
    except FormatError as error:
        raise StoreCorrupt(f"{layout.store_file} is damaged: {error}") from None
    if type(found) is not int or found < 1:
        raise StoreCorrupt(f"{layout.store_file} does not say its format.")
    if found > FORMAT:
        message = f"{layout.root} has store format {found}; this version of adapterhub-lite reads up to {FORMAT}."
        raise StoreNewer(message, "Upgrade with: pip install --upgrade adapterhub-lite")
    return True


def ensure_store(fs: FileSystem, layout: Layout) -> None:
    """Make the store if it is not there yet. Two processes may do so at once: both write the same."""
    ready = check_format(layout)
    root = layout.root.absolute()
    existing = next(parent for parent in (root, *root.parents) if parent.is_dir())
    ensure_folder(fs, root, existing)
    ensure_folder(fs, layout.tmp.absolute(), root)
    if not ready:
        replace_file(fs, layout.tmp, layout.store_file, dump({"format": FORMAT}))
