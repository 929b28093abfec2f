"""What every tensor of a merged model must be: the base's own tensor and the adapters' change, in float32.

It is made of the adapters as they are fitted for serving, not of the merge's plan: what the plan gets wrong is seen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.fit import Target, fit
from ..adapters.lora import PREFIX, LoraSite
from ..adapters.sites import is_conv1d
from ..bases.quantization import quantized_round_trip
from ..bases.quiet import quiet
from ..bases.skeleton import skeleton_of
from ..bases.views import View
from ..formats.specs import LoraSpec
from ..merging.checkpoint import Checkpoint
from ..merging.places import Tie, quantised_weights, with_embeddings


@dataclass(frozen=True)
class _Part:
    """One adapter's change of one weight; `transposed`: the weight is [in, out], as GPT-2's are."""

    site: LoraSite
    weight: float
    transposed: bool


class Expected:
    """Tensors of base + adapters by the names that the merged checkpoint gives them.

    Args:
        members: adapters with weights; none of them for the bare base.
        quantization: what the base's weights went through, or none.
    """

    def __init__(
        self, checkpoint: Checkpoint, members: Sequence[tuple[Adapter, float]], quantization: str = "none"
    ) -> None:
        self._quantization = quantization
        self._parts: dict[str, list[_Part]] = {}
        self._biases: dict[str, list[tuple[LoraSite, float]]] = {}
        self._heads: dict[str, torch.Tensor] = {}
        self._turned: set[str] = set()
        self._prefix = ""
        self._untied: dict[str, str] = {}  # an output layer that gets a place of its own -> what it begins as
        config = json.loads((checkpoint.folder / "config.json").read_text("utf-8"))
        own = skeleton_of(config, None)
        self._look(own)
        self._checkpoint = checkpoint = with_embeddings(checkpoint, own)
        self._rounded = set() if quantization == "none" else set(quantised_weights(own, checkpoint))
        for adapter, weight in members:
            self._add(skeleton_of(config, adapter.spec.task_type), config, adapter, weight)
        self._names = {self._bare(name): name for name in checkpoint.tensors}
        self._names |= {self._bare(name): self._names[self._bare(source)] for name, source in self._untied.items()}

    @property
    def names(self) -> Sequence[str]:
        """Tensors of the base, an output layer that is no longer tied, and heads that adapters bring."""
        own = self._checkpoint.tensors
        return [*own, *(name for name in self._untied if name not in own), *self._heads]

    def knows(self, name: str) -> bool:
        """Whether the merged model has a tensor of this name."""
        return name in self._heads or self._bare(name) in self._names

    def changed(self, name: str) -> bool:
        """Whether an adapter changes or brings it."""
        bare = self._bare(name)
        return name in self._heads or bare in self._parts or bare in self._biases

    def base(self, name: str) -> torch.Tensor:
        """The base's tensor, as its layers compute with it; of a head, zeros."""
        if name in self._heads:
            return torch.zeros_like(self._heads[name], dtype=torch.float32)
        bare = self._bare(name)
        tensor = self._checkpoint.read(self._names[bare])
        if not tensor.is_floating_point():
            return tensor
        return self._as_computed(self._names[bare], tensor.float())

    def change(self, name: str, base: torch.Tensor) -> torch.Tensor | None:
        """What the adapters add to it; None where they leave it."""
        if name in self._heads:
            return self._heads[name].float()
        if not self.changed(name):
            return None
        bare, total = self._bare(name), torch.zeros_like(base)
        for part in self._parts.get(bare, ()):
            total.add_(_change_by(part, base), alpha=part.weight)
        for site, weight in self._biases.get(bare, ()):
            total.add_(_bias_by(site, base), alpha=weight)
        return total

    def dense(self, name: str) -> torch.Tensor:
        """Base and change."""
        base = self.base(name)
        change = self.change(name, base)
        return base if change is None else base + change

    def format(self, name: str) -> str:
        """Exact."""
        return "float32"

    @property
    def labels(self) -> int | None:
        """How many classes the head tells apart; None without one."""
        return int(list(self._heads.values())[-1].shape[0]) if self._heads else None

    @property
    def turned(self) -> set[str]:
        """Weights that the checkpoint stores [in, out]."""
        return {name for name in self.names if self._bare(name) in self._turned}

    def _add(self, view: View, config: dict[str, Any], adapter: Adapter, weight: float) -> None:
        self._look(view)
        names = {module: name for name, module in view.modules.items()}
        tensors = {self._bare(name): name for name in self._checkpoint.tensors}
        tie = Tie(view, config, self._checkpoint)
        output, source = f"{tie.output}.weight", f"{tie.input}.weight"
        if tie.input and self._bare(source) in tensors:
            tensors[self._bare(output)] = tensors[self._bare(source)]

        def frozen(module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
            name = tensors[self._bare(f"{names[module]}.weight")]
            return self._as_computed(name, self._checkpoint.read(name).to(dtype))

        adapter, adapted = self._without_embeddings(adapter, weight)
        if tie.broken_by(adapted):
            self._untied[output] = source
        if adapted and not any(".lora_" in key for key in adapter.tensors):
            start = f"{PREFIX}{view.head_name}."  # what is left is a head, or nothing
            self._heads |= {key.removeprefix(PREFIX): t for key, t in adapter.tensors.items() if key.startswith(start)}
            return
        with quiet():
            fitted = fit(adapter, Target(view.modules, view.model.config, view.head, view.head_name, frozen))
        for module, site in fitted.sites.items():
            name = names[module]
            part = _Part(site, weight, is_conv1d(module))
            self._parts.setdefault(self._bare(f"{name}.weight"), []).append(part)
            if site.bias is not None:
                self._biases.setdefault(self._bare(f"{name}.bias"), []).append((site, weight))
        if tie.broken_by({names[module] for module in fitted.sites}):
            self._untied[output] = source
        if fitted.head is not None:
            self._heads |= {f"{view.head_name}.{name}": t for name, t in fitted.head.state_dict().items()}

    def _without_embeddings(self, adapter: Adapter, weight: float) -> tuple[Adapter, set[str]]:
        """Take what an adapter adds to embeddings, which no runtime serves: the rest of it is left, and their names."""
        found = set()
        parts = {key: t for key, t in adapter.tensors.items() if ".lora_embedding_" in key}
        for key, down in parts.items():
            if key.endswith("_A"):
                name, up = key.removeprefix(PREFIX).removesuffix(".lora_embedding_A"), parts[f"{key[:-1]}B"]
                assert isinstance(adapter.spec, LoraSpec)
                factor = adapter.spec.scaling(name, down.shape[0])
                found.add(name)
                part = _Part(LoraSite(down.float(), up.float() * factor), weight, True)
                self._parts.setdefault(self._bare(f"{name}.weight"), []).append(part)
        return replace(adapter, tensors={k: t for k, t in adapter.tensors.items() if k not in parts}), found

    def _look(self, view: View) -> None:
        """Learn the prefix of the base's names, and which weights are stored [in, out]."""
        prefix = str(getattr(view.model, "base_model_prefix", "") or "")
        self._prefix = f"{prefix}." if prefix else ""
        self._turned |= {self._bare(f"{n}.weight") for n, m in view.modules.items() if is_conv1d(m)}

    def _as_computed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the checkpoint after what the base's quantisation did to it."""
        rounding = self._quantization if name in self._rounded else "none"
        return quantized_round_trip(tensor, rounding, self._bare(name) in self._turned)

    def _bare(self, name: str) -> str:
        return name.removeprefix(self._prefix)


def _change_by(part: _Part, base: torch.Tensor) -> torch.Tensor:
    """(g W + up down) s - W, the weight as it is stored."""
    site, change = part.site, part.site.up.float() @ part.site.down.float()
    if site.gain is not None or site.scale is not None:
        weight = base.T if part.transposed else base
        made = weight if site.gain is None else weight * (1 + site.gain.float()[:, None])
        made = made + change
        change = (made if site.scale is None else made * site.scale.float()) - weight
    return change.T if part.transposed else change


def _bias_by(site: LoraSite, base: torch.Tensor) -> torch.Tensor:
    """What a site adds to a bias; what scales an output scales the bias, which is not in a module without weights."""
    assert site.bias is not None
    if not site.bias.is_meta:
        return site.bias.float()
    assert site.gain is not None
    return site.gain.float() * base
