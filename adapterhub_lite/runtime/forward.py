"""One forward pass of a mixed batch: logits for every token, or for every row's label."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..bases.inputs import causal_inputs, encoder_inputs, pad_rows, seq2seq_inputs
from ..bases.load import Base
from .batch import BatchPlan
from .decoder import decoder_of
from .prefill import read_all
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
        logits = base.model(**arguments).logits
    return [logits[i, :n] for i, n in enumerate(lengths)]


def class_logits(base: Base, hooks: SiteHooks, plan: BatchPlan, rows: Sequence[list[int]]) -> torch.Tensor:
    """Logits [rows, most labels] of classification heads, -inf where a row's head has fewer labels."""
    view = base.view("SEQ_CLS")
    ids, mask = (t.to(base.device) for t in pad_rows(list(rows), base.pad_id, left=False))
    if base.kind == "encoder":
        arguments = encoder_inputs(ids, mask, plan.prefix, base.config)
    elif base.kind == "causal":
        arguments = causal_inputs(ids, mask, plan.prefix, use_cache=False)
    else:
        arguments = {"input_ids": ids, "attention_mask": mask}
    assert view.head is not None
    view.head.assign(plan.heads)
    try:
        with torch.inference_mode(), hooks.using(plan.sites):
            logits: torch.Tensor = view.model(**arguments).logits
    finally:
        view.head.assign([])
    return logits
