"""The store as everything above sees it: one object, one folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import FormatError, InvalidName, NotFound, StoreError
from ..formats.card import Card
from ..formats.files import read_regular
from ..formats.peft_config import MAX_BYTES, parse_adapter_config
from ..formats.specs import Spec
from ..names import Ref, check_alias, check_name, check_version
from . import catalog, check, publish, reading, transfer
from .aliases import Move, aliases_of, move_alias, read_alias
from .catalog import Entry
from .check import Finding
from .fs import FileSystem, storing
from .layout import CARD, CONFIG, WEIGHTS, Layout, default_root, ensure_store
from .manifest import Manifest
from .vetting import vet

Entries = list[Entry]
Findings = list[Finding]
Names = list[str]
Versions = list[int]


class Store:
    """Adapters by name and version in one folder. Reading creates nothing; the first write makes the folder.

    References are `name` (newest version), `name@3` or `name:prod`. Every method that takes one raises InvalidName,
    NotFound, StoreCorrupt or StoreNewer; every method that writes also StoreError and StoreFull. After those nothing
    was published; where only the last sync of a moved alias or a removal failed, it may be seen although it is not
    durable.
    """

    def __init__(self, path: str | Path | None = None, fs: FileSystem | None = None) -> None:
        """`path`: the folder; by default the one AHL_HOME names, else the user's data folder."""
        self._layout = Layout(Path(path).absolute() if path is not None else default_root().absolute())
        self._fs = fs or FileSystem()

    @property
    def path(self) -> Path:
        """The folder of the store; it may not exist yet."""
        return self._layout.root

    def prepare(self) -> None:
        """Make the store if it is not there yet: finds before long work that nothing could be stored after it.

        Raises:
            StoreError, StoreFull, StoreNewer: why it cannot be written.
        """
        with storing("prepare the store", self.path):
            ensure_store(self._fs, self._layout)

    def put(self, name: str, files: Mapping[str, bytes | Path], card: Card) -> Ref:
        """Check an adapter and publish it as a new version; the resolved reference says which.

        `files` are adapter_config.json and adapter_model.safetensors. The configuration is stored in canonical form,
        and the card's `adapter` gets the facts of the files.

        Raises:
            FormatError, UnsafeFile, Unsupported, AdapterMismatch, NoEffect: refused before anything is written.
        """
        check_name(name)
        if set(files) != {CONFIG, WEIGHTS}:
            raise FormatError(f"An adapter is {CONFIG} and {WEIGHTS}, got {', '.join(sorted(files)) or 'nothing'}.")
        vetted = vet(_bytes(files[CONFIG], MAX_BYTES), _bytes(files[WEIGHTS], transfer.MAX_WEIGHTS))
        described = replace(card, adapter={**card.adapter, **vetted.facts}).to_bytes()
        contents = {CONFIG: vetted.config, WEIGHTS: vetted.weights, CARD: described}
        with storing(f"store {name}", self.path, sum(map(len, contents.values()))):
            version, digest = publish.publish(self._fs, self._layout, name, contents)
        return Ref(name).resolved(version, digest)

    def resolve(self, ref: str | Ref) -> Ref:
        """The reference, bound to its version and digest."""
        return catalog.resolve(self._layout, ref)

    def folder(self, ref: str | Ref) -> Path:
        """The folder of a version, unchecked: for showing where it is. To load it, use `verified_folder`."""
        return self._layout.version(*self._at(ref))

    def verified_folder(self, ref: str | Ref) -> Path:
        """The folder of a version after checking size and sha256 of each of its files; plain PEFT loads it."""
        found = self.resolve(ref)
        name, version = found.name, _version(found)
        manifest = reading.load_manifest(self._layout, name, version)
        if manifest.digest != found.digest:
            raise reading.corrupt(name, version, "its manifest changed while it was read.")
        reading.check_files(self._layout, name, version, manifest)
        return self._layout.version(name, version)

    def card(self, ref: str | Ref) -> Card:
        """The card of a version, checked."""
        return catalog.card_of(self._layout, *self._at(ref))

    def spec(self, ref: str | Ref) -> Spec:
        """What kind of adapter a version is, checked."""
        return parse_adapter_config(reading.read_file(self._layout, *self._at(ref), CONFIG))

    def manifest(self, ref: str | Ref) -> Manifest:
        """Digest and size of each file of a version."""
        return reading.load_manifest(self._layout, *self._at(ref))

    def names(self) -> Names:
        """Names that have a version, in order."""
        return catalog.names(self._layout)

    def versions(self, name: str) -> Versions:
        """The versions of a name, oldest first; empty when there are none."""
        return catalog.versions(self._layout, name)

    def aliases(self, name: str) -> dict[str, int]:
        """The aliases of a name and the versions they point to."""
        return aliases_of(self._layout, name)

    def alias_history(self, name: str, alias: str) -> tuple[Move, ...]:
        """Every move of an alias, the latest last: what to go back to."""
        record = read_alias(self._layout, name, alias)
        return record.history if record else ()

    def alias(self, name: str, alias: str, version: int) -> Ref:
        """Point an alias at a version, newly or anew."""
        found = self.resolve(Ref(check_name(name), version=check_version(version)))
        check_alias(alias)
        with storing(f"set {name}:{alias}", self.path):
            move_alias(self._fs, self._layout, name, alias, found.version, found.digest)
        return replace(found, alias=alias)

    def unalias(self, name: str, alias: str) -> None:
        """Take an alias away; its history stays. Raises NotFound if it points nowhere."""
        if alias not in self.aliases(name):
            raise NotFound(f"{name} has no alias {check_alias(alias)}.", "See what there is with: ahl list")
        with storing(f"remove {name}:{alias}", self.path):
            move_alias(self._fs, self._layout, name, alias, None, None)

    def remove(self, ref: str | Ref, force: bool = False) -> Ref:
        """Remove a version for ever; its number is not used again.

        Refused with StoreError while an alias points to it or another version was made from it, unless `force`: then
        those aliases are taken away, and the children keep naming a parent that is gone.
        """
        found = self.resolve(ref)
        name, version = found.name, _version(found)
        pointing = [alias for alias, number in self.aliases(name).items() if number == version]
        users = [f"{name}:{alias}" for alias in pointing] + self._children(found)
        if users and not force:
            raise StoreError(
                f"{name}@{version} is in use by {', '.join(users)}.", "Move those first, or force the removal."
            )
        for alias in pointing:
            self.unalias(name, alias)
        with storing(f"remove {name}@{version}", self.path):
            publish.remove(self._fs, self._layout, name, version, str(found.digest))
        return found

    def import_(self, path: str | Path, name: str, base_card: dict[str, Any] | None = None) -> Ref:
        """Store a PEFT folder as a new version. `base_card` adds to what its card says of the base.

        Raises:
            UnsafeFile, FormatError, Unsupported, AdapterMismatch, NoEffect: refused before anything is written.
        """
        check_name(name)
        files, card = transfer.read_folder(path, base_card)
        return self.put(name, files, card)

    def export(self, ref: str | Ref, folder: str | Path) -> Path:
        """Write a version as a PEFT folder with its card; the target must be absent or an empty folder."""
        name, version = self._at(ref)
        size = sum(fact.size for fact in reading.load_manifest(self._layout, name, version).files.values())
        with storing(f"export {name}@{version}", Path(folder).absolute().parent, size):
            return transfer.export_folder(self._fs, self._layout, name, version, Path(folder))

    def verify(self, ref: str | Ref | None = None) -> Findings:
        """Everything wrong with one version, or with every version, alias and object. Reports; does not raise."""
        return check.verify(self._layout, ref)

    def list(self) -> Entries:
        """Every version, by name and number."""
        return catalog.entries(self._layout)

    def _at(self, ref: str | Ref) -> tuple[str, int]:
        found = self.resolve(ref)
        return found.name, _version(found)

    def _children(self, parent: Ref) -> Names:
        """Versions whose card names this one as a parent, by reference or digest."""
        marks = {f"{parent.name}@{parent.version}", str(parent.digest)}
        found = []
        for name in self.names():
            for version in self.versions(name):
                if marks & set(self._parents(name, version)):
                    found.append(f"{name}@{version}")
        return found

    def _parents(self, name: str, version: int) -> Names:
        try:
            return catalog.card_of(self._layout, name, version).parents
        except (StoreError, NotFound):
            return []  # damaged or removed meanwhile: it cannot hold another version back


def _version(ref: Ref) -> int:
    if ref.version is None:
        raise InvalidName(f"{ref} is not resolved.")
    return ref.version


def _bytes(source: bytes | Path, limit: int) -> bytes:
    if not isinstance(source, bytes):
        return read_regular(source, limit)
    if len(source) > limit:
        raise FormatError(f"A file of {len(source)} bytes is beyond the limit of {limit}.")
    return source
