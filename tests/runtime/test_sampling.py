"""Settings of a row: each means what it means in transformers, and is the row's own."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_lite.errors import Unsupported
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.runtime.sampling import RowSampler, Sampling, choose, cut, penalised
from adapterhub_lite.store import Store
from tests import peers
from tests.runtime import build

PROMPTS = ["the quick", "a", "Hello, world!", "zebra crossing 12"]
VOCABULARY = 50


@pytest.fixture
def runtime(tiny_base):
    made = Runtime(tiny_base("llama"), Store())
    yield made
    made.close()


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def warped(logits: torch.Tensor, how: Sampling) -> torch.Tensor:
    """What transformers makes of logits [rows, vocabulary] before it draws."""
    warpers = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(how.temperature)])
    if how.top_k:
        warpers.append(transformers.TopKLogitsWarper(how.top_k))
    if how.top_p < 1.0:
        warpers.append(transformers.TopPLogitsWarper(how.top_p))
    if how.min_p:
        warpers.append(transformers.MinPLogitsWarper(how.min_p))
    return warpers(None, logits.clone())


CUTS = [
    {},
    {"top_k": 3},
    {"top_k": 500},
    {"top_p": 0.6},
    {"top_k": 8, "top_p": 0.3},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.2},
]


@pytest.mark.parametrize("changes", CUTS)
def test_cuts_keep_what_transformers_keeps(changes: dict) -> None:
    how = Sampling(temperature=0.7, seed=0, **changes)
    torch.testing.assert_close(cut(logits_of(5), [how] * 5), warped(logits_of(5), how))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(CUTS), min_size=1, max_size=7), st.integers(0, 99))
def test_rows_of_unlike_settings_are_cut_each_by_its_own(chosen: list[dict], seed: int) -> None:
    hows = [Sampling(temperature=0.5 + 0.25 * i, **changes) for i, changes in enumerate(chosen)]
    logits = logits_of(len(hows), seed)
    expected = torch.cat([warped(row[None], how) for row, how in zip(logits, hows, strict=True)])
    torch.testing.assert_close(cut(logits, hows), expected)


def test_the_repetition_penalty_is_transformers() -> None:
    logits = logits_of(3)
    seen = [[1, 2, 2, 7], [49], []]
    rows = [RowSampler(Sampling(repetition_penalty=p), 0, s) for p, s in zip((1.3, 0.8, 1.5), seen, strict=True)]
    found = penalised(logits, rows)
    for i, (row, ids) in enumerate(zip(rows, seen, strict=True)):
        processor = transformers.RepetitionPenaltyLogitsProcessor(row.penalty)
        expected = processor(torch.tensor([ids], dtype=torch.long), logits[i : i + 1].clone())
        assert torch.equal(found[i : i + 1], expected)
    rows[2].note(5)
    changed = penalised(logits, rows)[2] != logits[2]
    assert changed.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_penalised_greedy_tokens_are_transformers(tiny_base, family: str) -> None:
    """The prompt counts, and so does what was written; of an encoder-decoder only the latter."""
    base = tiny_base(family)
    model = peers.plain(base.source.folder, peers.task_type(family))
    runtime = Runtime(base, Store())
    plain = runtime.generate(PROMPTS, max_new_tokens=12)
    for penalty in (1.2, 3.0):
        sampling = [None, *[Sampling(repetition_penalty=penalty)] * 3]
        found = runtime.generate(PROMPTS, max_new_tokens=12, sampling=sampling)
        assert found[0] == plain[0]
        assert found != plain
        for prompt, answer in zip(PROMPTS[1:], found[1:], strict=True):
            ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
            made = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0,
                repetition_penalty=penalty,
            )  # fmt: skip
            new = made[0, 1:] if family == "t5" else made[0, ids.shape[1] :]
            assert answer == base.tokenizer.decode(new, skip_special_tokens=True)
    runtime.close()


def test_what_is_drawn_follows_the_probabilities() -> None:
    """Chi-square over the tokens that a cut leaves; nothing else is ever drawn."""
    logits, how = logits_of(1), Sampling(temperature=1.0, top_k=6)
    row = RowSampler(how, 3)
    draws = [int(choose(logits, [row])) for _ in range(4000)]
    expected = warped(logits, how).softmax(-1)[0] * len(draws)
    kept = expected.nonzero().flatten().tolist()
    assert set(draws) <= set(kept)
    chi = sum((draws.count(t) - float(expected[t])) ** 2 / float(expected[t]) for t in kept)
    assert chi < 25.7  # 5 degrees of freedom, p = 1e-4; the seed is fixed


def test_a_row_without_finite_logits_leaves_the_draws_of_others_alone() -> None:
    logits = logits_of(3)
    alone = choose(logits[:1], [RowSampler(Sampling(temperature=1.0), 5)])
    logits[1] = float("nan")
    rows = [RowSampler(Sampling(temperature=1.0), seed) for seed in (5, 6, 7)]
    assert choose(logits, rows)[0] == alone[0]


def test_settings_are_a_rows_own(runtime: Runtime) -> None:
    ref = runtime.attach(build.lora(runtime.base, 4))
    sampling = [
        None,
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=0.8, seed=9, top_p=0.9),
        Sampling(temperature=1.3, seed=3, min_p=0.05, repetition_penalty=1.2),
    ]
    most, stops = [5, 9, 16, 12], ["e", ["a", "b"], [], "zz"]
    chosen = [None, ref, None, ref]
    found = runtime.generate(PROMPTS, chosen, max_new_tokens=most, stop=stops, sampling=sampling)
    for i, prompt in enumerate(PROMPTS):
        alone = runtime.generate(prompt, chosen[i], max_new_tokens=most[i], stop=stops[i], sampling=[sampling[i]])
        assert alone == [found[i]]
    backwards = runtime.generate(
        PROMPTS[::-1], chosen[::-1], max_new_tokens=most[::-1], stop=stops[::-1], sampling=sampling[::-1]
    )
    assert backwards == found[::-1]


def test_max_new_tokens_is_a_rows_own(runtime: Runtime) -> None:
    """A prefix of the longer text; none gives none, and fewer than none are refused."""
    whole = runtime.generate(["the quick"] * 4, max_new_tokens=[0, 1, 4, 9])
    assert whole[0] == ""
    assert whole[1]
    assert all(longer.startswith(shorter.rstrip("\ufffd")) for shorter, longer in pairwise(whole))


def test_one_seed_for_all_counts_by_place_and_a_rows_own_does_not(runtime: Runtime) -> None:
    shared = runtime.generate(["a"] * 3, sampling=Sampling(temperature=1.0, seed=5), max_new_tokens=12)
    own = [Sampling(temperature=1.0, seed=5 + i) for i in range(3)]
    assert runtime.generate(["a"] * 3, sampling=own, max_new_tokens=12) == shared
    same = runtime.generate(["a"] * 3, sampling=[own[0]] * 3, max_new_tokens=12)
    assert same == [shared[0]] * 3
    assert len(set(shared)) == 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_stop_token_ends_its_own_row(tiny_base, family: str) -> None:
    runtime = Runtime(tiny_base(family), Store())
    answer = runtime.submit("the quick", raw=True, max_new_tokens=12)
    answer.result()
    written = answer.tokens
    for token in dict.fromkeys(written):
        stopped = runtime.generate(
            ["the quick"] * 2, max_new_tokens=12, sampling=[Sampling(stop_token_ids=[token]), None]
        )
        expected = runtime.base.tokenizer.decode(written[: written.index(token)], skip_special_tokens=True)
        assert stopped == [expected, answer.result()]
    runtime.close()


def test_a_stop_string_ends_its_row_at_once(runtime: Runtime) -> None:
    whole = runtime.submit("the quick", raw=True, max_new_tokens=40)
    text = whole.result()
    stop = next(letter for letter in text[2:] if letter != "\ufffd")
    answer = runtime.submit("the quick", raw=True, max_new_tokens=40, stop=[stop])
    assert answer.result() == text.partition(stop)[0]
    assert len(answer.tokens) < len(whole.tokens) // 2
    assert stop in runtime.base.tokenizer.decode(answer.tokens)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": [3]},
        {"max_new_tokens": "many"},
        {"sampling": [None]},
        {"sampling": [3, 3]},
        {"stop": [["a"]]},
        {"stop": [["a"], [3]]},
        {"stop": 3},
    ],
)
def test_settings_that_do_not_fit_the_rows_are_refused(runtime: Runtime, wrong: dict) -> None:
    with pytest.raises(Unsupported):
        runtime.generate(["a", "b"], **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_p": -0.1}, {"min_p": 1.5}, {"min_p": float("nan")}, {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")}, {"stop_token_ids": ["a"]},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(Unsupported):
        Sampling(**wrong)
