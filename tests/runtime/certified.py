"""Stored adapters with the effect that is measured of them, or another; and a count of a base's forwards."""

from __future__ import annotations

from dataclasses import replace

import torch

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.formats.card import Card
from adapterhub_lite.runtime.certificate import measure
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from tests.runtime import build


def made(base, kind: str, seed: int = 1) -> Adapter:
    if kind == "prefix":
        return build.prefix(base, seed)
    plain = build.lora(base, seed, dora=kind == "dora")
    if kind != "head":
        return plain
    score = torch.randn((3, base.config.hidden_size), generator=torch.Generator().manual_seed(seed))
    spec = replace(plain.spec, task_type="SEQ_CLS", modules_to_save=("score",))
    return Adapter(spec, {**plain.tensors, "base_model.model.score.weight": score}, name="head")


def effect_of(base, adapter: Adapter) -> dict:
    runtime = Runtime(base, Store())
    try:
        return measure(runtime, runtime.attach(adapter))
    finally:
        runtime.close()


def certified(base, name: str, adapter: Adapter, effect: dict | None = None, store: Store | None = None):
    """`adapter` as a stored version whose card says `effect`, by default what is true of it."""
    told = {
        "name": base.name,
        "fingerprint": base.fingerprint.to_dict(),
        "quantization": base.quantization,
        "dtype": base.choices["dtype"].value,
    }
    card = Card(base=told, effect=effect_of(base, adapter) if effect is None else effect)
    return (store or Store()).put(name, dict(adapter.files()), card)


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """The same adapter with another alpha; a prefix has none, so its tensors are scaled."""
    if hasattr(adapter.spec, "alpha"):
        return replace(adapter, spec=replace(adapter.spec, alpha=adapter.spec.alpha * factor))
    return replace(adapter, tensors={name: tensor * factor for name, tensor in adapter.tensors.items()})


class Forwards:
    """Counts how often the base embeds a batch."""

    def __init__(self, base) -> None:
        self.count = 0
        self._handle = base.model.get_input_embeddings().register_forward_pre_hook(self._add)

    def _add(self, *_: object) -> None:
        self.count += 1

    def __enter__(self) -> Forwards:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
