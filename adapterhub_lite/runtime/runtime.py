"""`Runtime`: one live base, many adapters, one adapter (or none) a row."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from ..adapters.adapter import Adapter
from ..bases.load import Base
from ..errors import Unsupported
from ..events import Listener, ignore
from ..names import Ref
from ..store import Store
from ..tasks.prompts import Message, chat_ids
from ..tasks.task import Task
from .admit import fit_to_base
from .engine import Engine
from .given import check_ids, check_messages, texts_of
from .labels import DEFAULT, Labels
from .mixes import Chosen
from .owner import Owner
from .prompting import question_ids, raw_ids
from .requests import Answer, Call, Samplings, Stop, requests
from .residents import Residents
from .sampling import Sampling
from .texts import tokenizer_lock


class Runtime(Residents, Labels):
    """Serves a base with any of a store's adapters, switched and mixed freely.

    Args:
        slots: how many adapters are resident at most; the least recently used goes out. None: what `memory` holds.
        memory: most bytes of adapters on the device, such as "2GB"; left out, half of what is free there now.
        host_memory: on a device with memory of its own, most bytes of adapters kept in the host's, to come back from
            there instead of from the disk; left out, half of what is free. A CPU is its own host.
        batch_size: most rows that run at a time; the others wait for a place.
        compile: write texts by steps that torch.compile makes, where the base has a forward of our own. The first step
            of each size takes long (`static_size`); adapters are switched without another one. Left out, a CUDA device
            uses CUDA graphs, unless AHL_CUDA_GRAPHS is 0.

    Calls may come from any thread. Texts of all callers are written by one thread, in one running batch where the base
    has a forward of our own (`scheduler`); it and every other call take the base's lock in turn, whichever runtime they
    are of.
    """

    def __init__(
        self,
        base: Base,
        store: Store | None = None,
        slots: int | None = 8,
        batch_size: int = 32,
        on_event: Listener = ignore,
        *,
        memory: int | str | None = None,
        host_memory: int | str | None = None,
        compile: bool = False,
    ) -> None:
        some = store if store is not None else Store()
        self._engine = Engine(base, some, slots, batch_size, on_event, memory, host_memory, compile)
        self._owner = Owner(self._engine)
        # A runtime that is dropped without close() leaves no hook and no thread.
        weakref.finalize(self, _end, self._owner, self._engine)
        self._default: Ref | None = None
        self._lock = self._owner.gate

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
        """Most rows that run at a time."""
        return self._engine.batch_size

    # -- adapters ------------------------------------------------------------------------------------------------

    def attach(self, adapter: Adapter, task: Task | None = None) -> Ref:
        """Make an adapter resident that is in no store (yet); returns a reference that this runtime knows.

        The same weights with another task are another adapter, as they are in a store.

        Raises:
            AdapterMismatch: it does not fit this base.
        """
        with self._lock:
            digest = _digest(adapter, task)
            fitted = replace(fit_to_base(adapter, self.base), digest=digest)
            self._engine.keep(fitted)
            self._engine.tasks[digest] = task
            return Ref(adapter.name, digest=digest)

    def use(self, ref: Chosen) -> None:
        """Answer with this adapter from now on where a call names none; None: the bare base."""
        with self._lock:
            resolved = self._engine.resolve(ref)
            self._default = None if resolved is None else self.load(resolved)

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
        """Take the runtime's hooks off the base; it answers no more.

        Texts that are being written are given up: whoever waits for one gets Unsupported, as every later call does.
        """
        self._owner.close()

    # -- text ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[str],
        adapters: Chosen | Sequence[Chosen] = DEFAULT,
        *,
        max_new_tokens: int | Sequence[int] = 64,
        stop: Stop = (),
        sampling: Samplings = None,
    ) -> list[str]:
        """Continue raw texts. Each setting is one value for all rows, or a list with one a row.

        Args:
            adapters: one a row; None is the bare base; a single value is for all rows; left out: what `use` chose.
            stop: strings that end an answer and are not part of it; the one that begins first in the text counts. A
                list that holds lists has one a row.
            sampling: greedy when left out. Row i of a single value with a seed uses seed + i.

        Raises:
            NotFound, BaseMismatch, AdapterMismatch, CapacityError: an adapter cannot be served.
        """
        texts = texts_of(prompts)
        with tokenizer_lock(self.base):
            ids = [raw_ids(self.base, text) for text in texts]
        return self.generate_ids(ids, adapters, max_new_tokens, stop, sampling)

    def answer(
        self,
        questions: str | Sequence[str],
        adapters: Chosen | Sequence[Chosen] = DEFAULT,
        *,
        max_new_tokens: int | Sequence[int] = 64,
        stop: Stop = (),
        sampling: Samplings = None,
    ) -> list[str]:
        """Answer questions as each row's adapter was trained to see them (chat template, system prompt)."""
        texts = texts_of(questions)
        rows = self._rows(adapters, len(texts))
        ids = [self._question_ids(t, r) for t, r in zip(texts, rows, strict=True)]
        return self.generate_ids(ids, rows, max_new_tokens, stop, sampling)

    def chat(
        self,
        messages: Sequence[Message],
        adapter: Chosen = DEFAULT,
        *,
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        sampling: Sampling | None = None,
    ) -> str:
        """The assistant's next turn of a conversation, through the base's chat template; `stop` as for `generate`."""
        check_messages(messages)
        with tokenizer_lock(self.base):
            ids = chat_ids(self.base.tokenizer, messages)
        return self.generate_ids([ids], [self._one(adapter)], max_new_tokens, stop, sampling)[0]

    def stream(
        self,
        prompt: str | Sequence[Message],
        adapter: Chosen = DEFAULT,
        *,
        raw: bool = False,
        max_new_tokens: int = 256,
        stop: Stop = (),
        sampling: Sampling | None = None,
    ) -> Iterator[str]:
        """Pieces of one answer as they come. A text is asked as a question unless `raw`; a list is a conversation.

        It begins with the first piece asked for; to close or drop the iterator cancels it.
        """
        answer = self.submit(prompt, adapter, raw=raw, max_new_tokens=max_new_tokens, stop=stop, sampling=sampling)
        try:
            yield from answer
        finally:
            answer.cancel()

    def submit(
        self,
        prompt: str | Sequence[Message],
        adapter: Chosen = DEFAULT,
        *,
        raw: bool = False,
        max_new_tokens: int = 256,
        stop: Stop = (),
        sampling: Sampling | None = None,
    ) -> Answer:
        """Begin what `stream` gives, and return at once: a handle to wait for the answer, read or cancel it."""
        row = self._engine.resolve(self._one(adapter))
        if not isinstance(prompt, str):
            check_messages(prompt)
        if isinstance(prompt, str) and not raw:
            ids = self._question_ids(prompt, row)
        else:
            with tokenizer_lock(self.base):
                ids = raw_ids(self.base, prompt) if isinstance(prompt, str) else chat_ids(self.base.tokenizer, prompt)
        call = self._ask([ids], [row], max_new_tokens, stop, sampling, streams=True)
        return Answer(call.rows[0], self)

    def generate_ids(
        self,
        prompts: Sequence[list[int]],
        adapters: Chosen | Sequence[Chosen],
        max_new_tokens: int | Sequence[int],
        stop: Stop = (),
        sampling: Samplings = None,
    ) -> list[str]:
        """`generate` for prompts that are token ids already."""
        check_ids(self.base, prompts)
        return self._ask(prompts, self._rows(adapters, len(prompts)), max_new_tokens, stop, sampling).texts()

    def task(self, ref: str | Ref) -> Task | None:
        """The task a stored adapter was trained for, if its card says."""
        return self._engine.task(ref)

    # -- inside --------------------------------------------------------------------------------------------------

    def _question_ids(self, text: str, row: Ref | None) -> list[int]:
        task = self.task(row) if row is not None else None
        with tokenizer_lock(self.base):
            return question_ids(self.base, text, task)

    def _ask(
        self,
        prompts: Sequence[list[int]],
        rows: list[Ref | None],
        most: int | Sequence[int],
        stop: Stop,
        sampling: Samplings,
        streams: bool = False,
    ) -> Call:
        self._owner.check_open()
        if self.base.kind == "encoder":
            raise Unsupported(f"{self.base.name} is an encoder: it writes no text.", "Use label() or logits().")
        call = Call(streams)
        distinct = {row.digest: row for row in rows if row is not None}
        made = requests(call, self.base, prompts, rows, most, stop, sampling)
        call.add(made, by_adapter=not self._engine.can_hold(distinct.values()))
        if made:
            self._owner.submit(call)
        return call


def _digest(adapter: Adapter, task: Task | None) -> str:
    """What an adapter in no store is known by: all that its answers depend on."""
    parts = hashlib.sha256(b"".join(adapter.files().values()))
    if task is not None:
        parts.update(json.dumps(task.config, sort_keys=True, default=repr).encode())
    return parts.hexdigest()


def _end(owner: Owner, engine: Engine) -> None:
    owner.stop()
    engine.close()
