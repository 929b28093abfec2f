"""One set of frozen modules seen as the classes PEFT knows: language model, classifier, tagger, bare backbone.

A view shares every module of the base; only the classification head is a slot, filled per row of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..errors import AdapterMismatch, Unsupported
from .heads import HEAD_NAMES as HEAD_NAMES

VIEWS = ("SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION")
"""Task types of PEFT whose class is not always the one a base is loaded as; all others see it as that one."""


def kind_of(config: Mapping[str, Any]) -> str:
    """causal, seq2seq or encoder, from the plain content of config.json.

    Raises:
        Unsupported: an architecture that is none of the three.
    """
    names = [str(a) for a in config.get("architectures") or []]
    if config.get("is_encoder_decoder"):
        return "seq2seq"
    if any(n.endswith(("ForCausalLM", "LMHeadModel")) for n in names):
        return "causal"
    from transformers.models.auto import modeling_auto as auto

    model_type = str(config.get("model_type"))
    encoder_classes = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForPreTraining")
    if any(n.endswith(encoder_classes) for n in names) and model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    if (
        model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and model_type not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    ):
        return "causal"
    if model_type in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return "encoder"
    raise Unsupported(
        f"{names or model_type} is not a text model this package knows.",
        "Causal, encoder and encoder-decoder text models load.",
    )


class HeadSlot(nn.Module):
    """Stands where a classifier's head stood and sends each row of the batch through its own head.

    It registers no parameters: the base stays what its fingerprint says.
    """

    def __init__(self, blueprint: nn.Module) -> None:
        super().__init__()
        # A tuple hides the module from registration.
        self._blueprint = (blueprint,)
        self._heads: tuple[nn.Module, ...] = ()
        self._rows: tuple[list[int], ...] = ()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter names and shapes of the blueprint; the first dimension of the last layer is the label count."""
        return {k: tuple(v.shape) for k, v in self._blueprint[0].state_dict().items()}

    def build(self, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """A head with these parameters; all must be there, and only the number of labels may differ.

        Raises:
            AdapterMismatch: missing, unexpected or misshapen parameters.
        """
        expected = self.shapes()
        if set(tensors) != set(expected):
            raise AdapterMismatch(
                f"The head holds {sorted(tensors)}, this base's class needs {sorted(expected)}.",
                "It was made for another model class.",
            )
        labels = {t.shape[0] for n, t in tensors.items() if _is_output(n, expected)}
        head = copy.deepcopy(self._blueprint[0]).to_empty(device="cpu")
        for name, tensor in tensors.items():
            shape = (_only(labels), *expected[name][1:]) if _is_output(name, expected) else expected[name]
            if tuple(tensor.shape) != shape:
                raise AdapterMismatch(f"Head tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}.")
            parent, _, leaf = name.rpartition(".")
            module = head.get_submodule(parent)
            setattr(module, leaf, nn.Parameter(tensor.clone(), requires_grad=False))
            if isinstance(module, nn.Linear) and leaf == "weight":
                module.out_features = tensor.shape[0]
        return head.eval()

    def fresh(self, labels: int, generator: torch.Generator, std: float) -> dict[str, torch.Tensor]:
        """Initial parameters of a new head: normal weights with the model's `initializer_range`, zero biases."""
        expected = self.shapes()
        made = {}
        for name, shape in expected.items():
            full = (labels, *shape[1:]) if _is_output(name, expected) else shape
            made[name] = torch.zeros(full)
            if name.endswith("weight"):
                made[name].normal_(0.0, std, generator=generator)
        return made

    def assign(self, heads: Sequence[nn.Module | None]) -> None:
        """Choose the head of every row; rows with None get no logits (-inf)."""
        by_id: dict[int, tuple[nn.Module, list[int]]] = {}
        for row, head in enumerate(heads):
            if head is not None:
                by_id.setdefault(id(head), (head, []))[1].append(row)
        self._heads = tuple(h for h, _ in by_id.values())
        self._rows = tuple(r for _, r in by_id.values())

    def forward(self, features: torch.Tensor, **_: Any) -> torch.Tensor:
        """features [rows, ...] -> logits [rows, ..., most labels], -inf where a row's head has fewer labels."""
        if self._heads:
            features = features.to(next(self._heads[0].parameters()).dtype)  # a head in training is float32
        if len(self._heads) == 1 and len(self._rows[0]) == features.shape[0]:
            logits: torch.Tensor = self._heads[0](features)
            return logits
        parts = [head(features[rows]) for head, rows in zip(self._heads, self._rows, strict=True)]
        if not parts:
            raise Unsupported("No row of this batch has a classification head.", "Name an adapter trained to classify.")
        width = max(p.shape[-1] for p in parts)
        out: torch.Tensor = parts[0].new_full((features.shape[0], *parts[0].shape[1:-1], width), float("-inf"))
        for part, rows in zip(parts, self._rows, strict=True):
            out[rows, ..., : part.shape[-1]] = part
        return out


def _only(labels: set[int]) -> int:
    """The one label count all output tensors of a head agree on."""
    if len(labels) != 1:
        raise AdapterMismatch(f"The head's output tensors disagree on the number of labels: {sorted(labels)}.")
    return next(iter(labels))


@dataclass(frozen=True)
class View:
    """A callable model, the names PEFT gives its modules, and its head slot if it has one."""

    model: nn.Module
    head: HeadSlot | None
    head_name: str

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """Module name -> module, as PEFT names them below `base_model.model.`."""
        return MappingProxyType(dict(self.model.named_modules()))


def make_view(model: nn.Module, kind: str, task_type: str, pad_id: int = 0) -> View:
    """The view of `model` for PEFT's `task_type` (one of `VIEWS`), else as the class it was loaded as.

    Raises:
        Unsupported: transformers has no such class for this model, or not one whose head we know.
    """
    if task_type == "FEATURE_EXTRACTION":
        return View(model.base_model, None, "")  # type: ignore[arg-type]
    if task_type == "TOKEN_CLS":
        return _tagger_around(model, kind)
    if kind == "encoder":
        return _with_head_slot(model)
    return _classifier_around(model, pad_id) if task_type == "SEQ_CLS" else View(model, None, "")


def _with_head_slot(model: nn.Module) -> View:
    for name in HEAD_NAMES:
        head = getattr(model, name, None)
        if isinstance(head, HeadSlot):
            return View(model, head, name)
        if head is not None:
            slot = HeadSlot(head)
            setattr(model, name, slot)
            return View(model, slot, name)
    raise Unsupported(f"{type(model).__name__} has no head named {', '.join(HEAD_NAMES)}.", "Use another base.")


def _classifier_around(model: Any, pad_id: int) -> View:
    """A *ForSequenceClassification shell on the meta device whose backbone is the live one."""
    from transformers import AutoModelForSequenceClassification

    # The class reads each row at its last token that is no padding: it must know what we pad with.
    shell = _shell(AutoModelForSequenceClassification, model, "sequence-classification", pad_token_id=pad_id)
    prefix = shell.base_model_prefix
    if isinstance(getattr(model, prefix, None), nn.Module):
        setattr(shell, prefix, getattr(model, prefix))
    else:  # T5: the shell wraps a backbone whose parts are the model's own
        backbone = getattr(shell, prefix)
        for name, _ in list(backbone.named_children()):
            setattr(backbone, name, getattr(model, name))
    return _with_head_slot(shell.eval())


def _tagger_around(model: Any, kind: str) -> View:
    """A *ForTokenClassification shell on the meta device over the live modules: without BERT's pooler, as that class.

    Its head must read the last hidden states as they are, since that is what a mixed batch gives it.
    """
    from transformers import AutoModelForTokenClassification

    if kind == "seq2seq":
        raise Unsupported(f"{type(model).__name__} has no class that labels tokens.", "Use an encoder or causal base.")
    shell = _shell(AutoModelForTokenClassification, model, "token-classification")
    backbone, live = shell.base_model, model.base_model
    head = next((name for name in HEAD_NAMES if isinstance(getattr(shell, name, None), nn.Linear)), None)
    others = [
        n for n, part in shell.named_children() if n not in (shell.base_model_prefix, head) and _has_weights(part)
    ]
    lacking = [n for n, _ in backbone.named_children() if not isinstance(getattr(live, n, None), nn.Module)]
    if head is None or others or lacking or type(backbone) is not type(live):
        raise Unsupported(
            f"{type(shell).__name__} does more than a linear layer on the last hidden states.", "Use another base."
        )
    for name, _ in list(backbone.named_children()):
        setattr(backbone, name, getattr(live, name))
    for name, _ in [*backbone.named_parameters(recurse=False), *backbone.named_buffers(recurse=False)]:
        setattr(backbone, name, getattr(live, name))
    backbone.config = live.config
    return _with_head_slot(shell.eval())


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _shell(auto: Any, model: Any, what: str, **settings: Any) -> Any:
    """A model of transformers' class for a task, with two labels and no weights."""
    config = copy.deepcopy(model.config)
    config.num_labels = 2
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    for key, value in settings.items():
        setattr(config, key, value)
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except ValueError as error:
        raise Unsupported(f"{type(model).__name__} has no {what} class.", "Use another base.") from error


def _is_output(name: str, expected: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a head parameter belongs to its last layer (the only one when there is one)."""
    modules = list(dict.fromkeys(n.rpartition(".")[0] for n in expected))
    return name.rpartition(".")[0] == modules[-1]
