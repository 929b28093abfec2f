"""Plan a merge: which checkpoint tensors change and how, without loading a model.

W' = W + the sum of w_i dW_i over the adapters, computed in float32 and rounded once; dW is what an adapter alone does
to the frozen weight (`dense`). An adapter that was trained on a quantised base (int8, nf4, nf4-double) can be baked
into what that base really computed with (`dequantised`: every weight that bitsandbytes quantised goes through the
quantisation and back) or into the checkpoint's own weights (`original`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from ..adapters.adapter import Adapter
from ..bases.load import checked_config
from ..bases.skeleton import skeleton_of
from ..bases.views import HEAD_NAMES, VIEWS, View
from ..errors import AdapterMismatch, Unsupported
from .checkpoint import DTYPES, Checkpoint, Planned, not_finite, planned
from .dense import Edit
from .edits import BiasTerm, Edits, changed_bias, edits_of
from .merged import content_digest, noted, refuse_again
from .places import Places, Tie, quantised_weights, with_embeddings

BAKES = ("auto", "dequantised", "original")
Member = tuple[Adapter, float]


@dataclass(frozen=True)
class MergePlan:
    """What the merged checkpoint will hold.

    Attributes:
        shards: file name -> tensors in order.
        changed: names of the tensors that adapters change.
        config: the merged model's configuration.
        checkpoint: what it is made of.
        identity: digest of all that decides the values: whoever makes other values of the same plan uses `varied`.
        notes: lines a person should read.
    """

    shards: dict[str, list[Planned]]
    changed: list[str]
    config: dict[str, Any]
    bake: str
    quantization: str
    dtype: str
    checkpoint: Checkpoint | None = None
    identity: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for tensors in self.shards.values() for t in tensors)

    def varied(self, how: str, **changes: Any) -> MergePlan:
        """A plan made of this one, whose tensors have other values; `how` tells one way from another."""
        identity = hashlib.sha256(f"{self.identity}\n{how}".encode()).hexdigest()
        return replace(self, identity=identity, **changes)


def plan_merge(
    adapters: Sequence[Member] | Adapter,
    checkpoint: Checkpoint,
    *,
    quantization: str,
    bake: str,
    dtype: str,
    labels: list[str] | None,
    again: bool = False,
) -> MergePlan:
    """Plan the merge of adapters into a checkpoint: LoRA, DoRA, AdaLoRA, LoHa, LoKr and IA3, in any mix.

    Args:
        adapters: each with the factor on its change; one alone has the factor 1.
        quantization: of the base the adapters were trained on: none, int8, nf4 or nf4-double.
        bake: dequantised, original, or auto (dequantised if the base was quantised).
        dtype: float32, bfloat16, float16, or auto (each tensor keeps its own).
        labels: label names, for an adapter with a classification head.
        again: merge an adapter that is in this checkpoint already a second time.

    Raises:
        Unsupported: an adapter that does not change weights, two heads, a merge for the second time, an unknown option.
        AdapterMismatch: an adapter does not fit the checkpoint.
    """
    members = [(adapters, 1.0)] if isinstance(adapters, Adapter) else list(adapters)
    _check_options(members, bake, dtype)
    bake = ("original" if quantization == "none" else "dequantised") if bake == "auto" else bake
    config = checked_config(checkpoint.folder)
    digests = [adapter.digest or content_digest(adapter) for adapter, _ in members]
    if not again:
        refuse_again(config, [adapter for adapter, _ in members], digests)
    draft = _Draft(checkpoint, config)
    for adapter, weight in members:
        draft.take(adapter, weight)
    if bake == "dequantised":
        draft.bake(quantization)
    shards = draft.shards(dtype)
    config = noted(draft.config(labels, dtype), [a.name for a, _ in members], digests, [w for _, w in members])
    identity = _identity(checkpoint, digests, [w for _, w in members], quantization, bake, dtype, labels)
    return MergePlan(shards, draft.changed, config, bake, quantization, dtype, draft.checkpoint, identity, draft.notes)


def _check_options(members: Sequence[Member], bake: str, dtype: str) -> None:
    if not members:
        raise Unsupported("There is no adapter to merge.", "Name one.")
    for adapter, weight in members:
        if not math.isfinite(weight):
            raise Unsupported(f"{adapter.name} has the weight {weight}.", "Use a number such as 0.7.")
    if bake not in BAKES:
        raise Unsupported(f"{bake!r} is not a way to bake.", f"Use {', '.join(BAKES)}.")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise Unsupported(
            f"{dtype!r} is not a dtype of a merged checkpoint.", "Use auto, float32, bfloat16 or float16."
        )


def _identity(checkpoint: Checkpoint, digests: list[str], weights: list[float], *options: Any) -> str:
    return hashlib.sha256(repr((1, checkpoint.identity(), digests, weights, options)).encode()).hexdigest()


class _Draft:
    """A plan in the making: what all adapters change, by the checkpoint's names."""

    def __init__(self, checkpoint: Checkpoint, config: dict[str, Any]) -> None:
        self._view_of: Callable[[str], View] = cache(partial(skeleton_of, config))
        self._checkpoint, self._config = with_embeddings(checkpoint, self._view_of("default")), config
        self._view: View | None = None  # the class that the merged model has
        self._edits: dict[str, Edit] = {}
        self._biases: dict[str, list[BiasTerm]] = {}
        self._head: tuple[str, View, dict[str, torch.Tensor]] | None = None
        self._untied: dict[str, tuple[str, Edit]] = {}  # a tensor that gets a place of its own -> (source, edit)
        self._apart = False  # the configuration says tied, and the checkpoint holds two tensors
        self._adapted: set[str] = set()
        self.notes: list[str] = []

    @property
    def checkpoint(self) -> Checkpoint:
        """What it is made of, by the names that the merged model has."""
        return self._checkpoint

    @property
    def changed(self) -> list[str]:
        """Names of the tensors that adapters change."""
        edited = {name for name, edit in self._edits.items() if edit.terms}
        return sorted(edited | set(self._biases) | set(self._untied))

    def take(self, adapter: Adapter, weight: float) -> None:
        """Add what one adapter changes."""
        task = adapter.spec.task_type
        view = self._view_of(task if task in VIEWS else "default")
        edits = edits_of(adapter, weight, view)
        if edits.head:
            if self._head is not None:
                raise Unsupported(
                    f"{self._head[0]} and {adapter.name} both bring a classification head, and a model has one.",
                    "Merge one of them, or combine them with `ahl combine ... --head NAME` and merge that.",
                )
            assert view.head is not None
            view.head.build(edits.head)  # says what is wrong with it
            if weight != 1.0:
                self.notes.append(f"The head of {adapter.name} is taken as it is: its weight is for the layers alone.")
            self._head, self._view = (adapter.name, view, edits.head), view
        self._view = self._view or view
        self._place(adapter, edits, view)

    def _place(self, adapter: Adapter, edits: Edits, view: View) -> None:
        places, tie = Places(view, self._checkpoint), Tie(view, self._config, self._checkpoint)
        self._apart |= tie.apart
        self._adapted |= set(edits.weights)
        broken = tie.broken_by(set(edits.weights))
        if broken:
            self._untie(tie, places)
        for module, term in edits.weights.items():
            if broken and module == tie.output:
                name, (source, edit) = next(iter(self._untied.items()))
                self._untied[name] = source, edit.plus(term)
            else:
                name = places.tensor(f"{module}.weight")
                self._edits[name] = self._edits.get(name, Edit()).plus(term)
        for module, change in edits.biases.items():
            if getattr(view.modules[module], "bias", None) is None:
                raise AdapterMismatch(
                    f"{adapter.name} adds a bias to {module} (lora_bias), which has none here.",
                    "This model's class has no place for it: serve the adapter with its base.",
                )
            self._biases.setdefault(places.tensor(f"{module}.bias"), []).append(change)

    def _untie(self, tie: Tie, places: Places) -> None:
        """The output layer becomes a tensor of its own, which begins as the embeddings."""
        if self._untied:
            return
        name, source = f"{tie.output}.weight", places.tensor(f"{tie.input}.weight")
        self._untied[name] = source, Edit()
        self.notes.append(
            f"{tie.output} and {tie.input} are one tensor in the base; since an adapter changes one of them, "
            "the merged model has both (tie_word_embeddings is false)."
        )

    def bake(self, quantization: str) -> None:
        """Let every weight that a quantised base would hold go through the quantisation and back."""
        for name, turned in quantised_weights(self._view_of("default"), self._checkpoint).items():
            edit = self._edits.get(name, Edit())
            self._edits[name] = replace(edit, quantization=quantization, turned=turned)

    def shards(self, dtype: str) -> dict[str, list[Planned]]:
        """File name -> tensors in order."""
        shards = {
            file: [self._planned(name, dtype) for name in tensors if name not in self._untied]
            for file, tensors in self._checkpoint.shards.items()
        }
        if self._head is not None:
            _put_head(shards, self._head[1], self._head[2])
        last = list(shards)[-1]
        for name, (source, edit) in self._untied.items():
            place = self._checkpoint.place(source)
            shards[last].append(planned(name, _target(place.dtype, dtype), place, edit if edit.terms else None))
        return shards

    def _planned(self, name: str, dtype: str) -> Planned:
        info = self._checkpoint.tensors[name]
        if info.dtype not in DTYPES:
            raise Unsupported(f"Tensor {name} is {info.dtype}, which is not merged.", "Use a float checkpoint.")
        place = self._checkpoint.place(name)
        target, terms = _target(place.dtype, dtype), self._biases.get(name)
        edit = self._edits.get(name)
        if terms:
            return Planned(name, target, place.shape, partial(_bias, self._checkpoint, name, terms))
        if edit is not None and (edit.terms or edit.quantization != "none") and not place.dtype.is_floating_point:
            raise Unsupported(f"Tensor {name} is {info.dtype}, which is not merged.", "Use a float checkpoint.")
        return planned(name, target, place, edit)

    def config(self, labels: list[str] | None, dtype: str) -> dict[str, Any]:
        """The merged model's configuration."""
        config = dict(self._config)
        if self._untied or self._apart:
            config["tie_word_embeddings"] = False
        if self._head is not None:
            config = _with_labels(config, self._head[1], self._head[2], labels)
        if dtype != "auto":
            config["dtype"] = dtype
            config.pop("torch_dtype", None)
        return config


def _target(own: torch.dtype, dtype: str) -> torch.dtype:
    found: torch.dtype = own if dtype == "auto" or not own.is_floating_point else getattr(torch, dtype)
    return found


def _bias(checkpoint: Checkpoint, name: str, terms: list[BiasTerm]) -> torch.Tensor:
    own = checkpoint.read(name).float()
    total = changed_bias(own, terms)
    if not bool(torch.isfinite(total).all()):
        raise not_finite(name, own)
    return total


def _lacks(modules: Mapping[str, nn.Module], tensor: str, prefix: str) -> bool:
    """Whether a class has no module for a tensor of the checkpoint, as taggers have none for BERT's pooler."""
    module = tensor.rpartition(".")[0]
    return module not in modules and f"{prefix}{module}" not in modules


def _put_head(shards: dict[str, list[Planned]], view: View, head: Mapping[str, torch.Tensor]) -> None:
    """Put the head's tensors in the last shard, and name the others as the class with a head does."""
    modules, prefix = view.modules, f"{getattr(view.model, 'base_model_prefix', '')}."
    for tensors in shards.values():
        tensors[:] = [p for p in tensors if p.name.split(".")[0] not in HEAD_NAMES and p.name != "lm_head.weight"]
        tensors[:] = [p for p in tensors if not _lacks(modules, p.name, prefix)]
        tensors[:] = [
            p if p.name.rpartition(".")[0] in modules else replace(p, name=f"{prefix}{p.name}") for p in tensors
        ]
    last = list(shards)[-1]
    dtype = next((p.dtype for tensors in shards.values() for p in tensors if p.dtype.is_floating_point), torch.float32)
    for name, tensor in head.items():
        shards[last].append(Planned(f"{view.head_name}.{name}", dtype, tuple(tensor.shape), tensor.clone))


def _with_labels(
    config: dict[str, Any], view: View, head: Mapping[str, torch.Tensor], labels: list[str] | None
) -> dict[str, Any]:
    """The configuration of the class with a head, with its classes' names."""
    assert view.head is not None
    state = view.head.build(head).state_dict()
    count = list(state.values())[-1].shape[0]
    names = labels or [f"LABEL_{i}" for i in range(count)]
    made = {**config, "architectures": [type(view.model).__name__], "num_labels": count}
    made["id2label"] = {str(i): n for i, n in enumerate(names)}
    made["label2id"] = {n: i for i, n in enumerate(names)}
    return made
