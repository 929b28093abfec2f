"""A transformers model whose weights come one layer at a time: it computes where its checkpoint does not fit in memory.

Every module gets its own parameters right before its forward and lets go of them after it, so at no time more than one
module's are there, and the logits are those of transformers' own class in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..bases.quiet import quiet
from ..errors import Unsupported
from .merge_tensors import Tensors


def streamed_model(
    config: Mapping[str, Any],
    task_type: str | None,
    kind: str,
    tensors: Tensors,
    *,
    keep: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Any:
    """The model of a configuration, which reads `tensors` when it computes.

    Args:
        kind: causal, seq2seq or encoder.
        keep: leave what was read in its place: after a forward through all of it the model is an ordinary one.

    Raises:
        Unsupported: it has a parameter that no tensor of that name fills.
    """
    import transformers
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    plain = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    auto = model_class(task_type, kind)
    with quiet(), init_empty_weights(include_buffers=False):
        settings = transformers.AutoConfig.for_model(config["model_type"], **plain)
        model: Any = auto.from_config(settings, dtype=dtype)
    model.tie_weights()  # without weights each layer has got a parameter of its own
    model.requires_grad_(False).eval()
    if device is not None:
        for name, buffer in model.named_buffers():
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = buffer.to(device)
    for module, sources in _sources(model, tensors).items():
        module.register_forward_pre_hook(_loading(sources, tensors, dtype, device))
        if not keep:
            module.register_forward_hook(_unloading(dict(module._parameters)))
    return model


def model_class(task_type: str | None, kind: str) -> Any:
    """transformers' class that a merged adapter of PEFT's `task_type` on a base of this kind is loaded as."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    headed: dict[str | None, Any] = {
        "SEQ_CLS": AutoModelForSequenceClassification,
        "TOKEN_CLS": AutoModelForTokenClassification,
    }
    return headed.get(task_type, AutoModelForSeq2SeqLM if kind == "seq2seq" else AutoModelForCausalLM)


def fill(model: Any, tensors: Tensors, dtype: torch.dtype) -> None:
    """Overwrite the parameters of a model in memory with `tensors`, one at a time.

    Raises:
        Unsupported: as `streamed_model`.
    """
    for module, sources in _sources(model, tensors).items():
        for leaf, source in sources.items():
            parameter = module._parameters[leaf]
            assert parameter is not None
            parameter.data.copy_(tensors.dense(source).to(dtype))


def _sources(model: Any, tensors: Tensors) -> dict[nn.Module, dict[str, str]]:
    """For each module that has parameters of its own, their names there -> names of tensors."""
    known = set(tensors.names)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    alike: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        alike.setdefault(id(parameter), []).append(name)
    found: dict[nn.Module, dict[str, str]] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            own = f"{path}.{leaf}" if path else leaf
            names = [own, *(name for name in alike[id(parameter)] if name != own)]
            candidates = [c for name in names for c in (name, name.removeprefix(prefix), f"{prefix}{name}")]
            source = next((candidate for candidate in candidates if candidate in known), None)
            if source is None:
                raise Unsupported(
                    f"The checkpoint has no tensor {own} as {type(model).__name__} has it.",
                    "Its logits cannot be computed from the disk; verify its tensors alone with --verify weights.",
                )
            found.setdefault(module, {})[leaf] = source
    return found


def _loading(sources: Mapping[str, str], tensors: Tensors, dtype: torch.dtype, device: torch.device | None) -> Any:
    def load(module: nn.Module, *_: Any) -> None:
        for leaf, source in sources.items():
            if not _is_meta(module._parameters[leaf]):
                continue
            tensor = tensors.dense(source)
            tensor = tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    return load


def _unloading(empty: Mapping[str, nn.Parameter | None]) -> Any:
    def unload(module: nn.Module, *_: Any) -> None:
        module._parameters.update(empty)

    return unload


def _is_meta(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.device.type == "meta"
