"""A row's answer is its solo answer, whatever its neighbours in the batch are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub_lite.errors import AdapterMismatch, CapacityError
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.runtime.sampling import Sampling
from adapterhub_lite.store import Store
from tests import peers, tiny
from tests.runtime import build

ZOO = ("none", "lora1", "lora4", "lora16", "dora", "prefix3", "prefix7")


@pytest.fixture(scope="module")
def zoo(tiny_base, tmp_path_factory):
    """family -> (runtime, {kind: reference or None}); every adapter resident."""
    made = {}

    def runtime(family: str):
        if family not in made:
            base = tiny_base(family)
            one = Runtime(base, Store(tmp_path_factory.mktemp("store")), slots=8)
            adapters = {
                "lora1": build.lora(base, 1, 1, labels=2),
                "lora4": build.lora(base, 2, 4, labels=3),
                "lora16": build.lora(base, 3, 16, labels=5),
                "dora": build.lora(base, 4, 3, dora=True),
                "prefix3": build.prefix(base, 5, 3, labels=4),
                "prefix7": build.prefix(base, 6, 7),
            }
            made[family] = one, {"none": None, **{k: one.attach(a) for k, a in adapters.items()}}
        return made[family]

    yield runtime
    for one, _ in made.values():
        one.close()


rows = st.lists(st.lists(st.integers(3, tiny.VOCABULARY - 1), min_size=1, max_size=12), min_size=1, max_size=6)


def draw(data, kinds=ZOO):
    texts = data.draw(rows)
    return texts, [data.draw(st.sampled_from(kinds)) for _ in texts]


@pytest.mark.parametrize("family", tiny.CAUSAL)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
@given(data=st.data())
def test_logits_and_greedy_tokens_of_causal_bases(zoo, family: str, data):
    runtime, refs = zoo(family)
    texts, kinds = draw(data)
    chosen = [refs[k] for k in kinds]
    mixed = runtime.logits(texts, chosen)
    written = runtime.generate_ids(texts, chosen, 6)
    for i, (text, ref) in enumerate(zip(texts, chosen, strict=True)):
        peers.assert_logits_equal([mixed[i]], runtime.logits([text], ref))
        assert written[i] == runtime.generate_ids([text], ref, 6)[0], (kinds, i)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
@given(data=st.data())
def test_greedy_tokens_of_an_encoder_decoder(zoo, data):
    runtime, refs = zoo("t5")
    texts, kinds = draw(data)
    chosen = [refs[k] for k in kinds]
    written = runtime.generate_ids(texts, chosen, 6)
    for text, ref, found in zip(texts, chosen, written, strict=True):
        assert found == runtime.generate_ids([text], ref, 6)[0]


@pytest.mark.parametrize("family", tiny.ENCODERS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
@given(data=st.data())
def test_logits_of_encoders_with_different_heads(zoo, family: str, data):
    runtime, refs = zoo(family)
    texts, kinds = draw(data, ZOO[1:])
    chosen = [refs[k] for k in kinds]
    for mixed, text, ref in zip(runtime.logits(texts, chosen), texts, chosen, strict=True):
        (solo,) = runtime.logits([text], ref)
        assert torch.isneginf(mixed[len(solo) :]).all()
        peers.assert_logits_equal([mixed[: len(solo)]], [solo])


@pytest.mark.parametrize("family", [*tiny.CAUSAL, *tiny.ENCODERS])
def test_the_zoo_gives_answers_that_differ(zoo, family: str):
    """Else the tests above would prove nothing."""
    runtime, refs = zoo(family)
    kinds = [k for k in ZOO if not (k == "none" and family in tiny.ENCODERS)]
    found = [runtime.logits([[5, 6, 7, 8]], refs[k])[0].flatten()[:2] for k in kinds]
    for i, one in enumerate(found):
        assert all(float((one - other).abs().max()) > 1e-3 for other in found[:i]), kinds[i]


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, seed=5)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", [*tiny.CAUSAL, "t5"])
def test_rows_that_end_early_leave_the_batch_to_the_others(zoo, monkeypatch: pytest.MonkeyPatch, family: str, sampling):
    """Many tokens end an answer here, so that the batch is cut to its unfinished rows again and again."""
    runtime, refs = zoo(family)
    monkeypatch.setattr(runtime.base.model.generation_config, "eos_token_id", [2, *range(6, tiny.VOCABULARY, 9)])
    kinds = [ZOO[i % len(ZOO)] for i in range(14)]
    if family == "t5":
        kinds = [k for k in kinds if not k.startswith("prefix")]  # other prefix lengths are other batches there
    chosen = [refs[k] for k in kinds]
    texts = [[5 + i, 200 - 3 * i, *range(30, 30 + i % 5)] for i in range(len(kinds))]
    written = runtime.generate_ids(texts, chosen, 16, sampling=sampling)
    solo = []
    for i, (text, ref) in enumerate(zip(texts, chosen, strict=True)):
        shifted = None if sampling is None else Sampling(temperature=1.0, seed=5 + i)
        solo += runtime.generate_ids([text], ref, 16, sampling=shifted)
    assert written == solo
    assert len({len(one) for one in solo}) > (1 if sampling is None else 3), "the rows do not end at different times"


def test_a_short_row_with_a_prefix_beside_the_longest_text(zoo):
    """The padding of the short row lies beyond the last position, and must not count."""
    runtime, refs = zoo("bert")
    longest = [5 + i % 200 for i in range(512)]
    chosen = [refs["lora4"], refs["prefix7"]]
    mixed = runtime.logits([longest, [5, 6, 7]], chosen)
    for text, ref, found in zip([longest, [5, 6, 7]], chosen, mixed, strict=True):
        peers.assert_logits_equal([found[:3]], runtime.logits([text], ref))


def test_more_adapters_than_slots_in_one_call(tiny_base):
    base, store = tiny_base("llama"), Store()
    refs = [build.stored(store, base, f"a{i}", build.lora(base, 10 + i)) for i in range(5)]
    refs += [build.stored(store, base, f"p{i}", build.prefix(base, 20 + i, 2 + i)) for i in range(2)]
    small, large = Runtime(base, store, slots=2), Runtime(base, store, slots=8)
    chosen = [*refs, None, *reversed(refs)]
    texts = [[5 + i, 6, 7, *range(8, 8 + i % 4)] for i in range(len(chosen))]
    assert small.generate_ids(texts, chosen, 5) == large.generate_ids(texts, chosen, 5)
    assert len(small.resident()) == 2
    solo = [large.generate_ids([t], r, 5)[0] for t, r in zip(texts, chosen, strict=True)]
    assert small.generate_ids(texts, chosen, 5) == solo
    small.close(), large.close()


def test_long_lists_are_cut_into_batches(tiny_base):
    base = tiny_base("llama")
    small, large = Runtime(base, Store(), batch_size=3), Runtime(base, Store())
    texts = [[5 + i, *range(6, 7 + i % 5)] for i in range(11)]
    assert small.generate_ids(texts, None, 4) == large.generate_ids(texts, None, 4)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_an_adapter_that_overflows_is_refused(tiny_base, family: str):
    """Every stored value is finite, but alpha / rank makes infinity of it, and 0 * inf would reach every row."""
    base = tiny_base(family)
    runtime = Runtime(base, Store())
    bad = build.lora(base, 1)
    name = next(k for k in bad.tensors if k.endswith("lora_B.weight"))
    bad.tensors[name].fill_(3e38)
    good = runtime.attach(build.lora(base, 2))
    expected = runtime.logits([[5, 6, 7]], good)
    with pytest.raises(AdapterMismatch, match="infinity"):
        runtime.attach(bad)
    assert len(runtime.resident()) == 1
    assert torch.equal(runtime.logits([[5, 6, 7]], good)[0], expected[0])


def test_a_row_that_becomes_nan_leaves_its_neighbours(tiny_base):
    base = tiny_base("llama")
    runtime = Runtime(base, Store())
    wild = build.lora(base, 1)
    for name, tensor in wild.tensors.items():
        tensor.fill_(1e30 if name.endswith("lora_B.weight") else 1e12)
    bad, good = runtime.attach(wild), runtime.attach(build.lora(base, 2))
    texts, chosen = [[5, 6, 7], [8, 9], [10, 11, 12]], [bad, good, None]
    mixed = runtime.logits(texts, chosen)
    assert not torch.isfinite(mixed[0]).all()
    for i in (1, 2):
        peers.assert_logits_equal([mixed[i]], runtime.logits([texts[i]], chosen[i]))


def test_prefix_tokens_count_against_the_positions(tiny_base):
    base = tiny_base("gpt2")
    runtime = Runtime(base, Store())
    ref = runtime.attach(build.prefix(base, 1, 7))
    fits = [5] * (512 - 7 - 4)
    assert len(runtime.generate_ids([fits], ref, 4)) == 1
    with pytest.raises(CapacityError, match="512"):
        runtime.generate_ids([[*fits, 5]], ref, 4)
    assert len(runtime.generate_ids([[5] * 508], None, 4)) == 1
