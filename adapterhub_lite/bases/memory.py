"""How much memory a base takes, and whether a CPU has room for dequantised working copies."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .quantization import is_quantized, state_tensors

# A quarter of what is free now leaves room for activations, adapters and other programs.
_SHARE_FOR_COPIES = 0.25


@dataclass(frozen=True)
class MemoryReport:
    """Bytes held by a loaded base."""

    quantized: int
    other: int
    working_copies: int

    @property
    def total(self) -> int:
        """All bytes of the base in memory."""
        return self.quantized + self.other + self.working_copies

    def __str__(self) -> str:
        parts = []
        if self.quantized:
            parts.append(f"{_mb(self.quantized)} quantised")
        parts.append(f"{_mb(self.other)} {'other' if self.quantized else 'weights'}")
        if self.working_copies:
            parts.append(f"{_mb(self.working_copies)} dequantised working copy")
        return " + ".join(parts)


def measure(model: nn.Module, working_copies: int) -> MemoryReport:
    """Count the bytes of parameters, buffers and quantisation states, tied tensors once."""
    quantized = other = 0
    seen: set[int] = set()
    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            if is_quantized(module) and tensor.dtype in (torch.uint8, torch.int8):
                quantized += tensor.nbytes + _state_bytes(tensor)
            else:
                other += tensor.nbytes
    return MemoryReport(quantized, other, working_copies)


def keep_working_copies(model: nn.Module) -> bool:
    """Whether float32 copies of all quantised weights fit into a quarter of the free memory."""
    quantized: list[Any] = [m for m in model.modules() if is_quantized(m)]
    need = sum(4 * int(m.in_features) * int(m.out_features) for m in quantized)
    return need <= _SHARE_FOR_COPIES * available_bytes()


def available_bytes() -> int:
    """Free main memory in bytes, as the system reports it."""
    try:
        import psutil

        return int(psutil.virtual_memory().available)
    except ImportError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _state_bytes(tensor: torch.Tensor) -> int:
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        return sum(one.nbytes for one in state_tensors(state).values())
    scale = getattr(tensor, "SCB", None)
    return int(scale.nbytes) if isinstance(scale, torch.Tensor) else 0


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
