"""Load a base once: frozen, quantised, fingerprinted, and the same object for training, serving and merging."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import BaseUnavailable, Unsupported
from ..events import Listener, Note, Stage, ignore
from ..places import cache_root
from .allocator import keep_freed_memory
from .devices import DTYPES, Choice, choose_device, choose_dtype
from .fetch import BaseSource, locate
from .fingerprint import Fingerprint, fingerprint, live_digest
from .heads import HEAD_NAMES
from .memory import MemoryReport, keep_working_copies, measure
from .quantization import NOT_QUANTISED, make_exact_on_cpu, quantization_config
from .quiet import quiet
from .siblings import sibling_groups
from .views import VIEWS, View, kind_of, make_view

# Keys of a configuration that can name code or compiled kernels to fetch.
_CODE_KEYS = ("attn_implementation", "experts_implementation", "use_kernels")


@dataclass
class Base:
    """A frozen model with its tokenizer and identity.

    Attributes:
        kind: causal, seq2seq or encoder.
        model: the transformers model; an encoder is loaded as its sequence-classification class.
        choices: device and dtype with the reason each was chosen.
    """

    name: str
    kind: str
    model: nn.Module
    tokenizer: Any
    quantization: str
    source: BaseSource
    fingerprint: Fingerprint
    choices: dict[str, Choice]
    memory: MemoryReport
    lock: Any = field(default_factory=threading.RLock, repr=False)
    """Held by whoever drives the model: runtimes on one base, and training, take turns."""
    _in_training: bool = field(default=False, repr=False)
    _views: dict[str, View] = field(default_factory=dict, repr=False)
    derived: dict[str, Any] = field(default_factory=dict, repr=False)
    """What is made of this base once and shared by all that use it, by name."""

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.choices["device"].value)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return DTYPES[self.choices["dtype"].value]

    @cached_property
    def pad_id(self) -> int:
        """Token id used for padding (masked everywhere)."""
        for value in (self.tokenizer.pad_token_id, self.config.pad_token_id, self.tokenizer.eos_token_id, 0):
            if isinstance(value, int):
                return value
        return 0

    @cached_property
    def siblings(self) -> tuple[tuple[nn.Module, ...], ...]:
        """Groups of linear layers that read one input."""
        return sibling_groups(self.model)

    def view(self, task_type: str | None = None) -> View:
        """The model as PEFT's `task_type` sees it: same modules, that class's module names, outputs and head slot."""
        key = task_type if task_type in VIEWS else "default"
        if key not in self._views:
            self._views[key] = make_view(self.model, self.kind, key, self.pad_id)
        return self._views[key]

    @contextmanager
    def training(self) -> Iterator[None]:
        """Own the model for a training run; within the block nothing else may compute with it.

        Raises:
            Unsupported: it is being trained on already.
        """
        with self.lock:
            self.check_free()
            self._in_training = True
            try:
                yield
            finally:
                self._in_training = False

    def check_free(self) -> None:
        """Raise Unsupported while an adapter is trained on this base: answers would mix with it."""
        if self._in_training:
            raise Unsupported("An adapter is being trained on this base.", "Wait for it, or load the base once more.")

    def live_digest(self) -> str:
        """sha256 of all weights in memory; equal before and after whatever uses the base, since it is frozen."""
        return live_digest(self.model)


def load_base(
    name: str,
    quantize: str = "none",
    device: str = "auto",
    dtype: str = "auto",
    *,
    working_copies: bool | None = None,
    on_event: Listener = ignore,
) -> Base:
    """Load a base by catalogue name, folder or Hub id.

    Args:
        quantize: none, int8, nf4 or nf4-double.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16, for activations and weights that are not quantised.
        working_copies: on a CPU, keep dequantised weights (faster, answers of the same bits); None: if memory allows.

    Raises:
        BaseUnavailable: no source has it, or the checkpoint is incomplete, remote code or pickle.
        NotFound: nothing is called that.
        Unsupported: unknown quantisation, device or dtype.
    """
    source = locate(name, on_event=on_event)
    choices = {"device": choose_device(device)}
    choices["dtype"] = choose_dtype(choices["device"].value, dtype)
    config = checked_config(source.folder)
    kind = kind_of(config)
    on_event(Stage(f"loading {source.name} ({quantize if quantize != 'none' else choices['dtype'].value})"))
    if choices["device"].value == "cpu":
        keep_freed_memory()
    with quiet():
        model, tokenizer = _load(source.folder, kind, quantize, choices)
        model.requires_grad_(False).eval()
        copies = 0
        if quantize != "none" and choices["device"].value == "cpu":
            keep = keep_working_copies(model) if working_copies is None else working_copies
            copies = make_exact_on_cpu(model, DTYPES[choices["dtype"].value], keep)
        mark = fingerprint(source.folder, tokenizer, quantize, cache_root() / "fingerprints.json")
    base = Base(source.name, kind, model, tokenizer, quantize, source, mark, choices, measure(model, copies))
    if kind == "encoder":
        # The checkpoint's own head makes room for the slot now, so that the model's tensors never change later.
        base.view()
    on_event(Note(f"{base.name}: fingerprint {mark.digest[:12]}, {base.memory}"))
    return base


def checked_config(folder: Path) -> dict[str, Any]:
    """The content of config.json, if it asks for nothing but a model of transformers.

    Raises:
        BaseUnavailable: it is no configuration, or asks for code of its own.
        Unsupported: the checkpoint is quantised already.
    """
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BaseUnavailable(f"{folder / 'config.json'} is not JSON: {error}.", "Get the checkpoint anew.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise BaseUnavailable(f"{folder / 'config.json'} names no model_type.", "Is this a transformers checkpoint?")
    foreign = [key for key in _keys(config) if key == "auto_map" or any(part in key for part in _CODE_KEYS)]
    if foreign:
        raise BaseUnavailable(
            f"{folder} asks for code of its own ({foreign[0]}).", "Remote code is never run; use another base."
        )
    if "quantization_config" in config:
        raise Unsupported(f"{folder} is quantised already.", "Use the original checkpoint with quantize=nf4 or int8.")
    return config


def _keys(config: Any) -> Iterator[str]:
    """All keys of nested objects."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield key
            yield from _keys(value)


def _load(folder: Path, kind: str, quantize: str, choices: dict[str, Choice]) -> tuple[nn.Module, Any]:
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    classes = {
        "causal": AutoModelForCausalLM,
        "seq2seq": AutoModelForSeq2SeqLM,
        "encoder": AutoModelForSequenceClassification,
    }
    dtype = DTYPES[choices["dtype"].value]
    quantized = quantization_config(quantize, dtype, list(NOT_QUANTISED))
    try:
        model, info = classes[kind].from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=quantized,
            device_map={"": choices["device"].value},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except torch.OutOfMemoryError as error:
        raise BaseUnavailable(f"{folder} does not fit in memory.", "Use quantize=nf4 or a smaller base.") from error
    except Exception as error:  # a broken checkpoint fails in as many ways as there are libraries below
        raise BaseUnavailable(f"{folder} could not be loaded: {_first_line(error)}", "See the cause above.") from error
    missing = [k for k in info["missing_keys"] if k.split(".")[0] not in HEAD_NAMES]
    if missing:
        shown = ", ".join(sorted(missing)[:3])
        raise BaseUnavailable(
            f"{folder} lacks {len(missing)} tensors of {type(model).__name__} ({shown}).",
            "They would be random: use a complete checkpoint.",
        )
    return model, tokenizer


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
