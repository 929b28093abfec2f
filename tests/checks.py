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
        for folder in (path / "aliases").glob("*"):
            _assert_aliases(path, folder)
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


def _assert_aliases(path: Path, folder: Path) -> None:
    """The moves of each alias are numbered without a gap and agree with their seals; the last names what is there."""
    moves: dict[str, dict[int, Path]] = {}
    for entry in folder.glob("*@*"):
        alias, _, number = entry.name.partition("@")
        moves.setdefault(alias, {})[int(number)] = entry / "move.json"
    for alias, files in moves.items():
        assert sorted(files) == list(range(1, len(files) + 1)), f"{folder.name}:{alias} lost a move"
        told = [json.loads(files[number].read_bytes()) for number in sorted(files)]
        for move in told:
            seal = move.pop("seal")
            plain = json.dumps(move, ensure_ascii=False, sort_keys=True, separators=(",", ":")) + "\n"
            assert seal == hashlib.sha256(plain.encode()).hexdigest(), f"{folder.name}:{alias}"
        moved = [move for move in told if move["event"] != "refuse"]
        if moved and moved[-1]["version"] is not None:
            version = path / "adapters" / folder.name / str(moved[-1]["version"])
            removed = version.with_name(version.name + ".removed")
            assert version.is_dir(), f"{folder.name}:{alias} names a version that is not there"
            assert not removed.exists(), f"{folder.name}:{alias} names a version that was removed"
            identity = json.loads((version / "manifest.json").read_bytes())
            plain = json.dumps({"files": identity["files"], "format": 1}, sort_keys=True, indent=2) + "\n"
            assert moved[-1]["digest"] == hashlib.sha256(plain.encode()).hexdigest(), f"{folder.name}:{alias}"
