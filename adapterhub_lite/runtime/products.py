"""The products of a base's own forward: layers of one input at once, each in the form that is fastest for its rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..adapters.pack import Group
from ..bases.fused import fuse
from ..bases.packing import packable, packed
from ..bases.quantization import dense_weight
from ..kernels.packed import PackedWeight
from .changes import Changes

# Row counts at which the native product is compared with torch's; above the last one torch's is used unasked.
_TRIED = (1, 4, 8, 16, 32, 64, 128, 256)
_SITES = 8
_REPEATS = 4
_CLEARLY = 1.5  # a native product that is slower by less may have been disturbed: the next row count is tried
_MANY = 64  # from so many rows on less is measured: it takes longer, and says as much
# What was measured in this process, so that two loads of one base compute alike.
_LIMITS: dict[tuple[str, int, int, torch.dtype, int], int] = {}


class Site:
    """Layers of one input, computed as one product where their weights allow it, and changed as the plan says."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules: Group = modules
        self.packed: PackedWeight | None = None
        self.packed_rows = 0
        self._fused = fuse(modules)
        self._biases = [getattr(module, "bias", None) for module in modules]
        own = [bias.detach().float() for bias in self._biases if bias is not None]
        self.uniform = len(own) in (0, len(modules))
        self.bias = torch.cat(own) if own and self.uniform else None

    def __call__(self, x: torch.Tensor, changes: Changes) -> torch.Tensor:
        """x [rows, ..., in] -> [rows, ..., out of all layers]."""
        given = changes.scale_input(self.modules, x)
        if self.packed is not None and x.numel() <= self.packed_rows * x.shape[-1]:
            out = self.packed(given, self.bias)
        else:
            out = self.plain(given)
        changes.apply(self.modules, given, out, self._biases)
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a product of few rows reads."""
        if self.packed is not None and self.packed_rows:
            return self.packed.nbytes
        return sum(tensor.nbytes for module in self.modules for tensor in module.parameters())

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """The frozen product by torch."""
        if self._fused is not None:
            return F.linear(x, self._fused.weight, self._fused.bias)
        parts = [module(x) for module in self.modules]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def pack_sites(sites: Sequence[Site], dtype: torch.dtype) -> None:
    """Give every site a packed weight, if this machine has the native products, and find out up to how many rows each
    is faster than torch's product: measured once for every shape, over several sites, as a forward reads them.
    """
    if not packable([module for site in sites for module in site.modules]):
        return
    alike: dict[tuple[str, int, int], list[Site]] = {}
    for site in sites:
        site.packed = packed(site.modules) if site.uniform else None
        if site.packed is not None:
            alike.setdefault((site.packed.form, site.packed.n_in, site.packed.n_out), []).append(site)
    for shape, some in alike.items():
        key = (*shape, dtype, torch.get_num_threads())
        if key not in _LIMITS:
            _LIMITS[key] = _rows_up_to(some[:_SITES], dtype)
        for site in some:
            site.packed_rows = _LIMITS[key]


def _rows_up_to(sites: Sequence[Site], dtype: torch.dtype) -> int:
    """Torch's side computes with dense weights, also for quantised layers: a choice must not depend on free memory."""
    dense = [torch.cat([dense_weight(module, dtype) for module in site.modules]) for site in sites]
    best = 0
    for rows in _TRIED:
        x = torch.ones((rows, dense[0].shape[1]), dtype=dtype)
        repeats, some = (_REPEATS, _SITES) if rows < _MANY else (_REPEATS // 2, _SITES // 4)
        works = (
            [partial(site.packed, x) for site in sites[:some] if site.packed is not None],
            [partial(F.linear, x, weight) for weight in dense[:some]],
        )
        with torch.inference_mode():
            native, plain = _least_seconds(works, repeats)
        if native > _CLEARLY * plain:
            break
        if native <= plain:
            best = rows
    return best


def _least_seconds(works: Sequence[Sequence[Callable[[], object]]], repeats: int) -> list[float]:
    """Of each of some works the least of several times, taken in turn: what else the machine does hits all of them."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for found, work in zip(times, works, strict=True):
            begun = time.perf_counter()
            for call in work:
                call()
            found.append(time.perf_counter() - begun)
    return [min(found) for found in times]
