"""Whether something can stand before the texts of a base: keys and values, or virtual tokens, of an adapter."""

from __future__ import annotations

from typing import Any


def hidden_front(config: Any) -> str:
    """What a causal model has that would keep a text from what stands before it, or mix that up; "" if nothing does.

    Where a longer neighbour puts padding between the two, padding takes part of an attention window.
    """
    window, limit = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", None)
    kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "attention_layers", None) or ())}
    if window and (limit is None or int(window) < int(limit)):
        return f"an attention window of {window} tokens"
    if kinds - {"full_attention", "global"}:
        return f"layers that do not attend to all tokens ({', '.join(sorted(kinds))})"
    return "" if hasattr(config, "num_attention_heads") else "no keys and values that it could be"
