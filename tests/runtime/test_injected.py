"""Adapters that PEFT's own layers compute: they give what plain PEFT gives, and the base never knows of them."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.vera.layer import Linear as VeraLinear
from transformers import AutoModelForTokenClassification

from adapterhub_lite.adapters.adapter import Adapter, read_adapter
from adapterhub_lite.adapters.compare import compare
from adapterhub_lite.bases.load import load_base
from adapterhub_lite.bases.quantization import dense_weight
from adapterhub_lite.errors import AdapterMismatch, NoEffect, SlowAdapter, Unsupported
from adapterhub_lite.events import Note
from adapterhub_lite.merging.checkpoint import Checkpoint
from adapterhub_lite.merging.plan import plan_merge
from adapterhub_lite.runtime.decoder import decoder_of
from adapterhub_lite.runtime.encoder import encoder_of
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.workflows.deep_verify import verify_deep
from adapterhub_lite.workflows.receive import receive
from tests import injected, peers, tiny
from tests.runtime import build
from tests.runtime.test_kinds import our_tokens, peft_logits, peft_tokens, ragged

pytestmark = pytest.mark.filterwarnings("ignore::adapterhub_lite.errors.SlowAdapter")

# PEFT has layers of these methods, and no others, for transformers' Conv1D.
_CONV1D = {
    "DEFT", "FOURIERFT", "GRALORA", "HIRA", "LN_TUNING", "PVERA", "RANDLORA", "TINYLORA", "TRAINABLE_TOKENS",
    "UNILORA", "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
_SOME = ("BOFT", "FOURIERFT", "LN_TUNING", "OFT", "SHIRA", "VBLORA", "VERA-seed")
_LANGUAGE = [
    (family, kind)
    for family in ("llama", "gpt2", "t5")
    for kind in (injected.KINDS if family == "llama" else injected.METHODS)
    if family != "gpt2" or kind in _CONV1D
]
_CLASSIFIERS = [
    (family, kind)
    for family in tiny.FAMILIES
    for kind in (injected.METHODS if family == "bert" else _SOME)
    if kind != "TRAINABLE_TOKENS" and (family != "gpt2" or kind.partition("-")[0] in _CONV1D)
]


@contextmanager
def untouched(base: Any) -> Iterator[None]:
    """What every test here must leave as it was: values, modules, hooks, flags, configuration."""

    def state() -> tuple[Any, ...]:
        modules = [
            (name, id(module), module.training, len(vars(module))) for name, module in base.model.named_modules()
        ]
        tensors = [(name, id(one), one.requires_grad) for name, one in base.model.named_parameters()]
        return modules, tensors, base.model.config.to_dict(), base.live_digest()

    before = state()
    yield
    assert state() == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.model.modules()), "a hook was left"
    assert not hasattr(base.model, "peft_config")


@contextmanager
def runtime_on(base: Any, **given: Any) -> Iterator[Runtime]:
    """A runtime of an empty store that ends with the block, around which the base stays as it is."""
    _ = [base.view(task) for task in ("FEATURE_EXTRACTION", "SEQ_CLS")]
    runtime = Runtime(base, given.pop("store", None) or Store(), **given)
    _ = encoder_of(base) if base.kind == "encoder" else decoder_of(base)  # makes a forward of our own, if there is one
    with untouched(base):
        try:
            yield runtime
        finally:
            runtime.close()


def adapter(folder: Path, base: Any, family: str, kind: str, task: str | None = None, **changes: Any) -> Adapter:
    """An adapter that PEFT made and saved to `folder`."""
    made = injected.settings(family, kind, task or peers.task_type(family), **changes)
    injected.save(folder, base.source.folder, made)
    return read_adapter(folder)


@pytest.mark.parametrize(("family", "kind"), _LANGUAGE)
def test_language_models_give_what_peft_gives(tiny_base, tmp_path: Path, family: str, kind: str):
    base, task = tiny_base(family), peers.task_type(family)
    with runtime_on(base) as runtime:
        ref = runtime.attach(adapter(tmp_path, base, family, kind))
        model = injected.load(tmp_path, base.source.folder, task)
        expected = peft_logits(model)
        bare = peft_logits_bare(base, task)
        assert not torch.allclose(expected[0], bare[0], atol=1e-3), "the reference adapter itself does nothing"
        answers = peers.ANSWERS if family == "t5" else None
        peers.assert_logits_equal(runtime.logits(peers.ROWS, ref, answers), expected)
        start = base.config.decoder_start_token_id if family == "t5" else None
        written = our_tokens(runtime, peers.ROWS, [ref] * len(peers.ROWS))
        assert written == [peft_tokens(model, row, start) for row in peers.ROWS]


def peft_logits_bare(base: Any, task: str) -> list[torch.Tensor]:
    """Logits of the plain checkpoint."""
    return peers.logits(peers.plain(base.source.folder, task))


@pytest.mark.parametrize(("family", "kind"), _CLASSIFIERS)
def test_classifiers_give_what_peft_gives(tiny_base, tmp_path: Path, family: str, kind: str):
    base = tiny_base(family)
    with runtime_on(base) as runtime:
        ref = runtime.attach(adapter(tmp_path, base, family, kind, "SEQ_CLS"))
        expected = peft_logits(injected.load(tmp_path, base.source.folder, "SEQ_CLS"))
        peers.assert_logits_equal(runtime.logits(peers.ROWS, ref), expected)


@pytest.mark.parametrize("kind", ["VERA", "LN_TUNING", "OFT"])
@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_taggers_give_what_peft_gives(tiny_base, tmp_path: Path, family: str, kind: str):
    base = tiny_base(family)
    base.view("TOKEN_CLS")

    def plain() -> Any:
        torch.manual_seed(7)
        made = AutoModelForTokenClassification.from_pretrained(
            base.source.folder, num_labels=3, ignore_mismatched_sizes=True
        )
        return made.eval()

    wrapped = peft.get_peft_model(plain(), injected.settings(family, kind, "TOKEN_CLS"))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(tmp_path)
    with runtime_on(base) as runtime:
        ref = runtime.attach(read_adapter(tmp_path))
        expected = peers.logits(peft.PeftModel.from_pretrained(plain(), tmp_path).eval())
        peers.assert_logits_equal(runtime.logits(peers.ROWS, ref), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_row_of_a_mixed_call_is_its_solo_row(tiny_base, tmp_path: Path, family: str):
    base = tiny_base(family)
    with runtime_on(base, slots=8) as runtime:
        vera, norms = (runtime.attach(adapter(tmp_path / k, base, family, k)) for k in ("VERA", "LN_TUNING"))
        some = [vera, runtime.attach(build.lora(base, 1)), None, norms, runtime.attach(build.prefix(base, 2)), None]
        chosen = [some[(5 * i) % 6] for i in range(12)]
        texts, answers = ragged(12, 3), [[5 + i] * (1 + i % 3) for i in range(12)]
        mixed, written = runtime.logits(texts, chosen, answers), our_tokens(runtime, texts, chosen)
        for i, (text, ref) in enumerate(zip(texts, chosen, strict=True)):
            peers.assert_logits_equal([mixed[i]], runtime.logits([text], ref, [answers[i]]))
            assert written[i] == our_tokens(runtime, [text], [ref])[0], i
        assert len({tuple(one) for one in written}) > 6, "the rows answer alike"


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_classifiers_share_a_call_with_others(tiny_base, tmp_path: Path, family: str):
    base = tiny_base(family)
    with runtime_on(base, slots=8) as runtime:
        refs = [runtime.attach(adapter(tmp_path / k, base, family, k, "SEQ_CLS")) for k in ("VERA", "OFT", "MISS")]
        others = (
            [runtime.attach(build.lora(base, 1)), runtime.attach(build.ia3(base, 2))] if family == "bert" else [None]
        )
        chosen = [*refs, *others, *reversed(refs)]
        texts = ragged(len(chosen))
        mixed = runtime.logits(texts, chosen)
        for found, text, ref in zip(mixed, texts, chosen, strict=True):
            peers.assert_logits_equal([found], runtime.logits([text], ref))
        labels = runtime.predict(["a b", "c", "d e f"], refs)
        assert labels == [runtime.predict(t, r)[0] for t, r in zip(["a b", "c", "d e f"], refs, strict=True)]


def test_one_slot_is_enough_for_all_in_turn(tiny_base, tmp_path: Path):
    base = tiny_base("llama")
    store = Store(tmp_path / "store")
    for kind in ("VERA", "ROAD", "HRA"):
        adapter(tmp_path / kind, base, "llama", kind)
        receive(tmp_path / kind, kind.lower(), store=store, base=str(base.source.folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with runtime_on(base, store=store, slots=1) as runtime:
            texts, chosen = ragged(4), ["vera", "hra", None, "road"]
            written = our_tokens(runtime, texts, chosen)
            assert written == [our_tokens(runtime, [t], [r])[0] for t, r in zip(texts, chosen, strict=True)]
            scored = runtime._engine.parts([[1], [1, 2], [3], [4]], runtime._rows(chosen, 4))
            assert sorted(i for part in scored for i in part) == [0, 1, 2, 3]
            assert [held.name for held in runtime._engine.residency()] == ["road@1"]


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "RANDLORA"), ("llama", "SHIRA"), ("gpt2", "TRAINABLE_TOKENS"), ("bert", "VERA")]
)
def test_the_whole_life_of_a_stored_one(tiny_base, tmp_path: Path, family: str, kind: str):
    base, task = tiny_base(family), peers.task_type(family)
    notes: list[Any] = []
    adapter(tmp_path / "made", base, family, kind)
    store = Store(tmp_path / "store")
    ref = receive(tmp_path / "made", "some", store=store, base=str(base.source.folder))
    assert store.card(ref).adapter["type"] == kind.lower()
    assert store.verify() == []
    weights = "adapter_model.safetensors"
    assert (store.folder(ref) / weights).read_bytes() == (tmp_path / "made" / weights).read_bytes()
    archive = tmp_path / "some.ahl.tar"
    store.export(ref, archive)
    assert Store(tmp_path / "other").import_(archive, "some").digest == ref.digest
    with runtime_on(base, store=store, on_event=notes.append) as runtime:
        expected = peft_logits(injected.load(store.folder(ref), base.source.folder, task))
        assert runtime._engine._read_ahead(ref) is None, "PEFT's layers are made under the lock of the base"
        for _ in range(2):
            runtime.prefetch("some")
            runtime.load("some")
            peers.assert_logits_equal(runtime.logits(peers.ROWS, "some"), expected)
            assert runtime.resident() == ["some@1"]
            runtime.unload("some")
            assert runtime.resident() == []
        with runtime.using("some"):
            peers.assert_logits_equal(runtime.logits(peers.ROWS), expected)
    slower = [one.text for one in notes if isinstance(one, Note) and "PEFT's own layers" in one.text]
    assert len(slower) == 1
    assert kind in slower[0]
    assert verify_deep([ref], store=store) == ([], [])


def test_what_has_no_place_in_the_named_base_is_not_stored(tiny_base, tmp_path: Path):
    base, other = tiny_base("llama"), tiny_base("bert")
    adapter(tmp_path / "made", base, "llama", "VERA")
    store = Store(tmp_path / "store")
    with pytest.raises(AdapterMismatch, match="does not exist here"):
        receive(tmp_path / "made", "some", store=store, base=str(other.source.folder))
    assert store.list() == []


def test_without_a_listener_it_is_a_warning_and_said_once(tiny_base, tmp_path: Path):
    base = tiny_base("llama")
    made = adapter(tmp_path, base, "llama", "ROAD", group_size=16)
    with runtime_on(base) as runtime:
        with pytest.warns(SlowAdapter, match="ROAD"):
            runtime.attach(made)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            runtime.attach(made)


def _missing(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(next(key for key in tensors if "layers.1" in key))


def _stranger(tensors: dict[str, torch.Tensor]) -> None:
    some = next(key for key in tensors if "layers.1" in key)
    tensors[some.replace("layers.1", "layers.9")] = tensors[some].clone()


def _unknown(tensors: dict[str, torch.Tensor]) -> None:
    some = next(key for key in tensors if "layers.1" in key)
    tensors[some + "_more"] = tensors[some].clone()


def _cut(tensors: dict[str, torch.Tensor]) -> None:
    some = next(key for key in tensors if "layers.1" in key)
    tensors[some] = tensors[some][..., :-1].contiguous()


def _infinite(tensors: dict[str, torch.Tensor]) -> None:
    next(t for t in tensors.values() if t.is_floating_point()).view(-1)[0] = float("nan")


def _of_the_base(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"] = torch.zeros(32, 32)


def _weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 32)


_SPOILS = (_missing, _stranger, _unknown, _cut, _infinite, _of_the_base, _weight)


@pytest.mark.parametrize("spoil", _SPOILS)
@pytest.mark.parametrize("kind", ["VERA", "OFT", "SHIRA", "LN_TUNING", "BOFT"])
def test_a_bad_one_is_refused_and_nothing_stays(tiny_base, tmp_path: Path, kind: str, spoil: Any):
    base = tiny_base("llama")
    made = adapter(tmp_path, base, "llama", kind)
    tensors = {key: tensor.clone() for key, tensor in made.tensors.items()}
    spoil(tensors)
    with runtime_on(base) as runtime:
        with pytest.raises(AdapterMismatch):
            runtime.attach(replace(made, tensors=tensors, finite=False))
        assert runtime.resident() == []


@pytest.mark.parametrize("kind", ["SHIRA", "SUPERTUNING"])
@pytest.mark.parametrize("place", [-1, 1 << 20])
def test_places_outside_a_layer_are_refused(tiny_base, tmp_path: Path, kind: str, place: int):
    base = tiny_base("llama")
    made = adapter(tmp_path, base, "llama", kind)
    key = next(key for key in made.tensors if key.endswith("_indices"))
    tensors = {**made.tensors, key: made.tensors[key].clone()}
    tensors[key].view(-1)[3] = place
    with runtime_on(base) as runtime, pytest.raises(AdapterMismatch, match="outside"):
        runtime.attach(replace(made, tensors=tensors))


def test_an_untrained_one_is_refused(tiny_base, tmp_path: Path):
    base = tiny_base("llama")
    settings = injected.settings("llama", "VERA", "CAUSAL_LM")
    peft.get_peft_model(peers.plain(base.source.folder, "CAUSAL_LM"), settings).save_pretrained(tmp_path / "made")
    store = Store(tmp_path / "store")
    receive(tmp_path / "made", "idle", store=store, base=str(base.source.folder))
    with runtime_on(base, store=store) as runtime:
        with pytest.raises(NoEffect):
            runtime.load("idle")
        assert runtime.resident() == []


def test_one_of_another_base_is_refused(tiny_base, tmp_path: Path):
    wide = tiny_base("llama", hidden_size=48)
    made = [adapter(tmp_path / kind, wide, "llama", kind) for kind in ("VERA", "MISS", "BEFT", "TRAINABLE_TOKENS")]
    with runtime_on(tiny_base("llama")) as runtime:
        for one in made:
            with pytest.raises(AdapterMismatch):
                runtime.attach(one)
    with runtime_on(tiny_base("bert")) as runtime, pytest.raises(AdapterMismatch, match="does not exist here"):
        runtime.attach(made[0])


def test_what_fails_within_a_forward_leaves_the_others_alone(tiny_base, tmp_path: Path, monkeypatch):
    base = tiny_base("llama")
    with runtime_on(base) as runtime:
        ref, other = runtime.attach(adapter(tmp_path, base, "llama", "VERA")), runtime.attach(build.lora(base, 1))
        expected = runtime.logits(peers.ROWS, [other, None, ref])
        with monkeypatch.context() as patch:
            patch.setattr("peft.tuners.vera.layer.Linear.forward", _fails)
            with pytest.raises(RuntimeError, match="in the middle"):
                runtime.logits(peers.ROWS, [other, None, ref])
            with pytest.raises(RuntimeError, match="in the middle"):
                our_tokens(runtime, peers.ROWS[:1], [ref])
            peers.assert_logits_equal(runtime.logits(peers.ROWS[:2], [other, None]), expected[:2])
        peers.assert_logits_equal(runtime.logits(peers.ROWS, [other, None, ref]), expected)


def test_while_it_runs_nobody_sees_it_in_the_base(tiny_base, tmp_path: Path, monkeypatch):
    """As another thread would: a prefetch that looks for its modules, a digest of the weights."""
    base, seen = tiny_base("llama"), []
    digest, forward = base.live_digest(), VeraLinear.forward

    def looks(self: Any, x: torch.Tensor) -> torch.Tensor:
        seen.append((base.live_digest() == digest, {type(module) for module in base.model.modules()}))
        return forward(self, x)

    with runtime_on(base) as runtime:
        ref = runtime.attach(adapter(tmp_path, base, "llama", "VERA"))
        monkeypatch.setattr(VeraLinear, "forward", looks)
        runtime.logits(peers.ROWS, ref)
    assert len(seen) == 6
    assert all(same and VeraLinear not in kinds for same, kinds in seen)


def _fails(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("in the middle")


def test_fitting_draws_no_random_numbers_and_compiles_nothing(tiny_base, tmp_path: Path, monkeypatch):
    base = tiny_base("llama")
    made = [adapter(tmp_path / kind, base, "llama", kind) for kind in ("BOFT", "RANDLORA-seed", "PSOFT")]
    compiled: list[Any] = []
    monkeypatch.setattr("torch.utils.cpp_extension.load", lambda **given: compiled.append(given))
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", None)
    state = torch.random.get_rng_state()
    with runtime_on(base) as runtime, warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", SlowAdapter)
        for one in made:
            runtime.attach(one)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert compiled == []
    assert peft.tuners.boft.layer._FBD_CUDA is None, "who trains one may have it compiled"


def test_what_it_takes_counts_against_the_memory(tiny_base, tmp_path: Path):
    base = tiny_base("llama")
    with runtime_on(base) as runtime:
        sizes = {}
        for kind in ("VERA", "VERA-seed", "ROAD"):
            made = adapter(tmp_path / kind, base, "llama", kind)
            sizes[kind] = runtime._engine.fitted(runtime.attach(made)).nbytes
            file = sum(tensor.nbytes for tensor in made.tensors.values())
            assert sizes[kind] > file if kind == "VERA-seed" else sizes[kind] == file
        assert sizes["VERA-seed"] == sizes["VERA"], "what PEFT makes from a seed is in memory, too"


def test_it_has_no_part_in_mixes_merges_and_comparisons(tiny_base, tmp_path: Path):
    base = tiny_base("llama")
    one, two = (adapter(tmp_path / kind, base, "llama", kind) for kind in ("VERA", "VERA-seed"))
    with runtime_on(base) as runtime:
        ref, other = runtime.attach(one), runtime.attach(build.lora(base, 1))
        with pytest.raises(Unsupported, match="VERA"):
            runtime.logits(peers.ROWS, {ref: 0.5, other: 0.5})
        with pytest.raises(Unsupported, match="VERA"):
            runtime.logits(peers.ROWS, {ref: 0.5})
        peers.assert_logits_equal(runtime.logits(peers.ROWS, {ref: 1.0}), runtime.logits(peers.ROWS, ref))
    with pytest.raises(Unsupported, match="only PEFT"):
        compare(one, two)
    with pytest.raises(Unsupported, match="mean different things"):
        compare(one, build.lora(base, 1))
    with pytest.raises(Unsupported, match="merging does not know"):
        plan_merge(
            one, Checkpoint.open(base.source.folder), quantization="none", bake="auto", dtype="auto", labels=None
        )


_QUANTISED = ("BOFT", "HIRA", "LN_TUNING", "MISS", "OFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "VERA")


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("kind", _QUANTISED)
def test_a_quantised_base_computes_as_its_dense_weights_do(tiny_base, tmp_path: Path, kind: str, quantize: str):
    base = tiny_base("llama", quantize)
    with runtime_on(base) as runtime:
        ref = runtime.attach(adapter(tmp_path / "made", base, "llama", kind))
        model = peers.plain(base.source.folder, "CAUSAL_LM")
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = dense_weight(base.model.get_submodule(name), torch.float32).clone()
        dense = peft.PeftModel.from_pretrained(model, tmp_path / "made").eval()
        peers.assert_logits_equal(runtime.logits(peers.ROWS, ref), peft_logits(dense))


@pytest.mark.parametrize("kind", sorted(set(injected.METHODS) - set(_QUANTISED) - {"TRAINABLE_TOKENS"}))
def test_what_peft_cannot_do_on_a_quantised_base_is_refused(tiny_base, tmp_path: Path, kind: str):
    base = tiny_base("llama", "nf4")
    with runtime_on(base) as runtime, pytest.raises(Unsupported, match="without quantisation"):
        runtime.attach(adapter(tmp_path, base, "llama", kind))


def test_tokens_of_a_tied_embedding_are_read_and_written(tmp_path: Path):
    folder = tiny.save("llama", tmp_path / "base", tie_word_embeddings=True)
    base = load_base(str(folder), device="cpu")
    with runtime_on(base) as runtime:
        ref = runtime.attach(adapter(tmp_path / "made", base, "llama", "TRAINABLE_TOKENS"))
        expected = peft_logits(injected.load(tmp_path / "made", folder, "CAUSAL_LM"))
        peers.assert_logits_equal(runtime.logits(peers.ROWS, ref), expected)


def test_tokens_of_an_embedding_that_peft_chose(tiny_base, tmp_path: Path):
    base = tiny_base("gpt2")
    with runtime_on(base) as runtime:
        ref = runtime.attach(adapter(tmp_path, base, "gpt2", "TRAINABLE_TOKENS", target_modules=None))
        peers.assert_logits_equal(
            runtime.logits(peers.ROWS, ref), peft_logits(injected.load(tmp_path, base.source.folder, "CAUSAL_LM"))
        )


def test_names_that_hold_each_other_do_not_cross(tiny_base, tmp_path: Path):
    """PEFT finds its tensors by name; here no name of ours gets near it."""
    base, store, expected = tiny_base("llama"), Store(), {}
    for i, name in enumerate(("foo", "foobar", "s1", "s10", "lora", "a", "default", "base_model", "vera_lambda")):
        made = injected.settings("llama", "ROAD" if i % 2 else "VERA", "CAUSAL_LM")
        injected.save(tmp_path / name, base.source.folder, made)
        one = read_adapter(tmp_path / name)
        tensors = {
            key: t * (1 + 0.2 * i) if "vera_lambda" in key or "road" in key else t for key, t in one.tensors.items()
        }
        files = replace(one, tensors=tensors).files()
        for file, data in files.items():
            (tmp_path / name / file).write_bytes(data)
        build.stored(store, base, name, read_adapter(tmp_path / name))
        expected[name] = peft_logits(injected.load(tmp_path / name, base.source.folder, "CAUSAL_LM"))
    assert len({float(found[0][0, 0]) for found in expected.values()}) == len(expected)
    with runtime_on(base, store=store, slots=6) as served:
        for gone in (None, "foo", "s1", "a"):
            if gone is not None:
                served.load(gone)
                served.unload(gone)
            for name, logits in expected.items():
                peers.assert_logits_equal(served.logits(peers.ROWS, name), logits)


def test_half_precision_is_pefts(tmp_path: Path):
    """Its layers stay in float32 where the base is not, as PEFT chooses."""
    folder = tiny.save("llama", tmp_path / "base")
    base = load_base(str(folder), device="cpu", dtype="bfloat16")
    with runtime_on(base) as runtime:
        for kind in ("VERA", "MISS", "OFT", "LN_TUNING"):
            ref = runtime.attach(adapter(tmp_path / kind, base, "llama", kind))
            plain = peers.plain(folder, "CAUSAL_LM").to(torch.bfloat16)
            model = peft.PeftModel.from_pretrained(plain, tmp_path / kind).eval()
            peers.assert_logits_equal(runtime.logits(peers.ROWS, ref), peft_logits(model), 0.05)
            found = runtime._engine.fitted(ref).injected
            assert found is not None
            own = {key: one.dtype for key, one in model.named_parameters() if kind.lower() in key}
            assert {one.dtype for one in found.tensors if one.is_floating_point()} == set(own.values()), kind


def test_a_folder_that_was_imported_unchanged_is_read_by_peft(tiny_base, tmp_path: Path):
    """The configuration is written anew from what was read."""
    base = tiny_base("llama")
    for kind in injected.KINDS:
        made = adapter(tmp_path / kind, base, "llama", kind)
        before = peft_logits(injected.load(tmp_path / kind, base.source.folder, "CAUSAL_LM"))
        shutil.rmtree(tmp_path / kind)
        (tmp_path / kind).mkdir()
        for name, data in made.files().items():
            (tmp_path / kind / name).write_bytes(data)
        after = peft_logits(injected.load(tmp_path / kind, base.source.folder, "CAUSAL_LM"))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), kind
