"""One checker per promise, used by every test that can break it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from adapterhub_lite.store import Store

VERSION_FILES = {"adapter_config.json", "adapter_model.safetensors", "card.json"}


def assert_store_sound(path: Path) -> None:
    """Every version is whole, every alias names one, every object is its digest: judged here from the bytes, without
    the store's own reader, and then by the store's `verify`, which must agree.
    """
    if path.exists():
        for folder in (path / "adapters").glob("*/*"):
            if folder.name.isdigit() and not folder.with_name(folder.name + ".removed").exists():
                _assert_version(folder)
        for alias in (path / "aliases").glob("*/*.json"):
            _assert_alias(path, alias)
        for blob in (path / "objects").glob("*/*"):
            digest = hashlib.sha256(blob.read_bytes()).hexdigest()
            assert (blob.name, blob.parent.name) == (digest, digest[:2]), f"{blob} holds {digest}"
    assert Store(path).verify() == []


def _assert_version(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert {item.name for item in folder.iterdir()} == VERSION_FILES | {"manifest.json"}, folder
    assert set(manifest["files"]) == VERSION_FILES, folder
    for name, fact in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert fact == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}, folder / name


def _assert_alias(path: Path, file: Path) -> None:
    version = json.loads(file.read_bytes())["version"]
    folder = path / "adapters" / file.parent.name / str(version)
    removed = folder.with_name(f"{version}.removed")
    assert version is None or (folder.is_dir() and not removed.exists()), f"{file} names a version that is not there"
