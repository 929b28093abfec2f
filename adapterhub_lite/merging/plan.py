"""Plan a merge: which checkpoint tensors change and how, without loading a model.

W' = g * W + (s B) A for each adapted layer (g = 1 but for DoRA), computed in float32 and rounded once. An adapter that
was trained on a quantised base can be baked into what that base really computed with (`dequantised`: every weight goes
through the quantisation and back) or into the checkpoint's own weights (`original`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.fit import Fitted, Target, fit
from ..adapters.lora import LoraSite
from ..adapters.sites import is_conv1d
from ..bases.quantization import quantized_round_trip
from ..bases.skeleton import skeleton_of
from ..bases.views import HEAD_NAMES, View
from ..errors import AdapterMismatch, Unsupported
from ..formats.specs import FactoredSpec, LoraSpec
from .checkpoint import DTYPES, Checkpoint, Planned

BAKES = ("auto", "dequantised", "original")


@dataclass(frozen=True)
class MergePlan:
    """What the merged checkpoint will hold.

    Attributes:
        shards: file name -> tensors in order.
        changed: names of the tensors that the adapter changes.
        config: the merged model's configuration.
    """

    shards: dict[str, list[Planned]]
    changed: list[str]
    config: dict[str, Any]
    bake: str
    quantization: str
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for tensors in self.shards.values() for t in tensors)


def plan_merge(
    adapter: Adapter, checkpoint: Checkpoint, *, quantization: str, bake: str, dtype: str, labels: list[str] | None
) -> MergePlan:
    """Plan the merge of a LoRA or DoRA adapter into a checkpoint.

    Args:
        quantization: of the base the adapter was trained on: none, int8 or nf4.
        bake: dequantised, original, or auto (dequantised if the base was quantised).
        dtype: float32, bfloat16, float16, or auto (each tensor keeps its own).
        labels: label names, for an adapter with a classification head.

    Raises:
        Unsupported: a prefix, an adapted output layer that is tied to the embeddings, an unknown option.
        AdapterMismatch: the adapter does not fit the checkpoint.
    """
    _check_options(adapter, bake, dtype)
    bake = ("original" if quantization == "none" else "dequantised") if bake == "auto" else bake
    config = json.loads((checkpoint.folder / "config.json").read_text("utf-8"))
    view = skeleton_of(config, adapter.spec.task_type)
    fitted = fit(adapter, _target(view, checkpoint, quantization if bake == "dequantised" else "none"))
    places = _Places(view, checkpoint)
    changes = {places.weight_of(module): (module, site) for module, site in fitted.sites.items()}
    baked = set()
    if bake == "dequantised":
        skipped = (*HEAD_NAMES, "lm_head", "embed_out")
        quantised = [m for n, m in view.modules.items() if isinstance(m, nn.Linear) and n.split(".")[-1] not in skipped]
        baked = {places.weight_of(m) for m in quantised}
    shards = {
        file: [_planned(checkpoint, n, changes.get(n), quantization if n in baked else "none", dtype) for n in tensors]
        for file, tensors in checkpoint.shards.items()
    }
    _add_biases(shards, fitted, places, checkpoint)
    if fitted.head is not None:
        config = _add_head(shards, fitted.head, view, config, labels)
    if dtype != "auto":
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    return MergePlan(shards, sorted(changes), config, bake, quantization, dtype)


def _check_options(adapter: Adapter, bake: str, dtype: str) -> None:
    if not isinstance(adapter.spec, LoraSpec | FactoredSpec):
        what = {
            "Ia3Spec": "an IA3 adapter: merging does not know its factors yet",
            "PrefixSpec": "a prefix: keys and values before the text, not a change of weights",
            "PromptSpec": "a prompt: virtual tokens before the text, not a change of weights",
            "InjectedSpec": "of a method that PEFT's own layers compute: merging does not know what they do to weights",
        }[type(adapter.spec).__name__]
        raise Unsupported(
            f"{adapter.name} is {what}.",
            "Serve it with its base, or train a LoRA adapter to merge.",
        )
    if bake not in BAKES:
        raise Unsupported(f"{bake!r} is not a way to bake.", f"Use {', '.join(BAKES)}.")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise Unsupported(
            f"{dtype!r} is not a dtype of a merged checkpoint.", "Use auto, float32, bfloat16 or float16."
        )


def _target(view: View, checkpoint: Checkpoint, quantization: str) -> Target:
    places = _Places(view, checkpoint)

    def dense_weight(module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        weight = checkpoint.read(places.weight_of(module)).to(dtype)
        return weight if is_conv1d(module) else quantized_round_trip(weight, quantization)

    return Target(view.modules, view.model.config, view.head, view.head_name, dense_weight)


class _Places:
    """Where a module's tensors lie in a checkpoint, whose names may lack or carry the backbone's prefix."""

    def __init__(self, view: View, checkpoint: Checkpoint) -> None:
        self._names = {module: name for name, module in view.modules.items()}
        self._tensors = checkpoint.tensors
        self._prefix = f"{getattr(view.model, 'base_model_prefix', '')}."

    def weight_of(self, module: nn.Module) -> str:
        """The name of a module's weight tensor."""
        return self.tensor(f"{self._names[module]}.weight")

    def bias_of(self, module: nn.Module) -> str:
        """The name of a module's bias tensor."""
        return self.tensor(f"{self._names[module]}.bias")

    def tensor(self, name: str) -> str:
        """A model's tensor name -> the checkpoint's name for it.

        Raises:
            AdapterMismatch: it is not there (or tied to another tensor).
        """
        for candidate in (name, name.removeprefix(self._prefix), f"{self._prefix}{name}"):
            if candidate in self._tensors:
                return candidate
        raise AdapterMismatch(
            f"The checkpoint has no tensor {name}.",
            "An output layer tied to the embeddings cannot be changed alone; this merge is refused.",
        )


def _planned(
    checkpoint: Checkpoint,
    name: str,
    change: tuple[nn.Module, LoraSite] | None,
    quantization: str,
    dtype: str,
) -> Planned:
    info = checkpoint.tensors[name]
    own = DTYPES.get(info.dtype)
    if own is None:
        raise Unsupported(f"Tensor {name} is {info.dtype}, which is not merged.", "Use a float checkpoint.")
    target = own if dtype == "auto" or not own.is_floating_point else getattr(torch, dtype)
    make = partial(_make, checkpoint, name, change, quantization)
    return Planned(name, target, tuple(info.shape), make)


def _make(
    checkpoint: Checkpoint, name: str, change: tuple[nn.Module, LoraSite] | None, quantization: str
) -> torch.Tensor:
    weight = checkpoint.read(name)
    if change is None and quantization == "none":
        return weight
    dense = quantized_round_trip(weight.float(), quantization)
    if change is None:
        return dense
    module, site = change
    delta = site.up @ site.down
    delta = delta.T if is_conv1d(module) else delta
    if site.gain is not None:
        dense = dense * (1 + site.gain if is_conv1d(module) else (1 + site.gain)[:, None])
    merged = dense + delta
    if not bool(torch.isfinite(merged).all()):
        raise AdapterMismatch(f"Merging into {name} gives values that are not finite.", "Do not use this adapter.")
    return merged


def _add_biases(shards: dict[str, list[Planned]], fitted: Fitted, places: _Places, checkpoint: Checkpoint) -> None:
    """Fold lora_bias into the layers' own biases."""
    for module, site in fitted.sites.items():
        if site.bias is None:
            continue
        name = places.bias_of(module)
        for tensors in shards.values():
            for i, planned in enumerate(tensors):
                if planned.name == name:
                    make = partial(_sum, checkpoint, name, site.bias)
                    tensors[i] = Planned(name, planned.dtype, planned.shape, make)


def _sum(checkpoint: Checkpoint, name: str, bias: torch.Tensor) -> torch.Tensor:
    return checkpoint.read(name).float() + bias


def _lacks(modules: Mapping[str, nn.Module], tensor: str, prefix: str) -> bool:
    """Whether a class has no module for a tensor of the checkpoint, as taggers have none for BERT's pooler."""
    module = tensor.rpartition(".")[0]
    return module not in modules and f"{prefix}{module}" not in modules


def _add_head(
    shards: dict[str, list[Planned]], head: nn.Module, view: View, config: dict[str, Any], labels: list[str] | None
) -> dict[str, Any]:
    """Put the head's tensors in the last shard and name the classes in the configuration."""
    modules = view.modules
    prefix = f"{getattr(view.model, 'base_model_prefix', '')}."
    for tensors in shards.values():
        tensors[:] = [p for p in tensors if p.name.split(".")[0] not in HEAD_NAMES and p.name != "lm_head.weight"]
        tensors[:] = [p for p in tensors if not _lacks(modules, p.name, prefix)]
        for i, p in enumerate(tensors):
            if p.name.rpartition(".")[0] not in modules:
                tensors[i] = Planned(f"{prefix}{p.name}", p.dtype, p.shape, p.make)
    last = list(shards)[-1]
    state: Mapping[str, torch.Tensor] = head.state_dict()
    dtype = next((p.dtype for tensors in shards.values() for p in tensors if p.dtype.is_floating_point), torch.float32)
    for name, tensor in state.items():
        shards[last].append(Planned(f"{view.head_name}.{name}", dtype, tuple(tensor.shape), tensor.clone))
    count = list(state.values())[-1].shape[0]
    names = labels or [f"LABEL_{i}" for i in range(count)]
    merged = {**config, "architectures": [type(view.model).__name__], "num_labels": count}
    merged["id2label"] = {str(i): n for i, n in enumerate(names)}
    merged["label2id"] = {n: i for i, n in enumerate(names)}
    return merged
