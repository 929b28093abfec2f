"""Base + adapters as they are served, which a merged model is held against: in memory, or streamed from the disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ..adapters.adapter import Adapter
from ..adapters.lora import LoraSite
from ..adapters.sites import is_conv1d, is_linear
from ..bases.load import Base
from ..bases.quiet import quiet
from ..errors import Unsupported
from ..evaluation.evaluate import Evaluation, evaluate
from ..events import Listener, Progress, Stage, ignore
from ..formats.specs import HEADED
from ..merging.checkpoint import Checkpoint
from ..merging.inputs import Inputs, inputs_of
from ..merging.residual import Factors
from ..names import Ref
from ..runtime.runtime import Runtime
from ..store import Store
from ..tasks.rows import Rows
from ..tasks.task import Task
from .merge_expected import Expected
from .merge_served import decoder_rows, logits_of
from .merge_stream import streamed_model

Members = Sequence[tuple[Ref, float]]
_TOKENS_PER_INPUT = 2


class Reference(Protocol):
    """What a merged model must be like."""

    loaded: bool

    def logits(self, rows: list[list[int]]) -> list[torch.Tensor]:
        """Of base + adapters, in float32 on the CPU."""
        ...

    def bare(self, rows: list[list[int]]) -> list[torch.Tensor] | None:
        """Of the base alone; None where it is no model of the same kind."""
        ...

    def measure(self, task: Task, rows: Rows) -> Evaluation | None:
        """Answers to a task's rows; None where that would take too long."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


class Served:
    """Base + adapters through the runtime."""

    loaded = True

    def __init__(
        self, base: Base, store: Store, members: Members, task_type: str | None, on_event: Listener = ignore
    ) -> None:
        self._base, self._headed, self._on_event = base, task_type in HEADED, on_event
        self._runtime = Runtime(base, store, slots=len(members) + 1, batch_size=64, on_event=on_event)
        self._answered: list[tuple[Task, str, dict[int, str]]] = []
        try:
            alone = len(members) == 1 and members[0][1] == 1.0
            self._chosen: Any = members[0][0] if alone else dict(members)
            for ref, _ in members:
                self._runtime.load(ref)
            self._chosen = self._runtime.load(self._chosen)
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """Of the version, or of the mix."""
        return str(self._chosen)

    def logits(self, rows: list[list[int]]) -> list[torch.Tensor]:
        """Of base + adapters, in float32 on the CPU."""
        return self._logits(rows, self._chosen)

    def bare(self, rows: list[list[int]]) -> list[torch.Tensor] | None:
        """Of the base alone; None for classifiers and taggers, which the bare base is not."""
        return None if self._headed else self._logits(rows, None)

    def measure(self, task: Task, rows: Rows) -> Evaluation | None:
        """Answers to a task's rows; some of those that it was asked before are remembered."""
        for known, source, by_line in self._answered:
            if known is task and source == rows.sha256 and by_line.keys() >= set(rows.lines):
                answers = [by_line[line] for line in rows.lines]
                return Evaluation(dict(task.metrics(rows, answers)), answers)
        with quiet():
            found = evaluate(self._runtime, task, rows, self._chosen, self._on_event, "measuring base + adapter")
        self._answered.append((task, rows.sha256, dict(zip(rows.lines, found.answers, strict=True))))
        return found

    def inputs(self, rows: Sequence[list[int]]) -> dict[str, Inputs]:
        """What the base's layers read on these rows, with the adapters: module name -> second moments.

        Layers that read few tokens for their width are left out: codes chosen by too few suit no others.
        """
        base, fitted = self._base, self._runtime.fitted(self._chosen)
        modules = {n: m for n, m in base.view(fitted.task_type).modules.items() if is_linear(m) or is_conv1d(m)}

        def run() -> None:
            for done, row in enumerate(rows, 1):
                ids = torch.tensor([row], device=base.device)
                more = {}
                if base.kind == "seq2seq":
                    start = [base.config.decoder_start_token_id, *(decoder_rows(base, [row]) or [[]])[0]]
                    more = {"decoder_input_ids": torch.tensor([start], device=base.device)}
                model: Any = base.model.base_model if base.kind == "encoder" else base.model
                model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
                self._on_event(Progress("looking at what the layers read", done, len(rows), "rows"))

        with base.lock, quiet():
            found = inputs_of(modules, fitted.sites, run)
        return {name: one for name, one in found.items() if one.tokens >= _TOKENS_PER_INPUT * one.width}

    def factors(self) -> dict[str, Factors]:
        """The adapters' own changes by module name, where they are low-rank matrices and nothing else."""
        fitted = self._runtime.fitted(self._chosen)
        names = {module: name for name, module in self._base.view(fitted.task_type).modules.items()}
        return {
            names[module]: Factors(site.down.float().cpu(), site.up.float().cpu())
            for module, site in fitted.sites.items()
            if _is_plain(site)
        }

    def close(self) -> None:
        """Take the runtime off the base."""
        self._runtime.close()

    def _logits(self, rows: list[list[int]], adapter: Any) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        title = "logits of base + adapter" if adapter is not None else "logits of the base"
        for start in range(0, len(rows), 8):
            part = rows[start : start + 8]
            found += [t.float().cpu() for t in self._runtime.logits(part, adapter, decoder_rows(self._base, part))]
            self._on_event(Progress(title, len(found), len(rows), "rows"))
        return found


class Streamed:
    """Base + adapters with weights that come from the disk one layer at a time, in float32."""

    loaded = False

    def __init__(
        self,
        base: Base,
        adapters: Sequence[tuple[Adapter, float]],
        expected: Callable[[], Expected],
        on_event: Listener = ignore,
    ) -> None:
        self._base, self._adapters, self._on_event = base, adapters, on_event
        self._task_type = headed_type([adapter for adapter, _ in adapters])
        self._expected = expected

    def logits(self, rows: list[list[int]]) -> list[torch.Tensor]:
        """Of base + adapters."""
        self._on_event(Stage("base + adapter, streamed from the disk"))
        return self._through(self._expected(), rows)

    def bare(self, rows: list[list[int]]) -> list[torch.Tensor] | None:
        """Of the base alone; None for classifiers and taggers."""
        if self._task_type in HEADED:
            return None
        self._on_event(Stage("the base alone, streamed from the disk"))
        bare = Expected(Checkpoint.open(self._base.source.folder), (), self._base.quantization)
        return self._through(bare, rows)

    def measure(self, task: Task, rows: Rows) -> Evaluation | None:
        """Nothing: each token would read the whole checkpoint."""
        return None

    def close(self) -> None:
        """Nothing is held."""

    def _through(self, tensors: Expected, rows: list[list[int]]) -> list[torch.Tensor]:
        config = json.loads((self._base.source.folder / "config.json").read_text("utf-8"))
        labels = tensors.labels
        if labels is not None:
            config = {**config, "num_labels": labels, "id2label": {str(i): f"LABEL_{i}" for i in range(labels)}}
        model = streamed_model(config, self._task_type, self._base.kind, tensors, device=self._base.device)
        if self._task_type == "SEQ_CLS" and model.config.pad_token_id is None:
            model.config.pad_token_id = self._base.pad_id
        return logits_of(model, self._base, rows, self._task_type, self._on_event)


def headed_type(adapters: Sequence[Adapter]) -> str | None:
    """The PEFT task type that says which class a merge of these is: that with a head, else the first one's.

    Raises:
        Unsupported: heads of two classes.
    """
    types = [adapter.spec.task_type for adapter in adapters]
    headed = sorted({kind for kind in types if kind in HEADED})
    if len(headed) > 1:
        raise Unsupported("A classifier of texts and a tagger of words are no one model.", "Merge one of them.")
    return headed[0] if headed else types[0]


def _is_plain(site: LoraSite) -> bool:
    return site.gain is None and site.scale is None and site.down.shape[0] > 0
