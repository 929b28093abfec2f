"""Model inputs for a batch whose rows have prefixes or virtual tokens of different lengths, or none.

Physical layout of the keys of one row: [prefix slots, left-padded][prompt, padded][generated]. Masked slots take no
part in attention, and position ids count each row's own tokens, so a row sees what it would see alone. The virtual
tokens of an encoder come right before the text: its first position is the row's first token, of whichever kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import CapacityError, Unsupported


@dataclass(frozen=True)
class PromptRows:
    """Virtual tokens of a batch, for an encoder.

    Attributes:
        embeddings: [tokens, hidden] for each row, or None.
        embed: the base's embedding of token ids.
    """

    embeddings: tuple[torch.Tensor | None, ...]
    embed: nn.Module

    def before(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [rows, longest, hidden] of virtual tokens and texts padded on the right, and their mask."""
        texts, lengths = self.embed(ids), mask.sum(1).tolist()
        rows = [
            text[:n] if virtual is None else torch.cat([virtual.to(text), text[:n]])
            for virtual, text, n in zip(self.embeddings, texts, lengths, strict=True)
        ]
        widths = torch.tensor([len(row) for row in rows], device=mask.device)
        columns = torch.arange(int(widths.max()), device=mask.device)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), (columns[None] < widths[:, None]).to(mask)


@dataclass(frozen=True)
class PrefixRows:
    """What stands before the texts of a batch.

    Attributes:
        keys, values: [layers, rows, heads, tokens, head_dim], left-padded to the longest; 0 tokens without prefixes.
        mask: [rows, tokens], 1 where a prefix token is, 0 where padding is.
        prompts: virtual tokens, or None.
    """

    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor
    prompts: PromptRows | None = None

    @property
    def lengths(self) -> torch.Tensor:
        """Prefix tokens of each row [rows]."""
        return self.mask.sum(1)

    @property
    def uniform(self) -> bool:
        """Whether every row's prefix has the same length."""
        return bool((self.mask == self.mask[:1]).all())


def pad_rows(rows: list[list[int]], pad_id: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists -> input_ids and attention mask, both [rows, longest] int64."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = 1
    return ids, mask


def new_cache(prefix: PrefixRows | None, *, encoder_decoder: bool) -> Any:
    """A key-value cache that holds the prefixes (empty without)."""
    from transformers import DynamicCache, EncoderDecoderCache

    cache = DynamicCache()
    if prefix is not None:
        for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            cache.update(keys, values, layer)
    return EncoderDecoderCache(cache, DynamicCache()) if encoder_decoder else cache


def causal_inputs(
    ids: torch.Tensor, mask: torch.Tensor, prefix: PrefixRows | None, *, use_cache: bool
) -> dict[str, Any]:
    """Arguments of a causal model's forward for `ids`, `mask` [rows, tokens]."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": use_cache}
    if prefix is not None:
        positions = positions + prefix.lengths[:, None]
        arguments["attention_mask"] = torch.cat([prefix.mask, mask], 1)
    if prefix is not None or use_cache:
        arguments["past_key_values"] = new_cache(prefix, encoder_decoder=False)
    return {**arguments, "position_ids": positions}


def encoder_inputs(ids: torch.Tensor, mask: torch.Tensor, prefix: PrefixRows | None, config: Any) -> dict[str, Any]:
    """Arguments of an encoder's forward; with a prefix the positions of each row start after its own prefix."""
    offset = _position_offset(config)
    arguments, mask = _texts(ids, mask, prefix)
    arguments["attention_mask"] = mask
    if prefix is None:
        # RoBERTa would count by token ids, and number a text that holds the padding token unlike in a mixed batch.
        return arguments if offset is None else {**arguments, "position_ids": mask.cumsum(1) * mask + offset}
    if offset is None:
        positions = (prefix.lengths[:, None] + torch.arange(mask.shape[1], device=ids.device)[None, :]) * mask
    else:  # RoBERTa counts real tokens from padding_idx + 1 and gives pads padding_idx
        positions = (mask.cumsum(1) + prefix.lengths[:, None]) * mask + offset
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and int(positions.max()) >= limit:
        raise CapacityError(
            f"Text and virtual tokens need {int(positions.max()) + 1} positions, this base has {limit}.",
            "Shorten the text.",
        )
    arguments["position_ids"] = positions
    if prefix.mask.shape[1]:
        arguments["attention_mask"] = torch.cat([prefix.mask, mask], 1)
        arguments["past_key_values"] = new_cache(prefix, encoder_decoder=False)
    return arguments


def seq2seq_inputs(
    ids: torch.Tensor, mask: torch.Tensor, decoder_ids: torch.Tensor, prefix: PrefixRows | None, *, use_cache: bool
) -> dict[str, Any]:
    """Arguments of an encoder-decoder's forward; as in PEFT a prefix goes before the decoder's tokens, virtual tokens
    before the encoder's.

    Raises:
        Unsupported: rows with prefixes of different lengths (run them as separate batches).
    """
    arguments, mask = _texts(ids, mask, prefix)
    arguments |= {"attention_mask": mask, "decoder_input_ids": decoder_ids, "use_cache": use_cache}
    if prefix is not None and not prefix.uniform:
        raise Unsupported(
            "Encoder-decoder rows with prefixes of different lengths cannot share a batch.", "Split them."
        )
    if prefix is not None or use_cache:
        arguments["past_key_values"] = new_cache(prefix, encoder_decoder=True)
    return arguments


def _texts(ids: torch.Tensor, mask: torch.Tensor, prefix: PrefixRows | None) -> tuple[dict[str, Any], torch.Tensor]:
    """Texts as ids, or as embeddings where virtual tokens come before some of them; and their mask."""
    if prefix is None or prefix.prompts is None:
        return {"input_ids": ids}, mask
    embeddings, mask = prefix.prompts.before(ids, mask)
    return {"inputs_embeds": embeddings}, mask


def _position_offset(config: Any) -> int | None:
    """padding_idx of models that number positions as RoBERTa does, else None."""
    families = (
        "roberta",
        "xlm-roberta",
        "camembert",
        "xlm-roberta-xl",
        "data2vec-text",
        "roberta-prelayernorm",
        "xmod",
    )
    return int(config.pad_token_id) if config.model_type in families else None
