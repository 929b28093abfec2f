"""Plain transformers and plain PEFT on the tiny models: what ours is compared with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from tests import tiny

LABELS = 3
ROWS = [[5, 6, 7, 8, 9, 2], [10, 11, 2], [40, 41, 42, 43, 2]]
ANSWERS = [[5, 6], [7, 8, 9], [10]]
KINDS = ("lora", "patterns", "rslora", "bias", "dora", "prefix", "projection")

# A module by the last parts of its name, to give it a rank and an alpha of its own.
_SPECIAL = {
    "llama": ("layers.1.self_attn.q_proj", "down_proj"),
    "gpt2": ("h.1.attn.c_attn", "mlp.c_proj"),
    "bert": ("layer.1.attention.self.query", "intermediate.dense"),
    "roberta": ("layer.1.attention.self.query", "intermediate.dense"),
    "t5": ("encoder.block.1.layer.0.SelfAttention.q", "wo"),
}
_AUTO = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
}


def task_type(family: str, *, classify: bool = False) -> str:
    """PEFT's task type."""
    if classify or family in tiny.ENCODERS:
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"


def plain(folder: Path, task: str, labels: int = LABELS, seed: int = 7) -> Any:
    """The checkpoint in plain transformers, as the class of a task; a new head is random, but always the same."""
    torch.manual_seed(seed)
    some = {"num_labels": labels, "ignore_mismatched_sizes": True} if task == "SEQ_CLS" else {}
    model = _AUTO[task].from_pretrained(folder, dtype=torch.float32, **some)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    return model.eval()


def config(family: str, kind: str, task: str, tokens: int = 4, **changes: Any) -> Any:
    """PEFT's configuration of one kind of adapter."""
    if kind in ("prefix", "projection"):
        network = {"prefix_projection": True, "encoder_hidden_size": 24} if kind == "projection" else {}
        return peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=tokens, **network, **changes)
    first, second = _SPECIAL[family]
    patterns = {"rank_pattern": {first: 7, second: 2}, "alpha_pattern": {second: 3}} if kind == "patterns" else {}
    given: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **patterns, **changes}
    made = peft.LoraConfig(
        task_type=task, use_rslora=kind == "rslora", use_dora=kind == "dora", lora_bias=kind == "bias", **given
    )
    if family == "t5" and task == "SEQ_CLS":
        made.modules_to_save = ["classification_head"]
    return made


def wrap(model: Any, settings: Any, seed: int = 1) -> Any:
    """A PEFT model whose trained values are random: an untouched LoRA would do nothing."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, settings).eval()
    for name, parameter in made.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data.normal_(0, 0.2)
        elif parameter.requires_grad and "magnitude" in name:
            parameter.data.mul_(1 + 0.3 * torch.rand_like(parameter))
    return made


def logits(model: Any, rows: Sequence[list[int]] = ROWS, answers: Sequence[list[int]] = ANSWERS) -> list[torch.Tensor]:
    """Logits of each row by itself: no padding, no neighbours."""
    found = []
    for row, answer in zip(rows, answers, strict=True):
        given: dict[str, Any] = {
            "input_ids": torch.tensor([row]),
            "attention_mask": torch.ones(1, len(row), dtype=torch.long),
        }
        if model.config.is_encoder_decoder and "Classification" not in type(_inner(model)).__name__:
            given["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id, *answer]])
        with torch.no_grad():
            found.append(model(**given).logits[0])
    return found


def _inner(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def assert_logits_equal(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], relative: float = 1e-5
) -> None:
    """Equal to `relative` of the largest logit."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=relative, atol=relative * scale)
