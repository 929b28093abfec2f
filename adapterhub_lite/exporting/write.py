"""Files for a reader, read back before they appear."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import Adapter, read_adapter
from ..errors import AdapterMismatch
from ..events import Listener, ignore
from ..formats.specs import LoraSpec
from ..merging.gguf_lora import write_gguf_lora
from ..merging.gguf_names import Layout
from ..store.fs import MUTABLE, FileSystem, write_file
from .pairs import Pair, pairs_of

GGUF = "adapter.gguf"
MODELFILE = "Modelfile"
REPORT = "export_report.json"
_KIND = "f32"  # an adapter is small beside its base: nothing of it is rounded


def write_peft(fs: FileSystem, folder: Path, adapter: Adapter) -> Mapping[str, Pair]:
    """PEFT's two files; returns the changes as they are read back, none for methods that are not LoRA.

    Raises:
        AdapterMismatch: the files are not what was to be written.
    """
    for file, data in adapter.files().items():
        write_file(fs, folder / file, data, MUTABLE)
    back = read_adapter(folder, name=adapter.name)
    same = set(back.tensors) == set(adapter.tensors)
    if not same or not all(torch.equal(tensor, adapter.tensors[key]) for key, tensor in back.tensors.items()):
        raise AdapterMismatch(f"{adapter.name} does not read back as it was written.", "Try another disk.")
    plain = isinstance(back.spec, LoraSpec) and not back.spec.use_dora
    return pairs_of(back, None, None).modules if plain else {}


def write_gguf(
    fs: FileSystem, folder: Path, adapter: Adapter, config: Mapping[str, Any], on_event: Listener = ignore
) -> Mapping[str, Pair]:
    """`adapter.gguf`; returns the changes as they are read back.

    Raises:
        Unsupported, AdapterMismatch: what llama.cpp has no place for.
    """
    pairs = pairs_of(adapter, None, None).modules
    changes = {name: (pair.down.float(), (pair.up.double() * pair.scale).float()) for name, pair in pairs.items()}
    write_gguf_lora(changes, config, folder / GGUF, _KIND, fs, on_event, name=adapter.name)
    return read_gguf(folder / GGUF, config, pairs)


def read_gguf(path: Path, config: Mapping[str, Any], pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """The changes of these modules in a GGUF file, as llama.cpp scales them, by the model's names and order of rows."""
    import gguf

    reader, layout = gguf.GGUFReader(path), Layout.of(config)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    found = {}
    for module, pair in pairs.items():
        place = layout.place(f"{module}.weight")
        assert place is not None
        down, up = tensors[f"{place.name}.lora_a"], tensors[f"{place.name}.lora_b"]
        down = down.T if pair.embedding else down
        if place.order is not None:
            rows = torch.empty_like(up)
            rows[place.order] = up
            up = rows
        found[module] = Pair(down, up, alpha / up.shape[1], pair.embedding)
    return found


def modelfile(base_name: str) -> bytes:
    """Ollama's recipe: the base, and the adapter beside it."""
    return f"FROM {base_name}\nADAPTER ./{GGUF}\n".encode()


def write_report(fs: FileSystem, folder: Path, report: Mapping[str, Any]) -> None:
    """export_report.json beside the reader's own files, which does not look at it."""
    data = json.dumps(report, indent=2, sort_keys=True) + "\n"
    write_file(fs, folder / REPORT, data.encode(), MUTABLE)
