"""Prefix adapters: trained keys and values before the first token of every layer (arXiv 2101.00190)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import AdapterMismatch, Unsupported
from ..formats.peft_config import PrefixSpec


@dataclass(frozen=True)
class PrefixShape:
    """What a prefix must look like for a model: layers, key-value heads and their width."""

    layers: int
    heads: int
    head_dim: int
    submodules: int = 1

    @property
    def width(self) -> int:
        """Columns of `prompt_embeddings`: keys and values of all layers."""
        return self.layers * 2 * self.heads * self.head_dim


@dataclass(frozen=True)
class FittedPrefix:
    """keys and values [layers, heads, tokens, head_dim], in the dtype they compute in."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def tokens(self) -> int:
        """Number of virtual tokens."""
        return int(self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def to(self, device: torch.device, dtype: torch.dtype) -> FittedPrefix:
        """A copy on `device` in `dtype`."""
        return FittedPrefix(self.keys.to(device, dtype), self.values.to(device, dtype))


def prefix_shape(config: Any) -> PrefixShape:
    """The prefix shape of a transformers configuration (the decoder's, for encoder-decoder models).

    Raises:
        Unsupported: the layers differ in key-value shape, or the model keeps no key-value cache.
    """
    submodules = 2 if getattr(config, "is_encoder_decoder", False) else 1
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    heads = config.num_attention_heads
    layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"}:
        raise Unsupported(f"This base mixes attention kinds ({', '.join(sorted(kinds))}).", "Use a LoRA adapter.")
    return PrefixShape(layers, getattr(config, "num_key_value_heads", None) or heads, head_dim, submodules)


def layer_rows(shape: PrefixShape, submodules: int) -> tuple[list[int], list[int]]:
    """Which of the 2 * layers rows of a prefix are each layer's keys and values.

    With one submodule they alternate. For encoder-decoder models (two submodules) PEFT repeats the rows and deals four
    to each layer, of which the decoder's self-attention uses the first two; we follow it, so that files mean the same.
    """
    rows = 2 * shape.layers
    step = 2 * submodules
    return [step * i % rows for i in range(shape.layers)], [(step * i + 1) % rows for i in range(shape.layers)]


def fit_prefix(spec: PrefixSpec, embeddings: torch.Tensor, shape: PrefixShape) -> FittedPrefix:
    """Cut `prompt_embeddings` [tokens, 2 * layers * heads * head_dim] into keys and values, as PEFT lays them out.

    Differentiable: training uses it too.

    Raises:
        AdapterMismatch: the shape is not what this base needs.
    """
    tokens = spec.num_virtual_tokens
    if tuple(embeddings.shape) != (tokens, shape.width):
        raise AdapterMismatch(
            f"The prefix has shape {list(embeddings.shape)}, this base needs [{tokens}, {shape.width}] "
            f"({shape.layers} layers x 2 x {shape.heads} heads x {shape.head_dim}).",
            "It was made for another model.",
        )
    said = (spec.num_layers, spec.num_attention_heads, spec.token_dim, spec.num_transformer_submodules)
    needed = (shape.layers, shape.heads, shape.heads * shape.head_dim, shape.submodules)
    if said != needed:
        raise AdapterMismatch(
            f"The prefix's configuration says (layers, heads, width, submodules) {said}, this base has {needed}.",
            "It was made for another model.",
        )
    cut = embeddings.view(tokens, 2 * shape.layers, shape.heads, shape.head_dim).permute(1, 2, 0, 3)
    keys, values = layer_rows(shape, spec.num_transformer_submodules)
    return FittedPrefix(cut[keys].contiguous(), cut[values].contiguous())


def join_prefix(prefix: FittedPrefix, submodules: int = 1) -> torch.Tensor:
    """The inverse of `fit_prefix` -> `prompt_embeddings`; rows that no layer uses are zero."""
    layers, heads, tokens, head_dim = prefix.keys.shape
    both = prefix.keys.new_zeros((2 * layers, heads, tokens, head_dim))
    keys, values = layer_rows(PrefixShape(layers, heads, head_dim), submodules)
    both[keys], both[values] = prefix.keys, prefix.values
    return both.permute(2, 0, 1, 3).reshape(tokens, -1).contiguous()
