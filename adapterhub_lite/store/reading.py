"""Reading a published version: nothing leaves here that does not match the manifest."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ..errors import FormatError, NotFound, StoreCorrupt
from ..formats.files import open_regular, read_regular
from .layout import MANIFEST, Layout
from .manifest import MAX_BYTES, FileFact, Manifest

_REPAIR = "Restore it from a copy of the store, or remove the version and import or train it again."


def load_manifest(layout: Layout, name: str, version: int) -> Manifest:
    """The manifest of a version.

    Raises:
        NotFound: there is no such version.
        StoreCorrupt: its manifest is missing or damaged.
    """
    folder = layout.version(name, version)
    if not folder.is_dir():
        raise NotFound(f"There is no {name}@{version}.", "See what there is with: ahl list")
    try:
        return Manifest.from_bytes(read_regular(folder / MANIFEST, MAX_BYTES))
    except (NotFound, FormatError) as error:
        raise corrupt(name, version, error.message) from None


def read_file(layout: Layout, name: str, version: int, file: str) -> bytes:
    """The bytes of one file of a version, checked against its manifest. Raises as `load_manifest`."""
    fact = load_manifest(layout, name, version).files[file]
    try:
        data = read_regular(layout.version(name, version) / file, fact.size)
    except (NotFound, FormatError) as error:
        raise corrupt(name, version, error.message) from None
    if FileFact.of(data) != fact:
        raise corrupt(name, version, f"{file} does not match its digest {fact.sha256[:12]}.")
    return data


def check_files(layout: Layout, name: str, version: int, manifest: Manifest) -> None:
    """Check size, then sha256 of every file, without holding one in memory. Raises StoreCorrupt naming the file."""
    for file, fact in manifest.files.items():
        problem = file_problem(layout.version(name, version) / file, fact)
        if problem:
            raise corrupt(name, version, f"{file} {problem}.")


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
    return "" if digest == fact.sha256 else f"does not match its digest {fact.sha256[:12]}"


def corrupt(name: str, version: int, what: str) -> StoreCorrupt:
    """The error for a version that is not what it was when it was published."""
    return StoreCorrupt(f"{name}@{version} is damaged: {what}", _REPAIR)
