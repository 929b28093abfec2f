"""Train one adapter from a recipe's parts: build it, run the loop, hand it over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.prefix import FittedPrefix, join_prefix, prefix_shape
from ..adapters.sites import select_sites
from ..bases.load import Base
from ..bases.quiet import quiet
from ..bases.views import View
from ..errors import Unsupported
from ..events import Listener, ignore
from ..formats.peft_config import LoraSpec, PrefixSpec
from ..recipe.schema import LoraAdapter, PrefixAdapter, Recipe, TagTask
from ..tasks.task import Example
from .loop import History, run_loop
from .objective import make_objective
from .trainable import Trainable, TrainableLora, TrainablePrefix

_TASK_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "SEQ_CLS"}


@dataclass(frozen=True)
class Trained:
    """The result of a run."""

    adapter: Adapter
    history: History


def train_adapter(
    recipe: Recipe,
    base: Base,
    train: Sequence[Example],
    validation: Sequence[Example] = (),
    *,
    labels: int = 0,
    start_text: str = "",
    on_event: Listener = ignore,
) -> Trained:
    """Train the adapter that `recipe` describes on `base`.

    Args:
        labels: number of classes, for encoders (that classify or tag, as the recipe's task says).
        start_text: what a text-initialised prefix starts from when the recipe names no text.

    Raises:
        TrainingFailed: the loss diverged or memory ran out.
        Unsupported: this base cannot have such an adapter.
    """
    seed = recipe.training.seed
    generator = torch.Generator().manual_seed(seed)
    with base.training(), torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        task_type = _task_type(recipe, base)
        adapter = _new_trainable(recipe, base, generator, start_text)
        head = _new_head(base, task_type, labels, generator)
        output = base.model.get_output_embeddings() if base.kind != "encoder" else None  # type: ignore[operator]
        adapts_output = isinstance(adapter, TrainableLora) and any(s.module is output for s in adapter.sites.values())
        objective = make_objective(base, head, adapts_output, task_type)
        parameters = [*adapter.parameters(), *(head.parameters() if head else ())]
        try:
            # An encoder trains with its own dropout, as its makers and PEFT with Trainer do.
            objective.train(True)
            with adapter.attached():
                history = run_loop(recipe.training, adapter, parameters, objective, train, validation, on_event)
        finally:
            objective.train(False)
    tensors = {k: v.clone() for k, v in adapter.tensors().items()}
    if head is not None:
        name = base.view(task_type).head_name
        tensors |= {f"{adapter.head_prefix}{name}.{k}": v.detach().clone() for k, v in head.state_dict().items()}
    return Trained(Adapter(adapter.spec, tensors, name=recipe.name), history)


def _task_type(recipe: Recipe, base: Base) -> str:
    """PEFT's name for the class that the adapter is trained in."""
    return "TOKEN_CLS" if isinstance(recipe.task, TagTask) else _TASK_TYPES[base.kind]


def _new_trainable(recipe: Recipe, base: Base, generator: torch.Generator, start_text: str) -> Trainable:
    task_type = _task_type(recipe, base)
    heads = (base.view(task_type).head_name,) if base.kind == "encoder" else ()
    common: dict[str, Any] = {
        "task_type": task_type,
        "base_model": base.name,
        "revision": base.source.revision,
        "modules_to_save": heads,
    }
    if isinstance(recipe.adapter, PrefixAdapter):
        return _new_prefix(recipe.adapter, base, common, generator, start_text)
    return _new_lora(recipe.adapter, base, common, generator)


def _new_lora(config: LoraAdapter, base: Base, common: dict[str, Any], generator: torch.Generator) -> TrainableLora:
    output = base.model.get_output_embeddings() if base.kind != "encoder" else None  # type: ignore[operator]
    view = base.view(common["task_type"])
    sites = select_sites(view.modules, config.targets, output)
    spec = LoraSpec(
        rank=config.rank,
        alpha=config.alpha,
        target_modules=tuple(sorted({_suffix(name, sites, view) for name in sites})),
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        use_rslora=config.rslora,
        use_dora=config.type == "dora",
        dropout=config.dropout,
        **common,
    )
    return TrainableLora(spec, sites, generator)


def _suffix(name: str, sites: dict[str, nn.Module], view: View) -> str:
    """The shortest end of a module's name that names no module outside the chosen ones, so that PEFT finds the same."""
    parts = name.split(".")
    inside_head = [f"{view.head_name}.{key.rpartition('.')[0]}" for key in view.head.shapes()] if view.head else []
    others = [n for n in view.modules if n not in sites] + inside_head
    for length in range(1, len(parts) + 1):
        end = ".".join(parts[-length:])
        if not any(n == end or n.endswith(f".{end}") for n in others):
            return end
    return name


def _new_prefix(
    config: PrefixAdapter, base: Base, common: dict[str, Any], generator: torch.Generator, start_text: str
) -> TrainablePrefix:
    shape = prefix_shape(base.config)
    if base.kind == "encoder" and base.config.model_type not in (
        "bert",
        "roberta",
        "xlm-roberta",
        "camembert",
        "electra",
    ):
        raise Unsupported(f"{base.config.model_type} takes no prefix.", "Use adapter.type: lora.")
    spec = PrefixSpec(
        num_virtual_tokens=config.tokens,
        token_dim=shape.heads * shape.head_dim,
        num_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_transformer_submodules=2 if base.kind == "seq2seq" else 1,
        encoder_hidden_size=shape.heads * shape.head_dim if config.projection else None,
        prefix_projection=config.projection,
        **common,
    )
    start = None
    if config.init == "text" and not config.projection and base.kind == "causal":
        start = prefix_of_text(base, config.text or start_text, config.tokens)
    return TrainablePrefix(spec, shape, generator, base.device, start)


def prefix_of_text(base: Base, text: str, tokens: int) -> torch.Tensor:
    """`prompt_embeddings` holding the keys and values that the base computes for `text`, repeated or cut to `tokens`.

    Starting from real activations helps small data sets most (arXiv 2101.00190, section 7.4).
    """
    ids = list(base.tokenizer(text or "Answer:")["input_ids"])
    ids = (ids * (tokens // len(ids) + 1))[:tokens]
    with torch.inference_mode():
        cache = base.model(input_ids=torch.tensor([ids], device=base.device), use_cache=True).past_key_values
    layers = cache.layers
    keys = torch.stack([layer.keys[0] for layer in layers]).clone()
    values = torch.stack([layer.values[0] for layer in layers]).clone()
    return join_prefix(FittedPrefix(keys, values)).float()


def _new_head(base: Base, task_type: str, labels: int, generator: torch.Generator) -> nn.Module | None:
    if base.kind != "encoder":
        return None
    slot = base.view(task_type).head
    assert slot is not None
    tensors = slot.fresh(labels, generator, getattr(base.config, "initializer_range", 0.02))
    head = slot.build(tensors).to(base.device)
    head.requires_grad_(True).train()
    return head
