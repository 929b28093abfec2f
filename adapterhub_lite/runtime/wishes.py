"""What a base's generation settings ask of every token: repetition penalty, forced and suppressed tokens, least length.

They are carried out by transformers' own processors, one list a row, so that a row's text is that of `generate` alone.
Of these settings, those that choose (do_sample, temperature, num_beams) are not taken: `Sampling` says how to choose.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..bases.load import Base
from .requests import Request

Wishes = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Ids so far [1, tokens], logits [1, vocabulary] -> logits."""

# Settings of which one that differs from its neutral values makes processors.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None, []),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None, {}),
}


def asked(base: Base) -> dict[str, Any]:
    """The settings of a base that change logits, by name."""
    settings = getattr(base.model, "generation_config", None)
    found = {name: getattr(settings, name, None) for name in _NEUTRAL}
    return {name: value for name, value in found.items() if value not in _NEUTRAL[name]}


def wishes(base: Base, row: Request) -> Wishes | None:
    """What to do with the logits of a row; None where nothing is asked. A row's own repetition penalty comes first."""
    wanted = asked(base)
    if row.sampler.penalty != 1.0:
        wanted.pop("repetition_penalty", None)
    if not wanted:
        return None
    model: Any = base.model
    settings = copy.deepcopy(model.generation_config)
    for name in _NEUTRAL:
        setattr(settings, name, wanted.get(name))
    begin = len(_begin(base, row))
    settings.update(do_sample=False, num_beams=1, guidance_scale=None, max_length=begin + row.most)
    model._prepare_special_tokens(settings, kwargs_has_attention_mask=True, device=base.device)
    encoder = torch.tensor([row.prompt], device=base.device) if base.kind == "seq2seq" else None
    made: Wishes = model._get_logits_processor(
        generation_config=settings,
        input_ids_seq_length=begin,
        encoder_input_ids=encoder,
        device=base.device,
        model_kwargs={},
    )
    return made


def heeded(base: Base, logits: torch.Tensor, rows: Sequence[Request], each: Sequence[Wishes | None]) -> torch.Tensor:
    """logits [rows, vocabulary] as the rows' wishes change them; the tensor given stays as it is."""
    if all(one is None for one in each):
        return logits
    found = []
    for own, row, one in zip(logits.float(), rows, each, strict=True):
        if one is None or row.done:
            found.append(own[None])
        else:
            ids = torch.tensor([[*_begin(base, row), *row.tokens]], device=logits.device)
            found.append(one(ids, own[None].clone()))
    return torch.cat(found)


def _begin(base: Base, row: Request) -> list[int]:
    return [base.config.decoder_start_token_id] if base.kind == "seq2seq" else row.prompt
