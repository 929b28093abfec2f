"""Adapters with random values, attached to a runtime without a store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.adapters.prefix import prefix_shape
from adapterhub_lite.adapters.sites import features, select_sites
from adapterhub_lite.bases.load import Base
from adapterhub_lite.bases.quantization import dense_weight
from adapterhub_lite.formats.card import Card
from adapterhub_lite.formats.specs import Ia3Spec, LoraSpec, PrefixSpec, PromptSpec
from adapterhub_lite.names import Ref
from adapterhub_lite.store import Store

PREFIX = "base_model.model."
FEEDFORWARD = ("down_proj", "mlp.c_proj", "output.dense", "wo")
TASK_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "SEQ_CLS"}


def lora(base: Base, seed: int, rank: int = 4, *, dora: bool = False, labels: int = 3, **changes: Any) -> Adapter:
    """A LoRA or DoRA on every linear layer, with a head for an encoder."""
    generator = torch.Generator().manual_seed(seed)
    view = base.view()
    output = None if base.kind == "encoder" else base.model.get_output_embeddings()
    sites = select_sites(view.modules, "all-linear", output)
    tensors = {}
    for name, module in sites.items():
        n_in, n_out = features(module)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn((rank, n_in), generator=generator) * n_in**-0.5
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn((n_out, rank), generator=generator) * 0.2
        if dora:
            weight = dense_weight(module, torch.float32)
            norm = (weight.T if weight.shape == (n_in, n_out) and type(module).__name__ == "Conv1D" else weight).norm(
                dim=1
            )
            change = 1 + 0.3 * torch.rand(n_out, generator=generator)
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = norm * change
    spec = LoraSpec(
        rank=rank,
        alpha=2.0 * rank,
        target_modules=tuple(sorted(sites)),
        use_dora=dora,
        task_type=TASK_TYPES[base.kind],
        modules_to_save=(view.head_name,) if base.kind == "encoder" else (),
        **changes,
    )
    return Adapter(spec, {**tensors, **_head(base, labels, generator, PREFIX)}, name=f"lora-{seed}")


def prefix(base: Base, seed: int, tokens: int = 3, labels: int = 3) -> Adapter:
    """A prefix of random keys and values, with a head for an encoder."""
    generator = torch.Generator().manual_seed(seed)
    shape = prefix_shape(base.config)
    spec = PrefixSpec(
        num_virtual_tokens=tokens,
        token_dim=shape.heads * shape.head_dim,
        num_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_transformer_submodules=2 if base.kind == "seq2seq" else 1,
        task_type=TASK_TYPES[base.kind],
        modules_to_save=(base.view().head_name,) if base.kind == "encoder" else (),
    )
    tensors = {"prompt_embeddings": torch.randn((tokens, shape.width), generator=generator)}
    return Adapter(spec, {**tensors, **_head(base, labels, generator, "base_model.")}, name=f"prefix-{seed}")


def ia3(base: Base, seed: int, inputs: tuple[str, ...] = FEEDFORWARD, labels: int = 3, **changes: Any) -> Adapter:
    """An IA3 on every linear layer, which scales the input of those whose name ends in one of `inputs`."""
    generator = torch.Generator().manual_seed(seed)
    view = base.view()
    output = None if base.kind == "encoder" else base.model.get_output_embeddings()
    sites = select_sites(view.modules, "all-linear", output)
    if base.kind == "encoder":
        sites = {name: module for name, module in sites.items() if not name.startswith(view.head_name)}
    tensors = {}
    for name, module in sites.items():
        n_in, n_out = features(module)
        shape = (1, n_in) if name.endswith(inputs) else (n_out, 1)
        tensors[f"{PREFIX}{name}.ia3_l"] = 1 + 0.5 * torch.randn(shape, generator=generator)
    spec = Ia3Spec(
        target_modules=tuple(sorted(sites)),
        feedforward_modules=tuple(sorted(name for name in sites if name.endswith(inputs))),
        task_type=TASK_TYPES[base.kind],
        modules_to_save=(view.head_name,) if base.kind == "encoder" else (),
        **changes,
    )
    return Adapter(spec, {**tensors, **_head(base, labels, generator, PREFIX)}, name=f"ia3-{seed}")


def prompt(base: Base, seed: int, tokens: int = 3, labels: int = 3, **changes: Any) -> Adapter:
    """Virtual tokens of random embeddings, with a head for an encoder."""
    generator = torch.Generator().manual_seed(seed)
    model: Any = base.model
    width = int(model.get_input_embeddings().weight.shape[1])
    spec = PromptSpec(
        num_virtual_tokens=tokens,
        token_dim=width,
        num_transformer_submodules=2 if base.kind == "seq2seq" else 1,
        task_type=TASK_TYPES[base.kind],
        modules_to_save=(base.view().head_name,) if base.kind == "encoder" else (),
        **changes,
    )
    tensors = {"prompt_embeddings": torch.randn(spec.shape, generator=generator)}
    return Adapter(spec, {**tensors, **_head(base, labels, generator, "base_model.")}, name=f"prompt-{seed}")


def _head(base: Base, labels: int, generator: torch.Generator, stem: str) -> dict[str, torch.Tensor]:
    view = base.view()
    if view.head is None:
        return {}
    made = view.head.fresh(labels, generator, 0.5)
    return {f"{stem}{view.head_name}.{name}": tensor for name, tensor in made.items()}


def stored(store: Store, base: Base, name: str, adapter: Adapter, task: Mapping[str, Any] | None = None) -> Ref:
    """The adapter as a version of `name`, with a card that names the base."""
    mark = {"name": base.name, "fingerprint": base.fingerprint.to_dict()}
    return store.put(name, dict(adapter.files()), Card(base=mark, task=dict(task or {})))
