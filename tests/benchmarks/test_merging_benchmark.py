"""The merging benchmark on tiny checkpoints: that both sides make the same files, and how it is told; not how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub_lite.merging.checkpoint import Checkpoint
from benchmarks import merging, merging_speed
from benchmarks.merging_speed import Case, Runs, case_rows, compared, random_adapter, synthetic
from benchmarks.rows import Row

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip


def test_both_sides_make_the_same_tensors_and_all_figures_are_told(tmp_path):
    base = synthetic(tmp_path / "base", SIZES, 2)
    assert len(Checkpoint.open(base).shards) == 2
    case = Case("tiny", base, random_adapter(base, tmp_path / "adapter"))
    (tmp_path / "runs").mkdir()
    found = list(case_rows(case, 1, tmp_path / "runs"))
    assert list((tmp_path / "runs").iterdir()) == []
    parts = [row.part for row in found]
    assert parts == ["merge", "merge memory", "merge", "merge", "merge bits"]
    bits = found[-1]
    assert bits.met is True
    assert bits.told == f"{len(Checkpoint.open(base).tensors)} of {len(Checkpoint.open(base).tensors)}"
    assert all(row.figure and row.figure > 0 for row in found)
    assert [row.goal for row in found] == [">= 4 x", "<= 0.125", "", ">= 0.6", "all"]


def test_other_tensors_are_seen(tmp_path):
    for number, change in enumerate(("none", "value", "dtype", "name")):
        for side in ("a", "b"):
            tensors = {"x": torch.ones(3), "y": torch.zeros(2, 2)}
            if side == "b" and change == "value":
                tensors["x"][1] = 2
            if side == "b" and change == "dtype":
                tensors["x"] = tensors["x"].half()
            if side == "b" and change == "name":
                tensors["z"] = tensors.pop("x")
            folder = tmp_path / f"{side}{number}"
            folder.mkdir()
            save_file(tensors, folder / "model.safetensors")
        expected = {"none": (2, 2), "value": (1, 2), "dtype": (1, 2), "name": (1, 3)}[change]
        assert compared(tmp_path / f"a{number}", tmp_path / f"b{number}") == expected


def test_a_goal_that_is_missed_is_said(tmp_path, monkeypatch):
    runs = Runs()
    for side, seconds, above in (
        ("ours", 2.0, 50),
        ("peer", 4.0, 100),
        ("copy", 0.1, None),
        ("durable copy", 1.0, None),
    ):
        runs.note(side, seconds, above)
    monkeypatch.setattr(merging_speed, "measured", lambda *_: (runs, (3, 4)))
    met = {(row.part, row.goal): row.met for row in case_rows(Case("x", tmp_path, tmp_path), 1, tmp_path) if row.goal}
    assert met == {
        ("merge", ">= 4 x"): False,
        ("merge memory", "<= 0.125"): False,
        ("merge", ">= 0.6"): False,
        ("merge bits", "all"): False,
    }


def test_quick_judges_bits_alone_and_writes_the_figures(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(merging, "load_base", lambda name: name)
    monkeypatch.setattr(merging.merging_combine, "rows", lambda *some, **more: asked.append((some, more)) or [])
    monkeypatch.setattr(merging.merging_quantised, "rows", lambda **more: [Row("other", "what", met=True)])
    monkeypatch.setattr(merging_speed, "_SMALL", SIZES)
    merging.main(["--quick", "--json", str(tmp_path / "figures.json")])
    found = json.loads((tmp_path / "figures.json").read_text())
    assert {row["met"] for row in found if row["part"] == "merge bits"} == {True}
    assert {row["met"] for row in found if row["part"] != "merge bits"} == {None}
    assert asked == [(("smollm2-135m-instruct",), {"rounds": 1, "rank": 4, "looked_at": 2})]
    assert {row["part"] for row in found} == {"merge", "merge memory", "merge bits", "other"}
    assert "tensors equal to PEFT's, bit for bit" in capsys.readouterr().out


def test_the_random_checkpoint_is_whole_and_loads(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    base = synthetic(tmp_path / "base", SIZES, 3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    assert model.dtype == torch.bfloat16
    stored = {n: t for p in base.glob("*.safetensors") for n, t in load_file(p).items()}
    assert all(torch.equal(parameter, stored[name]) for name, parameter in model.named_parameters())
    assert all(0.01 < t.float().std() < 0.03 for t in stored.values() if t.numel() > 1000)
