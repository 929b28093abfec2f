"""A stored version with a task, its data and its base's fingerprint, made without training."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from adapterhub_lite.formats.card import Card
from adapterhub_lite.names import Ref
from adapterhub_lite.store import Store
from tests import peers

INSTRUCT = {
    "type": "instruct",
    "prompt": "question",
    "completion": "reply",
    "max_new_tokens": 4,
    "max_length": 64,
    "metrics": ["exact_match"],
}
CLASSIFY = {"type": "classify", "text": "text", "label": "label", "labels": ["a", "b", "c"], "max_length": 64}
TAG = {"type": "tag", "tokens": "tokens", "tags": "tags", "labels": ["O", "B-X", "I-X"], "max_length": 64}


def rows_of(task: dict[str, Any], count: int, offset: int = 0) -> list[dict[str, Any]]:
    """Rows that a task reads."""
    numbers = range(offset, offset + count)
    if task["type"] == "classify":
        return [{"text": f"a text of number {i}", "label": "abc"[i % 3]} for i in numbers]
    if task["type"] == "tag":
        return [{"tokens": ["word", str(i), "end"], "tags": ["O", "B-X", "O"]} for i in numbers]
    return [{"question": f"say {i} please", "reply": f"{i}!"} for i in numbers]


def peft_folder(folder: Path, base: Path, family: str, kind: str = "lora", task: str | None = None, **changes: Any):
    """A random adapter of PEFT's in `folder`, and the PEFT model."""
    task = task or peers.task_type(family)
    seed = changes.pop("seed", 1)
    model = peers.wrap(peers.plain(base, task), peers.config(family, kind, task, **changes), seed)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def stored(
    store: Store,
    name: str,
    peft: Path,
    base: Any,
    task: dict[str, Any] | None,
    data: Path,
    rows: int = 6,
    test: list[dict[str, Any]] | None = None,
) -> Ref:
    """Store a PEFT folder as a version whose card says what one that was trained here says."""
    parts: dict[str, Any] = {}
    recipe: dict[str, Any] | None = None
    if task is not None:
        data.mkdir(parents=True, exist_ok=True)
        for part, offset in (("train", 0), ("test", 1000)):
            path = data / f"{name}-{part}.jsonl"
            given = test if part == "test" and test is not None else rows_of(task, rows, offset)
            text = "".join(json.dumps(row) + "\n" for row in given)
            path.write_text(text)
            digest = hashlib.sha256(text.encode()).hexdigest()
            parts[part] = {"source": path.name, "path": str(path), "sha256": digest, "rows": len(given)}
        recipe = {"name": name, "data": {part: told["path"] for part, told in parts.items()}}
    card = Card(
        base={
            "name": str(base.source.folder),
            "fingerprint": base.fingerprint.to_dict(),
            "quantization": base.quantization,
            "dtype": "float32",
        },
        task=task or {},
        recipe=recipe,
        data=parts,
        origin={"kind": "trained"},
    )
    files = {file: (peft / file).read_bytes() for file in ("adapter_config.json", "adapter_model.safetensors")}
    return store.put(name, files, card)
