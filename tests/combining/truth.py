"""What combining is compared with: dense changes in float64, made of an adapter's tensors by PEFT's definitions, and
each rule by brute force on them. Nothing of ours computes here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.combining.changes import changes_of
from adapterhub_lite.formats.specs import LoraSpec

SHAPES = {
    "layers.0.attn.q_proj": (12, 20),
    "layers.0.mlp.down_proj": (20, 9),
    "layers.1.attn.q_proj": (12, 20),
    "layers.1.mlp.down_proj": (20, 9),
}
KINDS = ("lora", "patterns", "rslora", "bias", "dora")
_STEM = "base_model.model."
_WORD = 1 << 64


def weight_of(module: str) -> torch.Tensor:
    """The frozen weight of a layer of `SHAPES`."""
    generator = torch.Generator().manual_seed(sum(map(ord, module)))
    return torch.randn(SHAPES[module], generator=generator)


def lora(
    seed: int,
    kind: str = "lora",
    *,
    rank: int = 4,
    alpha: float = 6.0,
    modules: Sequence[str] = tuple(SHAPES),
    name: str = "",
    **spec: Any,
) -> Adapter:
    """A random adapter of one kind."""
    generator = torch.Generator().manual_seed(seed)
    patterns: dict[str, Any] = {}
    if kind == "patterns":
        patterns = {"rank_pattern": {"layers.1.attn.q_proj": 2, "down_proj": 3}, "alpha_pattern": {"q_proj": 5.0}}
    made = LoraSpec(
        rank,
        alpha,
        spec.pop("target_modules", tuple(sorted({m.rpartition(".")[2] for m in modules}))),
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
        lora_bias=kind == "bias",
        **patterns,
        **spec,
    )
    tensors = {}
    for module in modules:
        n_out, n_in = SHAPES[module]
        r = made.rank_pattern.get(get_pattern_key(made.rank_pattern, module), rank)
        tensors[f"{_STEM}{module}.lora_A.weight"] = torch.randn(r, n_in, generator=generator)
        tensors[f"{_STEM}{module}.lora_B.weight"] = torch.randn(n_out, r, generator=generator) / 5
        if kind == "bias":
            tensors[f"{_STEM}{module}.lora_B.bias"] = torch.randn(n_out, generator=generator)
        if kind == "dora":
            norms = weight_of(module).norm(dim=1)
            factor = 1 + 0.1 * torch.randn(n_out, generator=generator)
            tensors[f"{_STEM}{module}.lora_magnitude_vector"] = norms * factor
    return Adapter(made, tensors, name=name or f"{kind}-{seed}")


def scaling(spec: LoraSpec, module: str) -> float:
    """PEFT's, by its own regular expressions."""
    rank = spec.rank_pattern.get(get_pattern_key(spec.rank_pattern, module), spec.rank)
    alpha = spec.alpha_pattern.get(get_pattern_key(spec.alpha_pattern, module), spec.alpha)
    return alpha / math.sqrt(rank) if spec.use_rslora else alpha / rank


def dense(adapter: Adapter) -> dict[str, torch.Tensor]:
    """What a LoRA or DoRA adapter adds to each weight, [out, in] in float64."""
    spec, found = adapter.spec, {}
    assert isinstance(spec, LoraSpec)
    for key, down in adapter.tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removeprefix(_STEM).removesuffix(".lora_A.weight")
        up = adapter.tensors[key.replace("lora_A", "lora_B")]
        delta = scaling(spec, module) * up.double() @ down.double()
        magnitude = adapter.tensors.get(f"{_STEM}{module}.lora_magnitude_vector")
        if magnitude is not None:
            weight = weight_of(module).double()
            whole = weight + delta
            delta = magnitude.double()[:, None] * whole / whole.norm(dim=1, keepdim=True) - weight
        found[module] = delta
    return found


def biases(adapter: Adapter) -> dict[str, torch.Tensor]:
    """What an adapter adds to each layer's output."""
    assert isinstance(adapter.spec, LoraSpec)
    found = {}
    for key, bias in adapter.tensors.items():
        if key.endswith(".lora_B.bias"):
            module = key.removeprefix(_STEM).removesuffix(".lora_B.bias")
            found[module] = scaling(adapter.spec, module) * bias.double()
    return found


def changes(adapter: Adapter) -> Any:
    """Ours, DoRA at its full rank."""
    return changes_of(adapter, weight_of, rank=20)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error (Frobenius)."""
    norm = float(expected.norm())
    return float((found.double() - expected).norm()) / norm if norm else float(found.norm())


def best_error(matrix: torch.Tensor, rank: int) -> float:
    """The relative error of the best approximation of this rank (Eckart and Young)."""
    values = torch.linalg.svdvals(matrix.double())
    return float(values[rank:].norm() / values.norm())


# --- rules by brute force ----------------------------------------------------------------------------------------


def summed(deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The weighted sum."""
    return sum((w * d for w, d in zip(weights, deltas, strict=True)), torch.zeros_like(deltas[0]))


def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The largest values alone."""
    count = max(1, round(density * delta.numel()))
    kept = torch.zeros(delta.numel(), dtype=torch.bool)
    kept[delta.abs().flatten().topk(count).indices] = True
    return torch.where(kept.view(delta.shape), delta, 0.0)


def elect(deltas: Sequence[torch.Tensor], weights: Sequence[float], majority: str = "total") -> torch.Tensor:
    """TIES value by value, in plain Python."""
    found = torch.zeros_like(deltas[0])
    for row in range(found.shape[0]):
        for column in range(found.shape[1]):
            values = [w * float(d[row, column]) for w, d in zip(weights, deltas, strict=True)]
            total = math.fsum(values)
            votes = sum((v > 0) - (v < 0) for v in values)
            deciding = votes if majority == "frequency" and votes else total
            agreeing = [v for v in values if v * deciding > 0]
            if agreeing:
                found[row, column] = math.fsum(agreeing) / len(agreeing)
    return found


def kept_by_hash(begun: int, row: int, column: int, columns: int, density: float) -> bool:
    """Whether DARE keeps a value: splitmix64 with whole numbers of any size."""
    state = ((begun + row * columns + column) * 0x9E3779B97F4A7C15) % _WORD
    state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) % _WORD
    state = ((state ^ state >> 27) * 0x94D049BB133111EB) % _WORD
    return (state ^ state >> 31) >> 11 < int(density * 2**53)


def drop(delta: torch.Tensor, density: float, begun: int) -> torch.Tensor:
    """DARE value by value."""
    found = torch.zeros_like(delta)
    for row in range(delta.shape[0]):
        for column in range(delta.shape[1]):
            if kept_by_hash(begun, row, column, delta.shape[1], density):
                found[row, column] = delta[row, column] / density
    return found


def union(adapters: Sequence[Adapter]) -> list[str]:
    """All modules that any of them changes."""
    return sorted({module for adapter in adapters for module in dense(adapter)})


def by_module(values: Sequence[Mapping[str, torch.Tensor]], module: str) -> list[torch.Tensor]:
    """One module's of each, zeros where one has none."""
    return [value.get(module, torch.zeros(SHAPES[module], dtype=torch.float64)) for value in values]
