"""LoRA and DoRA fitted to the linear layers of a base (LoRA: arXiv 2106.09685; DoRA: arXiv 2402.09353).

Fitted form of one site, with W [out, in] frozen and s the scaling:
    LoRA:  y = W x + (s B) (A x)
    DoRA:  y = g * (W x) + (g s B) (A x),  g = magnitude / ||W + s B A|| per output row
so both are `down` [rank, in], `up` [out, rank] with every scale folded in, and DoRA adds `gain` = g - 1 [out].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import Unsupported
from ..formats.peft_config import LoraSpec
from .sites import check_fit, features, is_conv1d, is_linear, matches_any, not_a_site

PREFIX = "base_model.model."
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector(\.weight)?)"
)


@dataclass(frozen=True)
class LoraSite:
    """The change of one linear layer; all tensors in the dtype they compute in.

    Attributes:
        down, unscaled: [rank, in] and [out, rank]; the rank is 0 where nothing is added.
        gain, bias: [out] or None.
        scale: [in], the factor on the layer's input (IA3), or None.
        factor: `up` is `unscaled` times this; products read a copy anyway, which is made with it.
    """

    down: torch.Tensor
    unscaled: torch.Tensor
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    factor: float = 1.0

    @property
    def up(self) -> torch.Tensor:
        """[out, rank], with all scales folded in."""
        return self.unscaled if self.factor == 1.0 else self.unscaled * self.factor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors there are."""
        return tuple(t for t in (self.down, self.unscaled, self.gain, self.bias, self.scale) if t is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors)

    def strength(self) -> float:
        """How far the site moves an output for a fixed input of ones and minus ones.

        Sums, not products: a product of torch waits for its other threads, which a core that hashes does not run soon.
        """
        signs = torch.where(torch.arange(self.down.shape[1]) % 3 == 0, -1.0, 1.0).to(self.down)
        parts = [
            (self.unscaled * (self.down * signs).sum(1)).sum(1) * self.factor,
            *(t for t in (self.gain, self.bias) if t is not None and not t.is_meta),
        ]
        parts += [] if self.scale is None else [self.scale - 1]
        return max(float(p.abs().max()) for p in parts)

    def to(self, device: torch.device, dtype: torch.dtype) -> LoraSite:
        """A copy on `device` in `dtype`."""
        same = dtype == self.unscaled.dtype
        unscaled, factor = (self.unscaled, self.factor) if same else (self.up, 1.0)  # scaled before it is rounded
        gain, bias, scale = (None if t is None else t.to(device, dtype) for t in (self.gain, self.bias, self.scale))
        return LoraSite(self.down.to(device, dtype), unscaled.to(device, dtype), gain, bias, scale, factor)


def split_tensors(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Sort PEFT's keys into LoRA parts by module, {module: {"A", "B", "bias", "magnitude"}}, and all other tensors."""
    names = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_B.bias": "bias"}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    others: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            others[key] = tensor
        else:
            parts.setdefault(match["module"], {})[names.get(match["part"], "magnitude")] = tensor
    return parts, others


def fit_lora(
    spec: LoraSpec,
    parts: Mapping[str, Mapping[str, torch.Tensor]],
    modules: Mapping[str, nn.Module],
    dense_weight: Callable[[nn.Module, torch.dtype], torch.Tensor],
) -> dict[str, LoraSite]:
    """Check LoRA parts against the modules of a base, exactly, and fold all scales in (float32).

    Args:
        parts: as `split_tensors` gives them.
        modules: module name -> module of the base.
        dense_weight: gives the frozen weight of a site as a dense tensor (only called for DoRA).

    Raises:
        AdapterMismatch: a module that is missing here, misses in the file, or has another shape.
    """
    check_fit(mismatches(spec, parts, modules), len(parts))
    return {name: _fit_site(spec, name, part, modules[name], dense_weight) for name, part in parts.items()}


def mismatches(
    spec: LoraSpec, parts: Mapping[str, Mapping[str, torch.Tensor]], modules: Mapping[str, nn.Module]
) -> list[str]:
    """What keeps LoRA parts from fitting these modules, one line a module; only shapes are looked at."""
    problems = [p for name, part in parts.items() if (p := _site_problem(spec, name, part, modules.get(name)))]
    if spec.target_modules:
        targets = frozenset(spec.target_modules)
        expected = [name for name, module in modules.items() if is_linear(module) and matches_any(name, targets)]
        problems += [f"{name} is targeted but has no tensors" for name in expected if name not in parts]
    if not parts:
        problems.append("the file holds no LoRA tensor")
    return problems


def _site_problem(spec: LoraSpec, name: str, part: Mapping[str, torch.Tensor], module: nn.Module | None) -> str | None:
    wrong = not_a_site(name, module)
    if module is None or wrong:
        return wrong
    if "A" not in part or "B" not in part:
        return f"{name} has only one of lora_A and lora_B"
    if spec.use_dora != ("magnitude" in part):
        return f"{name} {'lacks' if spec.use_dora else 'has'} a magnitude vector"
    n_in, n_out = features(module)
    rank = part["A"].shape[0]
    if tuple(part["A"].shape) != (rank, n_in) or tuple(part["B"].shape) != (n_out, rank):
        return (
            f"{name} has A {list(part['A'].shape)} and B {list(part['B'].shape)}, "
            f"this layer needs [r, {n_in}] and [{n_out}, r]"
        )
    if "magnitude" in part and part["magnitude"].numel() != n_out:
        return f"{name} has a magnitude of {part['magnitude'].numel()}, this layer needs {n_out}"
    return None


def _fit_site(
    spec: LoraSpec,
    name: str,
    part: Mapping[str, torch.Tensor],
    module: nn.Module,
    dense_weight: Callable[[nn.Module, torch.dtype], torch.Tensor],
) -> LoraSite:
    down, up = part["A"].float(), part["B"].float()
    scaling = spec.scaling(name, down.shape[0])
    bias = part["bias"].float() * scaling if "bias" in part else None
    if "magnitude" not in part:
        return LoraSite(down, up, None, bias, factor=scaling)
    up = up * scaling
    if bias is not None:
        raise Unsupported(f"{name}: DoRA with lora_bias has no defined meaning.", "Train it without lora_bias.")
    weight = dense_weight(module, torch.float32).cpu()
    norm = merged_norm(weight.T if is_conv1d(module) else weight, down, up)
    ratio = part["magnitude"].float().flatten() / norm
    return LoraSite(down, ratio[:, None] * up, ratio - 1, None)


def merged_norm(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """||W + up down|| of each output row [out]; the sum is formed in row blocks, never as a whole."""
    blocks = [
        torch.linalg.vector_norm(torch.addmm(w, u, down), dim=1)
        for w, u in zip(torch.split(weight, 1024), torch.split(up, 1024), strict=True)
    ]
    return torch.cat(blocks)
