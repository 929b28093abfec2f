"""Labels with scores: from heads, or from how likely a causal base finds each label's word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..bases.load import Base
from ..errors import NoEffect
from .batch import BatchPlan
from .forward import token_logits
from .sites import SiteHooks


@dataclass(frozen=True)
class Prediction:
    """The likeliest label, its score, and the scores of all labels (they sum to 1)."""

    label: str
    score: float
    scores: dict[str, float]


@dataclass(frozen=True)
class TaggedWord:
    """A word with its likeliest tag and that tag's score.

    Attributes:
        start, end: where the word is in the text; in the words joined by single spaces, if a list of words was given.
    """

    word: str
    tag: str
    score: float
    start: int
    end: int


def from_logits(logits: torch.Tensor, labels: Sequence[str]) -> Prediction:
    """logits [labels] -> a prediction.

    Raises:
        NoEffect: a logit is no number.
    """
    if bool(logits.isnan().any()):
        raise NoEffect("An adapter makes logits that are not finite.", "Use another adapter, or a wider dtype.")
    probabilities = logits[: len(labels)].float().softmax(-1).tolist()
    scores = dict(zip(labels, probabilities, strict=True))
    best = max(scores, key=lambda label: scores[label])
    return Prediction(best, scores[best], scores)


def label_word_logits(
    base: Base, hooks: SiteHooks, plan: BatchPlan, prompts: Sequence[list[int]], words: Sequence[Sequence[list[int]]]
) -> list[torch.Tensor]:
    """How likely each label's word is after each prompt: one tensor [labels] a row, to take a softmax of.

    The first token decides where a row's words all begin differently; otherwise the row's whole words are scored. Which
    of the two is each row's own affair; one forward is enough where no row needs its whole words.

    Args:
        words: for each row, the token ids of its labels' words.
    """
    whole = [len({w[0] for w in row}) < len(row) for row in words]
    if not any(whole):
        logits = token_logits(base, hooks, plan, prompts)
        return [one[-1, [w[0] for w in row]].float() for one, row in zip(logits, words, strict=True)]
    columns = []
    for label in range(max(map(len, words))):
        chosen = [row[min(label, len(row) - 1)] for row in words]
        logits = token_logits(base, hooks, plan, [[*p, *w] for p, w in zip(prompts, chosen, strict=True)])
        columns.append([_word_score(*each) for each in zip(logits, chosen, whole, strict=True)])
    return [torch.stack([column[i] for column in columns[: len(words[i])]]) for i in range(len(prompts))]


def _word_score(logits: torch.Tensor, word: list[int], whole: bool) -> torch.Tensor:
    """Sum of log-probabilities of `word`, the last tokens of what gave `logits`; or its first token's logit."""
    if not whole:
        return logits[-len(word) - 1, word[0]].float()
    steps = logits[-len(word) - 1 : -1].float().log_softmax(-1)
    return steps.gather(1, torch.tensor(word, device=steps.device)[:, None]).sum()
