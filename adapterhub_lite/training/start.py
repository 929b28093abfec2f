"""Start from the values of an adapter that was trained before, if it has exactly the recipe's shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..adapters.adapter import Adapter
from ..adapters.lora import split_tensors
from ..errors import AdapterMismatch, Unsupported
from ..formats.peft_config import LoraSpec, PrefixSpec
from .computation import Learner
from .trainable import TrainableLora, TrainablePrefix

_SHOWN = 4


def start_from(learner: Learner, adapter: Adapter, head_name: str = "") -> None:
    """Give a fresh learner the values of `adapter`.

    Args:
        head_name: the attribute that holds the head of an encoder.

    Raises:
        AdapterMismatch: it has another shape; says in numbers what differs.
        Unsupported: another kind of adapter, or one whose parameters are not stored.
    """
    trainable = learner.trainable
    if isinstance(trainable, TrainableLora):
        others = _start_lora(trainable, adapter)
    elif isinstance(trainable, TrainablePrefix):
        others = _start_prefix(trainable, adapter)
    else:
        raise Unsupported("Adapters of type peft cannot start from a stored version.", "Leave start_from out.")
    _start_head(learner, adapter, others, head_name)


def _start_lora(trainable: TrainableLora, adapter: Adapter) -> dict[str, torch.Tensor]:
    spec = adapter.spec
    if not isinstance(spec, LoraSpec) or spec.use_dora != trainable.spec.use_dora:
        raise _other_kind(adapter, "dora" if trainable.spec.use_dora else "lora")
    parts, others = split_tensors(adapter.tensors)
    problems = list(_lora_problems(trainable, spec, parts, adapter.name))
    if problems:
        raise _mismatch(adapter, problems)
    with torch.no_grad():
        for name, site in trainable.sites.items():
            part = parts[name]
            site.a.copy_(part["A"])
            site.b.copy_(part["B"])
            if site.magnitude is not None:
                site.magnitude.copy_(part["magnitude"].flatten())
    return others


def _lora_problems(
    trainable: TrainableLora, spec: LoraSpec, parts: Mapping[str, Mapping[str, torch.Tensor]], name: str
) -> Iterator[str]:
    ours = set(trainable.sites)
    if missing := sorted(ours - parts.keys()):
        yield f"it changes {len(parts)} layers, the recipe {len(ours)} ({missing[0]} is not among its)"
    if extra := sorted(parts.keys() - ours):
        yield f"it changes {len(parts)} layers, the recipe {len(ours)} ({extra[0]} is not among the recipe's)"
    for site in sorted(ours & parts.keys()):
        part, own = parts[site], trainable.sites[site]
        rank, wanted = part["A"].shape[0], own.a.shape[0]
        if rank != wanted:
            yield f"{site} has rank {rank}, the recipe's {wanted}"
        elif part["A"].shape != own.a.shape or part["B"].shape != own.b.shape:
            yield (
                f"{site} has A {list(part['A'].shape)} and B {list(part['B'].shape)}, "
                f"the recipe's A {list(own.a.shape)} and B {list(own.b.shape)}"
            )
        elif abs(spec.scaling(site, rank) - own.scaling) > 1e-9 * abs(own.scaling):
            yield f"{site} is scaled by {spec.scaling(site, rank):g}, the recipe's by {own.scaling:g} (alpha, rslora)"
        if "bias" in part:
            yield f"{site} has a bias, which is not trained here"


def _start_prefix(trainable: TrainablePrefix, adapter: Adapter) -> dict[str, torch.Tensor]:
    if not isinstance(adapter.spec, PrefixSpec):
        raise _other_kind(adapter, "prefix")
    if trainable.spec.prefix_projection:
        raise Unsupported(
            f"The network of a prefix with a projection is not stored, so {adapter.name} cannot be its start.",
            "Set adapter.projection: false to go on with its keys and values.",
        )
    others = dict(adapter.tensors)
    stored = others.pop("prompt_embeddings")
    (own,) = trainable.parameters()
    if stored.shape != own.shape:
        raise _mismatch(adapter, [f"it has prompt_embeddings {list(stored.shape)}, the recipe's {list(own.shape)}"])
    with torch.no_grad():
        own.copy_(stored)
    return others


def _start_head(learner: Learner, adapter: Adapter, others: Mapping[str, torch.Tensor], head_name: str) -> None:
    if learner.head is None:
        return
    problems = []
    with torch.no_grad():
        for key, parameter in learner.head.state_dict(keep_vars=True).items():
            stored = others.get(f"{learner.trainable.head_prefix}{head_name}.{key}")
            if stored is None:
                problems.append(f"it has no {head_name}.{key}")
            elif stored.shape != parameter.shape:
                problems.append(f"its {head_name}.{key} is {list(stored.shape)}, the recipe's {list(parameter.shape)}")
            else:
                parameter.copy_(stored)
    if problems:
        raise _mismatch(adapter, problems)


def _other_kind(adapter: Adapter, wanted: str) -> Unsupported:
    return Unsupported(
        f"{adapter.name} is no adapter of type {wanted}, which the recipe trains.", "Start from one of that type."
    )


def _mismatch(adapter: Adapter, problems: list[str]) -> AdapterMismatch:
    shown = "; ".join(problems[:_SHOWN]) + (f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else "")
    return AdapterMismatch(
        f"{adapter.name} does not fit the recipe's adapter: {shown}.",
        "Give the recipe the adapter part that it was trained with (`ahl show` tells it).",
    )
