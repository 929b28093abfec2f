"""What is minimised: the sum of cross-entropies over the supervised tokens or labels of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ..bases.inputs import causal_inputs, encoder_inputs, pad_rows, seq2seq_inputs
from ..bases.load import Base
from ..tasks.task import IGNORED, Example
from .losses import frozen_head_cross_entropy
from .trainable import Trainable

# A shorter common beginning costs more in a second pass through the layers than it saves.
_LEAST_SHARED = 8


@dataclass(frozen=True)
class BatchLoss:
    """Sum of losses over `count` supervised items; `tokens` real tokens went through the base; `hits` right labels,
    where there are classes."""

    total: torch.Tensor
    count: int
    tokens: int
    hits: int | None = None


class Objective(Protocol):
    """A loss of batches; `train` switches the dropout of the base and of the head."""

    chunked: bool

    def __call__(self, adapter: Trainable, batch: Sequence[Example]) -> BatchLoss:
        """The loss of one batch, differentiable."""
        ...

    def train(self, mode: bool) -> None:
        """Dropout on or off."""
        ...


def make_objective(base: Base, head: nn.Module | None, adapts_output: bool, task_type: str | None = None) -> Objective:
    """The objective for a base of this kind.

    Args:
        head: the head being trained, for encoders.
        adapts_output: the adapter changes the output layer, which then has to run as it is.
        task_type: PEFT's; TOKEN_CLS makes the head of an encoder one that labels tokens.
    """
    if base.kind == "encoder":
        assert head is not None
        return _Tagging(base, head) if task_type == "TOKEN_CLS" else _Classification(base, head)
    chunked = not adapts_output and _output_layer_is_plain(base)
    return _LanguageModel(base, chunked)


class _LanguageModel:
    """Causal and encoder-decoder bases."""

    def __init__(self, base: Base, chunked: bool) -> None:
        self._base = base
        self.chunked = chunked
        self._head: Any = base.model.get_output_embeddings()  # type: ignore[operator]
        self._plain_attention = not getattr(base.config, "sliding_window", None)
        self._base_drops = _drops(base)

    def __call__(self, adapter: Trainable, batch: Sequence[Example]) -> BatchLoss:
        shared = common_prefix(batch) if self._shares_prefixes(adapter) else 0
        arguments, labels, tokens = self._inputs(adapter, batch, shared)
        keep = labels != IGNORED
        wanted = labels[keep]
        if self.chunked:
            hidden = _hidden_states(self._base, arguments)[keep]
            total = frozen_head_cross_entropy(hidden, self._head.weight, self._head.bias, wanted)
        else:
            logits = self._base.model(**arguments).logits[keep]
            total = _cross_entropy(logits, wanted)
        return BatchLoss(total, int(keep.sum()), tokens)

    def train(self, mode: bool) -> None:
        """Dropout of the base."""
        self._base.model.train(mode)

    def _shares_prefixes(self, adapter: Trainable) -> bool:
        """Whether tokens that all rows begin with may be computed once: dropout would have to differ by row."""
        return self.chunked and not adapter.dropout and self._plain_attention and not self._base_drops

    def _inputs(
        self, adapter: Trainable, batch: Sequence[Example], shared: int
    ) -> tuple[dict[str, Any], torch.Tensor, int]:
        base = self._base
        ids, mask = (t.to(base.device) for t in pad_rows([e.ids for e in batch], base.pad_id, left=False))
        prefix = adapter.prefix(len(batch), base.dtype)
        labels, _ = pad_rows([e.labels for e in batch], IGNORED, left=False)
        labels = labels.to(base.device)
        tokens = int(mask.sum())
        if base.kind == "seq2seq":
            start = torch.full_like(labels[:, :1], base.config.decoder_start_token_id)
            given = torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, base.pad_id)], 1)
            return (
                seq2seq_inputs(ids, mask, given, prefix, use_cache=False),
                labels,
                tokens + int((labels != IGNORED).sum()),
            )
        shifted = torch.full_like(labels, IGNORED)
        shifted[:, :-1] = labels[:, 1:]
        if not shared:
            return causal_inputs(ids, mask, prefix, use_cache=False), shifted, tokens
        return self._after_shared(ids, mask, adapter, shared), shifted[:, shared:], tokens

    def _after_shared(self, ids: torch.Tensor, mask: torch.Tensor, adapter: Trainable, shared: int) -> dict[str, Any]:
        """Run the first `shared` tokens once for all rows, and give the inputs of the rest."""
        first = adapter.prefix(1, self._base.dtype)
        begin = causal_inputs(ids[:1, :shared], mask[:1, :shared], first, use_cache=True)
        cache = self._base.model.base_model(**begin).past_key_values  # type: ignore[operator,union-attr]
        for layer in cache.layers:
            layer.keys, layer.values = (t.expand(len(ids), -1, -1, -1) for t in (layer.keys, layer.values))
        held = cache.get_seq_length()
        rest = mask[:, shared:]
        return {
            "input_ids": ids[:, shared:],
            "attention_mask": torch.cat([mask.new_ones((len(ids), held)), rest], 1),
            "position_ids": held + (rest.cumsum(1) - 1).clamp(min=0),
            "past_key_values": cache,
            "use_cache": True,
        }


class _Classification:
    """Encoders with a head that labels texts."""

    chunked = False
    task_type = "SEQ_CLS"

    def __init__(self, base: Base, head: nn.Module) -> None:
        self._base = base
        self._head = head
        self._view = base.view(self.task_type)

    def train(self, mode: bool) -> None:
        """Dropout of the base and of the head."""
        self._view.model.train(mode)
        self._head.train(mode)

    def __call__(self, adapter: Trainable, batch: Sequence[Example]) -> BatchLoss:
        base = self._base
        slot = self._view.head
        assert slot is not None
        ids, mask = (t.to(base.device) for t in pad_rows([e.ids for e in batch], base.pad_id, left=False))
        inputs = encoder_inputs(ids, mask, adapter.prefix(len(batch), base.dtype), base.config)
        slot.assign([self._head] * len(batch))
        try:
            logits, wanted = self._supervised(self._view.model(**inputs).logits, batch)
        finally:
            slot.assign([])
        hits = int((logits.argmax(-1) == wanted).sum())
        return BatchLoss(_cross_entropy(logits, wanted), len(wanted), int(mask.sum()), hits)

    def _supervised(self, logits: torch.Tensor, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [items, labels] of what has a label, and the labels [items]."""
        return logits, torch.tensor([e.labels[0] for e in batch], device=logits.device)


class _Tagging(_Classification):
    """Encoders with a head that labels tokens, of which the first of each word counts."""

    task_type = "TOKEN_CLS"

    def _supervised(self, logits: torch.Tensor, batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        labels, _ = pad_rows([e.labels for e in batch], IGNORED, left=False)
        labels = labels.to(logits.device)
        keep = labels != IGNORED
        return logits[keep], labels[keep]


def _cross_entropy(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Summed over rows, in float32 at least."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), wanted, reduction="sum")


def _drops(base: Base) -> bool:
    """Whether the base has dropout of its own, in layers or in attention."""
    layers = any(isinstance(m, nn.Dropout) and m.p > 0 for m in base.model.modules())
    return layers or any(getattr(base.config, k, 0.0) for k in ("attention_dropout", "attn_pdrop"))


def common_prefix(batch: Sequence[Example]) -> int:
    """How many first tokens all rows share, short of the token before the first supervised one.

    Prompts made by one template begin alike (a system prompt, say): computing that part once for the whole batch gives
    the same loss and gradients for fewer tokens. 0 where it would not pay.
    """
    if len(batch) < 2:
        return 0
    limit = min(next((i for i, label in enumerate(e.labels) if label != IGNORED), 0) for e in batch) - 1
    first = batch[0].ids
    shared = next((i for i in range(max(limit, 0)) if any(e.ids[i] != first[i] for e in batch)), max(limit, 0))
    return shared if shared >= _LEAST_SHARED else 0


def _hidden_states(base: Base, arguments: dict[str, Any]) -> torch.Tensor:
    """The last hidden states [rows, tokens, width] that the output layer reads."""
    hidden: torch.Tensor = base.model.base_model(**arguments).last_hidden_state  # type: ignore[operator,union-attr]
    return hidden


def _output_layer_is_plain(base: Base) -> bool:
    """Whether logits are exactly the output layer of the last hidden states, found by trying.

    Some models scale or cap their logits (T5 with tied embeddings, Gemma 2, Cohere); they take the full-logits path.
    """
    if base.kind != "causal":
        return False
    head: Any = base.model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        return False
    ids = torch.tensor([[1, 2, 3]], device=base.device).clamp(max=base.config.vocab_size - 1)
    with torch.inference_mode():
        logits = base.model(input_ids=ids, use_cache=False).logits
        hidden = base.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[operator,union-attr]
        return torch.equal(F.linear(hidden, head.weight, head.bias), logits)
