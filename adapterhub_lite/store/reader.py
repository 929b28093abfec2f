"""Reading a store: resolved references, verified bytes, cards, listings, histories. Writes nothing, takes no lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..errors import AdapterHubError, InvalidName, NotFound, StoreError
from ..formats.card import Card
from ..names import Ref
from ..places import cache_root, default_root
from . import listing, reading
from .aliases import Move
from .catalog import Catalog, card_of
from .layout import CONFIG, ROOMS, Layout
from .listing import Entry
from .manifest import Manifest
from .received import trusted_view

if TYPE_CHECKING:  # the rest is imported by the methods that need it, so that a listing starts at once
    from ..formats.specs import Spec
    from .check import Finding
    from .index import Index
    from .journal import Event

Entries = list[Entry]
Findings = list["Finding"]
Names = list[str]
Events = list["Event"]
Versions = list[int]
_CHECK = "Check --store and AHL_HOME."
_Method = TypeVar("_Method", bound=Callable[..., Any])
T = TypeVar("T")


def told(method: _Method) -> _Method:
    """A method whose OSError becomes a StoreError: what a disk refuses is no bug, and has changed nothing."""

    @wraps(method)
    def call(self: StoreReader, *arguments: Any, **named: Any) -> Any:
        try:
            return method(self, *arguments, **named)
        except AdapterHubError:
            raise
        except OSError as error:
            what = reading.reason(error)
            where = error.filename or self.path
            raise StoreError(f"The store could not be read: {what} ({where}).", "Nothing was changed.") from error

    return cast(_Method, call)


class StoreReader:
    """The half of `Store` that changes nothing."""

    def __init__(self, path: str | Path | None = None) -> None:
        """`path`: the folder; by default the one AHL_HOME names, else the user's data folder."""
        self._layout = Layout(Path(os.path.abspath(path)) if path is not None else default_root().absolute())
        self._catalog = Catalog(self._layout)

    @property
    def path(self) -> Path:
        """The folder of the store; it may not exist yet."""
        return self._layout.root

    @told
    def require(self) -> None:
        """Refuse to go on where no store is, as at a mistyped path; an empty folder is an empty store.

        Raises:
            NotFound: nothing is there, or a folder of something else.
            StoreError: a file is there.
        """
        if not self.path.exists():
            raise NotFound(f"There is no store at {self.path}.", "Check --store and AHL_HOME; `ahl train` makes one.")
        if not self.path.is_dir():
            raise StoreError(f"{self.path} is a file, where the folder of a store should be.", _CHECK)
        known = self._layout.store_file.is_file() or self._layout.adapters.is_dir()
        if not known and not set(os.listdir(self.path)) <= ROOMS:
            raise NotFound(f"{self.path} is a folder of something else: it has no store.json.", _CHECK)

    @told
    def resolve(self, ref: str | Ref) -> Ref:
        """The reference, bound to its version and digest."""
        return self._catalog.resolve(ref)

    @told
    def folder(self, ref: str | Ref) -> Path:
        """The folder of a version, unchecked: for showing where it is. To load it, use `verified_folder`."""
        return self._layout.version(*self._at(ref))

    @told
    def verified_folder(self, ref: str | Ref) -> Path:
        """The folder of a version after checking size and sha256 of each of its files; plain PEFT loads it."""
        found = self.resolve(ref)
        name, version = found.name, version_of(found)
        reading.check_files(self._layout, name, version, self._manifest(found))
        return self._layout.version(name, version)

    @told
    def read(self, ref: str | Ref) -> reading.Stored:
        """The files of a version as bytes, each read once and checked: what is used is what was verified."""
        found = self.resolve(ref)
        return reading.read_version(self._layout, found)

    def read_while(self, ref: str | Ref, work: Callable[[reading.Stored], T]) -> T:
        """What `work` makes of a version's files, which are checked meanwhile; see `reading.read_while`."""
        return reading.read_while(self._layout, self.resolve(ref), work)

    @told
    def card(self, ref: str | Ref) -> Card:
        """The card of a version, checked. For one that came from elsewhere what its maker wrote is kept as a claim."""
        found = self.resolve(ref)
        manifest = self._manifest(found)
        return trusted_view(card_of(self._layout, found.name, version_of(found), manifest), manifest.received)

    @told
    def received(self, ref: str | Ref) -> dict[str, Any] | None:
        """How a version came here that another store made; None for one that was made here."""
        found = self.manifest(ref).received
        return dict(found) if found is not None else None

    @told
    def spec(self, ref: str | Ref) -> Spec:
        """What kind of adapter a version is, checked."""
        from ..formats.peft_config import parse_adapter_config

        found = self.resolve(ref)
        manifest = self._manifest(found)
        data = reading.read_file(self._layout, found.name, version_of(found), CONFIG, manifest)
        return parse_adapter_config(data)

    @told
    def manifest(self, ref: str | Ref) -> Manifest:
        """Digest and size of each file of a version."""
        return self._manifest(self.resolve(ref))

    @told
    def names(self) -> Names:
        """Names that have a version, in order."""
        return self._catalog.names()

    @told
    def versions(self, name: str) -> Versions:
        """The versions of a name, oldest first; empty when there are none."""
        return self._catalog.versions(name)

    @told
    def aliases(self, name: str) -> dict[str, int]:
        """The aliases of a name and the versions they point to."""
        return self._catalog.aliases(name)

    @told
    def alias_history(self, name: str, alias: str) -> tuple[Move, ...]:
        """Every move of an alias and every decision about it, the latest last."""
        return self._catalog.history(name, alias)

    @told
    def list(self) -> Entries:
        """Every version, by name and number."""
        return listing.entries(self._layout, self._catalog, self._index)

    @told
    def search(self, query: str) -> Entries:
        """The versions that match a query such as `sql base:smollm2 accuracy>0.8`.

        Raises:
            FormatError: the query cannot be read.
        """
        from .search import search

        return search(self.list(), query)

    @told
    def log(self, name: str) -> Events:
        """What happened to a name, the latest first: versions made and removed, aliases moved, decisions.

        Raises:
            NotFound: there is and was no such name.
        """
        from .journal import log

        return log(self._layout, self._catalog, name)

    @told
    def verify(self, ref: str | Ref | None = None) -> Findings:
        """Everything wrong with one version, or with every version, alias and object. Reports; does not raise."""
        from . import check

        return check.verify(self._layout, ref)

    def _index(self) -> Index:
        from .index import Index

        return Index(cache_root(), self.path)

    def _manifest(self, found: Ref) -> Manifest:
        """The manifest of a resolved version; what was resolved is what is read, also where it was remembered."""
        name, version = found.name, version_of(found)
        manifest = reading.load_manifest(self._layout, name, version)
        reading.check_identity(name, version, manifest, found)
        return manifest

    def _at(self, ref: str | Ref) -> tuple[str, int]:
        found = self.resolve(ref)
        return found.name, version_of(found)


def version_of(ref: Ref) -> int:
    """The version of a resolved reference."""
    if ref.version is None:
        raise InvalidName(f"{ref} is not resolved.")
    return ref.version
