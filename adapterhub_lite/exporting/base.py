"""What an export needs to know of a base, from its config.json alone; and its weights, one at a time, where asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.sites import features, is_conv1d, is_linear
from ..bases.quantization import quantized_round_trip
from ..bases.skeleton import skeleton_of
from ..bases.views import View, kind_of
from ..errors import AdapterMismatch
from ..merging.checkpoint import Checkpoint
from ..merging.places import quantised_weights

Shape = tuple[int, int]
"""(in, out) of a linear layer; (rows, width) of an embedding."""


@dataclass(frozen=True)
class BaseFacts:
    """A base by its configuration.

    Attributes:
        served: layers by the names of the class that a server loads the checkpoint as.
        prefix: what may stand before those names, and not before the adapter's or the checkpoint's, such as `model`.
        conv1d: whether linear layers store their weights [in, out] (GPT-2).
        tied: whether the output layer is the embedding.
    """

    config: Mapping[str, Any]
    served: Mapping[str, Shape]
    prefix: str
    conv1d: bool
    tied: bool

    def served_name(self, module: str) -> str | None:
        """What a server calls a module of the adapter; None if it has no such layer."""
        return next((name for name in _names(module, self.prefix) if name in self.served), None)


def base_facts(config: Mapping[str, Any], task_type: str | None) -> BaseFacts:
    """Facts of the base with this config.json, as an adapter with PEFT's `task_type` sees it.

    Raises:
        BaseUnavailable, Unsupported: it is not the configuration of a text model.
    """
    # Encoders are served as whatever they were trained as; of others servers know the language model.
    view = skeleton_of(dict(config), task_type if kind_of(config) == "encoder" else None)
    model: Any = view.model
    text = model.config.get_text_config(decoder=True)
    return BaseFacts(
        config,
        _shapes(view),
        str(getattr(model, "base_model_prefix", "")),
        any(is_conv1d(module) for module in view.modules.values()),
        bool(getattr(text, "tie_word_embeddings", False)),
    )


def _shapes(view: View) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for name, module in view.modules.items():
        if is_linear(module):
            found[name] = features(module)
        elif isinstance(module, nn.Embedding):
            found[name] = (module.num_embeddings, module.embedding_dim)
    return found


class Weights:
    """The frozen weights of a base's folder, by the names that an adapter's PEFT class gives modules, in float32."""

    def __init__(self, folder: Path, config: Mapping[str, Any], task_type: str | None, quantization: str) -> None:
        """`quantization`: what the adapter was trained on; each weight goes through it and back."""
        self._checkpoint = Checkpoint.open(folder)
        self._view = skeleton_of(dict(config), task_type)
        self._quantization, self._config = quantization, dict(config)

    def weight(self, module: str) -> torch.Tensor:
        """[out, in].

        Raises:
            AdapterMismatch: the base has no such layer.
        """
        name = self._name(f"{module}.weight")
        if name is None:
            raise AdapterMismatch(f"The base has no tensor {module}.weight.", "Name its own base with --base.")
        found = self._checkpoint.read(name).float()
        layer = self._view.modules.get(module)
        if layer is not None and is_conv1d(layer):
            found = found.T.contiguous()
        return quantized_round_trip(found, self._quantization) if name in self._quantised else found

    def bias(self, module: str) -> torch.Tensor | None:
        """[out], or None where the layer has none."""
        name = self._name(f"{module}.bias")
        return None if name is None else self._checkpoint.read(name).float()

    @cached_property
    def _quantised(self) -> set[str]:
        """The checkpoint's names of the weights that the base quantises."""
        if self._quantization == "none":
            return set()
        return set(quantised_weights(skeleton_of(self._config, None), self._checkpoint))

    def _name(self, tensor: str) -> str | None:
        prefix, known = str(getattr(self._view.model, "base_model_prefix", "")), self._checkpoint.tensors
        return next((name for name in _names(tensor, prefix) if name in known), None)


def _names(name: str, prefix: str) -> Iterator[str]:
    """A name as it is, with the backbone's prefix and without it."""
    yield name
    yield f"{prefix}.{name}"
    yield name.removeprefix(f"{prefix}.")
