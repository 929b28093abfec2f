"""One forward of a model over the rows of a pack: what its head reads, and the loss of each learner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ...bases.inputs import PrefixRows, causal_inputs, encoder_inputs, pad_rows, seq2seq_inputs
from ...bases.load import Base
from ...tasks.task import IGNORED
from ..computation import Learner
from ..losses import frozen_head_cross_entropy
from ..packs import Piece
from .lines import Run, lines_of

PrefixOf = Callable[[Sequence[Piece]], PrefixRows | None]


@dataclass(frozen=True)
class Loss:
    """Summed loss of one learner over `count` supervised items; `hits` right labels, where there are classes."""

    learner: int
    total: torch.Tensor
    count: int
    hits: int | None = None


class Pass(Protocol):
    """A forward of one kind of model."""

    packs: bool

    def cost(self, piece: Piece) -> int:
        """Tokens of a row, as a batch pads them."""
        ...

    def features(self, rows: Sequence[Piece], run: Run) -> torch.Tensor:
        """What a probe compares, one line a row: made of a row's own tokens only."""
        ...

    def losses(self, rows: Sequence[Piece], run: Run) -> list[Loss]:
        """The summed losses of each learner, differentiable."""
        ...


class CausalPass:
    """Language models that read from left to right; `within` gives what a packed forward runs in."""

    def __init__(self, base: Base, model: Any, adapts_output: bool, prefix: PrefixOf) -> None:
        self.base, self._model, self._prefix = base, model, prefix
        self._head: Any = model.get_output_embeddings()
        self._plain = output_is_plain(base, model)
        self._adapts_output = adapts_output
        self.packs = False
        self.within: Any = None

    def cost(self, piece: Piece) -> int:
        """Tokens of the row."""
        return len(piece.ids)

    def features(self, rows: Sequence[Piece], run: Run) -> torch.Tensor:
        """The sums of each row's last hidden states (of its logits, where these are no plain product)."""
        made, keep, _ = self._run(rows, run, whole=True)
        counts = [len(row.ids) for row in rows]
        return torch.stack([part.sum(0) for part in made[keep].split(counts)])  # type: ignore[no-untyped-call]

    def losses(self, rows: Sequence[Piece], run: Run) -> list[Loss]:
        """Of supervised tokens only."""
        made, keep, targets = self._run(rows, run)
        wanted, made = targets[keep], made[keep]
        counts = [sum(t != IGNORED for t in row.targets) for row in rows]
        lines = lines_of(rows, counts, made.device)
        if self._plain and self._adapts_output:
            places = torch.cat([_supervised_places(row) for row in rows]).to(made.device)
            with run.only(type(lines)(lines.keys, places, lines.segments)):
                made = self._head(made)
        found = []
        for begin, end, learner in lines.segments:
            here, want = made[begin:end], wanted[begin:end]
            if self._plain and not self._adapts_output:
                total = frozen_head_cross_entropy(here, self._head.weight, self._head.bias, want)
            else:
                total = cross_entropy(here, want)
            found.append(Loss(learner, total, end - begin))
        return found

    def _run(
        self, rows: Sequence[Piece], run: Run, whole: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states or logits [..., tokens, columns], which tokens count (`whole`: all), and the targets."""
        device, lengths = self.base.device, [len(row.ids) for row in rows]
        if self.packs:
            ids = torch.tensor([i for row in rows for i in row.ids], device=device)[None]
            lines = lines_of(rows, lengths, device)
            run.known = {ids.numel(): lines}
            arguments = {"input_ids": ids, "position_ids": lines.tokens[None], "use_cache": False}
            targets = torch.tensor([t for row in rows for t in row.targets], device=device)[None]
            with self.within(rows):
                made = self._outputs(arguments)
            return made, torch.ones_like(targets, dtype=torch.bool) if whole else targets != IGNORED, targets
        ids, mask = (t.to(device) for t in pad_rows([list(row.ids) for row in rows], self.base.pad_id, left=False))
        targets = pad_rows([list(row.targets) for row in rows], IGNORED, left=False)[0].to(device)
        run.known = {ids.numel(): lines_of(rows, [ids.shape[1]] * len(rows), device)}
        made = self._outputs(causal_inputs(ids, mask, self._prefix(rows), use_cache=False))
        return made, mask.bool() if whole else targets != IGNORED, targets

    def _outputs(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        model = self._model
        made: torch.Tensor
        made = model.base_model(**arguments).last_hidden_state if self._plain else model(**arguments).logits
        return made


class Seq2SeqPass:
    """Encoder-decoders."""

    packs = False

    def __init__(self, base: Base, model: Any, prefix: PrefixOf) -> None:
        self.base, self._model, self._prefix = base, model, prefix

    def cost(self, piece: Piece) -> int:
        """Tokens of the text and of the answer."""
        return len(piece.ids) + len(piece.targets)

    def features(self, rows: Sequence[Piece], run: Run) -> torch.Tensor:
        """The sums of each row's logits."""
        logits, labels = self._run(rows, run)
        counts = [len(row.targets) for row in rows]
        return torch.stack([part.sum(0) for part in logits[labels != IGNORED].split(counts)])  # type: ignore[no-untyped-call]

    def losses(self, rows: Sequence[Piece], run: Run) -> list[Loss]:
        """Of the answer's tokens."""
        logits, labels = self._run(rows, run)
        keep = labels != IGNORED
        logits, wanted = logits[keep], labels[keep]
        segments = lines_of(rows, [sum(t != IGNORED for t in row.targets) for row in rows], labels.device).segments
        return [Loss(who, cross_entropy(logits[a:b], wanted[a:b]), b - a) for a, b, who in segments]

    def _run(self, rows: Sequence[Piece], run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        base, device = self.base, self.base.device
        ids, mask = (t.to(device) for t in pad_rows([list(row.ids) for row in rows], base.pad_id, left=False))
        labels = pad_rows([list(row.targets) for row in rows], IGNORED, left=False)[0].to(device)
        start = torch.full_like(labels[:, :1], base.config.decoder_start_token_id)
        given = torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, base.pad_id)], 1)
        run.known = {t.numel(): lines_of(rows, [t.shape[1]] * len(rows), device) for t in (ids, given)}
        arguments = seq2seq_inputs(ids, mask, given, self._prefix(rows), use_cache=False)
        return self._model(**arguments).logits, labels


class _Features(nn.Module):
    """Stands for the heads: gives what they would read."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.mark = nn.Parameter(torch.zeros((), dtype=dtype, device=device), requires_grad=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The same."""
        return features


class EncoderPass:
    """Encoders with a head of each learner's own that labels texts or tokens."""

    packs = False

    def __init__(self, base: Base, model: Any, slot: Any, learners: Sequence[Learner], prefix: PrefixOf) -> None:
        self.base, self._model, self._slot, self._learners, self._prefix = base, model, slot, learners, prefix
        self._tags = learners[0].task_type == "TOKEN_CLS"
        weight = next(p for learner in learners if learner.head is not None for p in learner.head.parameters())
        self._features = _Features(weight.dtype, weight.device)

    def cost(self, piece: Piece) -> int:
        """Tokens of the text."""
        return len(piece.ids)

    def features(self, rows: Sequence[Piece], run: Run) -> torch.Tensor:
        """What a head reads: the first token's part of it."""
        made = self._run(rows, run)
        return made if made.dim() == 2 else made[:, 0]

    def losses(self, rows: Sequence[Piece], run: Run) -> list[Loss]:
        """Of each text's label, or of its labelled tokens."""
        made = self._run(rows, run)
        found = []
        for begin, end, learner in lines_of(rows, [1] * len(rows), made.device).segments:
            head = self._learners[learner].head
            assert head is not None
            here = made[begin:end]
            if self._tags:
                labels = pad_rows([list(row.targets) for row in rows[begin:end]], IGNORED, left=False)[0].to(
                    made.device
                )
                keep = labels != IGNORED
                logits, wanted = head(here[:, : labels.shape[1]][keep]), labels[keep]
            else:
                with run.only(lines_of(rows[begin:end], [1] * (end - begin), made.device)):
                    logits = head(here)
                wanted = torch.tensor([row.targets[0] for row in rows[begin:end]], device=made.device)
            hits = int((logits.argmax(-1) == wanted).sum())
            found.append(Loss(learner, cross_entropy(logits, wanted), len(wanted), hits))
        return found

    def _run(self, rows: Sequence[Piece], run: Run) -> torch.Tensor:
        base, device = self.base, self.base.device
        ids, mask = (t.to(device) for t in pad_rows([list(row.ids) for row in rows], base.pad_id, left=False))
        tokens = lines_of(rows, [ids.shape[1]] * len(rows), device)
        run.known = {len(rows): lines_of(rows, [1] * len(rows), device), ids.numel(): tokens}
        self._slot.assign([self._features] * len(rows))
        try:
            made: torch.Tensor = self._model(**encoder_inputs(ids, mask, self._prefix(rows), base.config)).logits
        finally:
            self._slot.assign([])
        return made


def cross_entropy(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Summed over lines, in float32 at least."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), wanted, reduction="sum")


def _supervised_places(row: Piece) -> torch.Tensor:
    return torch.tensor([i for i, t in enumerate(row.targets) if t != IGNORED], dtype=torch.int64)


def output_is_plain(base: Base, model: Any) -> bool:
    """Whether logits are exactly the output layer of the last hidden states, found by trying.

    Some models scale or cap their logits (Gemma 2, Cohere); their whole forward gives the logits.
    """
    head: Any = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        return False
    ids = torch.tensor([[1, 2, 3]], device=base.device).clamp(max=base.config.vocab_size - 1)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return torch.equal(F.linear(hidden, head.weight, head.bias), logits)
