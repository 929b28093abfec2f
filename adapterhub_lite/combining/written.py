"""Changes as one LoRA adapter that any reader of PEFT's files computes alike: the factors carry everything.

Every scale is in the factors, so alpha is the rank and the scaling 1, with rsLoRA or without patterns no other. Where
layers differ in rank, `rank_pattern` and `alpha_pattern` name each by its whole path between `^` and PEFT's own `$`, so
that no key can match another module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..adapters.adapter import Adapter
from ..adapters.lora import PREFIX
from ..adapters.sites import matches_any
from ..errors import AdapterMismatch, Unsupported
from ..formats.patterns import is_pattern
from ..formats.peft_config import MAX_RANK
from ..formats.specs import LoraSpec, Spec
from ..kernels.matrices import all_finite
from .low_rank import LowRank


@dataclass(frozen=True)
class Written:
    """What one layer gets.

    Attributes:
        matrix: of any rank; one of 0 is written as one of 1, since PEFT knows none.
        bias: [out] or None.
    """

    matrix: LowRank
    bias: torch.Tensor | None = None
    embedding: bool = False


@dataclass(frozen=True)
class Kin:
    """What an adapter shares with those that it was made of."""

    task_type: str | None
    base_model: str | None
    revision: str | None
    fan_in_fan_out: bool
    modules_to_save: tuple[str, ...] = ()


def lora_adapter(
    name: str,
    layers: Mapping[str, Written],
    kin: Kin,
    targets: tuple[str, ...],
    head: Mapping[str, torch.Tensor],
) -> Adapter:
    """An adapter of these layers, in float32, and of the whole tensors of a head.

    Args:
        layers: by module name; `head` by names inside the base.

    Raises:
        Unsupported: a rank, or a name, that no configuration can hold; a bias beside an embedding.
        AdapterMismatch: values that float32 cannot hold.
    """
    ranks = {module: max(1, layer.matrix.rank) for module, layer in layers.items()}
    biased = any(layer.bias is not None for layer in layers.values())
    if biased and any(layer.embedding for layer in layers.values()):
        raise Unsupported(
            f"{name} would add to a bias and change an embedding, which PEFT does not do in one adapter (lora_bias).",
            "Take adapters without lora_bias, or without the embedding.",
        )
    tensors: dict[str, torch.Tensor] = {}
    for module, layer in layers.items():
        tensors |= _tensors(module, layer, biased)
    if not all_finite(tensors.values()):
        raise AdapterMismatch(f"{name}: a value is beyond what float32 holds.", "Give smaller weights.")
    rank, patterns = _ranks(ranks)
    spec = LoraSpec(
        rank=rank,
        alpha=float(rank),
        target_modules=targets,
        rank_pattern=patterns,
        alpha_pattern={key: float(value) for key, value in patterns.items()},
        lora_bias=biased,
        fan_in_fan_out=kin.fan_in_fan_out,
        modules_to_save=kin.modules_to_save,
        task_type=kin.task_type,
        base_model=kin.base_model,
        revision=kin.revision,
    )
    whole = {PREFIX + key: tensor for key, tensor in head.items()}
    return Adapter(spec, tensors | whole, name=name)


def _tensors(module: str, layer: Written, biased: bool) -> dict[str, torch.Tensor]:
    down, up = layer.matrix.down.float(), layer.matrix.up.float()
    if not layer.matrix.rank:
        down, up = down.new_zeros(1, down.shape[1]), up.new_zeros(up.shape[0], 1)
    stem = PREFIX + module
    if layer.embedding:
        return {f"{stem}.lora_embedding_A": down.contiguous(), f"{stem}.lora_embedding_B": up.contiguous()}
    found = {f"{stem}.lora_A.weight": down.contiguous(), f"{stem}.lora_B.weight": up.contiguous()}
    if biased:
        found[f"{stem}.lora_B.bias"] = up.new_zeros(up.shape[0]) if layer.bias is None else layer.bias.float()
    return found


def _ranks(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The commonest rank, and that of each layer which has another, by an anchored key."""
    largest = max(ranks, key=lambda module: ranks[module])
    if ranks[largest] > MAX_RANK:
        raise Unsupported(
            f"{largest} would have the rank {ranks[largest]}, and {MAX_RANK} is the largest that is stored.",
            f"Give a rank of at most {MAX_RANK}, or an error, with a method that is not cat.",
        )
    counts = Counter(ranks.values())
    common = max(counts, key=lambda rank: (counts[rank], rank))
    patterns = {anchored(module): rank for module, rank in sorted(ranks.items()) if rank != common}
    for key in patterns:
        if not is_pattern(key):
            raise Unsupported(f"{key} is no name that rank_pattern can hold.", "Give a rank, so that all have one.")
    return common, patterns


def anchored(module: str) -> str:
    """A key of `rank_pattern` that names this module alone."""
    return "^" + module.replace(".", "\\.")


def target_names(kept: Iterable[str], left_out: Iterable[str], specs: Iterable[Spec]) -> tuple[str, ...]:
    """`target_modules` that name the layers which are kept, and none of those which are left out.

    A name that a member targets by names all its layers in the base, so it is used where all of them are kept; any
    other layer is named by its whole path.
    """
    kept = set(kept)
    named = {target for spec in specs for target in spec.target_modules}  # type: ignore[union-attr]
    named = (named & _ends(kept)) - _ends(left_out)
    return tuple(sorted(named | {module for module in kept if not matches_any(module, named)}))


def _ends(modules: Iterable[str]) -> set[str]:
    """The paths that name a module by its last components, and by all of them."""
    found = set()
    for module in modules:
        parts = module.split(".")
        found |= {".".join(parts[i:]) for i in range(len(parts))}
    return found
