"""Tiny decoders of the Llama family, PEFT's adapters on them, and the gradients that PEFT gives row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from adapterhub_lite.adapters.prefix import prefix_shape
from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.bases.quantization import dense_weight
from adapterhub_lite.formats.peft_config import LoraSpec, PrefixSpec
from adapterhub_lite.tasks.task import IGNORED, Example
from adapterhub_lite.training.computation import Learner, Row
from adapterhub_lite.training.dropout import keep_mask
from adapterhub_lite.training.trainable import Trainable, TrainableLora, TrainablePrefix
from tests import peers, tiny

_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
# Kinds of rows that differ in where their losses are, and a long one.
EXAMPLES = [
    Example([5, 6, 7, 8, 9, 10, 2], [IGNORED] * 4 + [9, 10, 2]),
    Example([30, 31, 32, 2], [IGNORED, 31, 32, 2]),
    Example(
        [*range(50, 71), 2], [IGNORED] * 5 + [55, 56, IGNORED, IGNORED, 59] + [IGNORED] * 9 + [69, IGNORED, IGNORED]
    ),
    Example([12, 13, 14, 15, 16, 2], [12, 13, 14, 15, 16, 2]),
]
_SALTS = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "o_proj": 3, "gate_proj": 4, "up_proj": 5, "down_proj": 6}


def folder(where: Path, family: str, **changes: Any) -> Path:
    """A tiny checkpoint; its window is shorter than its longest row."""
    sizes: dict[str, Any] = {
        "vocab_size": tiny.VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 16,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family == "mistral":
        sizes["sliding_window"] = 7
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(_CONFIGS[family](**{**sizes, **changes}))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.12) if parameter.dim() > 1 else parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(where)
    tiny.tokenizer().save_pretrained(where)
    return where


@contextmanager
def precision(monkeypatch: Any, dtype: str) -> Iterator[None]:
    """Let bases load in float64, which users cannot ask for, and the family's norms compute in it."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    from adapterhub_lite.bases.devices import DTYPES

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    with monkeypatch.context() as patch:
        if dtype == "float64":
            patch.setitem(DTYPES, "float64", torch.float64)
            for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
                patch.setattr(norm, "forward", forward)
        yield


def base_of(where: Path, dtype: str, quantize: str = "none", **more: Any) -> Base:
    """The checkpoint as our base."""
    return load_base(str(where), quantize, device="cpu", dtype=dtype, **more)


def plain_of(base: Base, dtype: torch.dtype | None = None) -> Any:
    """The checkpoint in plain transformers, with the weights that the base's stand for."""
    dtype = dtype or base.dtype
    model = peers.plain(base.source.folder, "CAUSAL_LM").to(dtype)
    for name, module in base.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            model.get_submodule(name).weight.data.copy_(dense_weight(module, dtype))
    return model


class Dropped(torch.nn.Module):
    """PEFT's place for dropout, with our mask of the row that is computed now."""

    def __init__(self, salt: int, p: float) -> None:
        super().__init__()
        self.salt, self.p, self.key = salt, p, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = torch.arange(x.shape[1])
        kept = keep_mask(torch.full_like(tokens, self.key), tokens, self.salt, x.shape[2], self.p)
        return x * kept.to(x.dtype) / (1 - self.p)


class Peer:
    """A PEFT adapter on plain transformers, our trainable of the same values, and PEFT's gradients."""

    def __init__(self, base: Base, kind: str, seed: int = 1, dtype: torch.dtype | None = None, **changes: Any) -> None:
        config = peers.config("llama", kind, "CAUSAL_LM", **changes)
        self.model = peers.wrap(plain_of(base, dtype), config, seed).to(dtype or base.dtype)
        self.base, self.settings = base, config
        self.wide = torch.promote_types(base.dtype, torch.float32)
        names = {n.replace(".default", ""): p for n, p in self.model.named_parameters() if p.requires_grad}
        self.peers: dict[str, torch.nn.Parameter] = names
        self.trainable: Trainable = self._prefix() if hasattr(config, "num_virtual_tokens") else self._lora()
        self.dropouts: list[Dropped] = []
        if getattr(config, "lora_dropout", 0.0):
            self._drop(config.lora_dropout)

    @property
    def learner(self) -> Learner:
        return Learner(self.trainable, None, "CAUSAL_LM")

    def _lora(self) -> TrainableLora:
        settings = self.settings
        modules = self.base.view().modules
        sites = sorted({n.removeprefix("base_model.model.").rpartition(".lora_")[0] for n in self.peers})
        spec = LoraSpec(
            rank=settings.r, alpha=settings.lora_alpha, rank_pattern=settings.rank_pattern,
            alpha_pattern=settings.alpha_pattern, use_rslora=settings.use_rslora, use_dora=settings.use_dora,
            dropout=settings.lora_dropout,
        )  # fmt: skip
        made = TrainableLora(spec, {n: modules[n] for n in sites}, torch.Generator())
        self.pairs: list[tuple[str, torch.nn.Parameter, torch.nn.Parameter]] = []
        for name, site in made.sites.items():
            stem = f"base_model.model.{name}"
            self._pair(name + " A", site.a, self.peers[f"{stem}.lora_A.weight"])
            self._pair(name + " B", site.b, self.peers[f"{stem}.lora_B.weight"])
            if site.magnitude is not None:
                self._pair(name + " magnitude", site.magnitude, self.peers[f"{stem}.lora_magnitude_vector.weight"])
        return made

    def _prefix(self) -> TrainablePrefix:
        given = self.settings
        spec = PrefixSpec(
            num_virtual_tokens=given.num_virtual_tokens, token_dim=given.token_dim, num_layers=given.num_layers,
            num_attention_heads=given.num_attention_heads, prefix_projection=given.prefix_projection,
            num_transformer_submodules=given.num_transformer_submodules, encoder_hidden_size=given.encoder_hidden_size,
        )  # fmt: skip
        made = TrainablePrefix(spec, prefix_shape(self.base.config), torch.Generator(), self.base.device)
        inner = {n.removeprefix("prompt_encoder."): p for n, p in self.peers.items()}
        order = ["embedding.weight", *(f"transform.{i}.{part}" for i in (0, 2) for part in ("weight", "bias"))]
        self.pairs = []
        for i, (ours, name) in enumerate(zip(made.parameters(), [n for n in order if n in inner], strict=True)):
            self._pair(f"prefix {i}", ours, inner[name])
        return made

    def _pair(self, name: str, ours: torch.nn.Parameter, theirs: torch.nn.Parameter) -> None:
        ours.data = theirs.detach().to(self.wide).clone()
        self.pairs.append((name, ours, theirs))

    def _drop(self, p: float) -> None:
        for name, module in self.model.named_modules():
            if hasattr(module, "lora_dropout") and len(module.lora_dropout):
                layer = int(name.partition("layers.")[2].partition(".")[0])
                place = Dropped(8 * layer + _SALTS[name.rpartition(".")[2]], p)
                module.lora_dropout["default"] = place
                self.dropouts.append(place)
        self.model.train()

    def gradients(self, rows: Sequence[Row]) -> tuple[float, list[torch.Tensor]]:
        """PEFT's summed loss and gradients, one row at a time and unpadded."""
        self.model.zero_grad()
        total = 0.0
        for row in rows:
            for place in self.dropouts:
                place.key = row.key
            ids = torch.tensor([row.example.ids])
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            labels = torch.tensor(row.example.labels[1:])
            loss = F.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="sum")
            loss.backward()
            total += float(loss.detach())
        return total, [theirs.grad.clone() for _, _, theirs in self.pairs]

    def clear(self) -> None:
        """Begin anew."""
        for _, ours, _ in self.pairs:
            ours.grad = None

    def ours(self) -> list[tuple[str, torch.Tensor]]:
        """The gradients that our parameters have."""
        for name, ours, _ in self.pairs:
            assert ours.grad is not None, f"{name} has no gradient"
        return [(name, ours.grad.clone()) for name, ours, _ in self.pairs]


def rows_of(examples: Sequence[Example], learner: int = 0, salt: int = 0) -> list[Row]:
    """Rows with keys of all 63 bits."""
    return [Row(e, learner, (0x3C6EF372FE94F82A * (i + 1 + salt)) % 2**63) for i, e in enumerate(examples)]


def error(ours: Sequence[tuple[str, torch.Tensor]], theirs: Sequence[torch.Tensor]) -> float:
    """The largest difference of a gradient as a share of its own largest value."""
    worst = 0.0
    for (name, own), other in zip(ours, theirs, strict=True):
        scale = float(other.abs().max())
        assert scale > 1e-9, f"the reference gradient of {name} is zero"
        worst = max(worst, float((own.double() - other.double()).abs().max()) / scale)
    return worst
