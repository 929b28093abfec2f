"""Reading a published version: nothing leaves here that does not match the manifest."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from ..errors import FormatError, NotFound, StoreCorrupt, StoreError
from ..formats.card import Card
from ..formats.files import open_regular, read_regular
from ..names import Ref
from .layout import CARD, CONFIG, MANIFEST, WEIGHTS, Layout
from .links import is_folder
from .manifest import LIMITS, MAX_BYTES, FileFact, Manifest
from .received import trusted_view

T = TypeVar("T")
_WORTH_A_THREAD = 1 << 20  # bytes; fewer are checked before a thread has begun
_REPAIR = "Restore it from a copy of the store, or remove the version and import or train it again."
_HEAL = "`ahl verify --repair` restores it from equal content of the store; importing the same export again does too."


def load_manifest(layout: Layout, name: str, version: int) -> Manifest:
    """The manifest of a version.

    Raises:
        NotFound: there is no such version.
        StoreCorrupt: its manifest is missing or damaged.
    """
    folder = layout.version(name, version)
    if not is_folder(folder):
        if folder.is_symlink():
            raise corrupt(name, version, "its folder is a symbolic link.")
        raise NotFound(f"There is no {name}@{version}.", "See what there is with: ahl list")
    try:
        return Manifest.from_bytes(read_regular(folder / MANIFEST, MAX_BYTES))
    except (NotFound, FormatError) as error:
        raise _lost(layout, name, version, error.message) from None
    except OSError as error:
        raise _unreadable(name, version, MANIFEST, error) from error


def read_file(layout: Layout, name: str, version: int, file: str, manifest: Manifest | None = None) -> bytes:
    """The bytes of one file of a version, checked against its manifest. Raises as `load_manifest`."""
    manifest = manifest or load_manifest(layout, name, version)
    return _checked(layout, name, version, file, manifest.files[file])


def check_files(layout: Layout, name: str, version: int, manifest: Manifest) -> None:
    """Check size, then sha256 of every file, without holding one in memory. Raises StoreCorrupt naming the file."""
    for file, fact in manifest.files.items():
        problem = file_problem(layout.version(name, version) / file, fact)
        if problem:
            raise _lost(layout, name, version, f"{file} {problem}.", _HEAL)


@dataclass(frozen=True)
class Stored:
    """The verified bytes of one version."""

    ref: Ref
    config: bytes
    weights: bytes
    card: Card


def read_version(layout: Layout, ref: Ref) -> Stored:
    """Read each file of a resolved version once, and check those very bytes.

    Raises:
        NotFound: it was removed meanwhile.
        StoreCorrupt: a file is not what it was when it was stored.
    """
    return read_while(layout, ref, lambda stored: stored)


def read_while(layout: Layout, ref: Ref, work: Callable[[Stored], T]) -> T:
    """What `work` makes of a version, whose weights are checked by another thread meanwhile.

    It is returned only if the bytes are those that were stored; if they are not, that is what is said, whatever `work`
    may have found wrong with them. Raises as `read_version`, and what `work` raises.
    """
    name, version = ref.name, ref.version or 0
    manifest = load_manifest(layout, name, version)
    check_identity(name, version, manifest, ref)
    files = {file: _read(layout, name, version, file, fact) for file, fact in manifest.files.items()}
    for file in files.keys() - {WEIGHTS}:
        _check(name, version, file, files[file], manifest.files[file])
    try:
        card = trusted_view(Card.from_bytes(files[CARD]), manifest.received)
    except FormatError as error:
        raise corrupt(name, version, error.message) from None
    stored = Stored(ref, files[CONFIG], files[WEIGHTS], card)
    check = partial(_check, name, version, WEIGHTS, files[WEIGHTS], manifest.files[WEIGHTS])
    with _beside(check, alone=len(files[WEIGHTS]) < _WORTH_A_THREAD):
        return work(stored)


@contextmanager
def _beside(check: Callable[[], object], alone: bool) -> Iterator[None]:
    """Run `check` while the block runs; what it raises comes before what the block raises. `alone`: run it first."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            check()
        except BaseException as error:
            raised.append(error)

    if alone:
        check()
        yield
        return
    thread = threading.Thread(target=run, name="adapterhub-lite digest")
    thread.start()
    try:
        yield
    finally:
        thread.join()
        if raised:
            raise raised[0] from None


def check_identity(name: str, version: int, manifest: Manifest, ref: Ref) -> None:
    """Raise StoreCorrupt if a manifest is not the one `ref` was resolved to."""
    if manifest.digest != ref.digest:
        raise corrupt(name, version, f"it is {manifest.digest[:12]} now, but {ref} stands for {str(ref.digest)[:12]}.")


def _checked(layout: Layout, name: str, version: int, file: str, fact: FileFact) -> bytes:
    data = _read(layout, name, version, file, fact)
    _check(name, version, file, data, fact)
    return data


def _read(layout: Layout, name: str, version: int, file: str, fact: FileFact) -> bytes:
    try:
        data = read_regular(layout.version(name, version) / file, min(fact.size, LIMITS[file]))
    except (NotFound, FormatError) as error:
        raise _lost(layout, name, version, error.message, _HEAL) from None
    except OSError as error:
        raise _unreadable(name, version, file, error) from error
    if len(data) != fact.size:
        raise corrupt(name, version, f"{file} has {len(data)} bytes instead of {fact.size}.", _HEAL)
    return data


def _check(name: str, version: int, file: str, data: bytes, fact: FileFact) -> None:
    if FileFact.of(data) != fact:
        raise corrupt(name, version, f"{file} does not match its digest {fact.sha256[:12]}.", _HEAL)


def file_problem(path: Path, fact: FileFact) -> str:
    """What is wrong with a file that should be `fact`, or ""."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != fact.size:
                return f"has {size} bytes instead of {fact.size}"
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except NotFound:
        return "is missing"
    except FormatError as error:
        return f"cannot be trusted: {error.message}"
    except OSError as error:
        return f"cannot be read: {reason(error)}"
    return "" if digest == fact.sha256 else f"does not match its digest {fact.sha256[:12]}"


def _lost(layout: Layout, name: str, version: int, what: str, hint: str = _REPAIR) -> NotFound | StoreCorrupt:
    """The error for a version that is not whole: its folder is cleared away after its tombstone is there."""
    if layout.tombstone(name, version).exists():
        return NotFound(f"{name}@{version} was removed.", "See what there is with: ahl list")
    return corrupt(name, version, what, hint)


def reason(error: OSError) -> str:
    """What the system says went wrong."""
    return os.strerror(error.errno) if error.errno else str(error)


def _unreadable(name: str, version: int, file: str, error: OSError) -> StoreError:
    return StoreError(f"{file} of {name}@{version} could not be read: {reason(error)}.", "Nothing was changed.")


def corrupt(name: str, version: int, what: str, hint: str = _REPAIR) -> StoreCorrupt:
    """The error for a version that is not what it was when it was published."""
    return StoreCorrupt(f"{name}@{version} is damaged: {what}", hint)
