"""What was trained and could not be stored, kept in another place, with the command that stores it later."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ..bases.load import Base
from ..errors import AdapterHubError, StoreError
from ..formats.card import Card
from ..places import cache_root, default_root
from ..store import FileFact, Manifest, Store
from ..store.layout import CARD, CONFIG, MANIFEST, WEIGHTS
from ..store.vetting import vet


def rescued(
    name: str, files: Mapping[str, bytes], card: Card, base: Base, store: Store, error: OSError | AdapterHubError
) -> StoreError:
    """Keep an adapter that `store` did not take; the error to raise says where, and how to store it from there.

    The folder is an export as a store writes it, with its card, so the import keeps task, recipe and figures as told.
    """
    kind = type(error) if isinstance(error, StoreError) else StoreError
    reason = error.message if isinstance(error, AdapterHubError) else f"{error}."
    told = f"{name} was trained, but could not be stored. {reason}"
    failed = []
    for place in _places():
        try:
            folder = _keep(place, name, _contents(files, card))
        except OSError as problem:
            failed.append(f"{place} ({problem.strerror or problem})")
        else:
            return kind(f"{told} It is kept in {folder}.", f"Store it with: {_command(folder, name, base, store)}")
    return kind(f"{told} It could not be kept elsewhere either: {', '.join(failed)}.", "Train it again.")


def _contents(files: Mapping[str, bytes], card: Card) -> dict[str, bytes]:
    """The files of an export, the manifest last: without it the others are a plain PEFT folder."""
    vetted = vet(files[CONFIG], files[WEIGHTS])
    described = replace(card, adapter={**card.adapter, **vetted.facts}).to_bytes()
    made = {CONFIG: vetted.config, WEIGHTS: vetted.weights, CARD: described}
    return {**made, MANIFEST: Manifest({file: FileFact.of(data) for file, data in made.items()}).to_bytes()}


def _places() -> Iterator[Path]:
    """Where to try: on a full or read-only disk one of them may lie on another one."""
    yield cache_root() / "rescued"
    yield Path(tempfile.gettempdir())
    yield Path.cwd()


def _keep(place: Path, name: str, contents: Mapping[str, bytes]) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=place))
    try:
        for file, data in contents.items():
            with (folder / file).open("xb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _command(folder: Path, name: str, base: Base, store: Store) -> str:
    source = str(base.source.folder) if base.source.origin == "folder" else base.source.name
    words = ["ahl", "import", str(folder), "--name", name, "--base", source]
    if store.path != default_root().absolute():
        words += ["--store", str(store.path)]
    return shlex.join(words)
