"""The catalogue's own bases: what holds for tiny models holds for them."""

from __future__ import annotations

import pytest
import torch

from adapterhub_lite.bases.fetch import cached
from adapterhub_lite.bases.load import Base, load_base
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.tasks.task import IGNORED, Example
from tests import peers
from tests.bases.test_quantized import dense_reference
from tests.runtime import build
from tests.training.build import Twin, assert_gradients_equal, peft_gradients

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(
        cached("smollm2-135m-instruct") is None or cached("minilm-l6") is None, reason="the bases are not in the cache"
    ),
]
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def smol() -> Base:
    return load_base("smollm2-135m-instruct", "nf4", device="cpu", working_copies=True)


def test_the_nf4_base_is_its_dequantised_reference_also_after_use(smol: Base):
    before = smol.live_digest()
    runtime = Runtime(smol, Store())
    texts = ["The capital of France is", "2, 4, 6, 8,"]
    refs = [runtime.attach(build.lora(smol, 1, 8)), None, runtime.attach(build.prefix(smol, 2, 5))]
    prompts = [f"{texts[i % 2]} {i}" for i in range(3)]
    chosen = [refs[i] for i in range(3)]
    mixed = runtime.generate(prompts, chosen, max_new_tokens=4)
    assert mixed == [runtime.generate(p, r, max_new_tokens=4)[0] for p, r in zip(prompts, chosen, strict=True)]
    runtime.close()

    reference = dense_reference(smol)
    for prompt in texts[:1]:
        ids = smol.tokenizer(prompt, return_tensors="pt")
        made = reference.generate(**ids, do_sample=False, max_new_tokens=5)
        expected = smol.tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert Runtime(smol, Store()).generate(prompt, None, max_new_tokens=5) == [expected]

    wrapped = peers.wrap(reference, peers.config("llama", "lora", "CAUSAL_LM", target_modules=TARGETS))
    twin = Twin(smol, wrapped)
    rows = [smol.tokenizer(p)["input_ids"] for p in prompts[:2]]
    examples = [Example(r, [*[IGNORED] * 2, *r[2:]]) for r in rows]
    loss, ours = twin.gradients(examples)
    expected_loss, theirs = peft_gradients(wrapped, twin, examples)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert_gradients_equal(ours, theirs, relative=1e-3)
    assert smol.live_digest() == before


def test_pefts_adapter_of_minilm(tmp_path):
    base = load_base("minilm-l6", device="cpu")
    model = peers.plain(base.source.folder, "SEQ_CLS", labels=4)
    wrapped = peers.wrap(model, peers.config("bert", "lora", "SEQ_CLS"))
    wrapped.save_pretrained(tmp_path)
    store = Store()
    rows = [base.tokenizer(t)["input_ids"] for t in ("a fine film", "where is my parcel and why so late", "no")]
    found = Runtime(base, store).logits(rows, store.import_(tmp_path, "mine"))
    peers.assert_logits_equal(found, peers.logits(wrapped, rows, rows), relative=3e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-4)
