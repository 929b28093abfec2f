"""Adapters from elsewhere: a PEFT folder or an archive becomes bytes and a card; a store's own export is recognised."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError, NotFound, UnsafeFile
from ..formats.adapter_files import inventory
from ..formats.card import Card, utc_now
from ..formats.files import read_regular
from ..formats.peft_config import parse_adapter_config
from ..formats.safetensors_header import read_header
from . import manifest as manifests
from .layout import CARD, CONFIG, MANIFEST, WEIGHTS
from .manifest import FileFact, Manifest, check_received, sha256
from .vetting import Vetted, vet

LIMITS: Mapping[str, int] = {**manifests.LIMITS, MANIFEST: manifests.MAX_BYTES}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_IGNORED = 100  # names of ignored files that are written down


@dataclass(frozen=True)
class Incoming:
    """An adapter that passed every check.

    `contents` are the files of an unchanged export of a store, to be kept byte for byte; None for any other adapter,
    whose `card` was made here.
    """

    vetted: Vetted
    card: Card
    received: Mapping[str, Any]
    contents: Mapping[str, bytes] | None


def read_incoming(
    path: str | Path, base: Mapping[str, Any] | None = None, source: Mapping[str, str] | None = None
) -> Incoming:
    """Read an adapter from a folder or an archive; nothing but its four known files is read, everything else is listed.

    Args:
        base: what is known of the base beyond what the adapter says.
        source: where it was got from, to be written down.

    Raises:
        NotFound: nothing there, or no configuration or weights in it.
        UnsafeFile: links, hostile names, or weights as a pickle.
        FormatError, Unsupported, AdapterMismatch, NoEffect: from the formats and the checks.
    """
    path = Path(path)
    kind = "folder" if path.is_dir() else "archive"
    files, others = _from_folder(path) if kind == "folder" else _from_archive(path)
    vetted = vet(files[CONFIG], files[WEIGHTS])
    own = _own_contents(files, vetted)
    ignored = others if own is not None else sorted([*others, *(files.keys() - {CONFIG, WEIGHTS})])
    place = _printable(path.resolve().name)
    told: dict[str, Any] = {"kind": kind, "from": place, "ignored": ignored[:_IGNORED], **(source or {})}
    if own is not None:
        received = {**told, "time": utc_now(), "base": dict(base or {})}
        check_received(received)
        return Incoming(vetted, Card.from_bytes(own[CARD]), received, own)
    spec = parse_adapter_config(files[CONFIG])
    named: dict[str, Any] = {"name": spec.base_model, "revision": spec.revision, "fingerprint": {}}
    digests = {name: sha256(files[name]) for name in (CONFIG, WEIGHTS)}
    origin = {**told, "kind": "imported", "by": told["kind"], "files": digests}
    return Incoming(vetted, Card(base={**named, **(base or {})}, origin=origin), told, None)


def _from_folder(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    present = sorted(entry.name for entry in folder.iterdir())
    config = read_regular(folder / CONFIG, LIMITS[CONFIG])
    spec = parse_adapter_config(config)  # another library's folder is explained before its weights are missed
    _check_weights(folder, present)
    inventory(spec, read_header(folder / WEIGHTS))  # so that what cannot be an adapter is not read, however large
    files = {CONFIG: config, WEIGHTS: read_regular(folder / WEIGHTS, LIMITS[WEIGHTS])}
    if {CARD, MANIFEST} <= set(present):
        files |= {name: read_regular(folder / name, LIMITS[name]) for name in (CARD, MANIFEST)}
    return files, [_printable(name) for name in present if name not in files]


def _from_archive(path: Path) -> tuple[dict[str, bytes], list[str]]:
    from ..formats.archive import is_archive, read_archive

    if not path.exists():
        what = "leads to nothing" if path.is_symlink() else "does not exist"
        raise NotFound(f"{path} {what}.", f"Expected a folder with {CONFIG} and {WEIGHTS}, or an archive of one.")
    if path.is_symlink():
        raise FormatError(
            f"{path} is a symbolic link, neither a folder nor an archive.",
            f"Give what it leads to: {_printable(os.path.realpath(path))}",
        )
    if not is_archive(path):
        raise FormatError(
            f"{path} is neither a folder nor an archive (.tar, .tar.gz, .zip).",
            f"Name the folder that holds {CONFIG} and {WEIGHTS}.",
        )
    files, others = read_archive(path, LIMITS)
    if CONFIG in files:
        parse_adapter_config(files[CONFIG])
    for name in (CONFIG, WEIGHTS):
        if name not in files:
            _check_weights(path, [Path(other).name for other in others])
            raise NotFound(f"{path} holds no {name}.", f"Expected {CONFIG} and {WEIGHTS}.")
    return files, others


def _own_contents(files: Mapping[str, bytes], vetted: Vetted) -> dict[str, bytes] | None:
    """The files of an export that nobody changed since; None for anything else.

    The manifest beside it tells: a card next to other weights than it was written for is worth nothing. A
    configuration that is not in our form is foreign, whatever the manifest says.
    """
    if not {CARD, MANIFEST} <= files.keys() or files[CONFIG] != vetted.config:
        return None
    try:
        manifest = Manifest.from_bytes(files[MANIFEST])
        contents = {name: files[name] for name in manifest.files}
    except FormatError:
        return None
    for name, data in contents.items():
        if FileFact.of(data) != manifest.files[name]:
            raise FormatError(
                f"{name} is not what its manifest says: the export is damaged or was changed.",
                f"Copy it again; to store what is there as a new adapter, take {CARD} and {MANIFEST} away first.",
            )
    try:
        card = Card.from_bytes(contents[CARD])
    except FormatError:
        return None
    wrong = [key for key, value in vetted.facts.items() if key in card.adapter and card.adapter[key] != value]
    return None if wrong else contents


def _check_weights(where: Path, present: list[str]) -> None:
    pickles = [name for name in present if name.startswith("adapter_model") and name.endswith(_PICKLES)]
    if WEIGHTS in present or not pickles:
        return
    hint = f"Where you trust it, load it with peft and call save_pretrained: that writes {WEIGHTS}."
    raise UnsafeFile(f"{where / pickles[0]} is a pickle; pickles can run code and are never read.", hint)


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)
