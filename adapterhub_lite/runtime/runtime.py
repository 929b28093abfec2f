"""`Runtime`: one live base, many adapters, one adapter (or none) a row."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..adapters.fit import Fitted
from ..bases.load import Base
from ..errors import CapacityError, NotFound, Unsupported
from ..events import Listener, Note, ignore
from ..names import Ref
from ..store import Store
from ..tasks.classify import Classify
from ..tasks.prompts import Message, chat_ids, prompt_ids
from ..tasks.registry import make_task
from ..tasks.task import Task
from .admit import admit, fit_to_base
from .batch import BatchPlan, Composer
from .forward import class_logits, token_logits
from .generate import decode
from .predict import Prediction, from_logits, label_word_logits
from .sampling import Sampler, Sampling
from .sites import SiteHooks
from .slots import Slots
from .texts import TextStream

Chosen = str | Ref | None
_DEFAULT: Any = object()


class Runtime:
    """Serves a base with any of a store's adapters, switched and mixed freely.

    Args:
        slots: how many adapters are resident at most; the least recently used goes out.
        batch_size: most rows of one forward pass; longer lists are cut.

    All calls take a lock: one caller drives the model at a time.
    """

    def __init__(
        self, base: Base, store: Store | None = None, slots: int = 8, batch_size: int = 32, on_event: Listener = ignore
    ) -> None:
        self.base = base
        self.store = store if store is not None else Store()
        self.batch_size = batch_size
        self._slots = Slots(slots)
        self._hooks = SiteHooks()
        weakref.finalize(self, self._hooks.remove)  # a runtime that is dropped without close() leaves no hook
        self._composer = Composer()
        self._tasks: dict[str, Task | None] = {}
        self._remarks: set[str] = set()
        self._default: Ref | None = None
        self._on_event = on_event
        self._lock = threading.RLock()

    # -- adapters ------------------------------------------------------------------------------------------------

    def load(self, ref: str | Ref) -> Ref:
        """Make an adapter resident; returns its resolved reference. A failed load changes nothing.

        Raises:
            NotFound, StoreCorrupt, BaseMismatch, AdapterMismatch, CapacityError: why it cannot be served.
        """
        with self._lock:
            resolved = self._resolve(ref)
            assert resolved is not None
            self._fitted(resolved)
            return resolved

    def attach(self, adapter: Adapter, task: Task | None = None) -> Ref:
        """Make an adapter resident that is in no store (yet); returns a reference that this runtime knows.

        Raises:
            AdapterMismatch: it does not fit this base.
        """
        with self._lock:
            digest = hashlib.sha256(b"".join(adapter.files().values())).hexdigest()
            fitted = replace(fit_to_base(adapter, self.base), digest=digest)
            self._keep(fitted)
            self._tasks[digest] = task
            return Ref(adapter.name, digest=digest)

    def unload(self, ref: str | Ref) -> None:
        """Free an adapter's slot."""
        with self._lock:
            resolved = self._resolve(ref)
            assert resolved is not None
            assert resolved.digest is not None
            if not self._slots.drop(resolved.digest):
                raise NotFound(f"{resolved} is not resident.", f"Resident: {', '.join(self.resident()) or 'none'}.")
            self._composer.forget(resolved.digest)

    def resident(self) -> list[str]:
        """Names of the adapters in slots, least recently used first."""
        return [fitted.name for fitted in self._slots.resident()]

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
        """Take the runtime's hooks off the base."""
        with self._lock:
            self._hooks.remove()

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
        return self.generate_ids([self._raw_ids(t) for t in texts], adapters, max_new_tokens, stop, sampling)

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
        row = self._resolve(self._one(adapter))
        if not isinstance(prompt, str):
            ids = chat_ids(self.base.tokenizer, prompt)
        else:
            ids = self._raw_ids(prompt) if raw else self._question_ids(prompt, row)
        text = TextStream(self.base.tokenizer, stop)
        with self._lock, self._plan([row]) as plan:
            self._check_lengths(plan, [ids], max_new_tokens)
            for pairs in decode(
                self.base, self._hooks, plan, [ids], Sampler(sampling or Sampling(), [0]), max_new_tokens
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
        texts = [TextStream(self.base.tokenizer, stop) for _ in prompts]
        answers = ["" for _ in prompts]
        with self._lock:
            for part in self._parts(prompts, rows):
                with self._plan([rows[i] for i in part]) as plan:
                    sampler = Sampler(sampling or Sampling(), part)
                    some = [prompts[i] for i in part]
                    self._check_lengths(plan, some, max_new_tokens)
                    for pairs in decode(self.base, self._hooks, plan, some, sampler, max_new_tokens):
                        for row, token in pairs:
                            if not texts[part[row]].done:
                                answers[part[row]] += texts[part[row]].push(token)
                        if stop and all(texts[i].done for i in part):
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
            heads = [self._has_head(row) for row in rows]
            made: dict[int, Prediction] = {}
            for with_head in (True, False):
                chosen = [i for i, h in enumerate(heads) if h == with_head]
                score = self._predict_heads if with_head else self._predict_words
                made |= dict(zip(chosen, score([items[i] for i in chosen], [rows[i] for i in chosen]), strict=True))
        return [made[i] for i in range(len(items))]

    def score_words(self, texts: Sequence[str], task: Classify, adapter: Chosen = None) -> list[Prediction]:
        """Labels by label words for any task on a causal base, also without an adapter (to compare with)."""
        row = self._resolve(adapter)
        with self._lock:
            return self._score_words(list(texts), [row] * len(texts), [task] * len(texts))

    def logits(
        self,
        rows: Sequence[list[int]],
        adapters: Chosen | Sequence[Chosen] = _DEFAULT,
        decoder_rows: Sequence[list[int]] | None = None,
    ) -> list[torch.Tensor]:
        """Raw logits for token ids: [tokens, vocabulary] a row, or [labels] for adapters with a head."""
        chosen = self._rows(adapters, len(rows))
        with self._lock, self._plan(chosen) as plan:
            self._check_lengths(plan, rows, 0)
            if plan.rows and all(r is not None and r.head is not None for r in plan.rows):
                return list(class_logits(self.base, self._hooks, plan, rows))
            return token_logits(self.base, self._hooks, plan, rows, decoder_rows)

    # -- inside --------------------------------------------------------------------------------------------------

    def task(self, ref: str | Ref) -> Task | None:
        """The task a stored adapter was trained for, if its card says."""
        resolved = self._resolve(ref)
        assert resolved is not None
        assert resolved.digest is not None
        if resolved.digest not in self._tasks:
            config = self.store.card(resolved).task
            self._tasks[resolved.digest] = make_task(config) if config.get("type") else None
        return self._tasks[resolved.digest]

    def _one(self, adapter: Chosen) -> Chosen:
        return self._default if adapter is _DEFAULT else adapter

    def _rows(self, adapters: Chosen | Sequence[Chosen], count: int) -> list[Ref | None]:
        adapters = self._one(adapters)  # type: ignore[arg-type]
        if adapters is None or isinstance(adapters, str | Ref):
            return [self._resolve(adapters)] * count
        if len(adapters) != count:
            raise Unsupported(f"{len(adapters)} adapters for {count} rows.", "Give one adapter a row, or a single one.")
        known: dict[Chosen, Ref | None] = {a: self._resolve(a) for a in dict.fromkeys(adapters)}
        return [known[a] for a in adapters]

    def _resolve(self, ref: Chosen) -> Ref | None:
        if ref is None or (isinstance(ref, Ref) and ref.digest is not None):
            return ref  # type: ignore[return-value]
        if not isinstance(ref, str | Ref):
            raise Unsupported(f"{ref!r} is not an adapter.", "Write name, name@3 or name:prod, or None for the base.")
        return self.store.resolve(ref)

    def _fitted(self, ref: Ref) -> Fitted:
        assert ref.digest is not None
        held = self._slots.get(ref.digest)
        if held is None:
            if ref.version is None:
                raise NotFound(f"{ref} was never stored and has left its slot.", "Attach it again, or raise slots.")
            held, remark = admit(self.store, ref, self.base)
            self._keep(held)
            if remark and remark not in self._remarks:
                self._remarks.add(remark)
                self._on_event(Note(remark, "warning"))
        return held

    def _keep(self, fitted: Fitted) -> None:
        out = self._slots.put(fitted)
        if out is not None:
            self._composer.forget(out)
        self._hooks.cover(fitted.sites)

    @contextmanager
    def _plan(self, rows: Sequence[Ref | None]) -> Iterator[BatchPlan]:
        digests = {r.digest for r in rows if r is not None and r.digest is not None}
        with self._slots.lease(digests):
            fitted = {r.digest: self._fitted(r) for r in rows if r is not None}
            yield self._composer.compose([fitted[r.digest] if r else None for r in rows], self.base.device)

    def _parts(self, prompts: Sequence[list[int]], rows: Sequence[Ref | None]) -> Iterator[list[int]]:
        """Cut the rows into batches, longest first: like lengths together, no more adapters than slots.

        Where the base needs it, a batch has one prefix length.
        """
        order = sorted(range(len(prompts)), key=lambda i: (self._group(rows[i]), -len(prompts[i])))
        part: list[int] = []
        used: set[str | None] = set()
        for i in order:
            row = rows[i]
            more = used | ({row.digest} if row else set())
            other_group = bool(part) and self._group(rows[part[0]]) != self._group(row)
            if part and (len(part) >= self.batch_size or len(more) > self._slots.capacity or other_group):
                yield part
                part, more = [], {row.digest} if row else set()
            part.append(i)
            used = more
        if part:
            yield part

    def _group(self, row: Ref | None) -> int:
        """Rows of different groups cannot share a batch: an encoder-decoder's prefixes must have one length."""
        if self.base.kind != "seq2seq" or row is None:
            return 0
        prefix = self._fitted(row).prefix
        return prefix.tokens if prefix else 0

    def _has_head(self, row: Ref | None) -> bool:
        if row is None:
            raise Unsupported("The bare base has no labels.", "Name an adapter trained to classify.")
        return self._fitted(row).head is not None

    def _predict_heads(self, texts: list[str], rows: list[Ref | None]) -> list[Prediction]:
        ids = [self._class_ids(t, row) for t, row in zip(texts, rows, strict=True)]
        made: dict[int, Prediction] = {}
        for part in self._parts(ids, rows):
            with self._plan([rows[i] for i in part]) as plan:
                logits = class_logits(self.base, self._hooks, plan, [ids[i] for i in part])
                for i, row, one in zip(part, plan.rows, logits, strict=True):
                    assert row is not None
                    assert row.head is not None
                    made[i] = from_logits(one, self._labels(rows[i], row))
        return [made[i] for i in range(len(texts))]

    def _labels(self, ref: Ref | None, fitted: Fitted) -> list[str]:
        assert ref is not None
        assert fitted.head is not None
        task = self.task(ref)
        if isinstance(task, Classify) and task.labels:
            return task.labels
        count = list(fitted.head.parameters())[-1].shape[0]
        return [f"LABEL_{i}" for i in range(count)]

    def _class_ids(self, text: str, row: Ref | None) -> list[int]:
        task = self.task(row) if row is not None else None
        limit = self._position_limit() or 512
        if row is not None and (prefix := self._fitted(row).prefix):
            limit -= prefix.tokens
        if task is not None:
            return task.encode(
                text, self.base.tokenizer, "encoder", min(limit, int(task.config.get("max_length") or limit))
            )
        return list(self.base.tokenizer(text, truncation=True, max_length=limit)["input_ids"])

    def _predict_words(self, texts: list[str], rows: list[Ref | None]) -> list[Prediction]:
        tasks = []
        for row in rows:
            task = self.task(row) if row is not None else None
            if not isinstance(task, Classify):
                raise Unsupported(f"{row} was not trained to classify.", "Use generate(), or another adapter.")
            tasks.append(task)
        return self._score_words(texts, rows, tasks)

    def _score_words(self, texts: list[str], rows: list[Ref | None], tasks: list[Classify]) -> list[Prediction]:
        tokenizer, kind = self.base.tokenizer, self.base.kind
        ids = [task.encode(text, tokenizer, kind, 0) for text, task in zip(texts, tasks, strict=True)]
        words = {id(task): task.word_ids(tokenizer) for task in tasks}
        made: dict[int, Prediction] = {}
        for part in self._parts(ids, rows):
            with self._plan([rows[i] for i in part]) as plan:
                some = [ids[i] for i in part]
                self._check_lengths(plan, some, max(len(w) for i in part for w in words[id(tasks[i])]))
                logits = label_word_logits(self.base, self._hooks, plan, some, [words[id(tasks[i])] for i in part])
                made |= {i: from_logits(one, tasks[i].labels) for i, one in zip(part, logits, strict=True)}
        return [made[i] for i in range(len(texts))]

    def _raw_ids(self, text: str) -> list[int]:
        ids = list(self.base.tokenizer(text)["input_ids"])
        if not ids:
            raise Unsupported("An empty prompt has no tokens.", "Give at least one character.")
        return ids

    def _question_ids(self, text: str, row: Ref | None) -> list[int]:
        task = self.task(row) if row is not None else None
        if task is not None:
            return task.encode(text, self.base.tokenizer, self.base.kind, 0)
        if self.base.kind == "seq2seq":
            return self._raw_ids(text)
        return prompt_ids(self.base.tokenizer, text)

    def _position_limit(self) -> int | None:
        limit = getattr(self.base.config, "max_position_embeddings", None) or getattr(
            self.base.config, "n_positions", None
        )
        if self.base.config.model_type in ("roberta", "xlm-roberta", "camembert") and limit:
            return int(limit) - int(self.base.config.pad_token_id) - 1
        return limit if self.base.kind != "seq2seq" else None

    def _check_lengths(self, plan: BatchPlan, prompts: Sequence[list[int]], new_tokens: int) -> None:
        limit = self._position_limit()
        if not all(prompts):
            raise Unsupported("An empty prompt has no tokens.", "Give at least one character.")
        for row, prompt in zip(plan.rows, prompts, strict=True):
            virtual = row.prefix.tokens if row and row.prefix else 0
            if limit is not None and len(prompt) + virtual + new_tokens > limit:
                before = f"{len(prompt)} prompt tokens" + (f" + {virtual} of the prefix" if virtual else "")
                raise CapacityError(
                    f"{before} + {new_tokens} new ones exceed this base's {limit} positions.",
                    "Shorten the prompt or lower max_new_tokens.",
                )
