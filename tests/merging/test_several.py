"""Which weights a merge changes and to what: PEFT's bits for one adapter, the true sum in float64 for several."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub_lite.adapters.adapter import read_adapter
from adapterhub_lite.errors import AdapterMismatch, BaseUnavailable, NoEffect, Unsupported
from adapterhub_lite.merging import dense
from adapterhub_lite.merging.merge import staged_merge
from tests import peers, tiny
from tests.merging import peft_merges
from tests.merging.peft_merges import biased, loaded, merged, plan_of, saved, tensors_of, true_sum


@pytest.fixture(params=["native", "torch"])
def both_ways(request, monkeypatch):
    """With native code, and without."""
    if request.param == "torch":
        monkeypatch.setattr(dense, "merge_rows", lambda *_: None)


def written(base: Path, out: Path, *members, **options) -> dict[str, torch.Tensor]:
    plan = plan_of(base, *members, **options)
    with staged_merge(plan, base, out):
        pass
    return tensors_of(out)


def assert_peft_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) <= set(expected)
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("kind", [*peft_merges.LORAS, "bias", "ia3"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_one_adapter_gives_the_bits_of_pefts_merge(tmp_path, family, kind):
    if kind == "bias" and family in ("llama", "t5"):
        pytest.skip("its layers have no bias")
    if (kind, family) == ("ia3", "roberta"):
        pytest.skip("PEFT cannot merge it: the head is no layer")
    base = biased(family, tmp_path / "base")
    adapter = saved(tmp_path / "one", base, family, kind)
    found = written(base, tmp_path / "out", (adapter, 1.0))
    assert_peft_bits(found, merged(base, adapter))
    own = load_file(base / "model.safetensors")
    assert any(name in own and not torch.equal(tensor, own[name]) for name, tensor in found.items())


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_rounded_once_as_pefts_are(tmp_path, dtype):
    base = tmp_path / "base"
    tiny.model("llama").to(dtype).save_pretrained(base)
    adapter = saved(tmp_path / "one", base, "llama", "lora")
    assert_peft_bits(written(base, tmp_path / "out", (adapter, 1.0)), merged(base, adapter, dtype))


@pytest.mark.parametrize("rank", [1, 2, 3, 7, 16, 33, 64, 200])
def test_bits_of_other_ranks(tmp_path, tiny_folder, rank):
    base = tiny_folder("llama", hidden_size=64, intermediate_size=176, vocab_size=300)
    adapter = saved(tmp_path / "one", base, "llama", "lora", r=rank, lora_alpha=7)
    assert_peft_bits(written(base, tmp_path / "out", (adapter, 1.0)), merged(base, adapter))


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("kind", [*peft_merges.LORAS, *peft_merges.SUMS, "ia3"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_one_adapter_is_right_in_float64(tmp_path, family, kind):
    if family == "gpt2" and kind in ("loha", "lokr"):
        pytest.skip("PEFT has no such layer for Conv1D")
    base = biased(family, tmp_path / "base")
    adapter = saved(tmp_path / "one", base, family, kind)
    _assert_near(written(base, tmp_path / "out", (adapter, -0.6)), true_sum(base, [(adapter, -0.6)]))


def _assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        if name in found and found[name].shape == tensor.shape:  # heads have other labels
            torch.testing.assert_close(found[name].double(), tensor, rtol=1e-6, atol=2e-6)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_several_of_all_kinds_are_the_sum_of_what_each_does_alone(tmp_path, family):
    base = biased(family, tmp_path / "base")
    kinds = ["lora", "dora", "ia3", "adalora", "dora"] + (["loha", "lokr"] if family == "llama" else [])
    members = [
        (saved(tmp_path / f"m{i}", base, family, kind, seed=i), weight)
        for i, (kind, weight) in enumerate(zip(kinds, (0.7, -0.5, 0.4, 1.5, 1.0, -2.0, 0.25), strict=False))
    ]
    expected = true_sum(base, members)
    found = written(base, tmp_path / "out", *members)
    _assert_near(found, expected)
    _assert_near(written(base, tmp_path / "turned", *members[::-1]), expected)
    alone = true_sum(base, members[:-1])
    assert any((alone[n] - expected[n]).abs().max() > 1e-2 for n in expected), "the last one has an effect"


def test_two_plain_adapters_give_the_bits_of_one_merge_after_the_other(tmp_path, tiny_folder):
    base = tiny_folder("llama")
    one, two = (saved(tmp_path / f"m{i}", base, "llama", "lora", seed=i, r=3 + i) for i in range(2))
    model = loaded(base, one)
    model.load_adapter(two, "second")
    model.base_model.set_adapter(["default", "second"])
    expected = dict(model.merge_and_unload().state_dict())
    assert_peft_bits(written(base, tmp_path / "out", (one, 1.0), (two, 1.0)), expected)


def test_weight_zero_changes_nothing_and_the_order_hardly(tmp_path, tiny_folder):
    base = tiny_folder("llama")
    one, two = (saved(tmp_path / f"m{i}", base, "llama", "lora", seed=i) for i in range(2))
    nothing = written(base, tmp_path / "zero", (one, 0.0))
    own = load_file(base / "model.safetensors")
    assert all(torch.equal(nothing[name], own[name]) for name in own)
    assert (tmp_path / "zero" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    a, b = (
        written(base, tmp_path / f"o{i}", *m)
        for i, m in enumerate([((one, 0.5), (two, 2.0)), ((two, 2.0), (one, 0.5))])
    )
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6)


def test_a_base_in_nf4_is_baked_for_several(tmp_path, tiny_folder):
    from adapterhub_lite.bases.quantization import quantized_round_trip

    base = tiny_folder("llama", hidden_size=64, intermediate_size=128)
    members = [(saved(tmp_path / f"m{i}", base, "llama", "lora", seed=i), 0.5 + i) for i in range(2)]
    for kind in ("nf4", "int8"):
        found = written(base, tmp_path / kind, *members, quantization=kind)
        own, total = load_file(base / "model.safetensors"), true_sum(base, members)
        for name in own:
            dense_own = own[name]
            if "proj" in name:
                dense_own = quantized_round_trip(own[name], kind)
            expected = total[name] - own[name].double() + dense_own.double()
            torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=2e-6)


def test_one_head_comes_along_and_two_are_refused(tmp_path, tiny_folder):
    base = tiny_folder("bert")
    one, two = (saved(tmp_path / f"m{i}", base, "bert", "lora", seed=i) for i in range(2))
    plain = read_adapter(two)
    headless = replace(plain, tensors={k: t for k, t in plain.tensors.items() if "lora" in k}, name="headless")
    out = tmp_path / "out"
    plan = plan_of(base, (headless, -0.5), (one, 0.5))
    assert plan.notes == ["The head of m0 is taken as it is: its weight is for the layers alone."]
    with staged_merge(plan, base, out):
        pass
    head = load_file(one / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.equal(tensors_of(out)["classifier.weight"], head), "a head is taken as it is"
    with pytest.raises(Unsupported, match="m0 and m1 both bring a classification head"):
        plan_of(base, (one, 1.0), (two, 1.0))


EMBEDDED = [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head"), ("embed_tokens", "q_proj")]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", EMBEDDED)
def test_adapters_of_embeddings_and_output_layers(tmp_path, tiny_folder, targets, tied):
    base = tiny_folder("llama", tie_word_embeddings=tied)
    _check_embedded(tmp_path, base, "llama", targets, tied)


@pytest.mark.parametrize("targets", [("wte",), ("lm_head", "c_attn")])
def test_adapters_of_gpt2s_embeddings(tmp_path, tiny_folder, targets):
    _check_embedded(tmp_path, tiny_folder("gpt2"), "gpt2", targets, tied=True)


def _check_embedded(tmp_path: Path, base: Path, family: str, targets: tuple[str, ...], tied: bool) -> None:
    """Against base + adapter unmerged, since PEFT's own merge of a tied layer changes the other one, too."""
    adapter = saved(tmp_path / "one", base, family, "lora", target_modules=list(targets))
    model = loaded(base, adapter)
    for name, parameter in model.named_parameters():
        if "lora_embedding_A" in name:
            assert parameter.abs().max() > 0
    expected = peers.logits(model)
    plan = plan_of(base, (adapter, 1.0))
    with staged_merge(plan, base, tmp_path / "out"):
        pass
    peers.assert_logits_equal(peers.logits(peers.plain(tmp_path / "out", "CAUSAL_LM")), expected)
    bare = peers.logits(peers.plain(base, "CAUSAL_LM"))
    assert max(float((a - b).abs().max()) for a, b in zip(bare, expected, strict=True)) > 1e-2
    untied = tied and bool({"embed_tokens", "lm_head", "wte"} & set(targets))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config.get("tie_word_embeddings") is False) == (untied or not tied)
    assert bool(plan.notes) == untied
    assert ("lm_head.weight" in tensors_of(tmp_path / "out")) == (untied or not tied)


def test_a_tie_is_seen_even_where_the_file_has_both(tmp_path, tiny_folder):
    """transformers ties again what the configuration says is tied: a changed copy in the file would be lost."""
    base = tmp_path / "base"
    tiny.save("llama", base, tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    _check_embedded(tmp_path, base, "llama", ("lm_head",), tied=True)


def test_models_that_compute_otherwise_without_the_tie_are_refused(tmp_path, tiny_folder):
    base = tiny_folder("t5")
    adapter = saved(tmp_path / "one", base, "t5", "lora", target_modules=["lm_head"])
    with pytest.raises((Unsupported, AdapterMismatch), match="tied"):
        plan_of(base, (adapter, 1.0))


def test_copies_of_the_bases_parts_are_refused(tmp_path, tiny_folder):
    base = tiny_folder("llama", tie_word_embeddings=False)
    adapter = saved(tmp_path / "one", base, "llama", "lora", modules_to_save=["embed_tokens"])
    with pytest.raises(Unsupported, match=r"embed_tokens \(modules_to_save\)"):
        plan_of(base, (adapter, 1.0))


def test_a_bias_without_a_place_is_refused(tmp_path, tiny_folder):
    base = tiny_folder("llama")
    adapter = saved(tmp_path / "one", base, "llama", "bias")
    with pytest.raises(AdapterMismatch, match="which has none here"):
        plan_of(base, (adapter, 1.0))


def test_an_adapter_without_effect_is_refused(tmp_path, tiny_folder):
    base = tiny_folder("llama")
    for kind in ("lora", "ia3", "lokr"):
        adapter = read_adapter(saved(tmp_path / kind, base, "llama", kind))
        dead = {k: torch.ones_like(t) if "ia3" in k else torch.zeros_like(t) for k, t in adapter.tensors.items()}
        with pytest.raises(NoEffect):
            plan_of(base, (replace(adapter, tensors=dead), 1.0))


def test_values_that_are_no_numbers_are_refused_and_nothing_is_left(tmp_path, tiny_folder):
    base = tiny_folder("llama")
    adapter = read_adapter(saved(tmp_path / "one", base, "llama", "lora"))
    huge = replace(adapter, tensors={k: t * 1e25 for k, t in adapter.tensors.items()})
    (tmp_path / "place").mkdir()
    with (
        pytest.raises(AdapterMismatch, match="not finite"),
        staged_merge(plan_of(base, (huge, 1.0)), base, tmp_path / "place" / "out"),
    ):
        raise AssertionError("never reached")
    assert list((tmp_path / "place").iterdir()) == []
    with pytest.raises(Unsupported, match="weight"):
        plan_of(base, (adapter, float("nan")))
    with pytest.raises(Unsupported, match="no adapter"):
        plan_of(base)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize(("kind", "part"), [("lora", "weight"), ("ia3", "weight"), ("ia3", "bias")])
def test_a_value_beyond_float16_is_the_dtypes_fault(tmp_path, kind, part, stored):
    base = biased("bert", tmp_path / "base")
    adapter = read_adapter(saved(tmp_path / "one", base, "bert", kind))
    large = replace(adapter, tensors={k: t * (1.0 if "lora_A" in k else 1e9) for k, t in adapter.tensors.items()})
    tensors = {name: t.to(stored) for name, t in load_file(base / "model.safetensors").items()}
    if part == "bias":
        tensors = {name: t.zero_() if "bias" not in name else t for name, t in tensors.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with (
        pytest.raises(AdapterMismatch, match=f"{part} holds values that float16 has no room for") as found,
        staged_merge(plan_of(base, (large, 1.0), dtype="float16"), base, tmp_path / "out"),
    ):
        raise AssertionError("never reached")
    assert "bfloat16 or float32" in found.value.hint
    with staged_merge(plan_of(base, (large, 1.0), dtype="bfloat16"), base, tmp_path / "wide"):
        pass
    assert all(bool(torch.isfinite(t).all()) for t in tensors_of(tmp_path / "wide").values())


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_base_whose_values_are_no_numbers_is_to_blame_itself(tmp_path, dtype, part):
    base = biased("bert", tmp_path / "base")
    adapter = saved(tmp_path / "one", base, "bert", "ia3")
    tensors = load_file(base / "model.safetensors")
    tensors[f"bert.encoder.layer.0.attention.self.key.{part}"][0] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with (
        pytest.raises(BaseUnavailable, match=f"The checkpoint's .*key.{part} holds values that are not finite"),
        staged_merge(plan_of(base, (adapter, 1.0), dtype=dtype), base, tmp_path / "out"),
    ):
        raise AssertionError("never reached")
    planned = {p.name: p for shard in plan_of(base, (adapter, 1.0)).shards.values() for p in shard}
    with pytest.raises(BaseUnavailable, match="The checkpoint's"):
        planned[f"bert.encoder.layer.0.attention.self.key.{part}"].make()


def test_merging_twice_is_refused(tmp_path, tiny_folder):
    base = tiny_folder("llama")
    one, two = (saved(tmp_path / f"m{i}", base, "llama", "lora", seed=i) for i in range(2))
    with pytest.raises(Unsupported, match="named twice"):
        plan_of(base, (one, 1.0), (one, 0.5))
    out = tmp_path / "out"
    with staged_merge(plan_of(base, (one, 0.5)), base, out):
        pass
    with pytest.raises(Unsupported, match="m0 is merged into this base already"):
        plan_of(out, (one, 1.0))
    with staged_merge(plan_of(out, (two, 1.0)), out, tmp_path / "both"):
        pass
    noted = json.loads((tmp_path / "both" / "config.json").read_text())["adapterhub_merge"]
    assert [(entry["adapter"], entry["weight"]) for entry in noted] == [("m0", 0.5), ("m1", 1.0)]
    for adapter in (one, two):
        with pytest.raises(Unsupported, match="already"):
            plan_of(tmp_path / "both", (adapter, 1.0))
    again = plan_of(out, (one, 0.5), again=True)
    with staged_merge(again, out, tmp_path / "again"):
        pass
    _assert_near(tensors_of(tmp_path / "again"), true_sum(base, [(one, 1.0)]))
    model = peers.plain(out, "CAUSAL_LM")
    model.save_pretrained(tmp_path / "resaved")
    with pytest.raises(Unsupported, match="already"):
        plan_of(tmp_path / "resaved", (one, 1.0))


def test_tensors_in_another_form_are_refused(tmp_path, tiny_folder):
    base, adapter = tmp_path / "base", None
    tiny.save("llama", base)
    adapter = saved(tmp_path / "one", base, "llama", "lora", target_modules=["q_proj"])
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    for other in (tensors[name].repeat(3, 1), None):
        changed = {k: t for k, t in tensors.items() if k != name} | ({name: other} if other is not None else {})
        save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(AdapterMismatch, match="another form"):
            plan_of(base, (adapter, 1.0))


@pytest.mark.models
def test_the_bits_of_smollm2(tmp_path):
    """A real model in float32, and in the dtype that it is stored in."""
    from adapterhub_lite.bases.fetch import cached

    base = cached("smollm2-135m-instruct")
    if base is None:
        pytest.skip("smollm2-135m-instruct is not in the cache")
    for dtype in (torch.float32, torch.bfloat16):
        model = peers.plain(base, "CAUSAL_LM").to(dtype)
        settings = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=20, target_modules="all-linear")
        wrapped = peers.wrap(model, settings)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(0.05)
        folder = tmp_path / str(dtype)
        wrapped.save_pretrained(folder)
        expected = dict(wrapped.merge_and_unload().state_dict())
        name = "float32" if dtype == torch.float32 else "bfloat16"
        found = written(base, tmp_path / name, (folder, 1.0), dtype=name)
        assert_peft_bits(found, expected)
        assert {t.dtype for t in found.values()} == {dtype}
