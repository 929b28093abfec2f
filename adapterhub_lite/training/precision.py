"""How a float32 base's products are computed on a CPU: in float32, or through bfloat16 where it has units for that.

A processor with AMX multiplies matrices in bfloat16 several times as fast as in float32. oneDNN, which computes torch's
products, then takes float32 matrices, rounds their values to bfloat16 on the way in and sums in float32. So does
Trainer with `bf16=True`; element-wise work stays float32 here, as parameters and gradients do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

FLOAT32, BFLOAT16, AUTO = "float32", "bfloat16", "auto"
_LEAST_GAIN = 1.5
_PROBE = 1024  # rows and columns of the matrices that are tried


@dataclass(frozen=True)
class Precision:
    """What was chosen, and why."""

    name: str
    why: str


def choose_precision(wanted: Sequence[str], device: torch.device, dtype: torch.dtype) -> Precision:
    """The precision of recipes that are trained together; one that asks for float32 is heard."""
    if device.type != "cpu" or dtype != torch.float32:
        return Precision(FLOAT32, f"products are of {str(dtype).removeprefix('torch.')}, as the base is")
    if FLOAT32 in wanted:
        return Precision(FLOAT32, "the recipe says so")
    if not has_units():
        return Precision(FLOAT32, "this processor has no units for bfloat16 matrices")
    if BFLOAT16 in wanted:
        return Precision(BFLOAT16, "the recipe says so")
    gain = measured_gain()
    if gain < _LEAST_GAIN:
        return Precision(FLOAT32, f"through bfloat16 they are {gain:.1f} times as fast here, which is too little")
    return Precision(BFLOAT16, f"through bfloat16 they are {gain:.1f} times as fast here")


def has_units() -> bool:
    """Whether the processor multiplies matrices of bfloat16 in units of their own (AMX)."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def measured_gain() -> float:
    """How many times as fast a product through bfloat16 is; a tenth of a second."""
    a, b, out = (torch.ones(_PROBE, _PROBE) for _ in range(3))

    def product() -> None:
        torch.mm(a, b, out=out)

    plain = _seconds(product)
    with products_in(BFLOAT16):
        return plain / _seconds(product)


def _seconds(work: Callable[[], None], times: int = 5) -> float:
    work()
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return median(taken)


@contextmanager
def products_in(name: str) -> Iterator[None]:
    """Let torch's products of float32 matrices on a CPU be computed so within."""
    if name == FLOAT32:
        yield
        return
    backend = _backend()
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


def through_bfloat16() -> bool:
    """Whether products are computed so now: those of our own, which are float32, then stand back."""
    return bool(_backend().fp32_precision == "bf16")


def _backend() -> Any:
    return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made when torch is imported
