"""Decoders that are built as Llama is, and what of their configuration decides how they can be computed."""

from __future__ import annotations

from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def rope_follows_length(config: Any) -> bool:
    """Whether the angles of all rows change with the longest one, as they must not in a batch of strangers."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope")


def windows(model: Any) -> list[int | None]:
    """For each layer how many tokens, itself among them, a token sees; None: all before it."""
    everywhere = getattr(model.config, "sliding_window", None) if model.config.model_type == "mistral" else None
    return [getattr(layer.self_attn, "sliding_window", everywhere) for layer in model.model.layers]
