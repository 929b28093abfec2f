"""Which device and dtype a base runs in; each choice carries its reason so that it can be printed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import Unsupported

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Choice:
    """A chosen value and why it was chosen."""

    value: str
    reason: str


def choose_device(wanted: str = "auto") -> Choice:
    """cpu, cuda or cuda:N for `auto`, or what was asked for if it exists.

    Raises:
        Unsupported: the device that was asked for is not here.
    """
    if wanted == "auto":
        if torch.cuda.is_available():
            return Choice("cuda", f"a CUDA device is present ({torch.cuda.get_device_name(0)})")
        return Choice("cpu", "no CUDA device is present")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise Unsupported(f"Device {wanted!r} is not available here.", "Use --device cpu.")
    try:
        return Choice(str(torch.device(wanted)), "asked for")
    except RuntimeError as error:
        raise Unsupported(f"{wanted!r} is not a device.", "Use auto, cpu or cuda.") from error


def choose_dtype(device: str, wanted: str = "auto") -> Choice:
    """The dtype of activations and of weights that are not quantised."""
    if wanted != "auto":
        if wanted not in DTYPES:
            raise Unsupported(f"{wanted!r} is not a dtype.", f"Use auto, {', '.join(DTYPES)}.")
        return Choice(wanted, "asked for")
    if device.startswith("cuda"):
        if torch.cuda.is_bf16_supported():
            return Choice("bfloat16", "the card computes in bfloat16")
        return Choice("float16", "the card has no bfloat16")
    return Choice("float32", "on a CPU float32 keeps every row of a batch equal to its solo run")
