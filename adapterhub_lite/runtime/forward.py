"""One forward pass of a mixed batch: logits for every token, or for every row's label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ..adapters.fit import Fitted
from ..bases.inputs import causal_inputs, encoder_inputs, pad_rows, seq2seq_inputs
from ..bases.load import Base
from ..errors import Unsupported
from .batch import BatchPlan, Row
from .decoder import decoder_of
from .encoder import encoder_of
from .prefill import read_all
from .side_by_side import tags_tokens
from .sites import SiteHooks


def token_logits(
    base: Base,
    hooks: SiteHooks,
    plan: BatchPlan,
    rows: Sequence[list[int]],
    decoder_rows: Sequence[list[int]] | None = None,
) -> list[torch.Tensor]:
    """Next-token logits of a language model, one tensor [tokens, vocabulary] a row.

    Args:
        decoder_rows: for an encoder-decoder, what the decoder is given.
    """
    decoder = decoder_of(base)
    if decoder is not None and decoder.knows(plan):
        with torch.inference_mode():
            return read_all(decoder, rows, plan)
    ids, mask = (t.to(base.device) for t in pad_rows(list(rows), base.pad_id, left=False))
    if base.kind == "seq2seq":
        given = [[base.config.decoder_start_token_id, *r] for r in decoder_rows or [[] for _ in rows]]
        out_ids, _ = (t.to(base.device) for t in pad_rows(given, base.pad_id, left=False))
        arguments = seq2seq_inputs(ids, mask, out_ids, plan.prefix, use_cache=False)
        lengths = [len(r) for r in given]
    else:
        arguments = causal_inputs(ids, mask, plan.prefix, use_cache=False)
        lengths = [len(r) for r in rows]
    with torch.inference_mode(), hooks.using(plan.sites):
        logits = plan.model(base.model)(**arguments).logits
    return [logits[i, :n] for i, n in enumerate(lengths)]


def class_logits(base: Base, hooks: SiteHooks, plan: BatchPlan, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    """What each row's own head gives: [labels] of a classifier, [tokens, labels] of a tagger; [0] without a head.

    Raises:
        Unsupported: no row has a head, or a tagger of an encoder-decoder.
    """
    if not any(row is not None and row.head is not None for row in plan.rows):
        raise Unsupported("No row of this batch has a classification head.", "Name an adapter trained to classify.")
    encoder = encoder_of(base)
    if encoder is not None and encoder.knows(plan, rows):
        with torch.inference_mode():
            return encoder(plan, rows)
    return model_logits(base, hooks, plan, rows)


def model_logits(base: Base, hooks: SiteHooks, plan: BatchPlan, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    """`class_logits` through the model's own forward: taggers read its last hidden states beside the pooled path."""
    tags = [tags_tokens(row) for row in plan.rows]
    if any(tags) and base.kind == "seq2seq":
        raise Unsupported("An encoder-decoder has no class that labels tokens.", "Use an encoder or a causal base.")
    view = base.view("SEQ_CLS")
    ids, mask = (t.to(base.device) for t in pad_rows(list(rows), base.pad_id, left=False))
    if base.kind == "encoder":
        arguments = encoder_inputs(ids, mask, plan.prefix, base.config)
    elif base.kind == "causal":
        arguments = causal_inputs(ids, mask, plan.prefix, use_cache=False)
    else:
        arguments = {"input_ids": ids, "attention_mask": mask}
    pooled = [None if tagger else head for tagger, head in zip(tags, plan.heads, strict=True)]
    assert view.head is not None
    view.head.assign(pooled)
    try:
        with torch.inference_mode(), hooks.using(plan.sites):
            if any(head is not None for head in pooled):
                out = plan.model(view.model)(**arguments, output_hidden_states=any(tags))
                logits, hidden = out.logits, out.hidden_states[-1] if any(tags) else None
            else:
                logits, hidden = None, plan.model(base.view("FEATURE_EXTRACTION").model)(**arguments).last_hidden_state
            counts = [len(row) for row in rows]
            return [
                _of_row(row, i, n, logits, hidden) for i, (row, n) in enumerate(zip(plan.rows, counts, strict=True))
            ]
    finally:
        view.head.assign([])


class _All(nn.Module):
    """The head of a tagger that says all it reads: the hidden values themselves."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def hidden_states(base: Base, hooks: SiteHooks, plan: BatchPlan, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    """What leaves an encoder's last layer at each token of the rows' texts, one tensor [tokens, hidden] a row."""
    encoder, head = encoder_of(base), _All(base.dtype)
    bare = Fitted("base", "", "TOKEN_CLS", {}, None, head, 0)
    read = tuple(bare if row is None else replace(row, task_type="TOKEN_CLS", head=head) for row in plan.rows)
    tagging = replace(plan, rows=read)
    with torch.inference_mode():
        if encoder is not None and encoder.knows(tagging, rows):
            return encoder(tagging, rows)
        ids, mask = (t.to(base.device) for t in pad_rows(list(rows), base.pad_id, left=False))
        with hooks.using(plan.sites):
            model = plan.model(base.view("FEATURE_EXTRACTION").model)
            hidden = model(**encoder_inputs(ids, mask, plan.prefix, base.config)).last_hidden_state
    begins = [row.prompt.tokens if row and row.prompt else 0 for row in plan.rows]
    return [hidden[i, begin : begin + len(ids)] for i, (begin, ids) in enumerate(zip(begins, rows, strict=True))]


def _of_row(row: Row, i: int, tokens: int, logits: torch.Tensor | None, hidden: torch.Tensor | None) -> torch.Tensor:
    if row is None or row.head is None:
        return torch.empty(0)
    own = list(row.head.parameters())
    if tags_tokens(row):
        assert hidden is not None
        begin = row.prompt.tokens if row.prompt else 0  # virtual tokens come right before the row's own
        made: torch.Tensor = row.head(hidden[i, begin : begin + tokens].to(own[0].dtype))
        return made
    assert logits is not None
    return logits[i, : own[-1].shape[0]]
