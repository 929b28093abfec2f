"""What is no text, conversation, row of token ids or setting: our own error, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases.load import load_base
from adapterhub_lite.errors import Unsupported
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.runtime.sampling import Sampling
from adapterhub_lite.store import Store

NO_TEXT = [None, 5, [5], [None], b"abc", [["a", "b"]], {"a": 1}, [b"x"]]
NO_CHAT = [None, 5, "hi", [], [1], {"role": "user", "content": "x"}, [{"role": "user"}], [{"role": 1, "content": "x"}]]
NO_IDS = [None, 5, ["a"], [1, 2], [[-1]], [[10**6]], [[2**70]], [["a"]], [[5.5]], [[True]], torch.tensor([[1, 2]])]


@pytest.fixture(scope="module")
def runtime(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    store = Store(tmp_path_factory.mktemp("given"))
    return Runtime(load_base(str(tiny_folder("llama")), device="cpu"), store)


@pytest.mark.parametrize("given", NO_TEXT, ids=repr)
def test_no_text(runtime: Runtime, given: Any) -> None:
    for call in (runtime.generate, runtime.answer):
        with pytest.raises(Unsupported, match="is no text"):
            call(given, None)


@pytest.mark.parametrize("given", NO_CHAT, ids=repr)
def test_no_conversation(runtime: Runtime, given: Any) -> None:
    with pytest.raises(Unsupported, match="message"):
        runtime.chat(given, None)
    if not isinstance(given, str):
        with pytest.raises(Unsupported, match="message"):
            runtime.submit(given, None)


@pytest.mark.parametrize("given", NO_IDS, ids=repr)
def test_no_token_ids(runtime: Runtime, given: Any) -> None:
    with pytest.raises(Unsupported, match="token"):
        runtime.generate_ids(given, None, 3)
    with pytest.raises(Unsupported, match="token"):
        runtime.logits(given)


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": "hot"}, {"temperature": None}, {"top_k": "a"}, {"top_k": 1.5}, {"seed": "x"}, {"seed": 1.5},
        {"stop_token_ids": 5}, {"top_p": None}, {"min_p": "0"}, {"repetition_penalty": True},
    ],
)  # fmt: skip
def test_no_setting(setting: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match=next(iter(setting))):
        Sampling(**setting)


@pytest.mark.parametrize("most", [-1, True, 1.5, "3", [2, -1]])
def test_no_number_of_tokens(runtime: Runtime, most: Any) -> None:
    with pytest.raises(Unsupported, match="max_new_tokens"):
        runtime.generate(["a", "b"], None, max_new_tokens=most)


def test_nothing_is_no_error(runtime: Runtime) -> None:
    assert runtime.generate([], None) == []
    assert runtime.logits([]) == []
