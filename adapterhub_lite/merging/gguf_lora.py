"""LoRA adapters as GGUF files, for llama.cpp's --lora.

llama.cpp adds alpha / rank * B A to a weight, with one alpha a file and the rank of each pair of matrices. Scales are
therefore folded into B, and alpha is the largest rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import Keys

from ..errors import AdapterMismatch, FormatError, Unsupported
from ..events import Listener, ignore
from ..store.fs import FileSystem
from .gguf_names import Layout, Place
from .gguf_writer import Body, Metadata, check_kind, type_of, write_file

KINDS = ("f32", "f16", "q8_0")
_EMBEDDING = "token_embd.weight"


def write_gguf_lora(
    changes: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    config: Mapping[str, Any],
    path: Path,
    kind: str = "f16",
    fs: FileSystem | None = None,
    on_event: Listener = ignore,
    *,
    name: str = "",
) -> None:
    """Write an adapter as a GGUF file, whole or not at all.

    Args:
        changes: module name -> (down [r, in], up [out, r]) whose product up @ down is added to the weight [out, in],
            scale included; an embedding's is [width, tokens], as PEFT has it.
        config: the content of the base's config.json.
        path: of the file; its folder must exist.
        kind: f32, f16 or q8_0 (rows that are no whole blocks of 32 are f16, as those of B are for most ranks).

    Raises:
        Unsupported: an architecture that is not written, a change of a tied embedding or output layer.
        AdapterMismatch: modules that the base does not have, or of another shape.
        FormatError: no change at all, or a value is not finite.
        StoreError: the file exists or could not be written.
    """
    check_kind(kind, KINDS)
    layout = Layout.of(config)
    if not changes:
        raise FormatError("The adapter changes no matrix.", "There is nothing to write.")
    alpha = max(down.shape[0] for down, _ in changes.values())
    bodies = [
        body
        for module, (down, up) in changes.items()
        for body in _pair(_place(layout, module), module, down, up, alpha, kind)
    ]
    metadata = Metadata()
    metadata.text(Keys.General.ARCHITECTURE, layout.arch)
    metadata.text(Keys.General.TYPE, gguf.GGUFType.ADAPTER)
    metadata.text(Keys.Adapter.TYPE, "lora")
    metadata.text(Keys.General.NAME, name or path.stem)
    metadata.real(Keys.Adapter.LORA_ALPHA, float(alpha))
    metadata.integer(Keys.General.QUANTIZATION_VERSION, gguf.GGML_QUANT_VERSION)
    write_file(fs or FileSystem(), path, metadata, bodies, on_event)


def _place(layout: Layout, module: str) -> Place:
    """Where the weight of a module is in the base's file."""
    place = layout.place(f"{module}.weight")
    if place is None or (place.name == _EMBEDDING and layout.tied):
        # llama.cpp looks changes up by a tensor's name, and the two layers have one name.
        raise Unsupported(
            f"{module} is both the embedding and the output layer of this base, and llama.cpp cannot change one alone.",
            "Merge the adapter instead.",
        )
    if len(place.shape) != 2 or place.name == "position_embd.weight":
        raise Unsupported(f"llama.cpp adds no LoRA to {module}.", "Merge the adapter instead.")
    return place


def _pair(place: Place, module: str, down: torch.Tensor, up: torch.Tensor, alpha: int, kind: str) -> tuple[Body, Body]:
    rank = down.shape[0]
    if down.dim() != 2 or up.dim() != 2 or up.shape[1] != rank or not rank:
        raise AdapterMismatch(
            f"{module} has matrices {tuple(down.shape)} and {tuple(up.shape)}, which are no LoRA pair.",
            "The first is [rank, in], the second [out, rank].",
        )
    embedding = place.name == _EMBEDDING
    found, expected = (up.shape[0], down.shape[1]), place.shape[::-1] if embedding else place.shape
    if found != expected:
        raise AdapterMismatch(
            f"The change of {module} is {found}, and the base's weight is {expected}.", "It was made for another model."
        )
    down = down.T if embedding else down  # llama.cpp looks A up by token
    low, high = _exponents(down, up) if kind != "f32" else (0, 0)
    scale = rank / alpha * 2.0**high
    make_down, make_up = partial(_scaled, down, 2.0**low), partial(_scaled, up, scale)
    names = f"{place.name}.lora_a", f"{place.name}.lora_b"
    return (
        Body(names[0], type_of(names[0], down.shape, kind), tuple(down.shape), make_down),
        Body(names[1], type_of(names[1], up.shape, kind), tuple(up.shape), make_up, order=place.order),
    )


def _exponents(down: torch.Tensor, up: torch.Tensor) -> tuple[int, int]:
    """Powers of two, of product 1, by which the two matrices get values of one size: float16 keeps few digits of B's
    small ones.
    """
    sizes = [float(matrix.abs().max()) for matrix in (down, up)]
    if not all(math.isfinite(size) and size > 0 for size in sizes):
        return 0, 0
    half = round(math.log2(sizes[0] / sizes[1]) / 2)
    return -half, half


def _scaled(matrix: torch.Tensor, factor: float) -> torch.Tensor:
    return matrix.to(torch.float32) * factor
