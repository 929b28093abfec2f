"""The products of a base's own forward: layers of one input at once, each in the form that is fastest for its rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..adapters.pack import Group
from ..adapters.sites import features
from ..bases.fused import fuse
from ..bases.packing import packable, packed
from ..kernels.packed import PackedWeight
from .changes import Changes

# Row counts at which the native product is compared with torch's; above the last one torch's is used unasked.
_TRIED = (1, 4, 8, 16, 32, 64)
_SITES = 8
_REPEATS = 4


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
        self._bias = torch.cat(own) if own and self.uniform else None

    def __call__(self, x: torch.Tensor, changes: Changes) -> torch.Tensor:
        """x [rows, ..., in] -> [rows, ..., out of all layers]."""
        if self.packed is not None and x.numel() <= self.packed_rows * x.shape[-1]:
            out = self.packed(x, self._bias)
        else:
            out = self.plain(x)
        changes.apply(self.modules, x, out, self._biases)
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


def pack_sites(sites: Sequence[Site]) -> None:
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
    for some in alike.values():
        rows = _rows_up_to(some[:_SITES])
        for site in some:
            site.packed_rows = rows


def _rows_up_to(sites: Sequence[Site]) -> int:
    some = next(sites[0].modules[0].parameters())
    dtype = some.dtype if some.is_floating_point() else torch.float32
    best = 0
    for rows in _TRIED:
        x = torch.ones((rows, features(sites[0].modules[0])[0]), dtype=dtype)
        with torch.inference_mode():
            native = _seconds([partial(site.packed, x) for site in sites if site.packed is not None])
            plain = _seconds([partial(site.plain, x) for site in sites])
        if native > plain:
            break
        best = rows
    return best


def _seconds(works: Sequence[Callable[[], object]]) -> float:
    times = []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        for work in works:
            work()
        times.append(time.perf_counter() - begun)
    return min(times)
