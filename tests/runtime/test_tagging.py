"""Taggers: PEFT's logits, words with their tags, and rows of taggers and classifiers in one forward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForTokenClassification, ModernBertConfig, ModernBertForSequenceClassification

from adapterhub_lite.adapters.adapter import Adapter
from adapterhub_lite.bases.load import Base
from adapterhub_lite.bases.views import make_view
from adapterhub_lite.errors import AdapterMismatch, Unsupported
from adapterhub_lite.formats.specs import LoraSpec
from adapterhub_lite.runtime import labelling
from adapterhub_lite.runtime.certificate import PROBES, measure
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.tasks.words import pieces
from adapterhub_lite.workflows.receive import receive
from tests import peers, tiny
from tests.runtime import build

LABELS = ["B-LOC", "B-PER", "I-PER", "O"]
TEXTS = ["good film", "Anna lives in Rome.", "bad", "a long and winding (text)", "so so", "x"]
TARGETS = {"bert": ["query", "dense"], "roberta": ["query", "value", "dense"], "llama": ["q_proj", "down_proj"]}


def plain(folder: Path, labels: int = 5):
    """The checkpoint in plain transformers, with a random head that labels tokens."""
    torch.manual_seed(7)
    made = AutoModelForTokenClassification.from_pretrained(folder, num_labels=labels, ignore_mismatched_sizes=True)
    return made.eval()


def wrapped(base: Base, family: str, kind: str, folder: Path):
    """A random tagger of PEFT, saved in `folder`."""
    if kind == "ia3":
        settings = peft.IA3Config(
            task_type="TOKEN_CLS", target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]
        )
    else:
        given = {} if kind in ("prefix", "projection") else {"target_modules": TARGETS[family]}
        settings = peers.config(family, kind, "TOKEN_CLS", **given)
    made = peers.wrap(plain(base.source.folder), settings)
    for name, parameter in made.named_parameters():
        if "ia3" in name:
            parameter.data.uniform_(0.5, 1.5)
    made.save_pretrained(folder)
    return made


def tagger(base: Base, seed: int, labels: int = 4, kind: str = "lora", **changes) -> Adapter:
    """A random tagger: an adapter for classifiers with the head, and without the pooler, of a tagger."""
    made = getattr(build, kind)(base, seed, **changes)
    view = base.view("TOKEN_CLS")
    assert view.head is not None
    stem = build.PREFIX if any(k.startswith(build.PREFIX) for k in made.tensors) else "base_model."
    kept = {k: t for k, t in made.tensors.items() if ".pooler." not in k and not k.startswith(f"{stem}classifier")}
    head = view.head.fresh(labels, torch.Generator().manual_seed(seed), 0.5)
    spec = replace(made.spec, task_type="TOKEN_CLS", modules_to_save=(view.head_name,))
    if isinstance(spec, LoraSpec):
        names = tuple(sorted(k.removeprefix(stem).partition(".lora_")[0] for k in kept if ".lora_A" in k))
        spec = replace(spec, target_modules=names)
    return Adapter(spec, {**kept, **{f"{stem}{view.head_name}.{k}": t for k, t in head.items()}}, name=made.name)


def task(labels: list[str] = LABELS, **changes) -> dict:
    return {"type": "tag", "tokens": "w", "tags": "t", "labels": labels, "max_length": 64, **changes}


def classify(labels: list[str]) -> dict:
    return {"type": "classify", "text": "text", "label": "label", "labels": labels, "max_length": 64}


def close(ours, theirs) -> bool:
    """The same words and tags, with scores that rounding allows."""
    same = [(w.word, w.tag, w.start, w.end) for w in ours] == [(w.word, w.tag, w.start, w.end) for w in theirs]
    return same and [w.score for w in ours] == pytest.approx([w.score for w in theirs], rel=1e-4)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, kind) for family in tiny.ENCODERS for kind in ("lora", "dora", "prefix", "projection")),
        ("bert", "ia3"),
        ("llama", "lora"),
    ],
)
def test_pefts_taggers_give_what_they_give_there(tiny_base, tmp_path: Path, family: str, kind: str):
    base, store = tiny_base(family), Store()
    before = base.live_digest()
    model = wrapped(base, family, kind, tmp_path)
    ref = store.import_(tmp_path, "mine")
    runtime = Runtime(base, store)
    found = runtime.logits(peers.ROWS, ref)
    peers.assert_logits_equal(found, peers.logits(model))
    assert [tuple(one.shape) for one in found] == [(len(row), 5) for row in peers.ROWS]
    assert {w.tag for w in runtime.tag("a few words", ref)[0]} <= {f"LABEL_{i}" for i in range(5)}
    assert base.live_digest() == before


def test_a_file_keeps_its_form_and_peft_reads_what_is_written(tiny_base, tmp_path: Path):
    base, store = tiny_base("bert"), Store()
    model = wrapped(base, "bert", "lora", tmp_path / "in")
    folder = store.export(store.import_(tmp_path / "in", "mine"), tmp_path / "out")
    again = peft.PeftModel.from_pretrained(plain(base.source.folder), folder).eval()
    peers.assert_logits_equal(peers.logits(again), peers.logits(model))
    ours = build.stored(store, base, "ours", tagger(base, 3))
    again = peft.PeftModel.from_pretrained(plain(base.source.folder, 4), store.export(ours, tmp_path / "ours")).eval()
    peers.assert_logits_equal(Runtime(base, store).logits(peers.ROWS, ours), peers.logits(again))


def test_the_view_has_the_names_of_transformers_class(tiny_base, tiny_folder):
    for family in tiny.ENCODERS:
        view = tiny_base(family).view("TOKEN_CLS")
        theirs = plain(tiny_folder(family))
        ours = {n for n, m in view.modules.items() if isinstance(m, torch.nn.Linear)}
        names = {n for n, m in theirs.named_modules() if isinstance(m, torch.nn.Linear)}
        assert ours == names - {"classifier"}
        assert view.head_name == "classifier"
        own = {id(p) for p in tiny_base(family).model.parameters()}
        assert {id(p) for p in view.model.parameters()} <= own
        assert not any(p.is_meta for p in [*view.model.parameters(), *view.model.buffers()])


def test_an_import_is_compared_with_its_base(tiny_base, tiny_folder, tmp_path: Path):
    wrapped(tiny_base("bert"), "bert", "lora", tmp_path)
    assert receive(tmp_path, "mine", store=Store(), base=str(tiny_folder("bert"))).version == 1
    with pytest.raises(AdapterMismatch, match="does not fit the base"):
        receive(tmp_path, "mine", store=Store(), base=str(tiny_folder("bert", hidden_size=64)))


def test_an_adapter_of_the_pooler_does_not_fit(tiny_base):
    base = tiny_base("bert")
    made = tagger(base, 1)
    name = f"{build.PREFIX}bert.pooler.dense.lora_"
    more = {f"{name}A.weight": torch.ones(4, 32), f"{name}B.weight": torch.ones(32, 4)}
    with pytest.raises(AdapterMismatch, match="pooler"):
        Runtime(base, Store()).attach(replace(made, tensors={**made.tensors, **more}))


def test_bases_without_such_a_class(tiny_base, monkeypatch):
    with pytest.raises(Unsupported, match="labels tokens"):
        tiny_base("t5").view("TOKEN_CLS")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    modern = ModernBertForSequenceClassification(ModernBertConfig(vocab_size=64, **sizes, **ids))
    with pytest.raises(Unsupported, match="more than a linear layer"):
        make_view(modern, "encoder", "TOKEN_CLS")

    def unknown(config: object) -> None:
        raise ValueError("Unrecognized configuration class")

    monkeypatch.setattr(AutoModelForTokenClassification, "from_config", unknown)
    with pytest.raises(Unsupported, match="no token-classification class"):
        make_view(tiny_base("bert").model, "encoder", "TOKEN_CLS")


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_taggers_and_classifiers_share_one_forward(tiny_base, monkeypatch, family: str):
    base, store = tiny_base(family), Store()
    five = [*LABELS, "I-LOC"]
    refs = [
        build.stored(store, base, "tags", tagger(base, 1), task()),
        build.stored(store, base, "mood", build.lora(base, 2, labels=2), classify(["no", "yes"])),
        build.stored(store, base, "more", tagger(base, 3, 5, "prefix"), task(five)),
        build.stored(store, base, "kind", build.prefix(base, 4, labels=3), classify(["x", "y", "z"])),
        build.stored(store, base, "scales", tagger(base, 5, 5, "ia3"), task(five)),
        build.stored(store, base, "front", tagger(base, 6, 4, "prompt"), task()),
    ]
    runtime = Runtime(base, store)
    for ref in refs:
        runtime.load(ref)
    solo = [runtime.label(text, ref)[0] for text, ref in zip(TEXTS, refs, strict=True)]
    calls = []

    def counted(*arguments):
        calls.append(len(arguments[-1]))
        return real(*arguments)

    real = labelling.class_logits
    monkeypatch.setattr(labelling, "class_logits", counted)
    mixed = runtime.label(TEXTS, refs)
    assert calls == [len(TEXTS)]
    for i, (ours, alone) in enumerate(zip(mixed, solo, strict=True)):
        if i in (1, 3):
            assert ours.scores == pytest.approx(alone.scores, rel=1e-4, abs=1e-6)
            assert ours.label == alone.label
        else:
            assert close(ours, alone)
            assert [w.word for w in ours] == [w.word for w in alone]
    turned = runtime.label(TEXTS[::-1], refs[::-1])[::-1]
    assert all(close(turned[i], mixed[i]) for i in (0, 2, 4, 5))
    raw = runtime.logits([base.tokenizer(t)["input_ids"] for t in TEXTS], refs)
    assert [tuple(t.shape)[1:] for t in raw] == [(4,), (), (5,), (), (5,), (4,)]


def test_words_come_back_with_their_place_in_the_text(tiny_base):
    base = tiny_base("bert")
    runtime = Runtime(base, Store())
    ref = runtime.attach(tagger(base, 1))
    text = 'He said: "Rome  (or Oslo)".'
    (found,) = runtime.tag(text, ref)
    assert [text[w.start : w.end] for w in found] == [w.word for w in found]
    assert [w.word for w in found] == ["He", "said", ":", '"', "Rome", "(", "or", "Oslo", ")", '"', "."]
    (given,) = runtime.tag([[w.word for w in found]], ref)
    assert [(w.word, w.tag) for w in given] == [(w.word, w.tag) for w in found]
    joined = " ".join(w.word for w in found)
    assert [joined[w.start : w.end] for w in given] == [w.word for w in given]


def test_the_tag_is_that_of_a_words_first_token(tiny_base):
    base = tiny_base("bert")
    runtime = Runtime(base, Store())
    ref = runtime.attach(tagger(base, 1))
    words = ["Anna", "in", "Rome"]
    (found,) = runtime.tag([words], ref)
    ids, first = [1], []
    for word in words:  # one token a byte, the space before a word among them
        first.append(len(ids))
        ids += base.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    logits = runtime.logits([[*ids, 2]], ref)[0]
    scores, best = logits[first].softmax(-1).max(-1)
    assert [w.tag for w in found] == [f"LABEL_{i}" for i in best.tolist()]
    assert [w.score for w in found] == pytest.approx(scores.tolist(), rel=1e-4)


def test_long_texts_are_read_in_pieces(tiny_base):
    base, store = tiny_base("bert"), Store()
    ref = build.stored(store, base, "tags", tagger(base, 1), task(max_length=16))
    runtime = Runtime(base, store)
    words = [f"w{i}" for i in range(40)] + ["x" * 60]
    (found,) = runtime.tag([words], ref)
    assert [w.word for w in found] == words
    assert all(w.score > 0 for w in found)
    parts = pieces(words, base.tokenizer, 16)
    assert len(parts) > 10
    for part in parts:
        own = [i for i, _ in part.first]
        (alone,) = runtime.tag([[words[i] for i in own]], ref)
        assert [found[i].tag for i in own] == [w.tag for w in alone]
        assert [found[i].score for i in own] == pytest.approx([w.score for w in alone], rel=1e-4)
    unlimited = build.stored(store, base, "free", tagger(base, 1), {})
    assert len(runtime.tag(" ".join(["word"] * 300), unlimited)[0]) == 300


def test_words_without_tokens_and_texts_without_words(tiny_base):
    base = tiny_base("bert")
    runtime = Runtime(base, Store())
    ref = runtime.attach(tagger(base, 1))
    empty, blank, some = runtime.tag(["", [" ", ""], ["a", " ", "b"]], ref)
    assert empty == []
    assert [(w.tag, w.score) for w in blank] == [("O", 0.0), ("O", 0.0)]
    assert (some[1].tag, some[1].score) == ("O", 0.0)
    assert close([some[0], replace(some[2], start=2, end=3)], runtime.tag([["a", "b"]], ref)[0])


def test_who_labels_what_is_checked(tiny_base):
    base = tiny_base("bert")
    runtime = Runtime(base, Store())
    tags, texts = runtime.attach(tagger(base, 1)), runtime.attach(build.lora(base, 2))
    with pytest.raises(Unsupported, match=r"labels words, not texts.*tag\(\)"):
        runtime.predict(["a", "b"], [texts, tags])
    with pytest.raises(Unsupported, match=r"labels texts, not words.*predict\(\)"):
        runtime.tag(["a", "b"], [tags, texts])
    with pytest.raises(Unsupported, match="bare base"):
        runtime.tag("a", None)
    with pytest.raises(Unsupported, match="no input"):
        runtime.tag([1], tags)
    with pytest.raises(Unsupported, match="no input"):
        runtime.tag([["a", 2]], tags)
    assert runtime.tag([], tags) == []


def test_more_adapters_than_slots(tiny_base):
    base, store = tiny_base("bert"), Store()
    refs = [build.stored(store, base, f"t{i}", tagger(base, i), task()) for i in range(3)]
    wide, narrow = Runtime(base, store), Runtime(base, store, slots=1)
    chosen = [refs[i % 3] for i in range(6)]
    for ours, alone in zip(narrow.tag(TEXTS, chosen), wide.tag(TEXTS, chosen), strict=True):
        assert close(ours, alone)


def _probe(base: Base, text: str) -> list[int]:
    return list(base.tokenizer(text, truncation=True, max_length=64)["input_ids"])


def test_its_certificate_is_measured_and_compared(tiny_base):
    base, store = tiny_base("bert"), Store()
    made = tagger(base, 1)
    runtime = Runtime(base, store)
    effect = measure(runtime, runtime.attach(made))
    assert {"loss", "layer_change", "max_logit_change", "mean_logit_change"} <= set(effect)
    ref = runtime.attach(made)
    logits = torch.cat(runtime.logits([_probe(base, text) for text in PROBES], ref))
    assert effect["loss"] == pytest.approx(-float(logits.log_softmax(-1).amax(-1).mean()), rel=1e-4)
    assert effect["max_logit_change"] == pytest.approx(float((logits - logits.mean(0)).abs().max()), rel=1e-4)
    other = {k: t * 2 if k.endswith("classifier.weight") else t for k, t in made.tensors.items()}
    changed = measure(runtime, runtime.attach(replace(made, tensors=other)))
    assert changed["loss"] != pytest.approx(effect["loss"], rel=1e-3)


def test_a_mix_keeps_the_head_of_its_tagger(tiny_base):
    base, store = tiny_base("bert"), Store()
    build.stored(store, base, "tags", tagger(base, 1), task())
    plain_lora = build.lora(base, 2)
    headless = {k: t for k, t in plain_lora.tensors.items() if not k.startswith(f"{build.PREFIX}classifier")}
    spec = replace(plain_lora.spec, modules_to_save=(), task_type=None)
    build.stored(store, base, "style", replace(plain_lora, spec=spec, tensors=headless))
    runtime = Runtime(base, store)
    (mixed,) = runtime.tag("Anna lives in Rome.", {"tags": 1.0, "style": 0.5})
    assert {w.tag for w in mixed} <= set(LABELS)
    assert not close(mixed, runtime.tag("Anna lives in Rome.", "tags")[0])
