"""The store as everything above sees it: one object, one folder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FormatError, NotFound, StoreCorrupt, StoreError
from ..formats.card import Card
from ..formats.files import read_regular
from ..names import Ref, check_alias, check_name, check_version
from .aliases import Move
from .fs import FileSystem, storing
from .layout import CARD, CONFIG, WEIGHTS
from .manifest import Manifest
from .reader import Names, StoreReader, told, version_of

if TYPE_CHECKING:  # imported by the methods that need them
    from .gc import Leftover, Swept
    from .repair import Healed


class Store(StoreReader):
    """Adapters by name and version in one folder. Reading creates nothing; the first write makes the folder.

    References are `name` (newest version), `name@3` or `name:prod`. Every method that takes one raises InvalidName,
    NotFound, StoreCorrupt or StoreNewer; every method that writes also StoreError and StoreFull. After those nothing
    was published; where only the last sync of a moved alias or a removal failed, it may be seen although it is not
    durable. Several threads and processes may use one store at once.
    """

    def __init__(self, path: str | Path | None = None, fs: FileSystem | None = None) -> None:
        """`path`: the folder; by default the one AHL_HOME names, else the user's data folder."""
        super().__init__(path)
        self._fs = fs or FileSystem()
        self._highest: dict[str, int] = {}  # numbers that this object has published
        self.healed: list[Healed] = []
        """Files of versions that were damaged and that imports by this object have restored."""

    def prepare(self) -> None:
        """Make the store if it is not there yet, and write into it: finds before long work that it could not be stored.

        Raises:
            StoreError, StoreFull, StoreNewer: why it cannot be written.
        """
        from .migrate import ensure_store
        from .publish import PROBE, try_writing

        hint = "Make it writable, or name another store with --store or AHL_HOME; nothing was changed."
        with storing("write into the store", self.path, len(PROBE), hint):
            ensure_store(self._fs, self._layout)
            try_writing(self._fs, self._layout)

    def migrate(self) -> None:
        """Make the store if it is not there yet, and bring one of an older format to the present one."""
        from .migrate import ensure_store

        with storing("prepare the store", self.path):
            ensure_store(self._fs, self._layout)

    def put(self, name: str, files: Mapping[str, bytes | Path], card: Card) -> Ref:
        """Check an adapter and publish it as a new version; the resolved reference says which.

        `files` are adapter_config.json and adapter_model.safetensors. The configuration is stored in canonical form,
        and the card's `adapter` gets the facts of the files.

        Raises:
            FormatError, UnsafeFile, Unsupported, AdapterMismatch, NoEffect: refused before anything is written.
        """
        from .incoming import LIMITS
        from .vetting import vet

        check_name(name)
        if set(files) != {CONFIG, WEIGHTS}:
            raise FormatError(f"An adapter is {CONFIG} and {WEIGHTS}, got {', '.join(sorted(files)) or 'nothing'}.")
        with storing(f"read the files of {name}", self.path):
            config, weights = (_bytes(files[file], LIMITS[file]) for file in (CONFIG, WEIGHTS))
        vetted = vet(config, weights)
        described = replace(card, adapter={**card.adapter, **vetted.facts}).to_bytes()
        return self._publish(name, {CONFIG: vetted.config, WEIGHTS: vetted.weights, CARD: described})

    def import_(
        self,
        path: str | Path,
        name: str,
        base_card: Mapping[str, Any] | None = None,
        source: Mapping[str, str] | None = None,
    ) -> Ref:
        """Store an adapter from a PEFT folder or an archive (.tar, .tar.gz, .zip) as a new version.

        What a store exported and nobody changed keeps its card and its digest; it is not stored twice under one name,
        and restores what is damaged of the version that it equals (see `healed`).

        Args:
            base_card: adds to what its card says of the base.
            source: where it was got from, to be written down, such as {"kind": "hub", "repo": ..., "commit": ...}.

        Raises:
            UnsafeFile, FormatError, Unsupported, AdapterMismatch, NoEffect: refused before anything is written.
        """
        from .incoming import read_incoming

        check_name(name)
        with storing(f"read {path}", Path(path)):
            found = read_incoming(path, base_card, source)
        if found.contents is not None:
            return self._twin(name, found.contents) or self._publish(name, found.contents, found.received)
        return self.put(name, {CONFIG: found.vetted.config, WEIGHTS: found.vetted.weights}, found.card)

    def alias(
        self,
        name: str,
        alias: str,
        version: int,
        *,
        event: str = "set",
        reason: Mapping[str, Any] | None = None,
        expected: Move | None = None,
    ) -> Ref:
        """Point an alias at a version, newly or anew.

        Args:
            event, reason: what the log says of it.
            expected: refuse with StoreError if the alias was moved since this move.
        """
        found = self.resolve(Ref(check_name(name), version=check_version(version)))
        with storing(f"set {name}:{alias}", self.path):
            move = Move(found.version, found.digest, "", event, dict(reason or {}))
            self._move(name, check_alias(alias), move, expected.number if expected else None)
        return replace(found, alias=alias)

    def refuse(self, name: str, alias: str, version: int, reason: Mapping[str, Any]) -> None:
        """Keep in the log that an alias was not moved to a version, and why."""
        found = self.resolve(Ref(check_name(name), version=check_version(version)))
        with storing(f"note a decision on {name}:{alias}", self.path):
            self._move(name, check_alias(alias), Move(found.version, found.digest, "", "refuse", dict(reason)))

    def rollback(self, name: str, alias: str) -> Ref:
        """Point an alias at what it named before its last move; again, one further back.

        Raises:
            NotFound: it names nothing, or named nothing else that still exists.
            StoreError: somebody else has moved it meanwhile.
        """
        from .journal import before

        current = self.resolve(Ref(check_name(name), alias=check_alias(alias)))
        history = self.alias_history(name, alias)
        version = before(history, self.versions(name))
        if version is None:
            raise NotFound(
                f"{name}:{alias} names {name}@{current.version}, and named no other version that still exists before.",
                f"See its history with: ahl log {name}; set it with: ahl alias {name}:{alias} VERSION",
            )
        # What lies before depends on the history: a move of somebody else meanwhile is not undone unseen.
        told = {"from": current.version}
        return self.alias(name, alias, version, event="rollback", reason=told, expected=history[-1])

    def unalias(self, name: str, alias: str) -> None:
        """Take an alias away; its history stays. Raises NotFound if it points nowhere."""
        if alias not in self.aliases(name):
            raise NotFound(f"{name} has no alias {check_alias(alias)}.", "See what there is with: ahl list")
        with storing(f"remove {name}:{alias}", self.path):
            self._move(name, alias, Move(None, None, "", "remove"))

    def remove(self, ref: str | Ref, force: bool = False) -> Ref:
        """Remove a version for ever; its number is not used again.

        Refused with StoreError while an alias points to it or another version was made from it, unless `force`: then
        those aliases are taken away, and the children keep naming a parent that is gone.
        """
        from . import publish

        found = self.resolve(ref)
        name, version = found.name, version_of(found)
        pointing = [alias for alias, number in self.aliases(name).items() if number == version]
        users = [f"{name}:{alias}" for alias in pointing] + self._children(found)
        if users and not force:
            raise StoreError(
                f"{name}@{version} is in use by {', '.join(users)}.",
                f"Move its aliases first, or remove it all the same with: ahl remove {name}@{version} --force",
            )
        for alias in pointing:
            self.unalias(name, alias)
        with storing(f"remove {name}@{version}", self.path):
            publish.remove(self._fs, self._layout, name, version, str(found.digest))
        self._catalog.forget(name)
        return found

    def export(self, ref: str | Ref, target: str | Path) -> Path:
        """Write a version as a PEFT folder with its card, or as one file where `target` ends in .tar.

        The target must be absent, or an empty folder. Another store imports it with the same digest.
        """
        from .outgoing import export

        name, version = self._at(ref)
        size = sum(fact.size for fact in self.manifest(ref).files.values())
        with storing(f"export {name}@{version}", Path(target).absolute().parent, size):
            return export(self._fs, self._layout, name, version, Path(target))

    def gc(self, dry_run: bool = False, older_than: float | None = None) -> list[Leftover]:
        """Remove what crashed or finished work has left behind; returns what is gone, or would be.

        Args:
            older_than: seconds since a temporary entry was touched last; by default a day.
        """
        return self.sweep(dry_run, older_than).gone

    def sweep(self, dry_run: bool = False, older_than: float | None = None) -> Swept:
        """`gc`, which also tells what stayed: what could not be removed, and what may be under way."""
        from . import gc, publish

        age = publish.STALE_SECONDS if older_than is None else older_than
        with storing("remove leftovers", self.path):
            if self._catalog.format() is None:
                return gc.Swept([], [], 0, 0)
            if dry_run:
                return gc.look(self._layout, self._catalog, age)
            return gc.sweep(self._fs, self._layout, self._catalog, age)

    def repair(self) -> list[Healed]:
        """Restore damaged files of versions from equal content that is sound; returns what was healed."""
        from . import repair

        with storing("repair the store", self.path):
            return repair.repair(self._fs, self._layout, self._catalog)

    # -- inside --------------------------------------------------------------------------------------------------

    def _publish(self, name: str, contents: Mapping[str, bytes], received: Mapping[str, Any] | None = None) -> Ref:
        from . import publish

        with storing(f"store {name}", self.path, sum(map(len, contents.values()))):
            after = self._highest.get(name)
            version, manifest = publish.publish(self._fs, self._layout, name, contents, received, after)
        self._highest[name] = version
        self._catalog.forget(name)
        return Ref(name).resolved(version, manifest.digest)

    def _move(self, name: str, alias: str, move: Move, after: int | None = None) -> None:
        from . import aliases
        from .migrate import ensure_store

        ensure_store(self._fs, self._layout)
        aliases.append(self._fs, self._layout, name, alias, move, after)
        self._catalog.forget(name)

    @told
    def _twin(self, name: str, contents: Mapping[str, bytes]) -> Ref | None:
        """The version of `name` that has exactly these files, healed from them where one of its own is damaged."""
        from .manifest import FileFact
        from .repair import heal

        digest = Manifest({file: FileFact.of(data) for file, data in contents.items()}).digest
        for version in reversed(self.versions(name)):
            with suppress(StoreCorrupt, NotFound):  # a version that does not say what it is, or was removed meanwhile
                if self._catalog.digest(name, version) != digest:
                    continue
                with storing(f"heal {name}@{version}", self.path, sum(map(len, contents.values()))):
                    self.healed += heal(self._fs, self._layout, self._catalog, name, version, contents)
                return Ref(name).resolved(version, digest)
        return None

    def _children(self, parent: Ref) -> Names:
        """Versions whose card names this one as a parent, by reference or digest."""
        marks = {f"{parent.name}@{parent.version}", str(parent.digest)}
        return [f"{one.name}@{one.version}" for one in self.list() if marks & set(one.summary.get("parents") or ())]


def _bytes(source: bytes | Path, limit: int) -> bytes:
    if not isinstance(source, bytes):
        return read_regular(source, limit)
    if len(source) > limit:
        raise FormatError(f"A file of {len(source)} bytes is beyond the limit of {limit}.")
    return source
