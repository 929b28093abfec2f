"""The training part of a recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from . import fields
from .fields import read_section
from .nodes import Scalar
from .readers import At, Reader, read_choice, read_flag, read_integer

LEARNING_RATES = {"lora": 5.0e-4, "dora": 5.0e-4, "prefix": 1.0e-2, "peft": 2.0e-3}
"""Defaults of this package. LoRA learns best at about ten times the rate of full fine-tuning, on all linear layers and
with alpha 32 ("LoRA Without Regret", Thinking Machines, 2025). A prefix has no path from a small step to a large
effect, so its step is larger."""

_PERIOD = re.compile(r"(?P<count>[1-9][0-9]{0,5}) ?(?P<unit>s|min|h)", re.ASCII)
_UNITS = {"s": 1, "min": 60, "h": 3600}
NEVER = "never"
AUTO = "auto"


@dataclass(frozen=True)
class EarlyStopping:
    """End when the validation part gets no better."""

    patience: int = fields.integer(low=1, high=10_000)
    """Evaluations without a better one, after which training ends."""
    metric: Literal["loss", "accuracy"] = fields.choice("loss", among=("loss", "accuracy"))
    """What is compared; accuracy is there for bases with a head (classify and tag on an encoder)."""


def _read_period(at: At) -> int | str | None:
    """Steps as a whole number, a time such as 5min, or never."""
    if isinstance(at.node, Scalar) and at.node.plain and at.node.text.isdigit():
        return read_integer(at, low=1, high=10**9)
    if isinstance(at.node, Scalar) and (at.node.text == NEVER or _PERIOD.fullmatch(at.node.text)):
        return at.node.text.replace(" ", "")
    at.expected("a number of steps, a time such as 30s, 5min or 2h, or never")
    return None


def _read_auto(at: At, other: Reader, what: str) -> Any:
    """`auto`, or what `other` reads."""
    if isinstance(at.node, Scalar) and at.node.text == AUTO:
        return AUTO
    before = len(at.problems)
    found = other(at)
    if len(at.problems) > before:
        del at.problems[before:]
        at.expected(f"auto, or {what}")
    return found


_read_tokens = partial(_read_auto, other=partial(read_integer, low=1, high=10**7), what="a number of tokens")
_read_switch = partial(_read_auto, other=read_flag, what="true or false")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. The defaults are this package's own."""

    epochs: float = fields.number(3.0, low=0, high=10_000, above=True)
    max_steps: int | None = fields.integer(None, low=1, high=10**9)
    """Stop after so many optimiser steps, if the epochs are not over before."""
    batch_size: int = fields.integer(8, low=1, high=65_536)
    gradient_accumulation: int = fields.integer(1, low=1, high=65_536)
    """Batches to one optimiser step."""
    learning_rate: float = fields.number(LEARNING_RATES["lora"], low=0, high=10, above=True)
    """Default by adapter type, see `LEARNING_RATES`."""
    schedule: Literal["linear", "cosine", "constant"] = fields.choice("linear", among=("linear", "cosine", "constant"))
    """How the learning rate falls after the warm-up; linear and cosine end at 0."""
    warmup: float = fields.number(0.0, low=0, high=1)
    """Fraction of all steps in which the learning rate rises."""
    weight_decay: float = fields.number(0.0, low=0, high=10)
    max_grad_norm: float = fields.number(1.0, low=0, high=1e6, above=True)
    max_length: int = fields.integer(512, low=8, high=1_048_576)
    """Tokens of a row; longer rows are cut."""
    seed: int = fields.integer(0, low=0, high=2**32 - 1)
    eval_every: int | None = fields.integer(None, low=1, high=10**9)
    """Steps between measurements on the validation part; None measures after every epoch."""
    early_stopping: EarlyStopping | None = fields.section(partial(read_section, cls=EarlyStopping), None)
    """When to end before the last step; None never does."""
    keep: Literal["best", "last"] | None = fields.section(partial(read_choice, among=("best", "last")), None)
    """The step whose values are stored: that of the best evaluation, or the last one. None is best with early stopping,
    else last."""
    checkpoint_every: int | str = fields.section(_read_period, "5min")
    """Steps, or a time such as 30s, 5min or 2h, between checkpoints; one is written at every evaluation too. `never`
    writes one only when the run is asked to stop."""
    pack_tokens: int | str = fields.section(_read_tokens, AUTO)
    """Tokens that go through the model at once; a step's rows are computed in as many packs as that takes. This field
    and the next five are about speed and memory, not about what is learnt; `auto` is chosen by what fits."""
    checkpointing: bool | str = fields.section(_read_switch, AUTO)
    """Keep each layer's input alone, and compute the rest again: less memory, a third more time."""
    recompute_mlp: bool | str = fields.section(_read_switch, AUTO)
    """Keep all of a layer but the widest part of its feed-forward half, and compute that again: less memory, a sixth
    more time (decoders built as Llama is)."""
    offload: bool | str = fields.section(_read_switch, AUTO)
    """With `checkpointing` on a GPU: keep the layers' inputs in the host's memory (decoders built as Llama is)."""
    table_on_host: bool | str = fields.section(_read_switch, AUTO)
    """Keep the table of input embeddings in the host's memory while a GPU learns, where the output layer has another
    one (decoders built as Llama is)."""
    working_copies: bool | str = fields.section(_read_switch, AUTO)
    """Keep the weights of a quantised base on a CPU dequantised as well: more memory, less time."""
    precision: str = fields.choice(AUTO, among=(AUTO, "float32", "bfloat16"))
    """How products with a float32 base are computed on a CPU; bfloat16 is heard where the processor has units for it
    (AMX), and `auto` takes it there if it is much faster. Parameters, gradients and all else stay float32."""

    def contradictions(self, given: set[str]) -> Iterator[tuple[str, str]]:
        """What is wrong between fields, of which `given` were written."""
        if self.recompute_mlp is True and self.checkpointing is True:
            yield "recompute_mlp", "is part of what checkpointing: true computes again; set one of them."
        if self.offload is True and self.checkpointing is False:
            yield "offload", "keeps the inputs that checkpointing computes from; checkpointing cannot be false."

    @property
    def checkpoint_steps(self) -> int | None:
        """Steps between checkpoints, where that is how they are counted."""
        return self.checkpoint_every if isinstance(self.checkpoint_every, int) else None

    @property
    def checkpoint_seconds(self) -> float | None:
        """Seconds between checkpoints, likewise."""
        match = _PERIOD.fullmatch(self.checkpoint_every) if isinstance(self.checkpoint_every, str) else None
        return float(match["count"]) * _UNITS[match["unit"]] if match else None

    @property
    def checkpoints(self) -> bool:
        """Whether any is written before the run is asked to stop."""
        return self.checkpoint_every != NEVER
