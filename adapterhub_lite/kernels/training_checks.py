"""What native code of training is given: tensors that are what it takes them for, and dropout's names."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

from .library import library


@dataclass(frozen=True)
class Dropout:
    """keys, tokens: int64 [tokens], the key of each token's row and its index in it; salt: the place in the model."""

    keys: torch.Tensor
    tokens: torch.Tensor
    salt: int
    p: float


class DropoutEntry(ctypes.Structure):
    """`dropout` of training.h: addresses only, so whoever makes one keeps the tensors."""

    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("salt", ctypes.c_long),
        ("threshold", ctypes.c_long),
        ("scale", ctypes.c_float),
    ]


def available() -> bool:
    """Whether these functions can be called on this machine."""
    return library().functions is not None


def functions() -> Any:
    """The native library; RuntimeError where there is none."""
    found = library().functions
    if found is None:
        raise RuntimeError(f"No native functions: {library().reason}.")
    return found


def dropout_entry(by: Dropout | None, tokens: int) -> DropoutEntry:
    """Dropout of `tokens` lines; nothing of None."""
    if by is None:
        return DropoutEntry()
    if not 0 <= by.p < 1:
        raise ValueError(f"The share to drop is {by.p}; it should be at least 0 and below 1.")
    keys, names = (
        address("keys", by.keys, tokens, dtype=torch.int64),
        address("tokens", by.tokens, tokens, dtype=torch.int64),
    )
    return DropoutEntry(keys, names, by.salt, round(by.p * 2**24), 1 / (1 - by.p))


def address(name: str, tensor: torch.Tensor | None, *shape: int, dtype: torch.dtype = torch.float32) -> int | None:
    """Where a tensor lies, which must be what native code takes it for; None of None."""
    if tensor is None:
        return None
    if not is_plain(tensor, dtype) or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(f"{name} should be {dtype} {list(shape)}, contiguous on a CPU; it is {looks(tensor)}.")
    return tensor.data_ptr()


def is_plain(tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether these are numbers of this kind in the memory of a CPU."""
    return tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.layout == torch.strided


def looks(tensor: torch.Tensor) -> str:
    """What a tensor is, for the message that says it should be something else."""
    return f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
