"""Labels: heads of different sizes mixed in one batch, and label words on a causal base."""

from __future__ import annotations

import pytest
import torch

from adapterhub_lite.errors import CapacityError, Unsupported
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.tasks.classify import Classify
from tests import peers, tiny
from tests.runtime import build

TEXTS = ["good film", "bad", "a long and winding text", "so so", "x"]


def classify(labels: list[str], **changes) -> dict:
    return {"type": "classify", "text": "text", "label": "label", "labels": labels, "max_length": 64, **changes}


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_two_heads_in_one_batch(tiny_base, family: str):
    base, store = tiny_base(family), Store()
    two, five = ["no", "yes"], ["a", "b", "c", "d", "e"]
    refs = [
        build.stored(store, base, "two", build.lora(base, 1, labels=2), classify(two)),
        build.stored(store, base, "five", build.prefix(base, 2, labels=5), classify(five)),
    ]
    runtime = Runtime(base, store)
    chosen = [refs[i % 2] for i in range(len(TEXTS))]
    mixed = runtime.predict(TEXTS, chosen)
    for text, ref, found in zip(TEXTS, chosen, mixed, strict=True):
        (solo,) = runtime.predict(text, ref)
        assert found.label == solo.label
        assert list(found.scores) == (two if ref.name == "two" else five)
        assert found.scores == pytest.approx(solo.scores, rel=1e-4, abs=1e-6)
        assert sum(found.scores.values()) == pytest.approx(1)
        assert found.score == max(found.scores.values()) == found.scores[found.label]
        raw = runtime.logits([base.tokenizer(text)["input_ids"]], ref)[0]
        assert list(solo.scores.values()) == pytest.approx(raw.softmax(-1).tolist(), rel=1e-4, abs=1e-6)
    assert len({p.label for p in mixed}) > 1


def test_an_imported_head_has_numbered_labels(tiny_base, tmp_path):
    base, store = tiny_base("bert"), Store()
    model = peers.plain(base.source.folder, "SEQ_CLS", labels=4)
    peers.wrap(model, peers.config("bert", "lora", "SEQ_CLS")).save_pretrained(tmp_path)
    (found,) = Runtime(base, store).predict("text", store.import_(tmp_path, "mine"))
    assert list(found.scores) == [f"LABEL_{i}" for i in range(4)]


def test_texts_are_cut_to_what_the_base_and_the_prefix_leave(tiny_base):
    base, store = tiny_base("bert"), Store()
    config = classify(["a", "b", "c"], max_length=512)
    ref = build.stored(store, base, "p", build.prefix(base, 1, 7), config)
    other = build.stored(store, base, "l", build.lora(base, 2), config)
    runtime = Runtime(base, store)
    long = "ab" * 600
    mixed = runtime.predict([long, "b", long], [ref, ref, other])
    assert mixed[0].scores == pytest.approx(runtime.predict(long, ref)[0].scores, rel=1e-4)


def test_without_a_head_there_are_no_labels(tiny_base):
    for family in ("bert", "llama"):
        base = tiny_base(family)
        with pytest.raises(Unsupported):
            Runtime(base, Store()).predict("text", None)
    runtime = Runtime(base, Store())
    with pytest.raises(Unsupported, match="not trained to classify"):
        runtime.predict("text", runtime.attach(build.lora(base, 1)))


def likelihood(runtime: Runtime, ref, prompt: list[int], word: list[int]) -> float:
    """Sum of the log-probabilities of the word's tokens, one forward a token, no padding."""
    total = 0.0
    for i, token in enumerate(word):
        logits = runtime.logits([[*prompt, *word[:i]]], ref)[0][-1]
        total += float(logits.log_softmax(-1)[token])
    return total


@pytest.mark.parametrize(
    "labels",
    [["n", "p"], ["negative", "positive"], ["same one", "same two", "same"], ["aa", "ab", "b"], ["x", "xy", "xyz"]],
)
def test_label_words(tiny_base, labels: list[str]):
    base = tiny_base("llama")
    runtime = Runtime(base, Store())
    ref = runtime.attach(build.lora(base, 1), Classify(classify(labels)))
    task = Classify(classify(labels))
    found = runtime.predict(TEXTS, ref)
    words = [base.tokenizer(label)["input_ids"] + [2] for label in labels]
    distinct = len({w[0] for w in words}) == len(words)
    for text, prediction in list(zip(TEXTS, found, strict=True))[:2]:
        prompt = task.encode(text, base.tokenizer, "causal", 0)
        if distinct:
            logits = runtime.logits([prompt], ref)[0][-1]
            expected = logits[[w[0] for w in words]].softmax(-1)
        else:
            expected = torch.tensor([likelihood(runtime, ref, prompt, w) for w in words]).softmax(-1)
        assert list(prediction.scores.values()) == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-6)


def test_label_words_of_different_tasks_in_one_batch(tiny_base):
    base = tiny_base("llama")
    runtime = Runtime(base, Store())
    first = runtime.attach(build.lora(base, 1), Classify(classify(["aa", "ab", "b"])))
    second = runtime.attach(build.prefix(base, 2), Classify(classify(["yes", "no"], template="{text}?")))
    chosen = [first, second, second, first, second]
    for text, ref, found in zip(TEXTS, chosen, runtime.predict(TEXTS, chosen), strict=True):
        assert found.scores == pytest.approx(runtime.predict(text, ref)[0].scores, rel=1e-4, abs=1e-6)


def test_the_bare_base_scores_words_too(tiny_base):
    base = tiny_base("llama")
    runtime = Runtime(base, Store())
    task = Classify(classify(["n", "p"]))
    (found,) = runtime.score_words(["text"], task)
    logits = runtime.logits([task.encode("text", base.tokenizer, "causal", 0)], None)[0][-1]
    ids = [base.tokenizer(w)["input_ids"][0] for w in ("n", "p")]
    assert list(found.scores.values()) == pytest.approx(logits[ids].softmax(-1).tolist(), rel=1e-4)
    with pytest.raises(CapacityError):
        runtime.score_words(["x" * 600], task)
