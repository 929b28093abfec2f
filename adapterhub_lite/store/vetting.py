"""The checks that an adapter passes before a byte of it enters the store.

They read bytes held in memory, so no file can change between the look and the copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import AdapterMismatch, NoEffect
from ..formats.adapter_files import (
    A_SUFFIX,
    B_SUFFIX,
    BIAS_SUFFIX,
    LORA_PREFIX,
    LoraInventory,
    facts,
    inventory,
    with_targets,
)
from ..formats.finite import FLOAT_DTYPES, first_non_finite, is_all_zero
from ..formats.peft_config import adapter_config_bytes, parse_adapter_config
from ..formats.safetensors_header import Header, parse_header
from ..formats.specs import Spec
from .layout import WEIGHTS


@dataclass(frozen=True)
class Vetted:
    """An adapter that passed: its spec, the canonical configuration made from it, weights, and facts for its card."""

    spec: Spec
    config: bytes
    weights: bytes
    facts: dict[str, Any]


def vet(config: bytes, weights: bytes) -> Vetted:
    """Check a configuration and a safetensors file against each other.

    Raises:
        FormatError, UnsafeFile, Unsupported: from the formats.
        AdapterMismatch: tensors do not fit the configuration, or hold NaN or infinity.
        NoEffect: a LoRA without heads whose product B @ A is zero everywhere.
    """
    spec = parse_adapter_config(config)
    header = parse_header(weights, WEIGHTS)
    found = inventory(spec, header)
    _check_finite(header, weights)
    if isinstance(found, LoraInventory) and not _has_effect(found, header, weights):
        hint = "It was not trained, or was saved before its first step."
        raise NoEffect("The adapter changes nothing: B @ A is zero in every module.", hint)
    spec = with_targets(spec, found)
    return Vetted(spec, adapter_config_bytes(spec), weights, facts(spec, header))


def _check_finite(header: Header, weights: bytes) -> None:
    view = memoryview(weights)
    for name, info in header.tensors.items():
        if info.dtype not in FLOAT_DTYPES:  # places in a weight, where the inventory lets them pass
            continue
        index = first_non_finite(view[header.span(name)], info.dtype)
        if index is not None:
            raise AdapterMismatch(f"Tensor {name} holds NaN or infinity at value {index} of {info.elements}.")


def _has_effect(found: LoraInventory, header: Header, weights: bytes) -> bool:
    """Whether some product B @ A, bias or head can move an output.

    A zero B with a DoRA magnitude is the untrained start.
    """
    view = memoryview(weights)

    def moves(name: str) -> bool:
        info = header.tensors.get(name)
        return info is not None and not is_all_zero(view[header.span(name)], info.dtype)

    return bool(found.heads) or any(
        moves(stem + BIAS_SUFFIX) or (moves(stem + B_SUFFIX[ranks.kind]) and moves(stem + A_SUFFIX[ranks.kind]))
        for stem, ranks in ((LORA_PREFIX + module, ranks) for module, ranks in found.modules.items())
    )
