"""One question to a runtime, answered on stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .render import Column, printable, put, say, table

if TYPE_CHECKING:
    from ..runtime.predict import TaggedWord
    from ..runtime.runtime import Runtime
    from ..runtime.sampling import Sampling

MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Question:
    """A prompt and how to answer it; `tokens` None leaves the length to the adapter's task."""

    prompt: str
    raw: bool = False
    tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def sampling(self) -> Sampling:
        """How tokens are chosen.

        Raises:
            Unsupported: numbers out of range.
        """
        from ..runtime.sampling import Sampling

        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)


def answer_once(runtime: Runtime, adapter: str | None, question: Question, stream: bool) -> dict[str, Any]:
    """Answer with the runtime's adapter in use, printing as it comes if `stream`; returns everything as plain data."""
    told: dict[str, Any] = {"base": runtime.base.name, "adapter": runtime.default, "prompt": question.prompt}
    if runtime.base.kind == "encoder":
        made = runtime.label(question.prompt)[0]
        if isinstance(made, list):
            if stream:
                say(*_tag_lines(made))
            return {**told, "words": [asdict(word) for word in made]}
        if stream:
            say(printable(made.label))
        return {**told, "label": made.label, "score": made.score, "scores": made.scores}
    pieces = runtime.stream(
        question.prompt,
        raw=question.raw,
        max_new_tokens=answer_length(runtime, adapter, question.tokens),
        sampling=question.sampling(),
    )
    return {**told, "answer": write(pieces) if stream else "".join(pieces)}


def _tag_lines(words: list[TaggedWord]) -> list[str]:
    """A table of words and their tags."""
    columns = (Column("WORD"), Column("TAG"), Column("SCORE", right=True))
    return table(columns, [(word.word, word.tag, f"{word.score:.2f}") for word in words])


def answer_length(runtime: Runtime, adapter: str | None, wanted: int | None) -> int:
    """Most tokens of an answer: as asked, else as the adapter's task says, else the usual."""
    if wanted is not None:
        return wanted
    task = runtime.task(adapter) if adapter is not None else None
    return int(task.config.get("max_new_tokens") or MAX_NEW_TOKENS) if task else MAX_NEW_TOKENS


def write(pieces: Iterable[str]) -> str:
    """Print pieces of text as they come and end the line; returns the whole."""
    whole = []
    shows = sys.stdout.isatty()
    for piece in pieces:
        whole.append(piece)
        put(printable(piece, keep_lines=True) if shows else piece)
    put("\n")
    return "".join(whole)
