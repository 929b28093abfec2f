"""Fit an adapter to a base: every tensor lands in a module, exactly, or nothing does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import AdapterMismatch, NoEffect
from ..formats.peft_config import LoraSpec
from .adapter import Adapter, check_finite
from .lora import LoraSite, fit_lora, split_tensors
from .pack import Group, Pack, pack, unpack
from .prefix import FittedPrefix, fit_prefix, prefix_shape

# Outputs of a layer are of the order of 1; float32 does not see less than this beside them.
_LEAST_STRENGTH = 1e-9


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
    """

    modules: Mapping[str, nn.Module]
    config: Any
    head: HeadBuilder | None
    head_name: str
    dense_weight: Callable[[nn.Module, torch.dtype], torch.Tensor]


@dataclass(frozen=True)
class Fitted:
    """An adapter whose every tensor has its place in one base.

    Attributes:
        sites: module -> its change; empty for prefixes.
        prefix: keys and values, or None.
        head: the classification head, or None.
        packs: the tensors of `sites` as a runtime's products read them (`packed`).
    """

    name: str
    digest: str
    task_type: str | None
    sites: dict[nn.Module, LoraSite]
    prefix: FittedPrefix | None
    head: nn.Module | None
    tensors: int
    packs: dict[Group, Pack] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        head = sum(p.nbytes for p in self.head.parameters()) if self.head is not None else 0
        return head + sum(s.nbytes for s in self.sites.values()) + (self.prefix.nbytes if self.prefix else 0)

    @property
    def finite(self) -> bool:
        """Whether every value is a number: scaling, or a narrower dtype, can make infinity of a large one."""
        found = [t for s in self.sites.values() for t in (s.down, s.up, s.gain, s.bias) if t is not None]
        found += [self.prefix.keys, self.prefix.values] if self.prefix else []
        found += list(self.head.parameters()) if self.head is not None else []
        return all(bool(torch.isfinite(t).all()) for t in found)

    def to(self, device: torch.device, dtype: torch.dtype) -> Fitted:
        """The same adapter on `device` in `dtype`."""
        return Fitted(
            self.name,
            self.digest,
            self.task_type,
            {m: s.to(device, dtype) for m, s in self.sites.items()},
            self.prefix.to(device, dtype) if self.prefix else None,
            self.head.to(device, dtype) if self.head is not None else None,
            self.tensors,
        )

    def packed(self, groups: Iterable[Group]) -> Fitted:
        """The same adapter, packed for layers that share their input; `sites` become views of the packs."""
        packs = pack(self.sites, groups)
        return replace(self, packs=packs, sites={m: s for g, p in packs.items() for m, s in unpack(g, p)})


def fit(adapter: Adapter, target: Target) -> Fitted:
    """Fit `adapter` to `target`.

    Raises:
        AdapterMismatch: a tensor is missing, unexpected, misshapen or not finite.
    """
    check_finite(adapter.tensors, adapter.name)
    spec = adapter.spec
    if isinstance(spec, LoraSpec):
        parts, others = split_tensors(adapter.tensors)
        by_name = fit_lora(spec, parts, target.modules, target.dense_weight)
        sites = {target.modules[name]: site for name, site in by_name.items()}
        prefix = None
        head = _fit_head(others, "base_model.model.", target, adapter)
    else:
        others = dict(adapter.tensors)
        if "prompt_embeddings" not in others:
            raise AdapterMismatch(
                f"{adapter.name}: the file holds no prompt_embeddings.", "It is not a prefix adapter."
            )
        prefix = fit_prefix(spec, others.pop("prompt_embeddings").float(), prefix_shape(target.config))
        sites, head = {}, _fit_head(others, "base_model.", target, adapter)
    fitted = Fitted(adapter.name, adapter.digest, spec.task_type, sites, prefix, head, len(adapter.tensors))
    _check_effect(fitted)
    return fitted


def _check_effect(fitted: Fitted) -> None:
    """Refuse changes of layers that change nothing: the product of B and A is zero, or lost in float32's rounding."""
    if fitted.prefix is not None or fitted.head is not None or not fitted.sites:
        return
    strongest = max(site.strength() for site in fitted.sites.values())
    if strongest < _LEAST_STRENGTH:
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
