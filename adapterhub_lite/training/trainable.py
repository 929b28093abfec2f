"""Adapters while they are trained: parameters, their initial values, and how they change the base's layers.

LoRA as in arXiv 2106.09685 (A: Kaiming uniform, B: zero, as PEFT initialises), DoRA as in arXiv 2402.09353 with the
norm held constant in the backward (its section 4.3, as PEFT does), prefixes as in arXiv 2101.00190.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..adapters.lora import PREFIX, merged_norm
from ..adapters.prefix import FittedPrefix, PrefixShape, fit_prefix
from ..adapters.sites import features, is_conv1d
from ..bases.inputs import PrefixRows
from ..bases.quantization import dense_weight
from ..formats.peft_config import LoraSpec, PrefixSpec
from .trainable_peft import TrainablePeft


@dataclass
class LoraParameters:
    """The trained tensors of one site: A [rank, in], B [out, rank], DoRA's magnitude [out] or None."""

    module: nn.Module
    scaling: float
    a: nn.Parameter
    b: nn.Parameter
    magnitude: nn.Parameter | None = None
    training: bool = True

    def hook(self, dropout: float) -> Callable[..., torch.Tensor]:
        """A forward hook that adds this site's change, differentiably."""

        def change(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
            x = args[0]
            dropped = F.dropout(x, dropout, self.training) if dropout else x
            hidden = F.linear(dropped, self.a.to(x.dtype))
            if self.magnitude is None:
                return _add_scaled(out, hidden, self.b.to(x.dtype), self.scaling)
            return self._dora(out, dropped if dropout else None, hidden)

        return change

    def _dora(self, out: torch.Tensor, dropped: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
        assert self.magnitude is not None
        with torch.no_grad():
            weight = dense_weight(self.module, self.a.dtype)
            weight = weight.T if is_conv1d(self.module) else weight
            norm = merged_norm(weight, self.a, self.b * self.scaling)
        bias = getattr(self.module, "bias", None)
        if dropped is not None and self.training:
            frozen = F.linear(dropped, weight.to(dropped.dtype))
        else:
            frozen = out if bias is None else out - bias
        ratio = (self.magnitude / norm).to(out.dtype)
        return out + (ratio - 1) * frozen + ratio * F.linear(hidden, self.b.to(out.dtype)) * self.scaling


def _add_scaled(out: torch.Tensor, hidden: torch.Tensor, up: torch.Tensor, scaling: float) -> torch.Tensor:
    """out + scaling * hidden up^T in one operation."""
    flat = torch.addmm(out.view(-1, out.shape[-1]), hidden.view(-1, hidden.shape[-1]), up.t(), alpha=scaling)
    return flat.view(out.shape)


class TrainableLora:
    """LoRA or DoRA on the chosen sites of a base."""

    def __init__(self, spec: LoraSpec, sites: Mapping[str, nn.Module], generator: torch.Generator) -> None:
        self.spec = spec
        self.sites = {name: self._new(name, module, generator) for name, module in sites.items()}

    def _new(self, name: str, module: nn.Module, generator: torch.Generator) -> LoraParameters:
        rank = self.spec.rank_of(name)
        n_in, n_out = features(module)
        bound = math.sqrt(1 / n_in)  # Kaiming uniform with a = sqrt(5), as nn.Linear and PEFT
        device = next(module.parameters()).device
        a = ((torch.rand((rank, n_in), generator=generator) * 2 - 1) * bound).to(device)
        b = torch.zeros((n_out, rank), device=device)
        magnitude = None
        if self.spec.use_dora:
            weight = dense_weight(module, torch.float32)
            weight = weight.T if is_conv1d(module) else weight
            magnitude = nn.Parameter(torch.linalg.vector_norm(weight, dim=1))
        return LoraParameters(module, self.spec.scaling(name, rank), nn.Parameter(a), nn.Parameter(b), magnitude)

    @property
    def dropout(self) -> float:
        """Share of inputs dropped in training."""
        return self.spec.dropout

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        return [p for s in self.sites.values() for p in (s.a, s.b, s.magnitude) if p is not None]

    def prefix(self, rows: int, dtype: torch.dtype) -> PrefixRows | None:
        """LoRA has no prefix."""
        return None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block the base computes with this adapter."""
        handles = [s.module.register_forward_hook(s.hook(self.spec.dropout)) for s in self.sites.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def train(self, mode: bool) -> None:
        """Switch dropout."""
        for site in self.sites.values():
            site.training = mode

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors under PEFT's keys."""
        made = {}
        for name, site in self.sites.items():
            made[f"{PREFIX}{name}.lora_A.weight"] = site.a.detach()
            made[f"{PREFIX}{name}.lora_B.weight"] = site.b.detach()
            if site.magnitude is not None:
                made[f"{PREFIX}{name}.lora_magnitude_vector"] = site.magnitude.detach()
        return made

    head_prefix = PREFIX


class TrainablePrefix:
    """A prefix of keys and values, as they are or made by a two-layer network (`projection`)."""

    head_prefix = "base_model."
    dropout = 0.0

    def __init__(
        self,
        spec: PrefixSpec,
        shape: PrefixShape,
        generator: torch.Generator,
        device: torch.device,
        start: torch.Tensor | None = None,
    ) -> None:
        """start: initial `prompt_embeddings` [tokens, width], or None for standard normal values, as PEFT's."""
        self.spec = spec
        self._shape = shape
        tokens = spec.num_virtual_tokens
        self._network: nn.Module | None = None
        if spec.prefix_projection:
            width = spec.encoder_hidden_size or spec.token_dim
            first = torch.randn((tokens, spec.token_dim), generator=generator)
            self._network = _projection(spec.token_dim, width, shape.width, generator).to(device)
        else:
            first = torch.randn((tokens, shape.width), generator=generator) if start is None else start.clone()
        self._embedding = nn.Parameter(first.to(device))

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        return [self._embedding, *(self._network.parameters() if self._network else ())]

    def prefix(self, rows: int, dtype: torch.dtype) -> PrefixRows | None:
        """The prefix for every row of a batch, differentiably."""
        fitted: FittedPrefix = fit_prefix(self.spec, self._embeddings().to(dtype), self._shape)
        size = (-1, rows, -1, -1, -1)
        mask = torch.ones((rows, fitted.tokens), dtype=torch.long, device=self._embedding.device)
        return PrefixRows(fitted.keys[:, None].expand(size), fitted.values[:, None].expand(size), mask)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """A prefix changes inputs, not layers."""
        yield

    def train(self, mode: bool) -> None:
        """A prefix has no dropout."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors under PEFT's keys."""
        return {"prompt_embeddings": self._embeddings().detach()}

    def _embeddings(self) -> torch.Tensor:
        return self._embedding if self._network is None else self._network(self._embedding)


def _projection(width: int, hidden: int, out: int, generator: torch.Generator) -> nn.Module:
    """PEFT's PrefixEncoder: Linear, tanh, Linear, initialised as nn.Linear but from our generator."""
    network = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, out))
    for layer in network:
        if isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            for parameter in layer.parameters():
                parameter.data.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
    return network


Trainable = TrainableLora | TrainablePrefix | TrainablePeft
