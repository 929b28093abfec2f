"""What a merged checkpoint says of itself in its configuration, so that no adapter is merged into it twice."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..adapters.adapter import Adapter
from ..errors import Unsupported
from ..formats.peft_config import adapter_config
from .checkpoint import bytes_of

KEY = "adapterhub_merge"


def content_digest(adapter: Adapter) -> str:
    """A digest of an adapter that has none of the store: of its configuration and tensors, where they are."""
    whole = hashlib.sha256(repr(sorted(adapter_config(adapter.spec).items())).encode())
    for name, tensor in sorted(adapter.tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(bytes_of(tensor.detach().cpu().contiguous()))
    return whole.hexdigest()


def noted(
    config: Mapping[str, Any], names: Sequence[str], digests: Sequence[str], weights: Sequence[float]
) -> dict[str, Any]:
    """The configuration with what was merged, after what had been merged before."""
    new = [
        {"adapter": name, "digest": digest, "weight": weight}
        for name, digest, weight in zip(names, digests, weights, strict=True)
    ]
    return {**config, KEY: [*merged_before(config), *new]}


def merged_before(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a configuration says was merged into its weights."""
    found = config.get(KEY)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def refuse_again(config: Mapping[str, Any], adapters: Sequence[Adapter], digests: Sequence[str]) -> None:
    """Raise Unsupported where an adapter is in the checkpoint already, or stands twice among those to be merged."""
    known = {str(entry.get("digest")) for entry in merged_before(config)}
    for adapter, digest in zip(adapters, digests, strict=True):
        if digest in known:
            raise Unsupported(
                f"{adapter.name} is merged into this base already, or named twice.",
                "Merge into the original base; a weight (0.5, 2) makes one adapter weaker or stronger.",
            )
        known.add(digest)
