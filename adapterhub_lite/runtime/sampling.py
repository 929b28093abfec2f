"""Choose the next token of each row: greedy, or sampled by settings and with a seed of the row's own."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch

from ..errors import Unsupported

_KINDS: dict[str, tuple[type, ...]] = {
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "seed": (int, type(None)),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
}


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, in the order of these settings; they mean what they mean in transformers.

    Attributes:
        temperature: 0: greedy.
        top_k, top_p, min_p: 0, 1 and 0: no cut. min_p is a share of the likeliest token's probability.
        seed: None: a random one.
        repetition_penalty: divides the positive logits of tokens that are in the prompt or written already, and
            multiplies the negative ones, before all else (arXiv 1909.05858). An encoder-decoder counts what it wrote.
        stop_token_ids: end an answer like the base's own end tokens; they are not part of it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise Unsupported(f"{name} {value!r} is not a number.", f"See Sampling: {name} is a number.")
        if not (0.0 <= self.temperature < inf):
            raise Unsupported(
                f"temperature {self.temperature} is not a number from 0 up.", "0 is greedy, 0.7 is usual."
            )
        if 0.0 < self.temperature < 1e-3:
            raise Unsupported(f"temperature {self.temperature:g} overflows.", "0 is greedy, 0.7 is usual.")
        if self.seed is not None and not 0 <= self.seed < 2**62:
            raise Unsupported(f"seed {self.seed} is out of range.", "Use a number from 0 to 2**62 - 1.")
        if not (0.0 < self.top_p <= 1.0) or self.top_k < 0:
            raise Unsupported(f"top_p {self.top_p} / top_k {self.top_k}.", "Use 0 < top_p <= 1 and top_k >= 0.")
        if not 0.0 <= self.min_p <= 1.0:
            raise Unsupported(f"min_p {self.min_p} is not a share.", "Use 0 (no cut) to 1; 0.05 is usual.")
        if not 0.0 < self.repetition_penalty < inf:
            raise Unsupported(
                f"repetition_penalty {self.repetition_penalty} is not a positive number.", "1 is none, 1.1 is usual."
            )
        if not isinstance(self.stop_token_ids, list | tuple):
            raise Unsupported(f"stop_token_ids {self.stop_token_ids!r} is no list.", "Give a list of token ids.")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if not all(isinstance(token, int) for token in self.stop_token_ids):
            raise Unsupported(f"stop_token_ids {self.stop_token_ids} are not token ids.", "Give whole numbers.")


class RowSampler:
    """What one row chooses by: its settings, its random numbers, and the tokens that a repetition is told from."""

    def __init__(self, sampling: Sampling, seed: int, seen: Sequence[int] = ()) -> None:
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(seed) if sampling.temperature else None
        self._penalised = sampling.repetition_penalty != 1.0
        self._unread = list(seen)
        self._seen: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is it."""
        return self.generator is None and not self._penalised

    @property
    def penalty(self) -> float:
        """The factor for tokens seen."""
        return self.sampling.repetition_penalty

    def note(self, token: int) -> None:
        """A token that was written."""
        if self._penalised:
            self._unread.append(token)

    def seen(self, like: torch.Tensor) -> torch.Tensor:
        """[vocabulary], True for tokens seen; `like` [vocabulary] gives size and device."""
        if self._seen is None:
            self._seen = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
        ids = [token for token in self._unread if token < len(like)]
        self._seen[torch.tensor(ids, dtype=torch.long, device=like.device)] = True
        self._unread = []
        return self._seen


def row_seeds(settings: Sequence[Sampling], shared: bool) -> list[int]:
    """A seed for each row.

    Args:
        shared: the rows have one setting together: each counts on from its seed by its place in the list, so that equal
            prompts get answers of their own.
    """
    if shared and settings:
        first = _seed(settings[0])
        return [first + i for i in range(len(settings))]
    return [_seed(one) for one in settings]


def choose(logits: torch.Tensor, rows: Sequence[RowSampler]) -> torch.Tensor:
    """Next tokens [rows]; logits [rows, vocabulary]. What a row gets depends on its own logits and settings alone."""
    if all(row.plain for row in rows):
        return logits.argmax(-1)
    logits = penalised(logits, rows)
    tokens = logits.argmax(-1)
    drawn = [i for i, row in enumerate(rows) if row.generator is not None]
    if drawn:
        probabilities = cut(logits[drawn], [rows[i].sampling for i in drawn]).softmax(-1).cpu()
        for i, some in zip(drawn, probabilities, strict=True):
            if bool(some.isfinite().all()):  # a row without probabilities is refused by whoever reads its logits
                tokens[i] = int(torch.multinomial(some, 1, generator=rows[i].generator))
    return tokens


def penalised(logits: torch.Tensor, rows: Sequence[RowSampler]) -> torch.Tensor:
    """logits [rows, vocabulary] with the repetition penalty of the rows that have one."""
    some = [i for i, row in enumerate(rows) if row.penalty != 1.0]
    if not some:
        return logits
    before = logits[some].float()
    seen = torch.stack([rows[i].seen(logits[i]) for i in some])
    factor = torch.tensor([rows[i].penalty for i in some], device=logits.device)[:, None]
    after = torch.where(seen, torch.where(before < 0, before * factor, before / factor), before)
    out = logits.float().clone()
    out[some] = after
    return out


def cut(logits: torch.Tensor, settings: Sequence[Sampling]) -> torch.Tensor:
    """logits [rows, vocabulary] over each row's temperature, -inf for what its settings cut off."""

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    logits = logits.float() / column([s.temperature for s in settings])
    if any(s.top_k for s in settings):
        counts = [min(s.top_k, logits.shape[-1]) for s in settings]
        best = logits.topk(max(counts)).values
        kth = best.gather(1, column(counts).long().sub(1).clamp(min=0))
        logits = logits.masked_fill((logits < kth) & (column(counts) > 0), -inf)
    if any(s.top_p < 1.0 for s in settings):
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        limits = column([s.top_p if s.top_p < 1.0 else inf for s in settings])
        beyond = probabilities.cumsum(-1) - probabilities >= limits
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -inf)
    if any(s.min_p for s in settings):
        probabilities = logits.softmax(-1)
        least = column([s.min_p for s in settings]) * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -inf)
    return logits


def _seed(sampling: Sampling) -> int:
    return secrets.randbits(31) if sampling.seed is None else sampling.seed
