"""Tiny models with trained little tokenizers, plans of them, and what a GGUF file holds by the words of its format."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from adapterhub_lite.merging.checkpoint import DTYPES, Checkpoint, Planned

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  Two blanks, a tab\t, and\n\nlines.  ",
    "I've told you, we'LL see: 3 33 333 3333 and x  12!",
    "Größe, naïve café, 你好世界, Привет, 🦙🦙 and \u200d joiners",
    "def f(x):\n    return x ** 2  # squared",
    "a",
    "",
    "......!!!!!!?????? ------======= 3.14",
]
SIZE = 384  # of the vocabulary: more than the tokenizers below have
_DIGITS = "{1,3}"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RULES = ("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
_SIZES: dict[str, Any] = {
    "vocab_size": SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def words(rule: str) -> Any:
    """The pre-tokenizer that models have which llama.cpp calls by this name."""
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if rule == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rule == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    pattern = WORDS % ("" if rule == "qwen2" else _DIGITS)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])


def tokenizer(rule: str = "gpt-2", *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from this folder's texts."""
    raw = Tokenizer(models.BPE(ignore_merges=rule == "llama-bpe"))
    raw.pre_tokenizer = words(rule)
    raw.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        raw.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 8,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS * 3, trainer)
    raw.add_tokens(["<tool>"])
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        unk_token="<|endoftext|>",
    )
    made.chat_template = TEMPLATE
    return made


def model(family: str, **changes: Any) -> Any:
    """A random model whose logits, biases included, say where every tensor went."""
    torch.manual_seed(0)
    given = {**_SIZES, **changes}
    if family == "gpt2":
        ids = {key: given[key] for key in ("bos_token_id", "eos_token_id")}
        made: Any = GPT2LMHeadModel(
            GPT2Config(
                **{"vocab_size": SIZE, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024, **ids, **changes}
            )
        )
    elif family == "llama":
        made = LlamaForCausalLM(LlamaConfig(**given))
    elif family == "mistral":
        made = MistralForCausalLM(MistralConfig(**{"sliding_window": None, **given}))
    elif family == "qwen2":
        made = Qwen2ForCausalLM(Qwen2Config(**given))
    else:
        made = Qwen3ForCausalLM(Qwen3Config(**{"head_dim": 128, **given}))  # transformers reads no other from a file
    for name, parameter in made.named_parameters():
        parameter.data = torch.randn_like(parameter) * (0.5 if "norm" in name or "ln_" in name else 0.12)
    return made.eval()


def save(family: str, folder: Path, *, rule: str | None = None, **changes: Any) -> Path:
    """A checkpoint folder with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model(family, **changes).save_pretrained(folder)
    tokenizer(rule or {"gpt2": "gpt-2", "llama": "smollm"}.get(family, "qwen2")).save_pretrained(folder)
    return folder


def plan_of(folder: Path, deltas: dict[str, torch.Tensor] | None = None, **config: Any) -> Any:
    """What the writer reads of a merge plan: the checkpoint's tensors, some with a change added in float32."""
    import json

    checkpoint, deltas = Checkpoint.open(folder), deltas or {}

    def make(name: str) -> torch.Tensor:
        weight = checkpoint.read(name)
        return weight.float() + deltas[name] if name in deltas else weight

    shards = {
        file: [Planned(name, DTYPES[info.dtype], tuple(info.shape), partial(make, name)) for name, info in some.items()]
        for file, some in checkpoint.shards.items()
    }
    read = json.loads((folder / "config.json").read_text("utf-8"))
    return SimpleNamespace(shards=shards, changed=sorted(deltas), config={**read, **config})


def deltas_of(made: Any, seed: int = 1) -> dict[str, torch.Tensor]:
    """A random change of every matrix of the blocks, by the checkpoint's names."""
    generator = torch.Generator().manual_seed(seed)
    named = {name: p for name, p in made.named_parameters() if p.dim() == 2 and (".layers." in name or ".h." in name)}
    return {name: torch.randn(p.shape, generator=generator) * 0.05 for name, p in named.items()}


def merged(made: Any, deltas: dict[str, torch.Tensor]) -> Any:
    """The dense model with the changes added."""
    parameters = dict(made.named_parameters())
    for name, delta in deltas.items():
        parameters[name].data += delta
    return made


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """Metadata, float32 tensors (rows first) and types of a GGUF file, by the gguf library's reader."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {t.name: np.array(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    shaped = {t.name: tensors[t.name].reshape(tuple(reversed([int(n) for n in t.shape]))) for t in reader.tensors}
    return fields, shaped, {t.name: t.tensor_type.name for t in reader.tensors}
