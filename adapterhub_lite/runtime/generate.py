"""The decode loop: a mixed batch step by step; rows that finish leave the batch.

Knows tokens and plans, not texts or names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from ..bases.inputs import causal_inputs, pad_rows, seq2seq_inputs
from ..bases.load import Base
from .batch import BatchPlan
from .changes import changes_of
from .decoder import Decoder, decoder_of
from .prefill import prefill
from .sampling import Sampler
from .sites import SiteHooks

# A batch is cut to its unfinished rows when at least this share of it has finished: cutting copies the cache.
_COMPACT_AT = 0.25


def end_tokens(base: Base) -> set[int]:
    """Token ids that end an answer."""
    generation = getattr(base.model, "generation_config", None)
    ids: set[int] = set()
    for value in (getattr(generation, "eos_token_id", None), base.tokenizer.eos_token_id, base.config.eos_token_id):
        ids |= set(value) if isinstance(value, list) else {value} if isinstance(value, int) else set()
    return ids


def decode(
    base: Base,
    hooks: SiteHooks,
    plan: BatchPlan,
    prompts: list[list[int]],
    sampler: Sampler,
    max_new_tokens: int,
) -> Iterator[list[tuple[int, int]]]:
    """Yield, step by step, the (row, token) pairs of the rows still running. End tokens are not yielded.

    Args:
        prompts: token ids of each row.
    """
    state = _loop(base, plan, prompts)
    ends = torch.tensor(sorted(end_tokens(base)), device=base.device)
    rows = list(range(len(prompts)))
    for step in range(max_new_tokens):
        with torch.inference_mode(), hooks.using(plan.sites if state.hooked else {}):
            tokens = sampler(state.step())
            alive = (~torch.isin(tokens, ends)).tolist()
        yield [(row, t) for row, t, a in zip(rows, tokens.tolist(), alive, strict=True) if a and row >= 0]
        rows = [row if a else -1 for row, a in zip(rows, alive, strict=True)]
        finished = sum(row < 0 for row in rows)
        if finished == len(rows) or step + 1 == max_new_tokens:
            return
        with torch.inference_mode():
            if finished >= _COMPACT_AT * len(rows):
                keep = [i for i, row in enumerate(rows) if row >= 0]
                plan, tokens, rows = plan.select(keep), tokens[keep], [rows[i] for i in keep]
                state.select(keep, plan)
                sampler.select(keep)
            state.append(tokens)


class _Loop(Protocol):
    """The state of a batch that is decoded; `hooked`: its forward is the model's own, changed by hooks."""

    hooked: bool

    def step(self) -> torch.Tensor:
        """Logits [rows, vocabulary] of the next token."""
        ...

    def append(self, tokens: torch.Tensor) -> None:
        """Go on with these tokens [rows]."""
        ...

    def select(self, keep: list[int], plan: BatchPlan) -> None:
        """Go on with these rows only; `plan` is theirs."""
        ...


def _loop(base: Base, plan: BatchPlan, prompts: list[list[int]]) -> _Loop:
    if base.kind == "seq2seq":
        return _Seq2SeqLoop(base, plan, prompts)
    decoder = decoder_of(base)
    if decoder is not None and decoder.knows(plan):
        return _WindowLoop(decoder, plan, prompts)
    return _CausalLoop(base, plan, prompts)


class _WindowLoop:
    """Decode state of a forward of our own: window, next positions [rows]."""

    hooked = False

    def __init__(self, decoder: Decoder, plan: BatchPlan, prompts: list[list[int]]) -> None:
        self._decoder, self._plan, self._prompts = decoder, plan, prompts
        self._changes = changes_of(decoder.base, plan)

    def step(self) -> torch.Tensor:
        """Logits [rows, vocabulary] of the next token."""
        if self._prompts:
            logits, self._window, self._positions = prefill(self._decoder, self._prompts, self._plan)
            self._prompts = []
            return logits
        logits = self._decoder.step(self._tokens, self._positions, self._window, self._changes)
        self._positions = self._positions + 1
        return logits

    def append(self, tokens: torch.Tensor) -> None:
        """Go on with these tokens [rows]."""
        self._tokens = tokens
        self._window.extend()

    def select(self, keep: list[int], plan: BatchPlan) -> None:
        """Go on with these rows only."""
        self._window.select(keep)
        self._positions = self._positions[keep]
        self._changes = changes_of(self._decoder.base, plan)


class _CausalLoop:
    """Decode state of a causal model through its own forward: cache, mask [rows, keys], next position [rows]."""

    hooked = True

    def __init__(self, base: Base, plan: BatchPlan, prompts: list[list[int]]) -> None:
        ids, mask = (t.to(base.device) for t in pad_rows(prompts, base.pad_id, left=True))
        self._model, self._device = base.model, base.device
        self._inputs = causal_inputs(ids, mask, plan.prefix, use_cache=True)
        self._inputs["logits_to_keep"] = 1

    def step(self) -> torch.Tensor:
        """Logits [rows, vocabulary] of the next token."""
        logits: torch.Tensor = self._model(**self._inputs).logits
        return logits[:, -1]

    def append(self, tokens: torch.Tensor) -> None:
        """Go on with these tokens [rows]."""
        mask = self._inputs["attention_mask"]
        self._inputs["input_ids"] = tokens[:, None]
        self._inputs["attention_mask"] = torch.cat([mask, mask.new_ones((mask.shape[0], 1))], 1)
        self._inputs["position_ids"] = self._inputs["position_ids"][:, -1:] + 1

    def select(self, keep: list[int], plan: BatchPlan) -> None:
        """Go on with these rows only."""
        rows = torch.tensor(keep, device=self._device)
        self._inputs["past_key_values"].batch_select_indices(rows)
        for name in ("input_ids", "attention_mask", "position_ids"):
            self._inputs[name] = self._inputs[name][rows]


class _Seq2SeqLoop:
    """Decode state of an encoder-decoder model; the encoder runs once."""

    hooked = True

    def __init__(self, base: Base, plan: BatchPlan, prompts: list[list[int]]) -> None:
        ids, mask = (t.to(base.device) for t in pad_rows(prompts, base.pad_id, left=False))
        start = torch.full((len(prompts), 1), base.config.decoder_start_token_id, device=base.device)
        self._model: Any = base.model
        self._device = base.device
        self._inputs = seq2seq_inputs(ids, mask, start, plan.prefix, use_cache=True)

    def step(self) -> torch.Tensor:
        """Logits [rows, vocabulary] of the next token."""
        out = self._model(**self._inputs)
        self._inputs.pop("input_ids", None)
        self._inputs["encoder_outputs"] = (out.encoder_last_hidden_state,)
        logits: torch.Tensor = out.logits
        return logits[:, -1]

    def append(self, tokens: torch.Tensor) -> None:
        """Go on with these tokens [rows]."""
        self._inputs["decoder_input_ids"] = tokens[:, None]

    def select(self, keep: list[int], plan: BatchPlan) -> None:
        """Go on with these rows only."""
        rows = torch.tensor(keep, device=self._device)
        self._inputs["past_key_values"].batch_select_indices(rows)
        self._inputs["attention_mask"] = self._inputs["attention_mask"][rows]
        self._inputs["encoder_outputs"] = (self._inputs["encoder_outputs"][0][rows],)
