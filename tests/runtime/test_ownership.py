"""Who may drive a base: a closed runtime, two runtimes in two threads, a runtime while an adapter is trained."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.bases.load import load_base
from adapterhub_lite.errors import Unsupported
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from tests import tiny
from tests.runtime import build

ROWS = [[5, 6, 7, 8], [9, 10]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(str(tiny.save("llama", tmp_path_factory.mktemp("llama"))), device="cpu")


def test_a_closed_runtime_refuses_instead_of_answering_as_the_bare_base(base):
    runtime = Runtime(base, Store())
    ref = runtime.attach(build.lora(base, 1))
    runtime.logits(ROWS, ref)
    runtime.close()
    for adapter in (ref, None):
        with pytest.raises(Unsupported, match="closed"):
            runtime.logits(ROWS, adapter)


def test_two_runtimes_on_one_base_take_turns(base):
    one, two = Runtime(base, Store()), Runtime(base, Store())
    ref = one.attach(build.lora(base, 1))
    prompts = [[5 + i, 6, 7] for i in range(4)]
    adapted, bare = one.generate_ids(prompts, ref, 6), two.generate_ids(prompts, None, 6)
    assert adapted != bare
    wrong: list[str] = []

    def repeat(runtime, adapter, expected):
        for _ in range(15):
            if runtime.generate_ids(prompts, adapter, 6) != expected:
                wrong.append(str(adapter))

    threads = [threading.Thread(target=repeat, args=a) for a in ((one, ref, adapted), (two, None, bare))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    one.close()
    two.close()


def test_a_base_in_training_answers_nobody(base):
    runtime = Runtime(base, Store())
    before = runtime.logits(ROWS, None)
    with base.training():
        with pytest.raises(Unsupported, match="being trained"):
            runtime.logits(ROWS, None)
        with pytest.raises(Unsupported, match="being trained"), base.training():
            raise AssertionError("never reached")
    assert all(torch.equal(a, b) for a, b in zip(before, runtime.logits(ROWS, None), strict=True))
    runtime.close()


def test_logits_of_each_row_are_of_its_own_kind(tmp_path):
    base = load_base(str(tiny.save("llama", tmp_path)), device="cpu")
    base.tokenizer.pad_token_id = 3  # what rows are padded with differs from the configuration's
    runtime = Runtime(base, Store())
    plain = build.lora(base, 2)
    score = torch.randn((3, base.config.hidden_size), generator=torch.Generator().manual_seed(2))
    spec = replace(plain.spec, task_type="SEQ_CLS", modules_to_save=("score",))
    head = runtime.attach(Adapter(spec, {**plain.tensors, "base_model.model.score.weight": score}, name="head"))
    alone = runtime.logits([ROWS[1]], head)[0]
    mixed = runtime.logits([ROWS[1], ROWS[0]], [head, None])
    assert alone.shape == mixed[0].shape == (3,)
    torch.testing.assert_close(mixed[0], alone)
    assert mixed[1].shape == (4, base.config.vocab_size)
    padded = runtime.logits([ROWS[1], ROWS[0]], head)[0]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-6)
    runtime.close()


@pytest.mark.parametrize("adapters", [{"a", "b"}, {"a": 1, "b": 2}])
def test_adapters_need_an_order(base, adapters):
    with pytest.raises(Unsupported, match="order"):
        Runtime(base, Store()).logits(ROWS, adapters)


def test_a_text_that_holds_the_padding_token_is_numbered_alike_beside_a_prefix(tmp_path):
    base = load_base(str(tiny.save("roberta", tmp_path)), device="cpu")
    runtime = Runtime(base, Store())
    lora, prefix = runtime.attach(build.lora(base, 1)), runtime.attach(build.prefix(base, 2))
    row = [1, 40, base.pad_id, 41, base.pad_id, 42, 2]
    alone = runtime.logits([row], lora)[0]
    beside = runtime.logits([row, [1, 50, 2]], [lora, prefix])[0]
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-6)
    runtime.close()
