"""PEFT folders in and out: a foreign folder becomes bytes and a card, a version becomes a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import FormatError, NotFound, StoreError, UnsafeFile
from ..formats.card import MAX_BYTES as CARD_BYTES
from ..formats.card import Card
from ..formats.files import read_regular
from ..formats.peft_config import MAX_BYTES, parse_adapter_config
from .fs import MUTABLE, FileSystem, discard, ensure_folder, new_tmp, write_file
from .layout import CARD, CONFIG, MANIFEST, WEIGHTS, Layout
from .manifest import MAX_BYTES as MANIFEST_BYTES
from .manifest import FileFact, Manifest, sha256
from .reading import load_manifest, read_file

MAX_WEIGHTS = 8 << 30
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_folder(path: str | Path, base: dict[str, Any] | None = None) -> tuple[dict[str, bytes], Card]:
    """The two files of a PEFT folder and a card that says where they came from; everything else is ignored and listed.

    `base` is what is known of the base beyond the name in the configuration.

    Raises:
        NotFound: no folder, or no configuration or weights in it.
        UnsafeFile: links, or weights as a pickle.
        FormatError: a configuration that is not PEFT's.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise NotFound(f"{folder} is not a folder.", f"Expected a folder with {CONFIG} and {WEIGHTS}.")
    present = sorted(entry.name for entry in folder.iterdir())
    config = read_regular(folder / CONFIG, MAX_BYTES)
    spec = parse_adapter_config(config)
    _check_weights(folder, present)
    files = {CONFIG: config, WEIGHTS: read_regular(folder / WEIGHTS, MAX_WEIGHTS)}
    origin = {
        "kind": "imported",
        "folder": folder.resolve().name,
        "files": {name: sha256(data) for name, data in files.items()},
        "ignored": [_printable(name) for name in present if name not in files],
    }
    own = _own_card(folder, present, files)
    if own is not None:
        return files, _claimed(own, {**own.base, **(base or {})}, origin)
    named: dict[str, Any] = {"name": spec.base_model, "revision": spec.revision, "fingerprint": {}}
    return files, Card(base={**named, **(base or {})}, origin=origin)


def _claimed(card: Card, base: dict[str, Any], origin: dict[str, Any]) -> Card:
    """A card from another store: kept as what it is, somebody's word; nothing in it leads to a file or a version."""
    data = {split: {k: v for k, v in facts.items() if k != "path"} for split, facts in card.data.items()}
    told = {"claimed_origin": card.origin, "claimed_parents": list(card.parents)}
    return replace(card, base=base, data=data, recipe=None, parents=[], origin={**origin, **told})


def _own_card(folder: Path, present: list[str], files: dict[str, bytes]) -> Card | None:
    """The card of a folder that a store exported and nobody changed since; None for any other folder.

    The manifest beside it tells: a card next to other weights than it was written for is worth nothing.
    """
    if not {CARD, MANIFEST} <= set(present):
        return None
    try:
        manifest = Manifest.from_bytes(read_regular(folder / MANIFEST, MANIFEST_BYTES))
        found = {**files, CARD: read_regular(folder / CARD, CARD_BYTES)}
        unchanged = all(FileFact.of(data) == manifest.files[name] for name, data in found.items())
        return Card.from_bytes(found[CARD]) if unchanged else None
    except FormatError:
        return None


def export_folder(fs: FileSystem, layout: Layout, name: str, version: int, target: Path) -> Path:
    """Write a version as a PEFT folder with its card, whole or not at all.

    Raises:
        StoreError: the target is a link, inside the store, or not absent or an empty folder.
        StoreCorrupt: the version is damaged.
    """
    # The parent is resolved, the last part is not: a link there must be seen, not followed.
    target = target.resolve() if target.name == ".." else target.absolute().parent.resolve() / target.name
    _check_target(layout, target)
    files = {file: read_file(layout, name, version, file) for file in (CONFIG, WEIGHTS, CARD)}
    files[MANIFEST] = load_manifest(layout, name, version).to_bytes()
    existing = next(parent for parent in target.parents if parent.is_dir())
    ensure_folder(fs, target.parent, existing)
    staged = new_tmp(target.parent)
    try:
        fs.mkdir(staged)
        for file, data in files.items():
            write_file(fs, staged / file, data, MUTABLE)
        fs.fsync_dir(staged)
        fs.rename(staged, target)
    except BaseException:
        discard(fs, staged)
        raise
    fs.fsync_dir(target.parent)
    return target


def _check_weights(folder: Path, present: list[str]) -> None:
    pickles = [name for name in present if name.startswith("adapter_model") and name.endswith(_PICKLES)]
    if WEIGHTS in present or not pickles:
        return
    hint = f"Where you trust it, load it with peft and call save_pretrained: that writes {WEIGHTS}."
    raise UnsafeFile(f"{folder / pickles[0]} is a pickle; pickles can run code and are never read.", hint)


def _check_target(layout: Layout, target: Path) -> None:
    hint = "Name a folder that does not exist yet."
    if target.is_symlink():
        raise StoreError(f"{target} is a symbolic link.", hint)
    if target.is_relative_to(layout.root.resolve()):
        raise StoreError(f"{target} is inside the store.", hint)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise StoreError(f"{target} exists and is not an empty folder.", hint)


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)
