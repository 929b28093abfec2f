"""What an adapter adds to weights, against what PEFT's own merge makes of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from adapterhub_lite.adapters.adapter import Adapter, read_adapter
from adapterhub_lite.combining.changes import Changes, changes_of
from adapterhub_lite.errors import AdapterMismatch, Unsupported
from adapterhub_lite.formats.specs import InjectedSpec, PrefixSpec, PromptSpec
from tests import peers, tiny
from tests.combining import truth

LINEAR = {"llama": ["q_proj", "down_proj", "v_proj"], "gpt2": ["c_attn", "c_proj"]}
EXACT = ("lora", "patterns", "rslora", "adalora", "loha", "lokr", "lokr-both")
FULL = ("dora", "ia3")
CASES = [(family, kind) for family in LINEAR for kind in (*EXACT, *FULL)]
NOT_CONV1D = ("loha", "lokr", "lokr-both")


def config(family: str, kind: str) -> Any:
    targets = {"target_modules": LINEAR[family]}
    if kind == "adalora":
        return peft.AdaLoraConfig(task_type="CAUSAL_LM", init_r=5, lora_alpha=7, total_step=10, **targets)
    if kind == "loha":
        return peft.LoHaConfig(task_type="CAUSAL_LM", r=3, alpha=5, alpha_pattern={"q_proj": 2}, **targets)
    if kind.startswith("lokr"):
        both = kind == "lokr-both"
        return peft.LoKrConfig(task_type="CAUSAL_LM", r=2, alpha=5, decompose_both=both, decompose_factor=4, **targets)
    if kind == "ia3":
        feedforward = [name for name in LINEAR[family] if name in ("down_proj", "c_proj")]
        return peft.IA3Config(task_type="CAUSAL_LM", feedforward_modules=feedforward, **targets)
    return peers.config(family, kind, "CAUSAL_LM", target_modules=LINEAR[family])


def wrapped(family: str, kind: str) -> Any:
    """A PEFT model, all of whose trained values are random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(tiny.model(family), config(family, kind)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        around = parameter.data if "magnitude" in name or "ia3" in name else 0.0
        parameter.data = around + 0.2 * noise
    return made


def oriented(model: Any, module: str, name: str = "weight") -> torch.Tensor:
    """A layer's tensor; its weight as [out, in]."""
    layer = model.get_submodule(module)
    value = getattr(layer, name).detach().clone()
    return value.T if name == "weight" and type(layer).__name__ == "Conv1D" else value


def setting(family: str, kind: str, tmp_path: Path) -> tuple[Adapter, dict[str, torch.Tensor], dict[str, Any]]:
    """The adapter as PEFT saves it, what its merge adds to each weight, and the frozen weights by name."""
    made = wrapped(family, kind)
    made.save_pretrained(tmp_path / "peft")
    adapter = read_adapter(tmp_path / "peft")
    base = tiny.model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = made.merge_and_unload()
    names = [name for name, m in base.named_modules() if hasattr(m, "weight") and m.weight.dim() == 2]
    added = {name: (oriented(merged, name).double() - oriented(base, name).double()) for name in names}
    added = {name: delta for name, delta in added.items() if float(delta.norm()) > 0}
    return adapter, added, {"base": base, "merged": merged}


@pytest.mark.parametrize(
    ("family", "kind"), [case for case in CASES if not (case[0] == "gpt2" and case[1] in NOT_CONV1D)]
)
def test_changes_are_what_pefts_merge_adds(family: str, kind: str, tmp_path: Path):
    adapter, added, models = setting(family, kind, tmp_path)
    base = models["base"]
    found = changes_of(
        adapter,
        lambda name: oriented(base, name),
        rank=1024 if kind in FULL else None,
        bias_of=lambda name: getattr(base.get_submodule(name), "bias", None),
    )
    assert set(found.modules) == set(added) != set()
    for name, delta in added.items():
        change = found.modules[name]
        assert change.matrix.shape == delta.shape
        assert truth.relative(change.matrix.rows(0, delta.shape[0]), delta) < 2e-5  # PEFT's merge is in float32
        assert change.error < 1e-6
        if change.bias is not None:
            expected = oriented(models["merged"], name, "bias").double() - oriented(base, name, "bias").double()
            assert truth.relative(change.bias, expected) < 1e-4
    with_bias = {name for name, change in found.modules.items() if change.bias is not None}
    outputs = {name for name in added if "c_attn" in name}
    assert with_bias == (outputs if (family, kind) == ("gpt2", "ia3") else set())


@pytest.mark.parametrize("kind", [*FULL, "loha", "lokr", "lokr-both"])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_a_wished_rank_is_the_best_there_is(kind: str, rank: int, tmp_path: Path):
    adapter, added, models = setting("llama", kind, tmp_path)
    found = changes_of(adapter, lambda name: oriented(models["base"], name), rank=rank, bias_of=lambda name: None)
    for name, delta in added.items():
        change, best = found.modules[name], truth.best_error(delta, rank)
        measured = truth.relative(change.matrix.rows(0, delta.shape[0]), delta)
        assert change.matrix.rank <= rank
        assert change.error == pytest.approx(measured, abs=1e-5)
        assert measured <= best * (1 + 1e-4) + 1e-5


@pytest.mark.parametrize("kind", FULL)
def test_a_wished_error_is_kept(kind: str, tmp_path: Path):
    adapter, added, models = setting("llama", kind, tmp_path)
    found = changes_of(adapter, lambda name: oriented(models["base"], name), error=0.3, bias_of=lambda name: None)
    for name, delta in added.items():
        change = found.modules[name]
        assert change.error <= 0.3
        assert truth.relative(change.matrix.rows(0, delta.shape[0]), delta) <= 0.3001
        assert truth.best_error(delta, change.matrix.rank - 1) > 0.2999


@pytest.mark.parametrize("kind", truth.KINDS)
def test_scales_are_folded_in_once(kind: str):
    adapter = truth.lora(3, kind)
    found = truth.changes(adapter)
    for name, delta in truth.dense(adapter).items():
        assert truth.relative(found.modules[name].matrix.rows(0, 99), delta) < 1e-7
    expected = truth.biases(adapter)
    assert {name for name, change in found.modules.items() if change.bias is not None} == set(expected)
    for name, bias in expected.items():
        torch.testing.assert_close(found.modules[name].bias, bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("alpha", "held"), [(8.0, torch.float32), (2.0, torch.float32), (6.0, torch.float64)])
def test_scales_round_nothing(dtype: torch.dtype, alpha: float, held: torch.dtype):
    adapter = truth.lora(1, alpha=alpha)
    adapter = Adapter(adapter.spec, {key: tensor.to(dtype) for key, tensor in adapter.tensors.items()}, name="one")
    found = changes_of(adapter).modules
    for name, delta in truth.dense(adapter).items():
        assert found[name].matrix.up.dtype == (torch.float64 if dtype == torch.float64 else held)
        assert truth.relative(found[name].matrix.rows(0, 99), delta) < 1e-15


def test_usual_ranks_of_what_has_no_low_rank():
    usual = changes_of(truth.lora(3, "dora", rank=2), truth.weight_of)
    assert {change.matrix.rank for change in usual.modules.values()} == {8}
    assert all(0.01 < change.error < 1 for change in usual.modules.values())


def test_an_embedding_is_one(tmp_path: Path):
    model = tiny.model("llama")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=7, target_modules=["embed_tokens", "q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, settings).eval()
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.2)
        made.save_pretrained(tmp_path, save_embedding_layers=False)
        layer = made.base_model.model.model.embed_tokens
        expected = layer.get_delta_weight("default").detach().double().T
    change = changes_of(read_adapter(tmp_path)).modules["model.embed_tokens"]
    assert change.embedding
    assert change.matrix.shape == (32, tiny.VOCABULARY)
    assert truth.relative(change.matrix.rows(0, 32), expected) < 1e-6


@pytest.mark.parametrize("kind", FULL)
def test_what_needs_the_base_says_so(kind: str, tmp_path: Path):
    adapter, _, models = setting("llama", kind, tmp_path)
    with pytest.raises(Unsupported, match="--base"):
        changes_of(adapter)
    with pytest.raises(AdapterMismatch, match="made for another model"):
        changes_of(adapter, lambda name: oriented(models["base"], name)[:-1, :-1], bias_of=lambda name: None)


def test_ia3_on_outputs_needs_to_know_of_biases(tmp_path: Path):
    adapter, _, models = setting("gpt2", "ia3", tmp_path)
    with pytest.raises(Unsupported, match="whether the layer has a bias"):
        changes_of(adapter, lambda name: oriented(models["base"], name))


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (PrefixSpec(4, 8, 2, 2), "stays a prefix"),
        (PromptSpec(4, 8), "stays a prompt"),
        (InjectedSpec("OFT", {}), "OFT"),
    ],
)
def test_what_is_no_sum_with_weights_is_refused(spec: Any, why: str):
    with pytest.raises(Unsupported, match=why):
        changes_of(Adapter(spec, {"prompt_embeddings": torch.ones(4, 8)}, name="one"))


def broken(key: str, value: torch.Tensor | None, kind: str = "lora") -> Adapter:
    adapter = truth.lora(1, kind)
    tensors = {k: v for k, v in adapter.tensors.items() if k != key}
    return Adapter(adapter.spec, tensors if value is None else {**tensors, key: value}, name="broken")


STEM = "base_model.model.layers.0.attn.q_proj"


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        (broken(f"{STEM}.lora_B.weight", None), "only one of"),
        (broken(f"{STEM}.lora_B.weight", torch.ones(12, 3)), "share no rank"),
        (broken(f"{STEM}.lora_A.weight", torch.ones(0, 20)), "share no rank"),
        (broken(f"{STEM}.lora_A.weight", torch.full((4, 20), torch.nan)), "NaN or infinity"),
        (broken(f"{STEM}.lora_magnitude_vector", torch.ones(12)), "has a magnitude"),
        (broken(f"{STEM}.lora_magnitude_vector", None, "dora"), "lacks a magnitude"),
        (broken(f"{STEM}.lora_magnitude_vector", torch.ones(11), "dora"), "magnitude of 11"),
        (broken(f"{STEM}.lora_kasa.weight", torch.ones(1)), "no meaning"),
        (broken("elsewhere.weight", torch.ones(1)), "no meaning"),
        (Adapter(truth.lora(1).spec, {}, name="empty"), "no tensor of a layer"),
    ],
)
def test_tensors_that_do_not_belong_together(adapter: Adapter, why: str):
    with pytest.raises(AdapterMismatch, match=why):
        changes_of(adapter, truth.weight_of)


def test_a_convolution_is_refused():
    with pytest.raises(Unsupported, match="convolution"):
        changes_of(broken(f"{STEM}.lora_A.weight", torch.ones(4, 20, 1, 1)))


def test_a_head_comes_along_as_it_is():
    head = torch.ones(2, 12)
    found: Changes = changes_of(broken("base_model.model.score.weight", head))
    assert list(found.head) == ["score.weight"]
    assert found.head["score.weight"] is head
