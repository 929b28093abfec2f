"""The merged model as its users have it: loaded by plain transformers, its logits, its answers to a task's rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import RLock
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..bases.inputs import pad_rows
from ..bases.load import Base
from ..bases.memory import keep_working_copies, measure
from ..bases.quantization import make_exact_on_cpu
from ..bases.quiet import quiet
from ..errors import Unsupported
from ..evaluation.evaluate import Evaluation, evaluate
from ..events import Listener, Progress, ignore
from ..formats.specs import HEADED
from ..merging.gguf_names import Layout
from ..names import Ref
from ..runtime.prompting import class_ids, class_limit
from ..runtime.runtime import Runtime
from ..store import Store
from ..tasks.classify import Classify
from ..tasks.rows import Rows
from ..tasks.spans import OUTSIDE
from ..tasks.tag import Tag
from ..tasks.task import Task
from ..tasks.words import pieces
from .merge_stream import model_class

GGUF = "model.gguf"
_BYTES = 256 << 20  # of logits of one forward
_DECODED = 16  # tokens that the decoder of an encoder-decoder is given


@dataclass(frozen=True)
class Merged:
    """A merged folder and what kind of model it holds.

    Attributes:
        kind: "float", "nf4", "int8", "f16" or "q8_0".
        task_type: PEFT's, of the adapters; says which class has the head.
        residual: the adapter of what 4 bits lost, or None.
        config: the model's configuration; a GGUF file has no config.json beside it.
    """

    folder: Path
    kind: str
    task_type: str | None
    residual: Adapter | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


def plain_model(merged: Merged, base: Base) -> Any:
    """The merged model by plain transformers, on the base's device and in its dtype."""
    loader = model_class(merged.task_type, base.kind)
    more: dict[str, Any] = {}
    if merged.kind in ("f16", "q8_0"):
        more = {"gguf_file": GGUF, "config": Layout.of(merged.config).read_config}
    elif merged.kind == "float":
        more = {"use_safetensors": True}
    else:
        more = {"use_safetensors": True, "device_map": {"": str(base.device)}}
    with quiet(), _without_bar():
        model = loader.from_pretrained(merged.folder, dtype=base.dtype, local_files_only=True, **more)
    if merged.kind in ("nf4", "int8"):
        _cast(model, base.dtype)
    else:
        model = model.to(base.device)
    model = model.requires_grad_(False).eval()
    if merged.task_type == "SEQ_CLS" and model.config.pad_token_id is None:
        model.config.pad_token_id = base.pad_id
    return model


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Bring what is not quantised to a dtype; of quantised checkpoints transformers reads it as it is stored."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


@contextmanager
def _without_bar() -> Iterator[None]:
    """transformers' reader of GGUF files draws a bar of its own, which no switch of its turns off."""
    from transformers import modeling_gguf_pytorch_utils as reader

    own: Any = reader.tqdm  # type: ignore[attr-defined]
    reader.tqdm = lambda parts, *_, **__: parts  # type: ignore[attr-defined]
    try:
        yield
    finally:
        reader.tqdm = own  # type: ignore[attr-defined]


def plain_logits(folder: Path, base: Base, rows: list[list[int]], task_type: str | None) -> list[torch.Tensor]:
    """Logits of a checkpoint folder by plain transformers: [tokens, vocabulary or labels] or [labels] a row."""
    return logits_of(plain_model(Merged(folder, "float", task_type), base), base, rows, task_type)


def logits_of(
    model: Any, base: Base, rows: Sequence[list[int]], task_type: str | None, on_event: Listener = ignore
) -> list[torch.Tensor]:
    """Logits of a model of transformers in float32 on the CPU, some rows at a time.

    [tokens, vocabulary or labels] a row, of a classifier [labels]; of an encoder-decoder those of its decoder.
    """
    width = int(getattr(model.config, "vocab_size", 1)) if task_type not in HEADED else 64
    found: list[torch.Tensor] = []
    step = max(1, _BYTES // (4 * width * max(map(len, rows), default=1)))
    for start in range(0, len(rows), step):
        on_event(Progress("comparing logits", start, len(rows), "rows"))
        found += _forward(model, base, list(rows[start : start + step]), task_type)
    on_event(Progress("comparing logits", len(rows), len(rows), "rows"))
    return found


def _forward(model: Any, base: Base, rows: list[list[int]], task_type: str | None) -> list[torch.Tensor]:
    ids, mask = (t.to(base.device) for t in pad_rows(rows, base.pad_id, left=False))
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    given, classifies = rows, task_type == "SEQ_CLS"
    if base.kind == "seq2seq" and not classifies:
        given = [[base.config.decoder_start_token_id, *row] for row in decoder_rows(base, rows) or []]
        arguments["decoder_input_ids"] = pad_rows(given, base.pad_id, left=False)[0].to(base.device)
    with torch.inference_mode(), quiet():
        try:
            logits = model(**arguments).logits.float().cpu()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # as where a forward reads weights of layers that it does not call
            raise _does_not_compute(model, error) from error
    return list(logits) if classifies else [logits[i, : len(row)] for i, row in enumerate(given)]


def _does_not_compute(model: Any, error: RuntimeError) -> Unsupported:
    """The error of a class whose forward cannot use weights that are quantised, or come one layer at a time."""
    quantised = getattr(model.config, "quantization_config", None) is not None
    said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    hint = "Merge to float weights." if quantised else "Verify its tensors alone with --verify weights."
    return Unsupported(f"{type(model).__name__} does not compute with weights in this form: {said}.", hint)


def decoder_rows(base: Base, rows: Sequence[list[int]]) -> list[list[int]] | None:
    """What the decoder of an encoder-decoder is given."""
    return [row[:_DECODED] for row in rows] if base.kind == "seq2seq" else None


# -- answers ----------------------------------------------------------------------------------------------------------


@contextmanager
def served(model: Any, base: Base, merged: Merged, store: Store) -> Iterator[tuple[Runtime, Ref | None]]:
    """A runtime on the merged model as a base of its own, and its residual adapter or None for the bare model."""
    quantization = merged.kind if merged.kind in ("nf4", "int8") else "none"
    copies = 0
    if quantization != "none" and base.device.type == "cpu":
        copies = make_exact_on_cpu(model, base.dtype, keep_working_copies(model))
    own = replace(
        base,
        name=f"{base.name} merged",
        model=model,
        quantization=quantization,
        memory=measure(model, copies),
        lock=RLock(),
        _in_training=False,
        _views={},
        derived={},
    )
    runtime = Runtime(own, store, slots=1, batch_size=64)
    try:
        yield runtime, runtime.attach(merged.residual) if merged.residual is not None else None
    finally:
        runtime.close()


def answers(
    model: Any, base: Base, merged: Merged, store: Store, task: Task, rows: Rows, on_event: Listener = ignore
) -> Evaluation:
    """What the merged model answers to rows of a task, and its metrics: with its head, or as a bare base."""
    title = "measuring the merged model"
    with quiet():
        if merged.task_type in HEADED and isinstance(task, Classify | Tag):
            said = _tags(model, base, task, rows) if isinstance(task, Tag) else _labels(model, base, task, rows)
            return Evaluation(dict(task.metrics(rows, said)), said)
        with served(model, base, merged, store) as (runtime, residual):
            return evaluate(runtime, task, rows, residual, on_event, title)


def _labels(model: Any, base: Base, task: Classify, rows: Rows) -> list[str]:
    ids = [class_ids(base, text, task, 0) for text in task.inputs(rows)]
    names = model.config.id2label
    logits = _in_batches(model, base, ids, "SEQ_CLS")
    return [str(names[int(one.argmax())]) for one in logits]


def _tags(model: Any, base: Base, task: Tag, rows: Rows) -> list[str]:
    """A word's tag is that of its first token; a row may take several pieces."""
    limit, names = class_limit(base, task, 0), model.config.id2label
    words = task.words(rows)
    parts = [(row, piece) for row, some in enumerate(words) for piece in pieces(some, base.tokenizer, limit)]
    logits = _in_batches(model, base, [piece.ids for _, piece in parts], "TOKEN_CLS")
    said = [[OUTSIDE] * len(some) for some in words]
    for (row, piece), found in zip(parts, logits, strict=True):
        for word, place in piece.first:
            said[row][word] = str(names[int(found[place].argmax())])
    return [" ".join(row) for row in said]


def _in_batches(model: Any, base: Base, ids: list[list[int]], task_type: str, size: int = 32) -> list[torch.Tensor]:
    """Rows of like length go together."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found: dict[int, torch.Tensor] = {}
    for start in range(0, len(order), size):
        part = order[start : start + size]
        found |= dict(zip(part, logits_of(model, base, [ids[i] for i in part], task_type), strict=True))
    return [found[i] for i in range(len(ids))]
