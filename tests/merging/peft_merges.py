"""PEFT's own merges to compare with: of one adapter in a dtype, and the true sum of several in float64."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file

from adapterhub_lite.adapters.adapter import Adapter, read_adapter
from adapterhub_lite.merging.checkpoint import Checkpoint
from adapterhub_lite.merging.plan import MergePlan, plan_merge
from tests import peers, tiny

LORAS = ("lora", "patterns", "rslora", "dora")
SUMS = ("adalora", "loha", "lokr")
# What IA3 scales, and which of it by its input.
_IA3 = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "roberta": (["key", "value", "output.dense"], ["output.dense"]),
    "t5": (["k", "v", "wo"], ["wo"]),
}
_LAYERS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "t5": ["q", "wo"]}


def config(family: str, kind: str, **changes: Any) -> Any:
    """PEFT's configuration of a method."""
    task = changes.pop("task", None) or peers.task_type(family)
    layers = {"target_modules": _LAYERS.get(family, ["query", "intermediate.dense"]), **changes}
    if kind == "ia3":
        targets, inputs = _IA3[family]
        return peft.IA3Config(task_type=task, target_modules=targets, feedforward_modules=inputs)
    if kind == "adalora":
        return peft.AdaLoraConfig(task_type=task, init_r=4, lora_alpha=12, total_step=10, **layers)
    if kind == "loha":
        return peft.LoHaConfig(task_type=task, r=3, alpha=5, **layers)
    if kind == "lokr":
        return peft.LoKrConfig(task_type=task, r=3, alpha=5, decompose_factor=4, **layers)
    return peers.config(family, kind, task, **changes)


def saved(folder: Path, base: Path, family: str, kind: str, seed: int = 1, **changes: Any) -> Path:
    """A PEFT folder of random values."""
    settings = config(family, kind, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peers.wrap(peers.plain(base, settings.task_type), settings, seed)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name and "modules_to_save" not in name:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + len(name))) * 0.2
                parameter.data = 1 + noise if "ia3" in name else noise
            elif "lora_E" in name or "lora_embedding_A" in name:  # they begin as zeros
                parameter.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def loaded(base: Path, folder: Path, dtype: torch.dtype = torch.float32, **some: Any) -> Any:
    """Base + adapter in plain PEFT."""
    task = json.loads((folder / "adapter_config.json").read_text())["task_type"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(peers.plain(base, task, **some).to(dtype), folder).eval()


def merged(base: Path, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What merge_and_unload makes of the weights, in `dtype` with the adapter in float32."""
    model = loaded(base, folder, dtype)
    if dtype == torch.float64:
        model = model.double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(model.merge_and_unload().state_dict())


def true_sum(base: Path, members: Sequence[tuple[Path, float]]) -> dict[str, torch.Tensor]:
    """Base weights + the weighted sum of what each adapter alone changes, in float64."""
    own = {name: t.double() for name, t in load_file(base / "model.safetensors").items()}
    total = dict(own)
    for folder, weight in members:
        alone = merged(base, folder, torch.float64)
        for name, tensor in own.items():
            if name in alone and alone[name].shape == tensor.shape:  # heads have other labels
                total[name] = total[name] + weight * (alone[name] - tensor)
    return total


def plan_of(base: Path, *members: tuple[Path, float] | tuple[Adapter, float], **options: Any) -> MergePlan:
    """The plan of merging PEFT folders."""
    read = [(m if isinstance(m, Adapter) else read_adapter(m, name=m.name), weight) for m, weight in members]
    given = {"quantization": "none", "bake": "auto", "dtype": "auto", "labels": None, **options}
    return plan_merge(read, Checkpoint.open(base), **given)


def sharded(family: str, folder: Path, size: str = "40KB", **changes: Any) -> Path:
    """A tiny checkpoint in several files."""
    tiny.model(family, **changes).save_pretrained(folder, max_shard_size=size)
    tiny.tokenizer(tiny.kind_of(family)).save_pretrained(folder)
    return folder


def biased(family: str, folder: Path) -> Path:
    """A tiny checkpoint whose biases are not zero, as those of new models are."""
    model = tiny.model(family)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
            parameter.data += noise
    model.save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, by the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
