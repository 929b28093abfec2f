"""The part of `Runtime` that labels, tags, embeds and gives logits: one forward for rows of different adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import Unsupported
from ..names import Ref
from ..tasks.classify import Classify
from .embedding import Pooling, embed
from .engine import Engine
from .forward import class_logits, token_logits
from .given import check_ids, texts_of
from .labelling import Input, label, score_words
from .mixes import Chosen
from .predict import Prediction, TaggedWord
from .prompting import check_lengths

DEFAULT: Any = object()
"""No adapter was named: the one in use answers."""


class Labels:
    """Predicts, tags and scores with the adapters of an engine."""

    _engine: Engine
    _lock: Any
    _default: Ref | None

    def predict(self, texts: str | Sequence[str], adapters: Chosen | Sequence[Chosen] = DEFAULT) -> list[Prediction]:
        """Labels with scores, for adapters trained to classify.

        Raises:
            Unsupported: a row without adapter, or whose adapter has no labels, or labels words.
        """
        return self._label(texts, adapters, tags=False)  # type: ignore[return-value]

    def tag(
        self, inputs: str | Sequence[Input], adapters: Chosen | Sequence[Chosen] = DEFAULT
    ) -> list[list[TaggedWord]]:
        """Every word with its tag, for adapters trained to tag. An input is a text, or a list of its words.

        Of a text, quotes, brackets and punctuation at the ends of words are words of their own. What is longer than the
        adapter or the base can read at a time is read in pieces.

        Raises:
            Unsupported: a row without adapter, or whose adapter labels no words.
        """
        return self._label(inputs, adapters, tags=True)  # type: ignore[return-value]

    def label(
        self, inputs: str | Sequence[Input], adapters: Chosen | Sequence[Chosen] = DEFAULT
    ) -> list[Prediction | list[TaggedWord]]:
        """`predict` or `tag`, whichever each row's adapter was trained for; rows of both kinds share one forward."""
        return self._label(inputs, adapters, tags=None)

    def embed(
        self,
        texts: str | Sequence[str],
        adapters: Chosen | Sequence[Chosen] = DEFAULT,
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
    ) -> torch.Tensor:
        """One vector a text, [rows, width] in float32 on the CPU, of an encoder with each row's adapter, but no head.

        Args:
            pooling: the mean of all tokens of the text, special ones too, or the first one (cls).
            normalize: to length 1.

        Raises:
            Unsupported: the base is no encoder.
        """
        items = texts_of(texts)
        rows = self._rows(adapters, len(items))
        with self._lock:
            return embed(self._engine, items, rows, pooling, normalize)

    def score_words(self, texts: Sequence[str], task: Classify, adapter: Chosen = None) -> list[Prediction]:
        """Labels by label words for any task on a causal base, also without an adapter (to compare with)."""
        row = self._engine.resolve(adapter)
        with self._lock:
            return score_words(self._engine, texts, [row] * len(texts), [task] * len(texts))

    def logits(
        self,
        rows: Sequence[list[int]],
        adapters: Chosen | Sequence[Chosen] = DEFAULT,
        decoder_rows: Sequence[list[int]] | None = None,
    ) -> list[torch.Tensor]:
        """Raw logits for token ids: [tokens, vocabulary] a row, or of a head [labels], of a tagger [tokens, labels]."""
        check_ids(self._engine.base, rows)
        check_ids(self._engine.base, decoder_rows or ())
        chosen = self._rows(adapters, len(rows))
        found: dict[int, torch.Tensor] = {}
        with self._lock:
            parts: dict[object, list[int]] = {}
            for i, r in enumerate(chosen):
                with_head = r is not None and self._engine.fitted(r).head is not None
                parts.setdefault((with_head, self._engine.group(r)), []).append(i)
            for part in parts.values():
                given = [decoder_rows[i] for i in part] if decoder_rows is not None else None
                found |= dict(zip(part, self._logits([rows[i] for i in part], chosen, part, given), strict=True))
        return [found[i] for i in range(len(rows))]

    def _label(
        self, inputs: str | Sequence[Input], adapters: Chosen | Sequence[Chosen], tags: bool | None
    ) -> list[Prediction | list[TaggedWord]]:
        if not isinstance(inputs, Sequence) or isinstance(inputs, bytes):
            raise Unsupported(f"{type(inputs).__name__} is no input.", "Give a text, or a list of texts.")
        items = [inputs] if isinstance(inputs, str) else list(inputs)
        strange = next((i for i in items if not _is_text(i)), None)
        if strange is not None:
            raise Unsupported(f"{type(strange).__name__} is no input.", "Give a text, or a list of words.")
        rows = self._rows(adapters, len(items))
        with self._lock:
            return label(self._engine, items, rows, tags)

    def _one(self, adapter: Chosen) -> Chosen:
        return self._default if adapter is DEFAULT else adapter

    def _rows(self, adapters: Chosen | Sequence[Chosen], count: int) -> list[Ref | None]:
        adapters = self._one(adapters)  # type: ignore[arg-type]
        if adapters is None or isinstance(adapters, str | Ref | Mapping):
            return [self._engine.resolve(adapters)] * count
        if not isinstance(adapters, list | tuple):
            raise Unsupported(f"{type(adapters).__name__} gives the adapters no order.", "Give a list, one a row.")
        if len(adapters) != count:
            raise Unsupported(f"{len(adapters)} adapters for {count} rows.", "Give one adapter a row, or a single one.")
        return self._engine.resolve_all(adapters)

    def _logits(
        self, rows: list[list[int]], chosen: list[Ref | None], part: list[int], decoder_rows: list[list[int]] | None
    ) -> list[torch.Tensor]:
        with self._engine.plan([chosen[i] for i in part]) as plan:
            check_lengths(self._engine.base, plan, rows, 0)
            if plan.rows[0] is not None and plan.rows[0].head is not None:
                return class_logits(self._engine.base, self._engine.hooks, plan, rows)
            return token_logits(self._engine.base, self._engine.hooks, plan, rows, decoder_rows)


def _is_text(given: object) -> bool:
    """Whether this is a text, or a list of words."""
    return isinstance(given, str) or (isinstance(given, list | tuple) and all(isinstance(w, str) for w in given))
