"""`Runtime`: one live base, many adapters, one adapter (or none) a row."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..adapters.fit import Fitted
from ..bases.load import Base
from ..errors import NotFound, Unsupported
from ..events import Listener, ignore
from ..names import Ref
from ..store import Store
from ..tasks.classify import Classify
from ..tasks.prompts import Message, chat_ids
from ..tasks.task import Task
from .admit import fit_to_base
from .engine import Engine
from .forward import class_logits, token_logits
from .generate import decode
from .labelling import label, score_words
from .predict import Prediction
from .prompting import check_lengths, question_ids, raw_ids
from .sampling import Sampler, Sampling
from .texts import TextStream

Chosen = str | Ref | None
_DEFAULT: Any = object()


class Runtime:
    """Serves a base with any of a store's adapters, switched and mixed freely.

    Args:
        slots: how many adapters are resident at most; the least recently used goes out.
        batch_size: most rows of one forward pass; longer lists are cut.

    All calls take the base's lock: one caller drives the model at a time, whichever runtime it calls.
    """

    def __init__(
        self, base: Base, store: Store | None = None, slots: int = 8, batch_size: int = 32, on_event: Listener = ignore
    ) -> None:
        self._engine = Engine(base, store if store is not None else Store(), slots, batch_size, on_event)
        # A runtime that is dropped without close() leaves no hook.
        weakref.finalize(self, self._engine.hooks.remove)
        self._default: Ref | None = None
        self._lock = base.lock

    @property
    def base(self) -> Base:
        """The live base."""
        return self._engine.base

    @property
    def store(self) -> Store:
        """Where adapters come from."""
        return self._engine.store

    @property
    def batch_size(self) -> int:
        """Most rows of one forward pass."""
        return self._engine.batch_size

    # -- adapters ------------------------------------------------------------------------------------------------

    def load(self, ref: str | Ref) -> Ref:
        """Make an adapter resident; returns its resolved reference. A failed load changes nothing.

        Raises:
            NotFound, StoreCorrupt, BaseMismatch, AdapterMismatch, CapacityError: why it cannot be served.
        """
        with self._lock:
            resolved = self._engine.resolve(ref)
            assert resolved is not None
            self._engine.fitted(resolved)
            return resolved

    def fitted(self, ref: str | Ref) -> Fitted:
        """An adapter with every tensor in its place in this base, made resident if it is not."""
        with self._lock:
            resolved = self._engine.resolve(ref)
            assert resolved is not None
            return self._engine.fitted(resolved)

    def attach(self, adapter: Adapter, task: Task | None = None) -> Ref:
        """Make an adapter resident that is in no store (yet); returns a reference that this runtime knows.

        Raises:
            AdapterMismatch: it does not fit this base.
        """
        with self._lock:
            digest = hashlib.sha256(b"".join(adapter.files().values())).hexdigest()
            fitted = replace(fit_to_base(adapter, self.base), digest=digest)
            self._engine.keep(fitted)
            self._engine.tasks[digest] = task
            return Ref(adapter.name, digest=digest)

    def unload(self, ref: str | Ref) -> None:
        """Free an adapter's slot."""
        with self._lock:
            resolved = self._engine.resolve(ref)
            assert resolved is not None
            assert resolved.digest is not None
            if not self._engine.slots.drop(resolved.digest):
                raise NotFound(f"{resolved} is not resident.", f"Resident: {', '.join(self.resident()) or 'none'}.")
            self._engine.composer.forget(resolved.digest)

    def resident(self) -> list[str]:
        """Names of the adapters in slots, least recently used first."""
        return [fitted.name for fitted in self._engine.slots.resident()]

    def use(self, ref: Chosen) -> None:
        """Answer with this adapter from now on where a call names none; None: the bare base."""
        with self._lock:
            self._default = None if ref is None else self.load(ref)

    @contextmanager
    def using(self, ref: Chosen) -> Iterator[Runtime]:
        """`use(ref)` for a block; what was used before is back after it."""
        before = self._default
        self.use(ref)
        try:
            yield self
        finally:
            self._default = before

    @property
    def default(self) -> str | None:
        """The adapter in use where a call names none."""
        return None if self._default is None else str(self._default)

    def close(self) -> None:
        """Take the runtime's hooks off the base; it answers no more."""
        with self._lock:
            self._engine.close()

    # -- text ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[str],
        adapters: Chosen | Sequence[Chosen] = _DEFAULT,
        *,
        max_new_tokens: int = 64,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
    ) -> list[str]:
        """Continue raw texts.

        Args:
            adapters: one a row; None is the bare base; a single value is for all rows; left out: what `use` chose.
            stop: strings that end an answer and are not part of it.
            sampling: greedy when left out.

        Raises:
            NotFound, BaseMismatch, AdapterMismatch, CapacityError: an adapter cannot be served.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        return self.generate_ids([raw_ids(self.base, t) for t in texts], adapters, max_new_tokens, stop, sampling)

    def answer(
        self,
        questions: str | Sequence[str],
        adapters: Chosen | Sequence[Chosen] = _DEFAULT,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """Answer questions as each row's adapter was trained to see them (chat template, system prompt)."""
        texts = [questions] if isinstance(questions, str) else list(questions)
        rows = self._rows(adapters, len(texts))
        ids = [self._question_ids(t, r) for t, r in zip(texts, rows, strict=True)]
        return self.generate_ids(ids, rows, max_new_tokens, (), sampling)

    def chat(
        self,
        messages: Sequence[Message],
        adapter: Chosen = _DEFAULT,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
    ) -> str:
        """The assistant's next turn of a conversation, through the base's chat template."""
        ids = chat_ids(self.base.tokenizer, messages)
        return self.generate_ids([ids], [self._one(adapter)], max_new_tokens, (), sampling)[0]

    def stream(
        self,
        prompt: str | Sequence[Message],
        adapter: Chosen = _DEFAULT,
        *,
        raw: bool = False,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
    ) -> Iterator[str]:
        """Pieces of one answer as they come. A text is asked as a question unless `raw`; a list is a conversation."""
        row = self._engine.resolve(self._one(adapter))
        if not isinstance(prompt, str):
            ids = chat_ids(self.base.tokenizer, prompt)
        else:
            ids = raw_ids(self.base, prompt) if raw else self._question_ids(prompt, row)
        text = TextStream(self.base.tokenizer, stop)
        with self._lock, self._engine.plan([row]) as plan:
            check_lengths(self.base, plan, [ids], max_new_tokens)
            for pairs in decode(
                self.base, self._engine.hooks, plan, [ids], Sampler(sampling or Sampling(), [0]), max_new_tokens
            ):
                for _, token in pairs:
                    if piece := text.push(token):
                        yield piece
                if text.done:
                    return
            if piece := text.finish():
                yield piece

    def generate_ids(
        self,
        prompts: Sequence[list[int]],
        adapters: Chosen | Sequence[Chosen],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
    ) -> list[str]:
        """`generate` for prompts that are token ids already."""
        rows = self._rows(adapters, len(prompts))
        stop = (stop,) if isinstance(stop, str) else stop
        texts = [TextStream(self.base.tokenizer, stop) for _ in prompts]
        answers = ["" for _ in prompts]
        with self._lock:
            for part in self._engine.parts(prompts, rows):
                with self._engine.plan([rows[i] for i in part]) as plan:
                    sampler = Sampler(sampling or Sampling(), part)
                    some = [prompts[i] for i in part]
                    check_lengths(self.base, plan, some, max_new_tokens)
                    for pairs in decode(self.base, self._engine.hooks, plan, some, sampler, max_new_tokens):
                        for row, token in pairs:
                            if not texts[part[row]].done:
                                answers[part[row]] += texts[part[row]].push(token)
                        if all(texts[part[row]].done for row, _ in pairs):
                            break
        return [answer + text.finish() for answer, text in zip(answers, texts, strict=True)]

    # -- labels --------------------------------------------------------------------------------------------------

    def predict(self, texts: str | Sequence[str], adapters: Chosen | Sequence[Chosen] = _DEFAULT) -> list[Prediction]:
        """Labels with scores, for adapters trained to classify.

        Raises:
            Unsupported: a row without adapter, or whose adapter has no labels.
        """
        items = [texts] if isinstance(texts, str) else list(texts)
        rows = self._rows(adapters, len(items))
        with self._lock:
            return label(self._engine, items, rows)

    def score_words(self, texts: Sequence[str], task: Classify, adapter: Chosen = None) -> list[Prediction]:
        """Labels by label words for any task on a causal base, also without an adapter (to compare with)."""
        row = self._engine.resolve(adapter)
        with self._lock:
            return score_words(self._engine, texts, [row] * len(texts), [task] * len(texts))

    def logits(
        self,
        rows: Sequence[list[int]],
        adapters: Chosen | Sequence[Chosen] = _DEFAULT,
        decoder_rows: Sequence[list[int]] | None = None,
    ) -> list[torch.Tensor]:
        """Raw logits for token ids: [tokens, vocabulary] a row, or [labels] for adapters with a head."""
        chosen = self._rows(adapters, len(rows))
        found: dict[int, torch.Tensor] = {}
        with self._lock:
            heads = [r is not None and self._engine.fitted(r).head is not None for r in chosen]
            for with_head in (True, False):
                part = [i for i, head in enumerate(heads) if head == with_head]
                if part:
                    given = [decoder_rows[i] for i in part] if decoder_rows is not None else None
                    found |= dict(zip(part, self._logits([rows[i] for i in part], chosen, part, given), strict=True))
        return [found[i] for i in range(len(rows))]

    def task(self, ref: str | Ref) -> Task | None:
        """The task a stored adapter was trained for, if its card says."""
        return self._engine.task(ref)

    # -- inside --------------------------------------------------------------------------------------------------

    def _one(self, adapter: Chosen) -> Chosen:
        return self._default if adapter is _DEFAULT else adapter

    def _rows(self, adapters: Chosen | Sequence[Chosen], count: int) -> list[Ref | None]:
        adapters = self._one(adapters)  # type: ignore[arg-type]
        if adapters is None or isinstance(adapters, str | Ref):
            return [self._engine.resolve(adapters)] * count
        if not isinstance(adapters, list | tuple):
            raise Unsupported(f"{type(adapters).__name__} gives the adapters no order.", "Give a list, one a row.")
        if len(adapters) != count:
            raise Unsupported(f"{len(adapters)} adapters for {count} rows.", "Give one adapter a row, or a single one.")
        known: dict[Chosen, Ref | None] = {a: self._engine.resolve(a) for a in dict.fromkeys(adapters)}
        return [known[a] for a in adapters]

    def _logits(
        self, rows: list[list[int]], chosen: list[Ref | None], part: list[int], decoder_rows: list[list[int]] | None
    ) -> list[torch.Tensor]:
        with self._engine.plan([chosen[i] for i in part]) as plan:
            check_lengths(self.base, plan, rows, 0)
            if plan.rows[0] is not None and plan.rows[0].head is not None:
                return list(class_logits(self.base, self._engine.hooks, plan, rows))
            return token_logits(self.base, self._engine.hooks, plan, rows, decoder_rows)

    def _question_ids(self, text: str, row: Ref | None) -> list[int]:
        return question_ids(self.base, text, self.task(row) if row is not None else None)
