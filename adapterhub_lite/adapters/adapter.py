"""An adapter in memory: spec, tensors under PEFT's on-disk keys, and the card it came with."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save

from ..errors import AdapterMismatch
from ..formats.card import Card
from ..formats.files import read_regular
from ..formats.injected import is_index
from ..formats.peft_config import MAX_BYTES, Spec, adapter_config, parse_adapter_config
from ..formats.safetensors_header import Header, parse_header
from ..formats.specs import InjectedSpec
from ..kernels.matrices import all_finite
from ..store.reading import Stored

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Adapter:
    """Spec + tensors + card.

    Attributes:
        tensors: PEFT's keys as on disk, e.g. `base_model.model.<module>.lora_A.weight` [rank, in],
            `....lora_B.weight` [out, rank], `....ia3_l` [out, 1] or [1, in], or
            `prompt_embeddings` [tokens, 2 * layers * key-value width] (prefix) or [tokens, hidden] (prompt); those of
            methods that PEFT runs as PEFT has them.
    """

    spec: Spec
    tensors: dict[str, torch.Tensor]
    card: Card | None = None
    name: str = ""
    digest: str = ""
    finite: bool = False
    """Whether it is known that every value is a number."""

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        return sum(t.numel() for t in self.tensors.values())

    def files(self) -> dict[str, bytes]:
        """The two files PEFT reads, as bytes."""
        import json

        config = json.dumps(adapter_config(self.spec), indent=2, sort_keys=True) + "\n"
        tensors = {k: v.detach().cpu().contiguous() for k, v in sorted(self.tensors.items())}
        return {CONFIG_FILE: config.encode(), WEIGHTS_FILE: save(tensors, metadata={"format": "pt"})}


def stored_adapter(stored: Stored) -> Adapter:
    """The adapter of a version, made of the very bytes that the store has verified.

    Raises:
        FormatError: config or tensor file break their format.
        AdapterMismatch: a value is not finite.
    """
    return _adapter(stored.config, stored.weights, name_of(stored), stored.ref.digest or "", stored.card)


def name_of(stored: Stored) -> str:
    """What a version is called in messages and lists."""
    return f"{stored.ref.name}@{stored.ref.version}"


def read_adapter(folder: Path, *, name: str = "") -> Adapter:
    """The adapter in a PEFT folder outside the store. Raises as `stored_adapter`; NotFound, UnsafeFile."""
    files = [read_regular(folder / file, limit) for file, limit in ((CONFIG_FILE, MAX_BYTES), (WEIGHTS_FILE, 1 << 40))]
    return _adapter(files[0], files[1], name or folder.name, "", None)


def _adapter(config: bytes, weights: bytes, name: str, digest: str, card: Card | None) -> Adapter:
    spec = parse_adapter_config(config)
    header = parse_header(weights, WEIGHTS_FILE)  # limits first: the library accepts files that take seconds
    tensors = _views(weights, header)
    check_finite(tensors, name, spec)
    return Adapter(spec, tensors, card, name, digest, finite=True)


def _views(weights: bytes, header: Header) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, as views of its bytes where they are; nothing may write to them."""
    if sys.byteorder != "little" or any(info.dtype not in _DTYPES for info in header.tensors.values()):
        return dict(load(weights))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the bytes are not writable
        whole = torch.frombuffer(weights, dtype=torch.uint8)
    found = {}
    for key, info in header.tensors.items():
        span, dtype = header.span(key), _DTYPES[info.dtype]
        if span.start % dtype.itemsize:
            return dict(load(weights))
        found[key] = whole[span].view(dtype).view(info.shape)
    return found


def check_finite(tensors: Mapping[str, torch.Tensor], name: str, spec: Spec) -> None:
    """Raise AdapterMismatch naming the first tensor that holds NaN or infinity, or is not floating point.

    Tensors of places in a weight, which some methods have, hold whole numbers.
    """
    for key, tensor in tensors.items():
        places = isinstance(spec, InjectedSpec) and is_index(spec.method, key)
        if not tensor.is_floating_point() and not places:
            raise AdapterMismatch(f"{name}: tensor {key} is {tensor.dtype}, not floating point.", "Train it again.")
    if all_finite(tensors.values()):
        return
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterMismatch(
                f"{name}: tensor {key} holds NaN or infinity.", "The training diverged; do not use it."
            )
