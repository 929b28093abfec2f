"""Fit an adapter to a base: every tensor lands in a module, exactly, or nothing does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ..errors import AdapterMismatch, NoEffect, Unsupported
from ..formats.specs import FactoredSpec, Ia3Spec, InjectedSpec, LoraSpec, PrefixSpec, PromptSpec
from ..kernels.matrices import all_finite
from .adapter import Adapter, check_finite
from .factored import fit_factored, split_factors
from .ia3 import fit_ia3, split_ia3
from .injected import Injected, fit_injected
from .lora import PREFIX, LoraSite, fit_lora, split_tensors
from .pack import Group, Pack, Packing, pack, unpacked
from .prefix import FittedPrefix, fit_prefix, prefix_shape
from .prompt import FittedPrompt, fit_prompt

if TYPE_CHECKING:
    from .layout import Laid

# Outputs of a layer are of the order of 1; float32 does not see less than this beside them.
LEAST_STRENGTH = 1e-9


class HeadBuilder(Protocol):
    """What builds a classification head from its tensors (a view's head slot)."""

    def build(self, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """The head as a module."""
        ...


@dataclass(frozen=True)
class Target:
    """The part of a base an adapter is fitted to.

    Attributes:
        modules: module name -> module, as the adapter's PEFT class names them.
        head, head_name: the classification head's slot and attribute name, if the class has one.
        dense_weight: gives a site's frozen weight as a dense tensor.
        embed: the embedding of token ids; None where nothing can stand before a text's tokens.
        read_prompt: for a causal base, the keys and values that embeddings [tokens, hidden] leave behind.
    """

    modules: Mapping[str, nn.Module]
    config: Any
    head: HeadBuilder | None
    head_name: str
    dense_weight: Callable[[nn.Module, torch.dtype], torch.Tensor]
    embed: nn.Module | None = None
    read_prompt: Callable[[torch.Tensor], FittedPrefix] | None = None


@dataclass(frozen=True)
class Fitted:
    """An adapter whose every tensor has its place in one base.

    Attributes:
        sites: module -> its change; empty for prefixes and prompts.
        prefix: keys and values, or None.
        head: the classification head, or None.
        packs: the tensors of `sites` as a runtime's products read them (`packed`).
        prompt: embeddings before a text's own, where they cannot be read ahead of it; or None.
        matrices_finite: whether that is known of the matrices in `packs`, so that none of them has to be read for it.
        injected: the changed layers as PEFT's own, where we have no form of them; bound to the base's device.
    """

    name: str
    digest: str
    task_type: str | None
    sites: dict[nn.Module, LoraSite]
    prefix: FittedPrefix | None
    head: nn.Module | None
    tensors: int
    packs: dict[Group, Pack] = field(default_factory=dict)
    prompt: FittedPrompt | None = None
    injected: Injected | None = None
    matrices_finite: bool = False
    laid: Laid | None = field(default=None, init=False, repr=False, compare=False)
    """How its matrices lie, if others lie so too; a copy with something replaced has lost it."""

    @property
    def virtual_tokens(self) -> int:
        """Positions that a row of this adapter needs before its text."""
        return (self.prefix.tokens if self.prefix else 0) + (self.prompt.tokens if self.prompt else 0)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        head = sum(p.nbytes for p in self.head.parameters()) if self.head is not None else 0
        parts = (*self.sites.values(), self.prefix, self.prompt, self.injected)
        return head + sum(part.nbytes for part in parts if part is not None)

    @property
    def finite(self) -> bool:
        """Whether every value is a number: scaling, or a narrower dtype, can make infinity of a large one."""
        if self.packs:
            found = [t for one in self.packs.values() for t in (one.vectors if self.matrices_finite else one.tensors)]
        else:
            found = [t for site in self.sites.values() for t in site.tensors]
        found += [self.prefix.keys, self.prefix.values] if self.prefix else []
        found += [self.prompt.embeddings] if self.prompt else []
        found += self.injected.tensors if self.injected else []
        found += list(self.head.parameters()) if self.head is not None else []
        return all_finite(found)

    def to(self, device: torch.device, dtype: torch.dtype) -> Fitted:
        """The same adapter on `device` in `dtype`; layers of PEFT stay where their base is."""
        return Fitted(
            self.name,
            self.digest,
            self.task_type,
            {m: s.to(device, dtype) for m, s in self.sites.items()},
            self.prefix.to(device, dtype) if self.prefix else None,
            self.head.to(device, dtype) if self.head is not None else None,
            self.tensors,
            prompt=self.prompt.to(device, dtype) if self.prompt else None,
            injected=self.injected,
        )

    def packed(self, groups: Iterable[Group]) -> Fitted:
        """The same adapter, packed for layers that share their input; `sites` become views of the packs."""
        return self.packing(groups)[0]

    def packing(self, groups: Iterable[Group]) -> tuple[Fitted, Packing]:
        """`packed`, and how it was done."""
        found = pack(self.sites, groups)
        return replace(self, packs=found.packs, sites=unpacked(found.packs), matrices_finite=found.finite), found


def fit(adapter: Adapter, target: Target) -> Fitted:
    """Fit `adapter` to `target`.

    Raises:
        AdapterMismatch: a tensor is missing, unexpected, misshapen or not finite.
        Unsupported: a prompt for a target that has no place before a text.
    """
    if not adapter.finite:
        check_finite(adapter.tensors, adapter.name, adapter.spec)
    parts = _Parts()
    if isinstance(adapter.spec, LoraSpec | FactoredSpec | Ia3Spec):
        others, stem = _fit_sites(adapter, adapter.spec, target, parts), PREFIX
    elif isinstance(adapter.spec, InjectedSpec):
        stem = PREFIX
        parts.injected, others = fit_injected(adapter.spec, adapter.tensors, target.modules, adapter.name)
    else:
        others, stem = _fit_front(adapter, adapter.spec, target, parts), "base_model."
    head = _fit_head(others, stem, target, adapter)
    task = adapter.spec.task_type
    fitted = Fitted(adapter.name, adapter.digest, task, parts.sites, parts.prefix, head, len(adapter.tensors))
    fitted = replace(fitted, prompt=parts.prompt, injected=parts.injected)
    _check_effect(fitted)
    return fitted


@dataclass
class _Parts:
    """What the tensors of an adapter become, but for its head."""

    sites: dict[nn.Module, LoraSite] = field(default_factory=dict)
    prefix: FittedPrefix | None = None
    prompt: FittedPrompt | None = None
    injected: Injected | None = None


def _fit_sites(
    adapter: Adapter, spec: LoraSpec | FactoredSpec | Ia3Spec, target: Target, parts: _Parts
) -> dict[str, torch.Tensor]:
    """Fit the changes of layers; returns the tensors that are left."""
    if isinstance(spec, LoraSpec):
        tensors, others = split_tensors(adapter.tensors)
        by_name = fit_lora(spec, tensors, target.modules, target.dense_weight)
    elif isinstance(spec, FactoredSpec):
        tensors, others = split_factors(adapter.tensors)
        by_name = fit_factored(spec, tensors, target.modules)
    else:
        vectors, others = split_ia3(adapter.tensors)
        by_name = fit_ia3(spec, vectors, target.modules)
    parts.sites = {target.modules[name]: site for name, site in by_name.items()}
    return others


def _fit_front(
    adapter: Adapter, spec: PrefixSpec | PromptSpec, target: Target, parts: _Parts
) -> dict[str, torch.Tensor]:
    """Fit what stands before a text; returns the tensors that are left."""
    others = dict(adapter.tensors)
    if "prompt_embeddings" not in others:
        kind = "prefix" if isinstance(spec, PrefixSpec) else "prompt"
        raise AdapterMismatch(f"{adapter.name}: the file holds no prompt_embeddings.", f"It is not a {kind} adapter.")
    embeddings = others.pop("prompt_embeddings").float()
    if isinstance(spec, PrefixSpec):
        parts.prefix = fit_prefix(spec, embeddings, prefix_shape(target.config))
        return others
    if target.embed is None:
        message = f"{adapter.name} is a prompt: tokens before the text, not a change of weights."
        raise Unsupported(message, "Serve it with its base.")
    hidden = int(target.embed.weight.shape[1])  # type: ignore[index,union-attr]
    embeddings = fit_prompt(spec, embeddings, hidden, 2 if target.config.is_encoder_decoder else 1)
    if target.read_prompt is not None:
        parts.prefix = target.read_prompt(embeddings)
    else:
        parts.prompt = FittedPrompt(embeddings, target.embed)
    return others


def strength(sites: Iterable[LoraSite]) -> float:
    """How far sites move an output; they are looked at until one moves it enough."""
    strongest = 0.0
    for site in sites:
        strongest = max(strongest, site.strength())
        if strongest >= LEAST_STRENGTH:
            break
    return strongest


def _check_effect(fitted: Fitted) -> None:
    """Refuse changes of layers that change nothing: the product of B and A is zero, or lost in float32's rounding."""
    if fitted.virtual_tokens or fitted.head is not None or not fitted.sites:
        return
    strongest = strength(fitted.sites.values())
    if strongest >= LEAST_STRENGTH:
        return
    raise NoEffect(
        f"{fitted.name} moves no logit (the largest change of a layer is {strongest:.1g}): it does nothing.",
        "It was not trained, or its alpha is wrong.",
    )


def _fit_head(tensors: dict[str, torch.Tensor], prefix: str, target: Target, adapter: Adapter) -> nn.Module | None:
    if not tensors:
        return None
    start = f"{prefix}{target.head_name}."
    unexpected = [k for k in tensors if target.head is None or not k.startswith(start)]
    if unexpected or target.head is None:
        raise AdapterMismatch(
            f"{adapter.name}: {len(unexpected)} of {len(adapter.tensors)} tensors have no place in this base: "
            f"{', '.join(sorted(unexpected)[:3])}.",
            "It was made for another model or task.",
        )
    return target.head.build({k.removeprefix(start): v.float() for k, v in tensors.items()})
