"""Stop strings: where an answer ends does not depend on the tokens that it comes in."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from adapterhub_lite.bases.load import Base
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.runtime.texts import TextStream
from adapterhub_lite.store import Store
from tests import tiny
from tests.runtime import build

LETTERS = "abc"
WORDS = ["".join(word) for size in (1, 2, 3, 4) for word in product(LETTERS, repeat=size)]


def long_tokens() -> PreTrainedTokenizerFast:
    """Tokens of one to four letters; every text can be cut into them in many ways."""
    words = [*tiny.SPECIALS, *WORDS]
    words += ["".join(word) for word in product("abcd", repeat=5)][: tiny.VOCABULARY - len(words)]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZER = long_tokens()


def until(text: str, stops: list[str]) -> str:
    """The text up to the stop string that begins first."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def streamed(pieces: list[str], stops: list[str]) -> list[str]:
    stream = TextStream(TOKENIZER, stops)
    found = []
    for piece in pieces:
        if not stream.done:
            found.append(stream.push(TOKENIZER.convert_tokens_to_ids(piece)))
    return [*found, stream.finish()]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
@given(
    pieces=st.lists(st.sampled_from(WORDS), max_size=8),
    stops=st.lists(st.text(LETTERS, min_size=1, max_size=6), min_size=1, max_size=4),
)
@example(pieces=["ab", "c", "a"], stops=["abca", "bc"])
@example(pieces=["ab", "c", "b"], stops=["abca", "bc"])
@example(pieces=["ab", "c"], stops=["abca", "bc"])
@example(pieces=["abca"], stops=["abca", "bc"])
@example(pieces=["aa", "ab", "c"], stops=["aab", "ab", "b"])
@example(pieces=["cab", "c"], stops=["ab", "abc"])
def test_the_stop_that_begins_first_ends_the_text(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    expected = until(text, stops)
    assert "".join(streamed(pieces, stops)) == expected
    assert "".join(streamed(list(text), stops)) == expected


def test_no_more_is_written_than_is_needed() -> None:
    stream = TextStream(TOKENIZER, ["bc", "abca"])
    given = [stream.push(TOKENIZER.convert_tokens_to_ids(piece)) for piece in ("c", "bcc")]
    assert (given, stream.done) == (["c", ""], True)
    stream = TextStream(TOKENIZER, ["bc", "abca"])
    given = [stream.push(TOKENIZER.convert_tokens_to_ids(piece)) for piece in ("c", "abc", "cc")]
    assert (given, stream.done) == (["c", "", "a"], True)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_stops_within_tokens_in_batches_and_streams(
    tiny_base: Callable[..., Base], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    base = tiny_base(family)
    monkeypatch.setattr(base, "tokenizer", TOKENIZER)
    runtime = Runtime(base, Store())
    refs: list[Any] = [None, runtime.attach(build.lora(base, 1)), runtime.attach(build.lora(base, 2))]
    prompts = [[5, 6, 7], [8, 9], [20, 30, 40, 50]]
    whole = runtime.generate_ids(prompts, refs, 16)
    dice = random.Random(3)
    stops = []
    for text in whole:
        start = dice.randrange(1, max(2, len(text) // 2))
        stops.append([text[start + 1 : start + 3], text[start : start + 5], text[start + 2 : start + 9], "zz"])
    expected = [until(text, some) for text, some in zip(whole, stops, strict=True)]
    assert expected != whole
    assert runtime.generate_ids(prompts, refs, 16, stops) == expected
    for prompt, ref, some, text in zip(prompts, refs, stops, expected, strict=True):
        call = runtime._ask([prompt], [ref], 16, [some], None, streams=True)
        assert call.texts() == [text]
        assert "".join(call.rows[0].pieces) == text
    runtime.close()
