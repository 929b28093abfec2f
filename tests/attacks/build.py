"""Hostile inputs, made in code: headers, configurations, folders, archives, exports that were tampered with."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterhub_lite.formats.card import Card
from adapterhub_lite.formats.peft_config import adapter_config_bytes, parse_adapter_config
from adapterhub_lite.formats.strict_json import dump
from adapterhub_lite.store import FileFact, Manifest
from adapterhub_lite.store.manifest import sha256
from tests.formats.build import BASE, Tensor, lora_config, lora_tensors, raw_safetensors, safetensors

CONFIG, WEIGHTS, CARD, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "card.json", "manifest.json"
HEADER_LIMIT = 4 << 20
STEM = f"{BASE}model.layers.0.self_attn.q_proj"
Files = dict[str, bytes]


def files(config: bytes | None = None, weights: bytes | None = None, **others: bytes) -> Files:
    """The two files of a valid adapter, or others in their place; a keyword `x_y` becomes the file `x.y`."""
    made = {
        CONFIG: lora_config() if config is None else config,
        WEIGHTS: safetensors(lora_tensors(), {"format": "pt"}) if weights is None else weights,
    }
    return {**made, **{name.replace("_", "."): data for name, data in others.items()}}


def config(**changes: Any) -> Files:
    """A valid adapter but for its configuration."""
    return files(config=lora_config(**changes))


def through_peft(tensors: Mapping[str, Tensor], method: str, **options: Any) -> Files:
    """An adapter of a method that PEFT's own layers compute; names of tensors begin after `base_model.`."""
    told = {"peft_type": method, "target_modules": ["q_proj"], **options}
    named = {f"base_model.{name}": tensor for name, tensor in tensors.items()}
    return files(config=json.dumps(told).encode(), weights=safetensors(named))


def header(text: str | bytes, body: bytes = b"") -> Files:
    """A valid configuration beside a safetensors file of this header and body."""
    return files(weights=raw_safetensors(text, body))


def one(shape: object = (1,), offsets: object = (0, 4), dtype: object = "F32", **more: object) -> dict[str, object]:
    """What a header says of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def said(**tensors: object) -> str:
    """A header that says this."""
    return json.dumps(tensors)


def repeated(start: bytes, piece: bytes, end: bytes, size: int = HEADER_LIMIT) -> bytes:
    """A header of at most `size` bytes, filled with a piece."""
    return start + piece * ((size - len(start) - len(end)) // len(piece)) + end


def nested(depth: int) -> Any:
    """An object of so many levels."""
    return {"a": nested(depth - 1)} if depth else {}


def numbered(form: str, count: int) -> bytes:
    """A JSON object of `count` entries; %d in `form` is their number."""
    return ("{" + ",".join(form.replace("%d", str(number)) for number in range(count)) + "}").encode()


def tensors(**changed: Tensor | None) -> Files:
    """A valid adapter with tensors of its first layer added, replaced or (None) left out; `A` and `B` are its own."""
    made: dict[str, Tensor] = dict(lora_tensors())
    short = {"A": f"{STEM}.lora_A.weight", "B": f"{STEM}.lora_B.weight"}
    for key, tensor in changed.items():
        name = short.get(key, key)
        made.pop(name, None)
        if tensor is not None:
            made[name] = tensor
    return files(weights=safetensors(made))


def valued(dtype: str, code: str, values: list[Any]) -> Tensor:
    """A tensor [2, 4] of these values, repeated, in a dtype that `struct` calls `code`."""
    cells = [values[index % len(values)] for index in range(8)]
    return dtype, [2, 4], struct.pack(f"<8{code}", *cells)


def pickled() -> bytes:
    """A pickle that would make a folder."""

    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, ("pwned",)

    return pickle.dumps(Harm())


def zip_of_pickle() -> bytes:
    """What torch.save writes: a zip with a pickle in it."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("archive/data.pkl", pickled())
    return sink.getvalue()


# --- archives ----------------------------------------------------------------------------------------------------


def tar(content: Mapping[str, bytes], mode: str = "w:") -> bytes:
    """A plain tar of these files."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return sink.getvalue()


def stored_zip(content: Mapping[str, bytes]) -> bytes:
    """A zip of these files, without compression."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return sink.getvalue()


# --- exports -----------------------------------------------------------------------------------------------------


def export(**told: Any) -> Files:
    """What a store exports, with the fields of its card changed and everything sealed as it should be."""
    spec = parse_adapter_config(lora_config(target_modules=["q_proj"]))
    return _exported(adapter_config_bytes(spec), told)


def export_of(foreign: bytes) -> Files:
    """What looks like an export, but for its configuration."""
    return _exported(foreign, {})


def _exported(configuration: bytes, told: Mapping[str, Any]) -> Files:
    plain = Card(created="2026-01-31T12:00:00Z", adapter={"type": "lora"}).to_bytes()
    made = files(config=configuration)
    made[CARD] = dump({**json.loads(plain), **told}, indent=2)
    return {**made, MANIFEST: Manifest({name: FileFact.of(data) for name, data in made.items()}).to_bytes()}


def with_manifest(change: Any) -> Files:
    """An export whose manifest says something else; `change` gets its content."""
    made = export(metrics={"test": {"accuracy": 1.0}})
    told = json.loads(made[MANIFEST])
    change(told)
    return {**made, MANIFEST: dump(told, indent=2)}


def move(version: object, digest: object, number: object = 1, **changes: object) -> bytes:
    """A move of the alias sql:prod, sealed as it should be."""
    told = {"alias": "prod", "digest": digest, "event": "set", "name": "sql", "number": number, "reason": {},
            "time": "2026-01-31T12:00:00Z", "version": version, **changes}  # fmt: skip
    return dump({**told, "seal": sha256(dump(told))}, indent=2)


def sparse(path: Path, start: bytes, size: int) -> None:
    """A file that claims to be large."""
    path.write_bytes(start)
    os.truncate(path, size)


def overwrite(path: Path, data: bytes) -> None:
    """Change a file that its mode protects, and no other name of it."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
