"""Stores, folders and files to measure with. Every store is written by `Store.put` itself, through its public API."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import Store
from adapterhub_lite.store.fs import FileSystem

from .rows import chosen

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_BASE = "smollm2-135m-instruct"
_RANK, _WIDTH = 16, 2048
_MODULE_BYTES = 2 * _RANK * _WIDTH * 4
_IN_PROCESS = 2_000  # fewer are made sooner than other processes begin
_CHUNK = 1_000


class Unsynced(FileSystem):
    """Does not wait for the disk: for making large stores, never for what is measured as durable."""

    def fsync(self, fd: int) -> None:
        """Nothing."""

    def fsync_dir(self, path: Path) -> None:
        """Nothing."""


def name_of(number: int) -> str:
    """The name of the n-th adapter."""
    return f"adapter-{number:06}"


def card_of(number: int) -> Card:
    """A card as training leaves it, but for its losses; each number has its own."""
    digest = f"{number:064x}"
    return Card(
        base={
            "name": _BASE, "revision": "main", "kind": "causal", "quantization": "nf4", "dtype": "float32",
            "fingerprint": dict.fromkeys(("digest", "config", "tokenizer", "chat_template", "weights"), digest),
        },
        task={"type": "instruct", "metrics": ["exact_match"], "max_length": 512},
        recipe={"name": name_of(number), "base": _BASE, "training": {"epochs": 3, "learning_rate": 1e-3}},
        data={split: {"source": f"{split}.jsonl", "sha256": digest, "rows": 100} for split in ("train", "test")},
        seed=number,
        libraries={"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        metrics={"test": {"exact_match": number % 1000 / 1000}},
        effect={"max_logit_change": 1.5},
        origin={"kind": "trained", "steps": 300, "tokens": 100_000, "training_seconds": 60.0},
        duration_seconds=70.0,
    )  # fmt: skip


def tiny_files() -> dict[str, bytes]:
    """The two files of a valid adapter of a few bytes."""
    return {CONFIG: _config(1), WEIGHTS: _weights(1, 1, 2, struct.pack("<4f", 0.1, 0.2, 0.3, 0.4))}


def write_random(folder: Path, size: int) -> dict[str, Path]:
    """A PEFT folder of about `size` random bytes (rank 16, float32); its two files by name."""
    modules = max(1, size // _MODULE_BYTES)
    # No byte of 0x40 or more: no float32 is NaN or infinite, and little can be compressed.
    body = os.urandom(modules * _MODULE_BYTES).translate(bytes(value & 0x3F for value in range(256)))
    folder.mkdir(parents=True)
    (folder / CONFIG).write_bytes(_config(_RANK))
    (folder / WEIGHTS).write_bytes(_weights(modules, _RANK, _WIDTH, body))
    return {CONFIG: folder / CONFIG, WEIGHTS: folder / WEIGHTS}


def fill_names(path: Path, count: int) -> float:
    """Make a store of `count` names with one version each; the seconds it took."""
    return _fill(path, count, None)


def fill_versions(path: Path, name: str, count: int) -> float:
    """Make a store of one name with `count` versions; the seconds it took."""
    return _fill(path, count, name)


def peft_folders(path: Path, count: int) -> float:
    """The same adapters as folders that runs leave behind, each with its name in its configuration; seconds."""
    begun = time.perf_counter()
    path.mkdir()
    config = json.loads(_config(1))
    weights = tiny_files()[WEIGHTS]
    for number in range(count):
        folder = path / f"run-{number:06}"
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps({**config, "name": name_of(number)}, indent=2))
        (folder / WEIGHTS).write_bytes(weights)
    return time.perf_counter() - begun


def _fill(path: Path, count: int, name: str | None) -> float:
    begun = time.perf_counter()
    chunks = [(path, first, min(first + _CHUNK, count), name) for first in range(0, count, _CHUNK)]
    if count <= _IN_PROCESS:
        for chunk in chunks:
            _put_all(*chunk)
    else:
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            for done in [pool.submit(_put_all, *chunk) for chunk in chunks]:
                done.result()
    _check_sample(path, count, name)
    return time.perf_counter() - begun


def _put_all(path: Path, first: int, last: int, name: str | None) -> None:
    store, files = Store(path, fs=Unsynced()), tiny_files()
    for number in range(first, last):
        store.put(name or name_of(number), files, card_of(number))


def _check_sample(path: Path, count: int, name: str | None) -> None:
    store = Store(path)
    have = len(store.versions(name)) if name else len(store.names())
    if have != count:
        raise RuntimeError(f"the store has {have} of {count}")
    refs = [f"{name}@{number + 1}" if name else f"{name_of(number)}@1" for number in range(count)]
    wrong = [finding for ref in chosen(refs, 20, seed=0) for finding in store.verify(ref)]
    if wrong:
        raise RuntimeError(f"the store is damaged: {wrong[0]}")


def _config(rank: int) -> bytes:
    raw: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": _BASE,
    }
    return json.dumps(raw).encode()


def _weights(modules: int, rank: int, width: int, body: bytes) -> bytes:
    """A safetensors file of A and B for each module: 8 bytes of header length, JSON header, `body`."""
    header, end = {}, 0
    for stem, shape in _tensors(modules, rank, width):
        begin, end = end, end + shape[0] * shape[1] * 4
        header[stem] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + body


def _tensors(modules: int, rank: int, width: int) -> Iterator[tuple[str, list[int]]]:
    for layer in range(modules):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        yield f"{stem}.lora_A.weight", [rank, width]
        yield f"{stem}.lora_B.weight", [width, rank]


def clear(folder: Path) -> None:
    """Remove a folder if it is there."""
    shutil.rmtree(folder, ignore_errors=True)
