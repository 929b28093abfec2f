"""IA3, prompt tuning and P-tuning: PEFT's own numbers, alone and beside rows of every other kind."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from adapterhub_lite.adapters.adapter import Adapter, read_adapter
from adapterhub_lite.adapters.compare import compare
from adapterhub_lite.bases.load import load_base
from adapterhub_lite.errors import AdapterMismatch, CapacityError, NoEffect, Unsupported
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from tests import peers, tiny
from tests.runtime import build

# Inputs of down_proj alone; inputs of one of two layers that share it; outputs alone, by a regular expression.
IA3: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "uneven": {
        "llama": {"target_modules": ["q_proj", "up_proj", "o_proj"], "feedforward_modules": ["up_proj", "o_proj"]},
        "gpt2": {"target_modules": ["c_attn", "c_fc", "c_proj"], "feedforward_modules": ["c_attn", "c_proj"]},
        "bert": {"target_modules": ["query", "value", "dense"], "feedforward_modules": ["value"]},
        "roberta": {"target_modules": ["query", "value", "output.dense"], "feedforward_modules": ["value"]},
        "t5": {"target_modules": ["q", "k", "wi", "wo"], "feedforward_modules": ["k", "wi"]},
    },
    "outputs": {
        "llama": {"target_modules": ".*(v_proj|gate_proj)", "feedforward_modules": []},
        "gpt2": {"target_modules": r".*\.(c_attn|c_proj)", "feedforward_modules": []},
        "bert": {"target_modules": ".*(key|value)", "feedforward_modules": []},
        "roberta": {"target_modules": ".*(key|value)", "feedforward_modules": []},
        "t5": {"target_modules": r".*\.(v|wo)", "feedforward_modules": []},
    },
}
KINDS = ("ia3 default", "ia3 uneven", "ia3 outputs", "prompt", "p_tuning mlp", "p_tuning lstm")
NEW = 6


def config(family: str, kind: str, task: str, tokens: int = 4) -> Any:
    """PEFT's configuration."""
    name, _, form = kind.partition(" ")
    if name == "ia3":
        return peft.IA3Config(task_type=task, **IA3[form].get(family, {}))
    if name == "prompt":
        return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=tokens)
    network = {"encoder_reparameterization_type": form.upper(), "encoder_hidden_size": 16}
    return peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=tokens, **network)


def made_by_peft(folder: Path, base_folder: Path, settings: Any, task: str) -> Any:
    """A PEFT model of random values, saved to `folder` and read back by PEFT."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(peers.plain(base_folder, task), settings)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "ia3_l" in name:
                parameter.data.normal_(1, 0.5)
            elif parameter.requires_grad and "prompt_encoder" in name:
                parameter.data.normal_(0, 1)
        wrapped.save_pretrained(folder)
        return peft.PeftModel.from_pretrained(peers.plain(base_folder, task), folder).eval()


def peft_logits(model: Any) -> list[torch.Tensor]:
    """PEFT's logits of the texts' own tokens, row by row."""
    found = peers.logits(model)
    causal = model.peft_config["default"].task_type == "CAUSAL_LM"
    return [one[-len(row) :] for one, row in zip(found, peers.ROWS, strict=True)] if causal else found


def peft_tokens(model: Any, row: list[int], start: int | None) -> list[int]:
    """What PEFT's generate writes, up to the end token."""
    ids = torch.tensor([row])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )[0].tolist()
    written = out[1:] if start is not None else out[len(row) :] if out[: len(row)] == row else out
    return written[: written.index(2)] if 2 in written else written


def our_tokens(runtime: Runtime, rows: list[list[int]], refs: list[Any], new: int = NEW) -> list[list[int]]:
    """The tokens that a runtime writes for rows in one batch."""
    call = runtime._ask(rows, runtime._rows(refs, len(rows)), new, (), None)
    call.texts()
    return [row.tokens for row in call.rows]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_language_models_give_what_peft_gives(tiny_base, tmp_path: Path, family: str, kind: str):
    base, task = tiny_base(family), peers.task_type(family)
    model = made_by_peft(tmp_path, base.source.folder, config(family, kind, task), task)
    expected = peft_logits(model)
    bare = peers.logits(peers.plain(base.source.folder, task))
    assert not torch.allclose(expected[0], bare[0], atol=1e-3), "the reference adapter itself does nothing"
    runtime, before = Runtime(base, Store()), base.live_digest()
    try:
        ref = runtime.attach(read_adapter(tmp_path))
        answers = peers.ANSWERS if family == "t5" else None
        peers.assert_logits_equal(runtime.logits(peers.ROWS, ref, answers), expected)
        start = base.config.decoder_start_token_id if family == "t5" else None
        for row in peers.ROWS:
            assert our_tokens(runtime, [row], [ref])[0] == peft_tokens(model, row, start)
    finally:
        runtime.close()
    assert base.live_digest() == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.model.modules()), "a hook was left"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_classifiers_give_what_peft_gives(tiny_base, tmp_path: Path, family: str, kind: str):
    base = tiny_base(family)
    settings = config(family, kind, "SEQ_CLS")
    if family == "t5":
        if not kind.startswith("ia3"):
            pytest.skip("PEFT itself has no prompt for T5ForSequenceClassification")
        settings.modules_to_save = ["classification_head"]
    model = made_by_peft(tmp_path, base.source.folder, settings, "SEQ_CLS")
    runtime = Runtime(base, Store())
    ref = runtime.attach(read_adapter(tmp_path))
    peers.assert_logits_equal(runtime.logits(peers.ROWS, ref), peft_logits(model))
    runtime.close()


@pytest.mark.parametrize("form", ["default", "uneven", "outputs"])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_factor_on_an_output_is_one_on_the_bias_too(tmp_path: Path, family: str, form: str):
    """The biases of a new model are zero, where they would hide it."""
    folder, task = tmp_path / "base", peers.task_type(family)
    model = tiny.model(family)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    tiny.tokenizer(tiny.kind_of(family)).save_pretrained(folder)
    expected = peft_logits(made_by_peft(tmp_path / "peft", folder, config(family, f"ia3 {form}", task), task))
    runtime = Runtime(load_base(str(folder), device="cpu"), Store())
    peers.assert_logits_equal(runtime.logits(peers.ROWS, runtime.attach(read_adapter(tmp_path / "peft"))), expected)
    runtime.close()


ZOO = ("none", "lora", "dora", "prefix", "ia3", "ia3-uneven", "prompt3", "prompt7")


@pytest.fixture(scope="module")
def zoo(tiny_base, tmp_path_factory):
    """family -> (runtime, {kind: reference or None}); every adapter resident."""
    made: dict[str, Any] = {}
    uneven = ("up_proj", "k_proj", "c_fc", "query", "SelfAttention.k")

    def runtime(family: str):
        if family not in made:
            base = tiny_base(family)
            one = Runtime(base, Store(tmp_path_factory.mktemp("store")), slots=8)
            adapters = {
                "lora": build.lora(base, 1, 4, labels=2),
                "dora": build.lora(base, 2, 3, dora=True),
                "prefix": build.prefix(base, 3, 5),
                "ia3": build.ia3(base, 4, labels=4),
                "ia3-uneven": build.ia3(base, 5, uneven),
                "prompt3": build.prompt(base, 6, 3),
                "prompt7": build.prompt(base, 7, 7, labels=5),
            }
            made[family] = one, {"none": None, **{k: one.attach(a) for k, a in adapters.items()}}
        return made[family]

    yield runtime
    for one, _ in made.values():
        one.close()


def ragged(count: int, begin: int = 0) -> list[list[int]]:
    """Texts of different lengths."""
    return [[5 + i, 200 - 7 * i, *range(30 + i, 30 + i + (5 * i + begin) % 9)] for i in range(count)]


@pytest.mark.parametrize("order", [1, 3, 5])
@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_a_row_of_a_mixed_batch_is_its_solo_row(zoo, family: str, order: int):
    runtime, refs = zoo(family)
    kinds = [ZOO[(order * i) % len(ZOO)] for i in range(len(ZOO))] + ["ia3", "none"]
    chosen, texts = [refs[k] for k in kinds], ragged(len(kinds), order)
    mixed, written = runtime.logits(texts, chosen), our_tokens(runtime, texts, chosen)
    for i, (text, ref) in enumerate(zip(texts, chosen, strict=True)):
        peers.assert_logits_equal([mixed[i]], runtime.logits([text], ref))
        assert written[i] == our_tokens(runtime, [text], [ref])[0], kinds[i]


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_a_row_of_a_mixed_batch_is_its_solo_row_in_an_encoder(zoo, family: str, order: int):
    runtime, refs = zoo(family)
    kinds = [ZOO[1:][(order * i) % 7] for i in range(7)] + ["prompt3", "lora"]
    texts = ragged(len(kinds), order)
    mixed = runtime.logits(texts, [refs[k] for k in kinds])
    for kind, text, found in zip(kinds, texts, mixed, strict=True):
        (solo,) = runtime.logits([text], refs[kind])
        peers.assert_logits_equal([found[: len(solo)]], [solo])


@pytest.mark.parametrize("order", [1, 3])
def test_a_row_of_a_mixed_batch_is_its_solo_row_in_an_encoder_decoder(zoo, order: int):
    runtime, refs = zoo("t5")
    kinds = [k for k in ZOO if k != "prefix"] * 2  # prefixes of other lengths are other batches there
    kinds = [kinds[(order * i) % len(kinds)] for i in range(len(kinds))]
    chosen, texts = [refs[k] for k in kinds], ragged(len(kinds), order)
    answers = [[5 + i] * (1 + i % 3) for i in range(len(kinds))]
    mixed, written = runtime.logits(texts, chosen, answers), our_tokens(runtime, texts, chosen)
    for i, (text, ref) in enumerate(zip(texts, chosen, strict=True)):
        peers.assert_logits_equal([mixed[i]], runtime.logits([text], ref, [answers[i]]))
        assert written[i] == our_tokens(runtime, [text], [ref])[0], kinds[i]


def test_prompts_and_prefixes_of_one_length_share_a_call_of_an_encoder_decoder(tiny_base):
    base = tiny_base("t5")
    runtime = Runtime(base, Store())
    refs = [runtime.attach(build.prefix(base, 1, 4)), runtime.attach(build.prompt(base, 2, 4)), None]
    texts = ragged(3, 2)
    assert runtime.generate_ids(texts, refs, 4) == [
        runtime.generate_ids([t], r, 4)[0] for t, r in zip(texts, refs, strict=True)
    ]
    runtime.close()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_zoo_gives_answers_that_differ(zoo, family: str):
    """Else the tests above would prove nothing."""
    runtime, refs = zoo(family)
    kinds = [k for k in ZOO if not (k == "none" and family in tiny.ENCODERS)]
    found = [runtime.logits([[5, 6, 7, 8]], refs[k], [[9]] if family == "t5" else None)[0].flatten() for k in kinds]
    for i, one in enumerate(found):
        assert all(float((one[:2] - other[:2]).abs().max()) > 1e-3 for other in found[:i]), kinds[i]


@pytest.mark.parametrize("family", [*tiny.CAUSAL, "t5"])
def test_rows_that_end_early_leave_the_batch_to_the_others(zoo, monkeypatch: pytest.MonkeyPatch, family: str):
    runtime, refs = zoo(family)
    monkeypatch.setattr(runtime.base.model.generation_config, "eos_token_id", [2, *range(6, tiny.VOCABULARY, 9)])
    kinds = [k for k in ZOO if not (family == "t5" and k == "prefix")] * 2
    chosen, texts = [refs[k] for k in kinds], ragged(len(kinds))
    written = our_tokens(runtime, texts, chosen, 16)
    assert written == [our_tokens(runtime, [t], [r], 16)[0] for t, r in zip(texts, chosen, strict=True)]
    assert len({len(one) for one in written}) > 1, "the rows do not end at different times"


def test_prompts_and_prefixes_are_told_apart(zoo):
    """Prompts and prefixes are kept under one key; only the configuration tells which it is."""
    runtime, _ = zoo("llama")
    base = runtime.base
    prompt, prefix = build.prompt(base, 1, 3), build.prefix(base, 1, 3)
    with pytest.raises(AdapterMismatch, match="prompt has shape"):
        runtime.attach(Adapter(prompt.spec, prefix.tensors, name="crossed"))
    with pytest.raises(AdapterMismatch, match="prefix has shape"):
        runtime.attach(Adapter(prefix.spec, prompt.tensors, name="crossed"))


def _cut(adapter: Adapter) -> None:
    name = next(iter(adapter.tensors))
    adapter.tensors[name] = adapter.tensors[name][:-1].contiguous()


def _turned(adapter: Adapter) -> None:
    name = next(n for n in adapter.tensors if n.endswith("down_proj.ia3_l"))
    adapter.tensors[name] = adapter.tensors[name].T.contiguous()


def _missing(adapter: Adapter) -> None:
    adapter.tensors.pop(next(iter(adapter.tensors)))


def _stranger(adapter: Adapter) -> None:
    adapter.tensors["base_model.model.model.layers.9.mlp.up_proj.ia3_l"] = torch.ones(64, 1)


def _unused(adapter: Adapter) -> None:
    adapter.tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] = torch.ones(4, 32)


def _infinite(adapter: Adapter) -> None:
    next(iter(adapter.tensors.values()))[0, 0] = float("inf")


@pytest.mark.parametrize("spoil", [_cut, _turned, _missing, _stranger, _unused, _infinite])
def test_a_bad_ia3_is_refused(zoo, spoil: Any):
    runtime, _ = zoo("llama")
    adapter, resident = build.ia3(runtime.base, 9), runtime.resident()
    spoil(adapter)
    with pytest.raises(AdapterMismatch):
        runtime.attach(adapter)
    assert runtime.resident() == resident


@pytest.mark.parametrize("spoil", [_cut, _missing, _unused, _infinite])
def test_a_bad_prompt_is_refused(zoo, spoil: Any):
    runtime, _ = zoo("llama")
    adapter, resident = build.prompt(runtime.base, 9), runtime.resident()
    spoil(adapter)
    with pytest.raises(AdapterMismatch):
        runtime.attach(adapter)
    assert runtime.resident() == resident


def test_what_fits_another_base_is_refused(tiny_base):
    wide, runtime = tiny_base("llama", hidden_size=48), Runtime(tiny_base("llama"), Store())
    for adapter in (build.ia3(wide, 1), build.prompt(wide, 1)):
        with pytest.raises(AdapterMismatch, match="another model"):
            runtime.attach(adapter)
    with pytest.raises(AdapterMismatch, match="encoder-decoder"):
        runtime.attach(build.prompt(tiny_base("t5"), 1))
    runtime.close()


def test_an_untrained_ia3_does_nothing_and_is_refused(tiny_base):
    base = tiny_base("llama")
    runtime, adapter = Runtime(base, Store()), build.ia3(tiny_base("llama"), 1)
    for tensor in adapter.tensors.values():
        tensor.fill_(1.0)
    with pytest.raises(NoEffect):
        runtime.attach(adapter)
    next(t for n, t in adapter.tensors.items() if n.endswith("down_proj.ia3_l"))[0, 1] = 1.5
    runtime.attach(adapter)
    runtime.close()


def test_a_prompt_for_the_classifier_of_an_encoder_decoder_is_refused(tiny_base):
    """The class takes no embeddings; without a word the prompt would be left out."""
    from dataclasses import replace

    base = tiny_base("t5")
    runtime = Runtime(base, Store())
    for adapter in (build.prompt(base, 1), build.prefix(base, 1)):
        head = {"base_model.classification_head." + n: t for n, t in _t5_head(base).items()}
        spec = replace(adapter.spec, task_type="SEQ_CLS", modules_to_save=("classification_head",))
        with pytest.raises(Unsupported, match="takes none"):
            runtime.attach(replace(adapter, spec=spec, tensors={**adapter.tensors, **head}))
    runtime.close()


def _t5_head(base: Any) -> dict[str, torch.Tensor]:
    return base.view("SEQ_CLS").head.fresh(3, torch.Generator().manual_seed(0), 0.5)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_virtual_tokens_count_against_the_positions(tiny_base, family: str):
    base = tiny_base(family)
    runtime = Runtime(base, Store())
    ref = runtime.attach(build.prompt(base, 1, 7))
    runtime.logits([[5] * 505], ref)
    with pytest.raises(CapacityError, match="512"):
        runtime.logits([[5] * 506], ref)
    runtime.close()


@pytest.mark.parametrize("make", [build.ia3, build.prompt])
def test_two_of_a_kind_are_compared(tiny_base, make: Any):
    base = tiny_base("bert")
    a, b = make(base, 1), make(base, 2)
    same, other = compare(a, a), compare(a, b)
    assert same.kind == make.__name__
    assert all(one.cosine == pytest.approx(1.0) for one in same.whole)
    parts = {one.part for one in same.whole}
    assert parts == {"factor" if make is build.ia3 else "prefix", "head"}
    assert all(abs(one.cosine or 0.0) < 0.5 for one in other.whole)
