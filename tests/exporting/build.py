"""Adapters that PEFT made and saved, on tiny bases, in a store; and what PEFT computes with them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from adapterhub_lite.adapters.adapter import Adapter, read_adapter
from adapterhub_lite.exporting.base import BaseFacts, base_facts
from adapterhub_lite.exporting.pairs import is_exact
from adapterhub_lite.exporting.prepare import Prepared, prepare
from adapterhub_lite.exporting.readers import READERS
from adapterhub_lite.exporting.traits import Asked
from adapterhub_lite.merging.weights import Weights
from tests import peers, tiny

PREFIX = "base_model.model."
FACTORED = {
    "adalora": lambda given: peft.AdaLoraConfig(**given, init_r=6, target_r=3, total_step=10, lora_alpha=7),
    "loha": lambda given: peft.LoHaConfig(**given, r=2, alpha=3),
    "lokr": lambda given: peft.LoKrConfig(**given, r=2, alpha=3),
    "ia3": lambda given: peft.IA3Config(**given, feedforward_modules=given["target_modules"][-1:]),
}
FEW = {
    "llama": ["q_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["query", "dense"],
}


def save_base(family: str, folder: Path, **changes: Any) -> Path:
    """A tiny checkpoint folder; qwen2, whose q, k and v have biases, beside those of `tiny`."""
    if family != "qwen2":
        return tiny.save(family, folder, **changes)
    torch.manual_seed(0)
    sizes = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**{**sizes, **heads, **ids, **changes}))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.12) if parameter.dim() > 1 else parameter.data.add_(0.05)
    model.save_pretrained(folder)
    tiny.tokenizer("causal").save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Made:
    """An adapter of PEFT's.

    Attributes:
        folder: where PEFT saved it.
        logits: what PEFT computes with it.
        bare: what the base computes without it.
    """

    base: Path
    family: str
    task: str
    folder: Path
    logits: list[torch.Tensor]
    bare: list[torch.Tensor]

    @property
    def adapter(self) -> Adapter:
        return read_adapter(self.folder, name="mine@1")

    @property
    def facts(self) -> BaseFacts:
        return base_facts(self.config, self.task)

    @property
    def config(self) -> dict[str, Any]:
        import json

        return dict(json.loads((self.base / "config.json").read_text("utf-8")))

    def plain(self) -> Any:
        return peers.plain(self.base, self.task)

    def prepare(self, reader: str, *, base: bool = True, **asked: Any) -> Prepared:
        """As the workflow does it."""
        adapter, facts = self.adapter, self.facts if base else None
        weights = None if is_exact(adapter) or not base else Weights(self.base, self.config, self.task, "none")
        name = asked.get("base_name") or "org/base"
        return prepare(adapter, READERS[reader], Asked(**asked), base=facts, weights=weights, base_name=name)


def make(base: Path, family: str, kind: str, folder: Path, *, task: str = "", **changes: Any) -> Made:
    """An adapter of random values, by the name of `peers.KINDS` or `FACTORED`, saved by PEFT."""
    task = task or peers.task_type(family)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind in FACTORED:
            given = {"task_type": task, "target_modules": FEW[family], **changes}
            model = peft.get_peft_model(peers.plain(base, task), FACTORED[kind](given))
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and any(part in name for part in ("lora_", "hada_", "lokr_")):
                    parameter.data.normal_(0, 0.4)
                elif "ia3_l" in name:
                    parameter.data.add_(0.3 * torch.rand_like(parameter))
        else:
            names = "llama" if family == "qwen2" else family
            model = peers.wrap(peers.plain(base, task), peers.config(names, kind, task, **changes))
        model.save_pretrained(folder, save_embedding_layers=False)
        model = peft.PeftModel.from_pretrained(peers.plain(base, task), folder).eval()
    return Made(base, family, task, folder, peers.logits(model), peers.logits(peers.plain(base, task)))


def by_peft(made: Made, folder: Path) -> list[torch.Tensor]:
    """Logits of plain PEFT with the files in `folder`; it must miss no tensor of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(made.plain(), folder).eval()
    return peers.logits(model)


def with_deltas(made: Made, deltas: Mapping[str, torch.Tensor], causal: bool = False) -> list[torch.Tensor]:
    """Logits of the base with [out, in] added to the weights of modules, which must be there."""
    model = peers.plain(made.base, "CAUSAL_LM") if causal else made.plain()
    modules = dict(model.named_modules())
    for name, delta in deltas.items():
        weight = modules[name].weight
        conv = type(modules[name]).__name__ == "Conv1D" or isinstance(modules[name], torch.nn.Embedding)
        weight.data += (delta.T if conv else delta).to(weight.dtype)
    return peers.logits(model)


def write(made: Made, reader: str, folder: Path, **asked: Any) -> Path:
    """The two PEFT files of an export."""
    prepared = made.prepare(reader, **asked)
    assert prepared.adapter is not None, [one.what for one in prepared.findings if one.remedy == "refused"]
    folder.mkdir()
    for name, data in prepared.adapter.files().items():
        (folder / name).write_bytes(data)
    return folder


def near(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference of two sets of logits, as a share of the largest logit."""
    largest = max(float(one.abs().max()) for one in expected)
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / largest
