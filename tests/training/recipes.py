"""Tiny recipes on tiny data, as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapterhub_lite.bases.load import Base
from adapterhub_lite.recipe import Recipe, load_recipe

WORDS = ["red", "green", "blue", "north", "south", "one", "two", "three", "up", "down"]


def write(
    folder: Path, base: Base, adapter: dict[str, Any], training: dict[str, Any] | None = None, rows: int = 12
) -> Path:
    """A recipe on `base`: classify on an encoder, else instruct."""
    classify = base.kind == "encoder"
    for part, start in (("train", 0), ("validation", 100), ("test", 200)):
        made = [_row(start + i, classify) for i in range(rows if part == "train" else 5)]
        (folder / f"{part}.jsonl").write_text("\n".join(json.dumps(r) for r in made))
    task = {"type": "classify"} if classify else {"type": "instruct", "max_new_tokens": 4}
    recipe = {
        "name": "tiny",
        "base": str(base.source.folder),
        "quantize": base.quantization,
        "task": task,
        "data": {p: f"{p}.jsonl" for p in ("train", "validation", "test")},
        "adapter": adapter,
        "training": {"epochs": 1, "batch_size": 4, "learning_rate": 0.05, "max_length": 96, **(training or {})},
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(recipe))
    return path


def load(folder: Path, base: Base, adapter: dict[str, Any], training: dict[str, Any] | None = None) -> Recipe:
    """The same, read."""
    return load_recipe(write(folder, base, adapter, training))


def _row(i: int, classify: bool) -> dict[str, Any]:
    words = [WORDS[(i * k + k) % len(WORDS)] for k in range(1, 3 + i % 3)]
    if classify:
        return {"text": " ".join(words), "label": ("even", "odd", "third")[i % 3]}
    return {"prompt": " ".join(words), "completion": words[0]}
