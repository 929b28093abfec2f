"""Train adapters from recipes' parts: build them, run the loop, hand them over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.prefix import FittedPrefix, join_prefix, prefix_shape
from ..adapters.sites import select_sites
from ..bases.front import hidden_front
from ..bases.load import Base
from ..bases.quiet import quiet
from ..bases.views import View
from ..errors import StoreCorrupt, TrainingFailed, Unsupported
from ..events import Listener, Note, ignore
from ..formats.peft_config import LoraSpec, PrefixSpec
from ..recipe.options import PeftAdapter
from ..recipe.schema import LoraAdapter, PrefixAdapter, Recipe, TagTask
from ..tasks.task import Example
from .apart import Apart
from .computation import Learner, Settings, make_computation
from .frozen import unchanged
from .loop import Referee, failed, run_loop
from .member import FAILED, Course, History, Member
from .memory.collector import resting_heap
from .memory.offload import settled
from .precision import BFLOAT16, choose_precision, products_in
from .runs.checkpoint import Checkpoints
from .signals import Wish
from .start import start_from
from .trainable import Trainable, TrainableLora, TrainablePrefix
from .trainable_peft import TrainablePeft, peft_sites

_TASK_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "SEQ_CLS"}


@dataclass(frozen=True)
class Trained:
    """The result of a run."""

    adapter: Adapter
    history: History


@dataclass(frozen=True)
class Assignment:
    """One adapter to train.

    Attributes:
        labels: number of classes, for encoders (that classify or tag, as the recipe's task says).
        start_text: what a text-initialised prefix starts from when the recipe names no text.
        start: the adapter whose values it starts with.
        name: whose progress it is, where several are trained together.
        lines: where in its file each training example is, for messages.
    """

    recipe: Recipe
    train: Sequence[Example]
    validation: Sequence[Example] = ()
    labels: int = 0
    start_text: str = ""
    start: Adapter | None = None
    name: str = ""
    lines: Sequence[int] = ()


def train_adapter(
    recipe: Recipe,
    base: Base,
    train: Sequence[Example],
    validation: Sequence[Example] = (),
    *,
    labels: int = 0,
    start_text: str = "",
    settings: Settings | None = None,
    on_event: Listener = ignore,
) -> Trained:
    """Train the adapter that `recipe` describes on `base`; see `Assignment` for the arguments.

    `settings` says how it is computed, whatever the recipe says of that; see `workflows.plan.setup_of`.

    Raises:
        TrainingFailed: the loss diverged or memory ran out.
        TrainingInterrupted: Ctrl-C or SIGTERM.
        Unsupported: this base cannot have such an adapter.
    """
    assignment = Assignment(recipe, train, validation, labels, start_text)
    (found,) = train_adapters([assignment], base, settings=settings, on_event=on_event)
    if isinstance(found, TrainingFailed):
        raise found
    return found


def train_adapters(
    assignments: Sequence[Assignment],
    base: Base,
    *,
    checkpoints: Checkpoints | None = None,
    settings: Settings | None = None,
    on_event: Listener = ignore,
    wish: Callable[[], int] | None = None,
    referee: Referee | None = None,
    apart: bool = False,
) -> list[Trained | TrainingFailed]:
    """Train adapters together on one base, each exactly as it would be alone; one result each, in order.

    Args:
        checkpoints: where the state is kept, and gone on from where there is one.
        wish: asks whether to stop; None listens to Ctrl-C and SIGTERM.
        referee: asked before every step who is to go on.
        apart: compute the rows of a step learner by learner, where that is faster.

    Raises:
        TrainingFailed: memory ran out.
        TrainingInterrupted: Ctrl-C or SIGTERM.
        Unsupported: this base cannot have such an adapter.
        StoreCorrupt: the checkpoint is damaged.
    """
    precision = choose_precision([one.recipe.training.precision for one in assignments], base.device, base.dtype)
    with (
        Wish() as own,
        base.training(),
        torch.random.fork_rng(),
        quiet(),
        unchanged(base.model),
        resting_heap(),
        products_in(precision.name),
    ):
        learners, members = new_members(assignments, base)
        for member in members:
            _tell_short(member, on_event)
        if checkpoints is not None:
            _restore(members, checkpoints, on_event)
        settings = settings or Settings()
        computation = make_computation(base, learners, settings)
        if note := getattr(computation, "note", ""):
            on_event(Note(note, "warning"))
        if precision.name == BFLOAT16:
            on_event(Note(f"products with the base go through bfloat16: {precision.why}"))
        if apart:
            computation = Apart(computation)
        with settled(base, learners, computation, settings):
            run_loop(members, computation, on_event, checkpoints, wish or (lambda: own.number), referee)
    kept = 0 if checkpoints is None else checkpoints.kept_step
    return [
        failed(member, kept) if member.status == FAILED else _trained(member, learner, one, base)
        for member, learner, one in zip(members, learners, assignments, strict=True)
    ]


def new_members(assignments: Sequence[Assignment], base: Base) -> tuple[list[Learner], list[Member]]:
    """Fresh learners that have not begun."""
    learners = [_learner(one, base) for one in assignments]
    members = [
        Member(i, learner, Course(one.recipe.training, one.train, one.validation, one.name, one.lines))
        for i, (one, learner) in enumerate(zip(assignments, learners, strict=True))
    ]
    return learners, members


def _learner(assignment: Assignment, base: Base) -> Learner:
    """A fresh adapter and head, or one with the values to start from."""
    recipe = assignment.recipe
    generator = torch.Generator().manual_seed(recipe.training.seed)
    torch.manual_seed(recipe.training.seed)
    task_type = _task_type(recipe, base)
    trainable = _new_trainable(recipe, base, generator, assignment.start_text)
    made = Learner(trainable, _new_head(base, task_type, assignment.labels, generator), task_type)
    if assignment.start is not None:
        start_from(made, assignment.start, base.view(task_type).head_name)
    return made


def _tell_short(member: Member, on_event: Listener) -> None:
    """Say where epochs end a run before the steps that were asked for: elsewhere `max_steps` means exactly so many."""
    wanted, total = member.config.max_steps, member.order.total
    if wanted is not None and total < wanted:
        on_event(Note(f"The epochs end after {total} steps: max_steps {wanted} is not reached; raise training.epochs"))


def _restore(members: Sequence[Member], checkpoints: Checkpoints, on_event: Listener) -> None:
    state = checkpoints.latest()
    if state is None:
        return
    try:
        for member, tensors, plain in zip(members, state.tensors, state.plain, strict=True):
            member.restore(tensors, plain)
    except (ValueError, LookupError, TypeError) as error:
        hint = "Start anew with --from-scratch."
        raise StoreCorrupt(f"The checkpoint does not fit this run: {error}.", hint) from error
    on_event(Note(f"going on from step {state.step}"))


def _trained(member: Member, learner: Learner, assignment: Assignment, base: Base) -> Trained:
    trainable, head = learner.trainable, learner.head
    tensors = {k: v.clone() for k, v in trainable.tensors().items()}
    if head is not None:
        name = base.view(learner.task_type).head_name
        tensors |= {f"{trainable.head_prefix}{name}.{k}": v.detach().clone() for k, v in head.state_dict().items()}
    return Trained(Adapter(trainable.spec, tensors, name=assignment.recipe.name), member.history)


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
    if isinstance(recipe.adapter, PeftAdapter):
        return _new_peft(recipe.adapter, base, common)
    return _new_lora(recipe.adapter, base, common, generator)


def _new_peft(config: PeftAdapter, base: Base, common: dict[str, Any]) -> TrainablePeft:
    output = base.model.get_output_embeddings() if base.kind != "encoder" else None  # type: ignore[operator]
    view = base.view(common["task_type"])
    sites = peft_sites(config.method, config.targets, view.modules, output)
    suffixes = sorted({_suffix(name, sites, view) for name in sites})
    return TrainablePeft(config.method, config.options, sites, view.modules, suffixes, common)


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
    if base.kind == "causal" and (what := hidden_front(base.config)):
        raise Unsupported(f"{base.name} has {what}: a prefix could not be served.", "Use adapter.type: lora.")
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
