"""Exports in plain PEFT: the logits of the version, whatever method, family and reader they were made for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.exporting import build

LORA = ("lora", "patterns", "rslora")
EXACT = ("adalora", "loha", "lokr")
FAMILIES = ("llama", "qwen2", "gpt2", "bert")
CASES = [(f, k) for f in FAMILIES for k in (*LORA, *EXACT) if not (f == "gpt2" and k in ("loha", "lokr"))]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = build.save_base(family, tmp_path_factory.mktemp(family))
        return made[family]

    return base


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_file_for_vllm_gives_the_same_logits_in_peft(bases, tmp_path, family, kind):
    made = build.make(bases(family), family, kind, tmp_path / "in")
    assert build.near(made.logits, made.bare) > 0.01, "the reference adapter itself does nothing"
    folder = build.write(made, "vllm", tmp_path / "out", max_rank=64)
    assert build.near(build.by_peft(made, folder), made.logits) < 1e-5
    config = json.loads((folder / "adapter_config.json").read_text())
    ranks = {
        t.shape[0] for k, t in load_file(folder / "adapter_model.safetensors").items() if k.endswith("lora_A.weight")
    }
    assert ranks == {config["r"]}
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    assert config["peft_type"] == "LORA"
    assert config["target_modules"] == sorted(config["target_modules"])
    if kind != "lora":
        assert config["lora_alpha"] == config["r"]


@pytest.mark.parametrize("reader", ["sglang", "lorax", "peft"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["patterns", "rslora"])
def test_files_for_other_readers_give_the_same_logits_in_peft(bases, tmp_path, reader, family, kind):
    made = build.make(bases(family), family, kind, tmp_path / "in")
    folder = build.write(made, reader, tmp_path / "out")
    assert build.near(build.by_peft(made, folder), made.logits) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_dora_comes_within_the_error_that_is_said(bases, tmp_path, family):
    made = build.make(bases(family), family, "dora", tmp_path / "in")
    found = {rank: made.prepare("vllm", max_rank=32, rank=rank) for rank in (8, 24)}
    said = {rank: next(f for f in one.findings if f.rule == "dora").error for rank, one in found.items()}
    assert 0 < said[24] < said[8] < 1
    distances = {}
    for rank in found:
        folder = build.write(made, "vllm", tmp_path / f"out{rank}", max_rank=32, rank=rank)
        distances[rank] = build.near(build.by_peft(made, folder), made.logits)
    bare = build.near(made.bare, made.logits)
    assert distances[24] < distances[8] < bare
    whole = build.write(made, "vllm", tmp_path / "whole", max_rank=32, rank=32)  # as wide as the layers
    wide = build.near(build.by_peft(made, whole), made.logits)
    assert wide < 1e-5
    config = json.loads((whole / "adapter_config.json").read_text())
    assert config["use_dora"] is False


def test_doras_error_is_that_of_the_dense_change(bases, tmp_path):
    made = build.make(bases("llama"), "llama", "dora", tmp_path / "in", target_modules=["q_proj", "down_proj"])
    prepared = made.prepare("vllm", rank=8)
    assert prepared.adapter is not None
    from peft import PeftModel

    model = PeftModel.from_pretrained(made.plain(), made.folder).merge_and_unload()
    plain = dict(made.plain().named_modules())
    lost = norm = 0.0
    for name, pair in prepared.facts.pairs.modules.items():
        change = (dict(model.named_modules())[name].weight - plain[name].weight).detach().double()
        ours = pair.up.double() @ pair.down.double() * pair.scale
        lost, norm = lost + float((change - ours).square().sum()), norm + float(change.square().sum())
        assert float((change - ours).norm() / change.norm()) == pytest.approx(pair.error, rel=1e-2)
    said = next(f.error for f in prepared.findings if f.rule == "dora")
    assert (lost / norm) ** 0.5 == pytest.approx(said, rel=1e-2)


def test_ia3_on_layers_without_biases_comes_within_the_error_that_is_said(bases, tmp_path):
    made = build.make(bases("llama"), "llama", "ia3", tmp_path / "in")
    folder = build.write(made, "vllm", tmp_path / "out", max_rank=32)
    assert build.near(build.by_peft(made, folder), made.logits) < 1e-5  # the layers are 32 wide: nothing is cut


def test_a_cut_by_error_keeps_to_it_in_every_module(bases, tmp_path):
    made = build.make(bases("llama"), "llama", "lora", tmp_path / "in", r=16)
    prepared = made.prepare("sglang", error=0.3)
    whole = {name: pair.exact.rows(0, pair.up.shape[0]) for name, pair in prepared.source.items()}
    for name, pair in prepared.facts.pairs.modules.items():
        dense = pair.exact.rows(0, pair.up.shape[0])
        error = float((dense - whole[name]).norm() / whole[name].norm())
        assert error == pytest.approx(pair.error, rel=1e-3, abs=1e-9)
        assert error <= 0.3
    assert prepared.facts.rank < 16
    assert next(f for f in prepared.findings if f.rule == "rank").remedy == "svd"


def test_a_plain_file_is_left_as_it_is(bases, tmp_path):
    made = build.make(bases("llama"), "llama", "lora", tmp_path / "in")
    folder = build.write(made, "vllm", tmp_path / "out")
    ours, theirs = (load_file(one / "adapter_model.safetensors") for one in (folder, made.folder))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)


@pytest.mark.parametrize("error", [0.3, 0.5, 0.6])
def test_dora_cut_by_error_keeps_to_it(bases, tmp_path, error):
    made = build.make(bases("llama"), "llama", "dora", tmp_path / "in", target_modules=["q_proj", "down_proj"])
    prepared = made.prepare("sglang", error=error)
    assert prepared.adapter is not None
    errors = [pair.error for pair in prepared.facts.pairs.modules.values()]
    assert 0.05 < max(errors) <= error
    assert prepared.facts.rank < 32
