"""A small adapter of what rounding lost: the best low-rank part of merged weight less stored one, layer by layer.

Without inputs, best by the Frobenius norm (Eckart and Young 1936); with them, by the error of the layer's output (as in
QERA, arXiv 2410.06040). The weights are those of a merge without it, so that they are a merged model by themselves;
rounding and repairing in turn, as LoftQ does (arXiv 2310.08659), would leave some of the adapter to the residual alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from ..adapters.adapter import Adapter
from ..formats.specs import LoraSpec
from ..store.fs import MUTABLE, FileSystem, write_file
from .inputs import PANEL, Directions, Inputs, damped

FOLDER = "residual"
_EXACT = 256  # the shorter side of a matrix whose singular vectors are computed exactly
_SPARE, _STEPS = 8, 4  # of the block Krylov method: vectors beside those that are wanted, powers


@dataclass(frozen=True)
class Factors:
    """up [out, r] down [r, in]."""

    down: torch.Tensor
    up: torch.Tensor

    def dense(self) -> torch.Tensor:
        """The product [out, in]."""
        return self.up @ self.down


def directions_of(change: Factors) -> Directions:
    """The inputs that a change answers to, each by how strongly: its right singular vectors over the largest value."""
    left, right = torch.linalg.qr(change.up), torch.linalg.qr(change.down.T)
    _, values, turned = torch.linalg.svd(left.R @ right.R.T)
    share = values / values[0] if float(values[0]) > 0 else values
    return Directions(share[:, None] * (turned @ right.Q.T))


class Metric:
    """How a loss E [out, in] of a weight is measured: |E|, or |E S| where inputs are known and S S^T their moments."""

    def __init__(self, inputs: Inputs | None) -> None:
        self._factor: torch.Tensor | None = None  # S: lower triangular [in, in], or its diagonal [in]
        if inputs is not None and inputs.width <= PANEL:
            self._factor = torch.linalg.cholesky(damped(inputs.moment(0, inputs.width))).float()
        elif inputs is not None:
            self._factor = inputs.scales().clamp(min=1e-6)

    def of(self, loss: torch.Tensor) -> torch.Tensor:
        """E S."""
        if self._factor is None:
            return loss
        return loss * self._factor if self._factor.dim() == 1 else loss @ self._factor

    def back(self, down: torch.Tensor) -> torch.Tensor:
        """down S^-1."""
        if self._factor is None:
            return down
        if self._factor.dim() == 1:
            return down / self._factor
        solved: torch.Tensor = torch.linalg.solve_triangular(self._factor, down, upper=False, left=False)
        return solved

    def error(self, loss: torch.Tensor) -> float:
        """|E S| squared."""
        return float(self.of(loss).double().square().sum())


@lru_cache(maxsize=1)
def metric_of(inputs: Inputs | None) -> Metric:
    """Layers of one input follow each other."""
    return Metric(inputs)


def low_rank(matrix: torch.Tensor, rank: int, metric: Metric | None = None) -> Factors:
    """The product of `rank` directions that is nearest to matrix [out, in] by a metric; the same in every run.

    Both factors get the root of each singular value.
    """
    metric = metric or Metric(None)
    up, values, down = _leading(metric.of(matrix), min(rank, *matrix.shape))
    roots = values.sqrt()
    return Factors(metric.back(roots[:, None] * down).contiguous(), (up * roots).contiguous())


def residual_adapter_of(
    factors: Mapping[str, Factors], rank: int, linear: Mapping[str, object], task: str | None, dtype: torch.dtype
) -> Adapter:
    """The adapter that adds the factors of each module; scaling 1 everywhere.

    Args:
        linear: names of all linear layers of the model, to name the targets as shortly as they can be.
        task: PEFT's task type.
    """
    tensors: dict[str, torch.Tensor] = {}
    ranks = {name: f.down.shape[0] for name, f in factors.items() if f.down.shape[0] != rank}
    for name, f in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = f.down.to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = f.up.to(dtype)
    short = {name.rpartition(".")[2] for name in factors}
    exact = {name for name in linear if name.rpartition(".")[2] in short} == set(factors)
    spec = LoraSpec(
        rank=rank,
        alpha=float(rank),
        target_modules=tuple(sorted(short if exact else factors)),
        rank_pattern=ranks,
        alpha_pattern={name: float(count) for name, count in ranks.items()},
        task_type=task,
    )
    return Adapter(spec, tensors, name=FOLDER)


def write_residual(adapter: Adapter, folder: Path, fs: FileSystem | None = None) -> Path:
    """Write an adapter as PEFT's folder `residual` in a folder of weights; returns it."""
    fs = fs or FileSystem()
    fs.mkdir(folder / FOLDER)
    for name, data in adapter.files().items():
        write_file(fs, folder / FOLDER / name, data, MUTABLE)
    fs.fsync_dir(folder / FOLDER)
    return folder / FOLDER


def _leading(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading singular vectors and values: [out, r], [r], [r, in]."""
    if matrix.shape[0] < matrix.shape[1]:
        down, values, up = _leading(matrix.T, rank)
        return up.T, values, down.T
    basis = _right_basis(matrix, rank)
    small = matrix if basis is None else matrix @ basis
    gram = small.T.double() @ small.double()
    squares, vectors = torch.linalg.eigh(gram)
    vectors = vectors[:, -rank:].flip(1).float()
    values = squares[-rank:].flip(0).clamp(min=0).sqrt().float()
    up = (small @ vectors) / values.clamp(min=torch.finfo(torch.float32).tiny)
    right = vectors if basis is None else basis @ vectors
    return up, values, right.T


def _right_basis(matrix: torch.Tensor, rank: int) -> torch.Tensor | None:
    """Orthonormal [in, k], nearly the leading right singular vectors: a block Krylov space (arXiv 1504.05477).

    None where the matrix is small. A spectrum of rounding errors is flat, so that powers alone gain little.
    """
    if matrix.shape[1] <= _EXACT:
        return None
    generator = torch.Generator().manual_seed(0)
    block = torch.randn((matrix.shape[0], rank + _SPARE), generator=generator)
    blocks = []
    for _ in range(_STEPS):
        block = torch.linalg.qr(matrix.T @ block).Q
        blocks.append(block)
        block = matrix @ block
    whole: torch.Tensor = torch.linalg.qr(torch.cat(blocks, 1)).Q
    return whole
