"""Tiny random models of real architectures, built in the test and saved as ordinary checkpoint folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]
VOCABULARY = 256 + len(SPECIALS)
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
CAUSAL = ("llama", "gpt2")
ENCODERS = ("bert", "roberta")
FAMILIES = (*CAUSAL, *ENCODERS, "t5")
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def tokenizer(kind: str = "causal") -> PreTrainedTokenizerFast:
    """One token a byte, with special tokens; encoders and encoder-decoders get an end token after each text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    raw = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    if kind == "encoder":
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    if kind == "seq2seq":
        raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if kind == "causal":
        made.chat_template = CHAT
    return made


def model(family: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random model of one family, with weights large enough that logits differ clearly."""
    torch.manual_seed(seed)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "llama":
        config: Any = LlamaConfig(
            **{**_SIZES, "num_key_value_heads": 2, "max_position_embeddings": 512, **ids, **changes}
        )
        made: Any = LlamaForCausalLM(config)
    elif family == "gpt2":
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, **ids, **changes)
        made = GPT2LMHeadModel(config)
    elif family == "bert":
        config = BertConfig(**{**_SIZES, "max_position_embeddings": 512, **ids, **changes})
        made = BertForSequenceClassification(config)
    elif family == "roberta":
        config = RobertaConfig(**{**_SIZES, "max_position_embeddings": 512, "type_vocab_size": 1, **ids, **changes})
        made = RobertaForSequenceClassification(config)
    else:
        config = T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            d_kv=8,
            decoder_start_token_id=0,
            **ids,
            **changes,
        )
        made = T5ForConditionalGeneration(config)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.12)
    return made.eval()


def kind_of(family: str) -> str:
    """causal, encoder or seq2seq."""
    return "causal" if family in CAUSAL else "encoder" if family in ENCODERS else "seq2seq"


def save(family: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny checkpoint folder with its tokenizer."""
    model(family, seed, **changes).save_pretrained(folder)
    tokenizer(kind_of(family)).save_pretrained(folder)
    return folder
