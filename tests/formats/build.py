"""Adapters as bytes, without torch: what the tests of formats and store start from."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

BASE = "base_model.model."
Tensor = tuple[str, list[int], bytes]


def f32(*shape: int, seed: int = 0, value: float | None = None) -> Tensor:
    """A float32 tensor of small random values, or of one value."""
    count = 1
    for dimension in shape:
        count *= dimension
    rng = random.Random(seed)
    values = [rng.uniform(-1, 1) if value is None else value for _ in range(count)]
    return "F32", list(shape), struct.pack(f"<{count}f", *values)


def safetensors(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A valid safetensors file."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return raw_safetensors(json.dumps(header), body)


def raw_safetensors(header: str | bytes, body: bytes = b"") -> bytes:
    """Length, header and body as they are, valid or not."""
    head = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(head)) + head + body


def lora_tensors(
    rank: int = 2, width: int = 4, layers: int = 2, seed: int = 0, b: float | None = None
) -> dict[str, Tensor]:
    """q_proj of each layer; `b` fixes every value of B."""
    tensors = {}
    for layer in range(layers):
        stem = f"{BASE}model.layers.{layer}.self_attn.q_proj"
        tensors[f"{stem}.lora_A.weight"] = f32(rank, width, seed=seed * 100 + 2 * layer)
        tensors[f"{stem}.lora_B.weight"] = f32(width, rank, seed=seed * 100 + 2 * layer + 1, value=b)
    return tensors


def lora_config(**changes: Any) -> bytes:
    """A small adapter_config.json for `lora_tensors`."""
    raw = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "tiny",
    }
    return json.dumps({**raw, **changes}).encode()


def lora_files(seed: int = 0, **changes: Any) -> dict[str, bytes]:
    """The two files of a valid adapter."""
    return {
        "adapter_config.json": lora_config(**changes),
        "adapter_model.safetensors": safetensors(lora_tensors(seed=seed), {"format": "pt"}),
    }
