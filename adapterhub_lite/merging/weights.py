"""The frozen weights of a checkpoint folder, one at a time, as a base computes with them, quantised or not."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.sites import is_conv1d
from ..bases.quantization import quantized_round_trip
from ..bases.skeleton import skeleton_of
from ..errors import AdapterMismatch
from .checkpoint import Checkpoint
from .places import Places, quantised_weights


class Weights:
    """By the names that an adapter's PEFT class gives modules, in float32. No model is in memory.

    Args:
        quantization: what the adapter was trained on; each weight that it concerns goes through it and back.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], task_type: str | None, quantization: str) -> None:
        self._checkpoint = Checkpoint.open(folder)
        self._view = skeleton_of(dict(config), task_type)
        self._places = Places(self._view, self._checkpoint)
        self._quantization, self._config = quantization, dict(config)

    def weight(self, module: str) -> torch.Tensor:
        """[out, in].

        Raises:
            AdapterMismatch: the base has no such layer, or stores it in another form.
        """
        turned = is_conv1d(self._module(module))
        name = self._places.tensor(f"{module}.weight")
        found = self._checkpoint.read(name).float()
        found = found.T.contiguous() if turned else found
        return quantized_round_trip(found, self._quantization) if name in self._quantised else found

    def bias(self, module: str) -> torch.Tensor | None:
        """[out], or None where the layer has none. Raises as `weight`."""
        if getattr(self._module(module), "bias", None) is None:
            return None
        return self._checkpoint.read(self._places.tensor(f"{module}.bias")).float()

    def _module(self, module: str) -> nn.Module:
        found = self._view.modules.get(module)
        if found is None:
            raise AdapterMismatch(f"The base has no layer {module}.", "It was made for another; --base names its own.")
        return found

    @cached_property
    def _quantised(self) -> set[str]:
        """The checkpoint's names of the weights that the base quantises."""
        if self._quantization == "none":
            return set()
        return set(quantised_weights(skeleton_of(self._config, None), self._checkpoint))
