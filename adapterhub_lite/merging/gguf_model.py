"""A merged model as one GGUF file for llama.cpp and Ollama, one tensor in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import Keys

from ..errors import AdapterMismatch, Unsupported
from ..events import Listener, Note, ignore
from ..store.fs import FileSystem
from .checkpoint import Planned
from .gguf_names import Layout, Place
from .gguf_tokenizer import add_tokenizer
from .gguf_writer import FILE_TYPES, Body, Metadata, check_kind, type_of, write_file
from .plan import MergePlan

KINDS = ("f16", "q8_0")


def write_gguf(
    plan: MergePlan,
    base_folder: Path,
    path: Path,
    kind: str = "f16",
    fs: FileSystem | None = None,
    on_event: Listener = ignore,
    *,
    name: str = "",
) -> None:
    """Write the merged model of a plan as a GGUF file, whole or not at all.

    Matrices are rounded once, from the float32 of the plan, to float16 or to Q8_0 (blocks of 32 values that share a
    float16 scale; rows that are no whole blocks are float16). Vectors, norms and positions are float32.

    Args:
        base_folder: holds the tokenizer.
        path: of the file; its folder must exist.
        kind: f16 or q8_0.
        name: general.name of the file; its stem where it is empty.

    Raises:
        Unsupported: an architecture or a tokenizer that llama.cpp does not compute in the same way, or no tokenizer,
            or a value beyond float16.
        AdapterMismatch: tensors that llama.cpp has no place for, or that are missing.
        StoreError: the file exists or could not be written.
    """
    metadata, bodies = _planned(plan, base_folder, kind, name or path.stem, on_event)
    write_file(fs or FileSystem(), path, metadata, bodies, on_event)


def check_gguf(plan: MergePlan, base_folder: Path, kind: str = "f16") -> None:
    """Raise what `write_gguf` would, but for what the values are and the disk does."""
    _planned(plan, base_folder, kind, "model", ignore)


def _planned(
    plan: MergePlan, base_folder: Path, kind: str, name: str, on_event: Listener
) -> tuple[Metadata, list[Body]]:
    check_kind(kind, KINDS)
    layout = Layout.of(plan.config)
    bodies = _bodies(plan, layout, kind)
    metadata = Metadata()
    _describe(metadata, layout, name, kind, bodies)
    window = _window(layout.config)
    if window:
        text = f"The model attends to the last {window} tokens, and llama.cpp to all: longer texts give other logits."
        on_event(Note(text, "warning"))
    add_tokenizer(metadata, base_folder, layout.config, on_event)
    return metadata, bodies


def _bodies(plan: MergePlan, layout: Layout, kind: str) -> list[Body]:
    """All tensors of the file, in the plan's order."""
    if layout.tied and "lm_head.weight" in plan.changed:
        raise AdapterMismatch(
            "The output layer was changed, and this model's is its embedding matrix.", "Untie it, or write safetensors."
        )
    bodies: dict[str, Body] = {}
    factors = _rope_factors(layout)
    if factors is not None:
        bodies["rope_freqs.weight"] = _body(Place("rope_freqs.weight", tuple(factors.shape)), factors.clone, kind)
    for planned in (planned for tensors in plan.shards.values() for planned in tensors):
        place = layout.place(planned.name)
        if place is None:
            continue
        _check(planned, place, bodies)
        bodies[place.name] = _body(place, planned.make, kind)
    missing = sorted(set(layout.required) - set(bodies))
    if missing:
        raise AdapterMismatch(
            f"llama.cpp needs {len(missing)} tensors that the checkpoint lacks ({missing[0]}).",
            "Is config.json the one of these weights?",
        )
    return list(bodies.values())


def _body(place: Place, make: Any, kind: str) -> Body:
    of = type_of(place.name, place.shape, kind)
    return Body(place.name, of, place.shape, make, place.transposed, place.order)


def _check(planned: Planned, place: Place, bodies: dict[str, Body]) -> None:
    if not planned.dtype.is_floating_point:
        raise Unsupported(f"{planned.name} is {planned.dtype}, which no GGUF file is made of.", "Merge into floats.")
    shape = tuple(reversed(planned.shape)) if place.transposed else planned.shape
    if shape != place.shape:
        raise AdapterMismatch(
            f"{planned.name} is {planned.shape}, and its place in the file is {place.shape}.",
            "Is config.json the one of these weights?",
        )
    if place.name in bodies:
        raise AdapterMismatch(f"Two tensors are {place.name}, the second {planned.name}.", "Write safetensors.")


def _describe(metadata: Metadata, layout: Layout, name: str, kind: str, bodies: Sequence[Body]) -> None:
    """What llama.cpp must know of a model besides its tokenizer."""
    general, config = Keys.General, layout.config
    metadata.text(general.ARCHITECTURE, layout.arch)
    metadata.text(general.TYPE, gguf.GGUFType.MODEL)
    metadata.text(general.NAME, name)
    count = sum(math.prod(body.shape) for body in bodies)
    metadata.text(general.SIZE_LABEL, gguf.size_label(count, count, 0, 0))
    metadata.integer(general.FILE_TYPE, FILE_TYPES[kind])
    metadata.integer(general.QUANTIZATION_VERSION, gguf.GGML_QUANT_VERSION)
    gpt2 = layout.arch == "gpt2"
    numbers = {
        Keys.LLM.VOCAB_SIZE: config.vocab_size,
        Keys.LLM.CONTEXT_LENGTH: config.n_positions if gpt2 else config.max_position_embeddings,
        Keys.LLM.EMBEDDING_LENGTH: config.hidden_size,
        Keys.LLM.BLOCK_COUNT: config.num_hidden_layers,
        Keys.LLM.FEED_FORWARD_LENGTH: config.n_inner or 4 * config.n_embd if gpt2 else config.intermediate_size,
        Keys.Attention.HEAD_COUNT: config.num_attention_heads,
        Keys.Attention.HEAD_COUNT_KV: config.num_attention_heads if gpt2 else config.num_key_value_heads,
    }
    for key, value in numbers.items():
        metadata.integer(key.format(arch=layout.arch), int(value))
    if gpt2:
        metadata.real(Keys.Attention.LAYERNORM_EPS.format(arch=layout.arch), config.layer_norm_epsilon)
        return
    metadata.real(Keys.Attention.LAYERNORM_RMS_EPS.format(arch=layout.arch), config.rms_norm_eps)
    metadata.integer(Keys.Attention.KEY_LENGTH.format(arch=layout.arch), layout.head_dim)
    metadata.integer(Keys.Attention.VALUE_LENGTH.format(arch=layout.arch), layout.head_dim)
    if layout.arch == "llama":
        metadata.integer(Keys.Rope.DIMENSION_COUNT.format(arch=layout.arch), layout.head_dim)
    _describe_rope(metadata, layout)


def _describe_rope(metadata: Metadata, layout: Layout) -> None:
    rope, keys = layout.config.rope_parameters or {}, Keys.Rope

    def real(key: str, value: Any) -> None:
        if value is not None:
            metadata.real(key.format(arch=layout.arch), float(value))

    real(keys.FREQ_BASE, rope.get("rope_theta", 10000.0))
    kind = rope.get("rope_type")
    if kind not in ("linear", "yarn"):
        return
    metadata.text(keys.SCALING_TYPE.format(arch=layout.arch), kind)
    real(keys.SCALING_FACTOR, rope["factor"])
    if kind == "yarn":
        original = int(rope["original_max_position_embeddings"])
        metadata.integer(keys.SCALING_ORIG_CTX_LEN.format(arch=layout.arch), original)
        real(keys.SCALING_YARN_BETA_FAST, rope.get("beta_fast"))
        real(keys.SCALING_YARN_BETA_SLOW, rope.get("beta_slow"))


def _rope_factors(layout: Layout) -> torch.Tensor | None:
    """What Llama 3.1's scaling divides each frequency by, [head_dim / 2]; None for other models."""
    rope = getattr(layout.config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](layout.config, torch.device("cpu"))
    steps = torch.arange(0, layout.head_dim, 2, dtype=torch.float64) / layout.head_dim
    factors: torch.Tensor = float(rope["rope_theta"]) ** -steps / scaled.double()
    return factors.float()


def _window(config: Any) -> int:
    """Tokens that a sliding window of attention spans; 0 where there is none that binds."""
    if not getattr(config, "use_sliding_window", True):
        return 0
    window = getattr(config, "sliding_window", None) or 0
    return int(window) if window < getattr(config, "max_position_embeddings", 0) else 0
