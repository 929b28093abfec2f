"""What an adapter is, without its tensors: frozen typed values that everything above works with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .patterns import first_match

HEADED = ("SEQ_CLS", "TOKEN_CLS")
"""PEFT's task types of adapters with a head of their own: it gives labels, of a text or of each token."""


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA or DoRA adapter. `target_modules` is sorted; () means that only the tensors say which modules."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    dropout: float = 0.0
    lora_bias: bool = False
    bias: Literal["none"] = "none"
    fan_in_fan_out: bool = False
    modules_to_save: tuple[str, ...] = ()
    task_type: str | None = None
    base_model: str | None = None
    revision: str | None = None

    def rank_of(self, module_name: str) -> int:
        """The rank at one module (its path inside the base model)."""
        key = first_match(self.rank_pattern, module_name)
        return self.rank if key is None else self.rank_pattern[key]

    def scaling(self, module_name: str, rank: int | None = None) -> float:
        """The factor before B @ A at one module: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        key = first_match(self.alpha_pattern, module_name)
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        rank = self.rank_of(module_name) if rank is None else rank
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module_name: str) -> bool:
        """Whether the configuration names this module, by its whole path or by whole last components of it."""
        return _named(module_name, self.target_modules)


@dataclass(frozen=True)
class Ia3Spec:
    """An IA3 adapter (arXiv 2205.05638): factors on the outputs of some layers, on the inputs of others.

    Attributes:
        target_modules: sorted; () means that only the tensors say which modules.
        feedforward_modules: sorted; the modules whose input is scaled; () means that only the tensors say which.
    """

    target_modules: tuple[str, ...] = ()
    feedforward_modules: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    modules_to_save: tuple[str, ...] = ()
    task_type: str | None = None
    base_model: str | None = None
    revision: str | None = None

    def targets(self, module_name: str) -> bool:
        """Whether the configuration names this module, by its whole path or by whole last components of it."""
        return _named(module_name, self.target_modules)

    def scales_input(self, module_name: str) -> bool | None:
        """Whether the input of this module is scaled, and not its output; None where only the tensors say."""
        if not self.feedforward_modules:
            return None
        # PEFT's rule; unlike that for target_modules it asks for no dot before the name.
        return module_name.endswith(self.feedforward_modules)


@dataclass(frozen=True)
class FactoredSpec:
    """A sum with a weight that is written as a product of small matrices otherwise than in LoRA.

    ADALORA: B diag(E) A (arXiv 2303.10512). LOHA: (A1 B1) * (A2 B2), value by value (arXiv 2108.06098). LOKR: the
    Kronecker product of two matrices, each of them whole or a product (arXiv 2309.14859).

    Attributes:
        options: the other keys of the configuration that PEFT needs to read the tensors.
    """

    method: Literal["ADALORA", "LOHA", "LOKR"]
    rank: int
    alpha: float
    target_modules: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    task_type: str | None = None
    base_model: str | None = None
    revision: str | None = None

    def rank_of(self, module_name: str) -> int:
        """The rank at one module (its path inside the base model); AdaLoRA's masks say what is left of it."""
        mask = self.options.get("rank_pattern", {}).get(f"{module_name}.lora_E")
        if mask is not None:
            return sum(mask)
        key = first_match(self.rank_pattern, module_name)
        return self.rank if key is None else self.rank_pattern[key]

    def alpha_of(self, module_name: str) -> float:
        """The alpha at one module."""
        key = first_match(self.alpha_pattern, module_name)
        return self.alpha if key is None else self.alpha_pattern[key]

    def targets(self, module_name: str) -> bool:
        """Whether the configuration names this module, by its whole path or by whole last components of it."""
        return _named(module_name, self.target_modules)


@dataclass(frozen=True)
class PrefixSpec:
    """A prefix-tuning adapter: `num_virtual_tokens` keys and values of width `token_dim` in each of `num_layers`."""

    num_virtual_tokens: int
    token_dim: int
    num_layers: int
    num_attention_heads: int
    num_transformer_submodules: int = 1
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    modules_to_save: tuple[str, ...] = ()
    task_type: str | None = None
    base_model: str | None = None
    revision: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of `prompt_embeddings` on disk: [virtual tokens, layers * 2 * token_dim]."""
        return (self.num_virtual_tokens, self.num_layers * 2 * self.token_dim)


@dataclass(frozen=True)
class PromptSpec:
    """A prompt-tuning adapter (arXiv 2104.08691): embeddings of `num_virtual_tokens` in front of a text's own.

    P-tuning (arXiv 2103.10385) comes to the same once it is trained: PEFT saves what its prompt encoder gives.
    """

    num_virtual_tokens: int
    token_dim: int
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_transformer_submodules: int = 1
    method: Literal["PROMPT_TUNING", "P_TUNING"] = "PROMPT_TUNING"
    modules_to_save: tuple[str, ...] = ()
    task_type: str | None = None
    base_model: str | None = None
    revision: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of `prompt_embeddings` on disk: [virtual tokens * submodules, token_dim]."""
        return (self.num_virtual_tokens * self.num_transformer_submodules, self.token_dim)


@dataclass(frozen=True)
class InjectedSpec:
    """An adapter of a PEFT method without a form of ours: PEFT's own layers compute with it.

    Attributes:
        method: PEFT's `peft_type`, one of `formats.injected.METHODS`.
        options: every other key of the configuration that PEFT builds the layers from, read and in range.
    """

    method: str
    options: Mapping[str, Any]
    target_modules: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    task_type: str | None = None
    base_model: str | None = None
    revision: str | None = None

    def targets(self, module_name: str) -> bool:
        """Whether the configuration names this module, by its whole path or by whole last components of it."""
        return _named(module_name, self.target_modules)


Spec = LoraSpec | FactoredSpec | Ia3Spec | PrefixSpec | PromptSpec | InjectedSpec


def _named(module_name: str, targets: tuple[str, ...]) -> bool:
    return any(module_name == target or module_name.endswith("." + target) for target in targets)
