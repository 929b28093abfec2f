"""What an export needs to know of a base, from its config.json alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..adapters.sites import features, is_conv1d, is_linear
from ..bases.skeleton import skeleton_of
from ..bases.views import View, kind_of

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


def _names(name: str, prefix: str) -> Iterator[str]:
    """A name as it is, with the backbone's prefix and without it."""
    yield name
    yield f"{prefix}.{name}"
    yield name.removeprefix(f"{prefix}.")
