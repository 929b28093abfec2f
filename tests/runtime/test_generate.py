"""Generation: greedy tokens are transformers' own; sampling, streams, stop strings and limits do what they say."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from adapterhub_lite.errors import CapacityError, Unsupported
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.runtime.sampling import Sampling
from adapterhub_lite.runtime.texts import TextStream
from adapterhub_lite.store import Store
from tests import peers, tiny
from tests.runtime import build

PROMPTS = ["the quick", "a", "Hello, world!", "zebra crossing 12"]


@pytest.fixture
def runtime(tiny_base):
    made = Runtime(tiny_base("llama"), Store())
    yield made
    made.close()


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", ["none", "lora", "dora"])
def test_greedy_tokens_are_transformers(tiny_base, tmp_path, family: str, kind: str):
    base = tiny_base(family)
    model = peers.plain(base.source.folder, peers.task_type(family))
    store, ref = Store(), None
    if kind != "none":
        model = peers.wrap(model, peers.config(family, kind, peers.task_type(family)))
        model.save_pretrained(tmp_path)
        ref = store.import_(tmp_path, "mine")
    found = Runtime(base, store).generate(PROMPTS, ref, max_new_tokens=10)
    assert len(set(found)) > 1
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, pad_token_id=0
        )
        new = made[0, 1:] if family == "t5" else made[0, ids.shape[1] :]
        assert answer == base.tokenizer.decode(new, skip_special_tokens=True)


def test_an_end_token_ends_a_row_and_not_the_batch(tiny_base):
    """Every token that the model likes is made an end token in turn; the other rows go on."""
    base = tiny_base("llama")
    runtime = Runtime(base, Store())
    prompts = [[5, 6, 7], [8, 9], [40, 41, 42], [60], [90, 91], [101, 7, 7]]
    model = peers.plain(base.source.folder, "CAUSAL_LM")
    tokens = []
    for prompt in prompts:
        made = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=0)
        tokens.append([t for t in made[0, len(prompt) :].tolist() if t != 2])
    kept = base.model.generation_config.eos_token_id
    try:
        for end in {t for row in tokens for t in row[:5]}:
            base.model.generation_config.eos_token_id = [2, end]
            for row, found in zip(tokens, runtime.generate_ids(prompts, None, 12), strict=True):
                expected = row[: row.index(end)] if end in row else row
                assert found == base.tokenizer.decode(expected)
    finally:
        base.model.generation_config.eos_token_id = kept


def test_stop_strings_end_an_answer_and_are_not_part_of_it(runtime):
    whole = runtime.generate(PROMPTS, max_new_tokens=14)
    stops = sorted({w[i : i + n] for w in whole for i in range(0, len(w), 5) for n in (1, 2, 3)} - {""})[::7]
    assert len(stops) > 3
    for stop in stops:
        if "\ufffd" in stop:
            continue
        found = runtime.generate(PROMPTS, max_new_tokens=14, stop=[stop])
        assert found == [w.partition(stop)[0] for w in whole], ascii(stop)


def test_sampling_is_a_rows_own(runtime):
    sampling = Sampling(temperature=1.0, seed=11)
    whole = runtime.generate(PROMPTS, sampling=sampling, max_new_tokens=16)
    assert whole == runtime.generate(PROMPTS, sampling=sampling, max_new_tokens=16)
    for i, prompt in enumerate(PROMPTS):
        others = ["x" * (j + 1) for j in range(i)]
        again = runtime.generate([*others, prompt], sampling=sampling, max_new_tokens=16)
        assert again[i] == whole[i]
    assert whole != runtime.generate(PROMPTS, sampling=Sampling(temperature=1.0, seed=12), max_new_tokens=16)
    same = runtime.generate([PROMPTS[0]] * 4, sampling=sampling, max_new_tokens=16)
    assert len(set(same)) == 4


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.8), Sampling(temperature=0.8, seed=3)])
def test_the_callers_random_numbers_are_left_alone(runtime, sampling):
    before = torch.get_rng_state()
    runtime.generate("a", sampling=sampling, max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_sampling_without_seed_differs(runtime):
    found = {runtime.generate("a", sampling=Sampling(temperature=2.0), max_new_tokens=12)[0] for _ in range(4)}
    assert len(found) > 1


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}]
)
def test_wrong_sampling_is_refused(wrong: dict):
    with pytest.raises(Unsupported):
        Sampling(**wrong)


def test_a_stream_is_the_generated_text(runtime):
    sampling = Sampling(temperature=1.0, seed=4)
    for prompt in PROMPTS:
        for given_sampling in (None, sampling):
            pieces = list(runtime.stream(prompt, raw=True, max_new_tokens=14, sampling=given_sampling))
            assert "".join(pieces) == runtime.generate(prompt, max_new_tokens=14, sampling=given_sampling)[0]
    question = "".join(runtime.stream("what?", max_new_tokens=16))
    assert question == runtime.answer("what?", max_new_tokens=16)[0]
    talk = [{"role": "user", "content": "what?"}]
    assert "".join(runtime.stream(talk, max_new_tokens=16)) == runtime.chat(talk, max_new_tokens=16) == question


def test_chat_goes_through_the_bases_template(runtime):
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "he"},
    ]
    text = "<s>user: hi</s><s>assistant: ho</s><s>user: he</s><s>assistant: "
    assert runtime.chat(talk, max_new_tokens=12) == runtime.generate(text, max_new_tokens=12)[0]


def test_a_stream_that_is_left_early_leaves_the_base_bare(runtime):
    base = runtime.base
    expected = peers.logits(peers.plain(base.source.folder, "CAUSAL_LM"))
    for end in ("close", "drop"):
        ref = runtime.attach(build.lora(base, 1))
        pieces = runtime.stream("the quick", ref, raw=True, max_new_tokens=50)
        next(pieces)
        if end == "close":
            pieces.close()
        del pieces
        assert runtime._engine.hooks.plan == {}
        with torch.no_grad():
            found = [base.model(input_ids=torch.tensor([row])).logits[0] for row in peers.ROWS]
        peers.assert_logits_equal(found, expected)
        runtime.unload(ref)
        thread = threading.Thread(target=runtime.generate, args=("a",), kwargs={"max_new_tokens": 1})
        thread.start()
        thread.join(60)
        assert not thread.is_alive(), "the lock is still held"


def test_a_call_during_a_stream_does_not_change_it(runtime):
    base = runtime.base
    first, second = runtime.attach(build.lora(base, 1)), runtime.attach(build.lora(base, 2))
    expected = runtime.generate("the quick", first, max_new_tokens=16)[0]
    found = ""
    for piece in runtime.stream("the quick", first, raw=True, max_new_tokens=16):
        found += piece
        runtime.generate("other", second, max_new_tokens=1)
        runtime.use(second)
    assert found == expected


def test_threads_get_their_own_answers(runtime):
    base = runtime.base
    refs = [None, *(runtime.attach(build.lora(base, s)) for s in (1, 2)), runtime.attach(build.prefix(base, 3))]
    jobs = [(prompt, ref) for prompt in PROMPTS for ref in refs]
    expected = [runtime.generate(p, r, max_new_tokens=8)[0] for p, r in jobs]
    assert len(set(expected)) > 8
    found: dict[int, str] = {}

    def work(start: int) -> None:
        for i in range(start, len(jobs), 4):
            found[i] = runtime.generate(jobs[i][0], jobs[i][1], max_new_tokens=8)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(jobs))] == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_empty_prompts_are_refused(tiny_base, family: str):
    base = tiny_base(family)
    runtime = Runtime(base, Store())
    for call in (
        lambda: runtime.generate_ids([[5], []], None, 4),
        lambda: runtime.logits([[5], []], None, [[5], [5]]),
        *([] if family == "t5" else [lambda: runtime.generate(["a", ""], None)]),
    ):
        with pytest.raises(Unsupported, match="no tokens"):
            call()
    assert runtime.generate([], None) == []


def test_an_empty_question_to_a_base_without_template_is_refused(tiny_base, monkeypatch: pytest.MonkeyPatch):
    base = tiny_base("gpt2")
    monkeypatch.setattr(base.tokenizer, "chat_template", None)
    runtime = Runtime(base, Store())
    with pytest.raises(Unsupported, match="no tokens"):
        runtime.answer("")
    with pytest.raises(Unsupported, match="no tokens"):
        list(runtime.stream(""))
    with pytest.raises(Unsupported, match="chat template"):
        runtime.chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_prompts_beyond_the_positions_are_refused(tiny_base, family: str):
    runtime = Runtime(tiny_base(family), Store())
    long = "x" * 509
    for call in (
        lambda: runtime.generate(["a", long], None, max_new_tokens=4),
        lambda: runtime.answer("x" * 520, None, max_new_tokens=4),
        lambda: runtime.chat([{"role": "user", "content": "x" * 520}], None, max_new_tokens=4),
        lambda: list(runtime.stream(long, None, raw=True, max_new_tokens=4)),
        lambda: runtime.logits([[5] * 513], None),
    ):
        with pytest.raises(CapacityError, match="512"):
            call()
    assert len(runtime.generate("x" * 508, None, max_new_tokens=4)) == 1


def test_one_adapter_a_row_or_one_for_all(runtime):
    with pytest.raises(Unsupported, match="2 adapters for 1 rows"):
        runtime.generate(["a"], [None, None])
    with pytest.raises(Unsupported, match="not an adapter"):
        runtime.generate(["a"], [3])


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
@given(text=texts, stop=st.lists(st.text(max_size=3), max_size=2))
@example(text="\x80", stop=["\ufffd"])
def test_text_arrives_whole_characters_at_a_time(text: str, stop: list[str]):
    """The tiny tokenizer has one token a byte, so that every other character is split."""
    stream = TextStream(_tokenizer(), stop)
    pieces = []
    for token in _tokenizer()(text)["input_ids"]:
        if not stream.done:
            pieces.append(stream.push(token))
            assert "\ufffd" not in pieces[-1] or "\ufffd" in text
    pieces.append(stream.finish())
    cut = min((text.find(s) for s in stop if s and s in text), default=len(text))
    assert "".join(pieces) == text[:cut]


def _tokenizer(made: list = []):  # noqa: B006
    if not made:
        made.append(tiny.tokenizer())
    return made[0]


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": 1e-40}, {"seed": 2**64}, {"top_p": 0.0}])
def test_settings_that_cannot_be_sampled_with_are_refused(wrong):
    with pytest.raises(Unsupported):
        Sampling(**wrong)
