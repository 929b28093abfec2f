"""Choose the next token of each row: greedy, or sampled with a seed of its own per row."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import torch

from ..errors import Unsupported


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0: greedy. top_k 0 and top_p 1: no cut. seed None: a random one."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (0.0 <= self.temperature < float("inf")):
            raise Unsupported(
                f"temperature {self.temperature} is not a number from 0 up.", "0 is greedy, 0.7 is usual."
            )
        if 0.0 < self.temperature < 1e-3:
            raise Unsupported(f"temperature {self.temperature:g} overflows.", "0 is greedy, 0.7 is usual.")
        if self.seed is not None and not 0 <= self.seed < 2**62:
            raise Unsupported(f"seed {self.seed} is out of range.", "Use a number from 0 to 2**62 - 1.")
        if not (0.0 < self.top_p <= 1.0) or self.top_k < 0:
            raise Unsupported(f"top_p {self.top_p} / top_k {self.top_k}.", "Use 0 < top_p <= 1 and top_k >= 0.")


class Sampler:
    """Holds one random generator a row, so that a row's text does not depend on its neighbours."""

    def __init__(self, sampling: Sampling, row_ids: list[int]) -> None:
        self.sampling = sampling
        seed = secrets.randbits(31) if sampling.seed is None else sampling.seed
        self._generators = [torch.Generator().manual_seed(seed + i) for i in row_ids]

    def select(self, keep: list[int]) -> None:
        """Go on with a part of the rows."""
        self._generators = [self._generators[i] for i in keep]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [rows, vocabulary] -> token ids [rows]."""
        if self.sampling.temperature == 0.0:
            return logits.argmax(-1)
        probabilities = self._cut(logits.float() / self.sampling.temperature).softmax(-1).cpu()
        picks = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, self._generators, strict=True)]
        return torch.cat(picks).to(logits.device)

    def _cut(self, logits: torch.Tensor) -> torch.Tensor:
        if self.sampling.top_k:
            kth = logits.topk(min(self.sampling.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        if self.sampling.top_p < 1.0:
            ordered, order = logits.sort(descending=True)
            probabilities = ordered.softmax(-1)
            beyond = probabilities.cumsum(-1) - probabilities >= self.sampling.top_p
            logits = logits.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))
        return logits
