"""Prompt adapters: trained embeddings before the first token's (prompt tuning, arXiv 2104.08691; P-tuning, 2103.10385).

A causal base reads them before any text and alone, so there they become keys and values, like a prefix. Where the
tokens of a text are seen from the front too (encoders), they stay embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import AdapterMismatch
from ..formats.specs import PromptSpec


@dataclass(frozen=True)
class FittedPrompt:
    """Embeddings [tokens, hidden] in the dtype they compute in, and the base's own embedding of token ids."""

    embeddings: torch.Tensor
    embed: nn.Module

    @property
    def tokens(self) -> int:
        """Number of virtual tokens."""
        return int(self.embeddings.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the embeddings."""
        return self.embeddings.nbytes

    def to(self, device: torch.device, dtype: torch.dtype) -> FittedPrompt:
        """A copy on `device` in `dtype`."""
        return FittedPrompt(self.embeddings.to(device, dtype), self.embed)


def fit_prompt(spec: PromptSpec, embeddings: torch.Tensor, hidden: int, submodules: int) -> torch.Tensor:
    """Check `prompt_embeddings` [tokens * submodules, hidden] -> what stands before a text [tokens, hidden].

    For encoder-decoders PEFT trains a second half for the decoder and never uses it; we follow it.

    Args:
        hidden: width of the base's embeddings.
        submodules: 2 for an encoder-decoder, else 1.

    Raises:
        AdapterMismatch: the shape is not what this base needs.
    """
    hint = "It was made for another model."
    if tuple(embeddings.shape) != spec.shape:
        message = f"The prompt has shape {list(embeddings.shape)}, its configuration says {list(spec.shape)}."
        raise AdapterMismatch(message, "Export it again with PEFT's save_pretrained.")
    if spec.token_dim != hidden:
        raise AdapterMismatch(f"The prompt's tokens have width {spec.token_dim}, this base's {hidden}.", hint)
    if spec.num_transformer_submodules > submodules:
        raise AdapterMismatch("The prompt is for an encoder-decoder, which this base is not.", hint)
    return embeddings[: spec.num_virtual_tokens]
