"""Tiny random checkpoints of families beyond those of `tests.tiny`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests import tiny

_IDS = {"vocab_size": tiny.VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "opt": "causal",
    "gemma2": "causal",
    "bart": "seq2seq",
    "distilbert": "encoder",
    "electra": "encoder",
    "deberta": "encoder",
}


def _model(family: str, **changes: Any) -> Any:
    if family == "opt":
        sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        return hf.OPTForCausalLM(hf.OPTConfig(**_IDS, **sizes, word_embed_proj_dim=32, **changes))
    if family == "gemma2":
        sizes = {**_BERT, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 0.5}
        return hf.Gemma2ForCausalLM(hf.Gemma2Config(**_IDS, **sizes, **changes))
    if family == "bart":
        sizes = {f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in (("layers", 2), ("attention_heads", 4))}
        more = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 0}
        return hf.BartForConditionalGeneration(hf.BartConfig(**_IDS, **sizes, **more, **changes))
    if family == "distilbert":
        sizes = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
        return hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**_IDS, **sizes, **changes))
    if family == "electra":
        sizes = {**_BERT, "embedding_size": 24, **changes}
        return hf.ElectraForSequenceClassification(hf.ElectraConfig(**_IDS, **sizes))
    sizes = {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    return hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**_IDS, **sizes, **changes))


def save(family: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny checkpoint of one of KINDS, or of a family of `tests.tiny`."""
    if family not in KINDS:
        return tiny.save(family, folder, seed, **changes)
    torch.manual_seed(seed)
    made = _model(family, **changes)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.12)
    made.save_pretrained(folder)
    tiny.tokenizer(KINDS[family]).save_pretrained(folder)
    return folder


def kind_of(family: str) -> str:
    """causal, encoder or seq2seq."""
    return KINDS.get(family) or tiny.kind_of(family)


def task_type(family: str) -> str:
    """PEFT's task type."""
    return {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "SEQ_CLS"}[kind_of(family)]
