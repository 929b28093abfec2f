"""The change of each module as two thin matrices, whatever method it was trained with.

LoRA's own matrices are taken as they are stored, with their scale beside them: nothing is rounded before it must be.
Other methods come through `combining.changes`, AdaLoRA, LoHa and LoKr exactly, DoRA and IA3 by SVD.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..adapters.adapter import Adapter
from ..adapters.lora import PREFIX, split_tensors
from ..combining.changes import changes_of
from ..combining.low_rank import LowRank
from ..errors import AdapterMismatch
from ..formats.adapter_files import A_SUFFIX, B_SUFFIX
from ..formats.specs import FactoredSpec, LoraSpec
from ..merging.weights import Weights


@dataclass(frozen=True)
class Pair:
    """scale * up @ down.

    Attributes:
        down, up: [rank, in] and [out, rank], in the dtype they were stored in.
        embedding: whether the layer is an embedding, whose `down` PEFT calls lora_embedding_A [rank, rows].
        error: relative Frobenius error of this form to what the module's method computes.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float = 1.0
    embedding: bool = False
    error: float = 0.0

    @property
    def rank(self) -> int:
        """Columns of `up`."""
        return int(self.up.shape[1])

    @property
    def exact(self) -> LowRank:
        """The change in float64, with its scale."""
        return LowRank(self.down.double(), self.up.double() * self.scale)

    @property
    def norm(self) -> float:
        """Frobenius norm of what the module's method computes: what an SVD left out is orthogonal to what it kept."""
        return self.exact.norm() / math.sqrt(max(1 - self.error**2, 1e-12))

    def truncated(self, rank: int | None, error: float | None) -> Pair:
        """The best pair of at most `rank`, or of the smallest rank within the relative `error` (Eckart-Young)."""
        cut, lost = self.exact.truncated(rank, error)
        if cut.rank >= self.rank:
            return self
        dtype = torch.promote_types(self.up.dtype, torch.float32)
        return Pair(cut.down.to(dtype), cut.up.to(dtype), 1.0, self.embedding, math.hypot(self.error, lost))


@dataclass(frozen=True)
class Pairs:
    """All changes of an adapter.

    Attributes:
        modules: by the names that PEFT gives modules.
        biases: modules whose change adds a bias.
        heads: whole tensors of `modules_to_save`, by their keys in the file.
    """

    modules: Mapping[str, Pair]
    biases: tuple[str, ...]
    heads: Mapping[str, torch.Tensor]


def is_exact(adapter: Adapter) -> bool:
    """Whether the method's change is a product of thin matrices, so that no weight of the base is needed."""
    return isinstance(adapter.spec, FactoredSpec) or (isinstance(adapter.spec, LoraSpec) and not adapter.spec.use_dora)


def pairs_of(
    adapter: Adapter, weights: Weights | None = None, rank: int | None = None, error: float | None = None
) -> Pairs:
    """The changes of an adapter.

    Args:
        rank, error: for DoRA and IA3, whose changes have full rank: how they are approximated.

    Raises:
        Unsupported: a method that does not change weights, or one that needs `weights` where they are None.
    """
    if isinstance(adapter.spec, LoraSpec) and not adapter.spec.use_dora:
        return _stored(adapter, adapter.spec)
    if is_exact(adapter):
        rank = error = None
    of = (weights.weight, weights.bias) if weights is not None else (None, None)
    found = changes_of(adapter, of[0], rank=rank, error=error, bias_of=of[1])
    modules = {
        name: Pair(change.matrix.down.float(), change.matrix.up.float(), 1.0, change.embedding, change.error)
        for name, change in found.modules.items()
    }
    biases = tuple(name for name, change in found.modules.items() if change.bias is not None)
    return Pairs(modules, biases, {PREFIX + key: tensor for key, tensor in found.head.items()})


def _stored(adapter: Adapter, spec: LoraSpec) -> Pairs:
    parts, others = split_tensors(adapter.tensors)
    modules = {name: _pair(spec, name, part.get("A"), part.get("B")) for name, part in parts.items()}
    for key in [key for key in others if key.endswith(A_SUFFIX["embedding"])]:
        name = key.removeprefix(PREFIX).removesuffix(A_SUFFIX["embedding"])
        up = others.pop(PREFIX + name + B_SUFFIX["embedding"], None)
        modules[name] = _pair(spec, name, others.pop(key), up, embedding=True)
    return Pairs(modules, tuple(name for name, part in parts.items() if "bias" in part), others)


def _pair(
    spec: LoraSpec, name: str, down: torch.Tensor | None, up: torch.Tensor | None, *, embedding: bool = False
) -> Pair:
    if down is None or up is None or down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
        raise AdapterMismatch(f"{name} has no A and B that belong together.", "Import it again.")
    return Pair(down, up, spec.scaling(name, down.shape[0]), embedding)


def total(parts: Iterable[tuple[float, float]]) -> float:
    """The relative error of all modules as one, of (absolute error, norm) of each."""
    listed = list(parts)
    whole = math.hypot(*(norm for _, norm in listed))
    return math.hypot(*(error for error, _ in listed)) / whole if whole else 0.0
