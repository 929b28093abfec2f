"""The adapter of what rounding lost: as near as Eckart and Young allow, read by plain PEFT on the merged 4-bit base."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from adapterhub_lite.adapters.adapter import read_adapter
from adapterhub_lite.errors import Unsupported
from adapterhub_lite.merging import residual
from adapterhub_lite.merging.inputs import Inputs
from adapterhub_lite.merging.quantised import quantised_plan, residual_adapter
from adapterhub_lite.merging.residual import Metric, low_rank, write_residual
from adapterhub_lite.store.fs import MUTABLE
from tests import peers
from tests.merging.test_quantised import (
    WIDE,
    coupled,
    dense_twin,
    loaded,
    merge_plan,
    wide_folder,  # noqa: F401
    written,
)

SHAPES = [(40, 64), (64, 40), (96, 96), (1200, 1100), (1100, 1300)]


def inputs_from(x: torch.Tensor) -> Inputs:
    made = Inputs(x.shape[1])
    made.add(x)
    return made


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 8])
def test_what_is_left_is_what_eckart_and_young_leave(shape: tuple[int, int], rank: int):
    """Of flat spectra too, where large matrices are only looked at through a Krylov space."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator)
    found = low_rank(matrix, rank)
    assert (found.down.shape, found.up.shape) == ((rank, shape[1]), (shape[0], rank))
    values = torch.linalg.svdvals(matrix.double())
    best = float(values[rank:].square().sum().sqrt())
    left = float((matrix - found.dense()).double().norm())
    assert best * (1 - 1e-6) <= left <= best * (1 + (1e-5 if min(shape) <= 256 else 1e-3))
    again = low_rank(matrix, rank)
    assert torch.equal(found.up, again.up)


def test_a_matrix_of_low_rank_is_found_whole():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn((1500, 3), generator=generator) @ torch.randn((3, 1200), generator=generator)
    found = low_rank(matrix, 5)
    torch.testing.assert_close(found.dense(), matrix, rtol=1e-4, atol=1e-4)
    assert bool(torch.isfinite(found.up).all())
    assert bool((low_rank(torch.zeros((30, 20)), 4).dense() == 0).all())


@pytest.mark.parametrize("wide", [False, True])
def test_with_inputs_the_layers_output_is_what_is_kept(wide: bool, monkeypatch: pytest.MonkeyPatch):
    """Against the SVD of the loss times the root of the moments; of wide layers times the size of each input."""
    if wide:
        monkeypatch.setattr(residual, "PANEL", 32)
    loss = torch.randn((40, 64), generator=torch.Generator().manual_seed(0))
    inputs = inputs_from(coupled(64))
    metric = Metric(inputs)
    found = low_rank(loss, 6, metric)
    moment = inputs.moment(0, 64).double()
    moment = torch.diag(moment.diagonal()) if wide else moment
    if not wide:
        moment = moment + torch.eye(64, dtype=torch.float64) * 0.01 * moment.diagonal().mean()
    root = torch.linalg.cholesky(moment)
    best = float(torch.linalg.svdvals(loss.double() @ root)[6:].square().sum())
    assert metric.error(loss - found.dense()) == pytest.approx(best, rel=1e-4)
    assert metric.error(loss - low_rank(loss, 6).dense()) > 1.05 * best


def test_the_weights_are_those_of_a_merge_without_it(tmp_path: Path, wide_folder: Any):  # noqa: F811
    """Without the adapter beside it the folder is a merged model all the same."""
    base = wide_folder("llama")
    plan = merge_plan(tmp_path, base, "llama", "CAUSAL_LM")
    folders = [written(quantised_plan(plan, "nf4", residual_rank=rank), base, tmp_path / str(rank)) for rank in (0, 4)]
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_peft_reads_it_on_the_merged_base(tmp_path: Path, wide_folder: Any, family: str):  # noqa: F811
    task = peers.task_type(family)
    base = wide_folder(family)
    plan = merge_plan(tmp_path, base, family, task)
    merged = written(plan, base, tmp_path / "merged")
    quantised = quantised_plan(plan, "nf4", residual_rank=8)
    out = written(quantised, base, tmp_path / "out")
    adapter = residual_adapter(quantised)
    folder = write_residual(adapter, out)
    assert folder == out / "residual"
    factors = {name: layer.factors() for name, layer in quantised.layers.items()}
    for name, found in quantised.roundings.items():
        assert found.repaired is not None
        assert found.repaired < found.error, name
    model = peft.PeftModel.from_pretrained(loaded(out, task, dtype=torch.float32), folder).eval()
    assert {
        n for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")
    } == set(factors)
    twin = dense_twin(out, merged, task)
    for name, one in factors.items():
        module = twin.get_submodule(name)
        dense = one.dense()
        module.weight.data += dense.T if type(module).__name__ == "Conv1D" else dense
    peers.assert_logits_equal(peers.logits(model), peers.logits(twin), relative=1e-4)
    exact = peers.logits(peers.plain(merged, task))
    bare, mended = (_gap(peers.logits(m), exact) for m in (loaded(out, task, dtype=torch.float32), model))
    assert mended < bare


def _gap(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True))


def test_more_ranks_leave_less_and_small_layers_have_ranks_of_their_own(tmp_path: Path, tiny_folder: Any):
    base = tiny_folder("llama", **WIDE)
    plan = merge_plan(tmp_path, base, "llama", "CAUSAL_LM", "bfloat16")
    left = []
    for rank in (1, 4, 16, 48):
        quantised = quantised_plan(plan, "nf4", residual_rank=rank)
        adapter = residual_adapter(quantised)  # before anything was written
        left.append([r.repaired for r in quantised.roundings.values()])
        assert {t.dtype for t in adapter.tensors.values()} == {torch.bfloat16}
        folder = tmp_path / f"r{rank}"
        folder.mkdir()
        back = read_adapter(write_residual(adapter, folder))
        assert back.tensors.keys() == adapter.tensors.keys()
    assert all(a > b for one, other in pairwise(left) for a, b in zip(one, other, strict=True))
    config = json.loads((tmp_path / "r48" / "residual" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) == {32}  # keys and values of this model are 32 wide
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert sorted(config["target_modules"]) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_the_weights_stay_those_that_the_adapter_was_made_for(tmp_path: Path, tiny_folder: Any):
    """Asked for before and after the weights are written, layer by layer, it is the same."""
    base = tiny_folder("llama", **WIDE)
    plan = merge_plan(tmp_path, base, "llama", "CAUSAL_LM")
    early = quantised_plan(plan, "nf4", residual_rank=4)
    first = residual_adapter(early).tensors
    written(early, base, tmp_path / "early")
    late = quantised_plan(plan, "nf4", residual_rank=4)
    written(late, base, tmp_path / "late")
    second = residual_adapter(late).tensors
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("early", "late"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_plan_without_one_has_none(tmp_path: Path, tiny_folder: Any):
    base = tiny_folder("llama", **WIDE)
    plan = quantised_plan(merge_plan(tmp_path, base, "llama", "CAUSAL_LM"), "nf4")
    with pytest.raises(Unsupported, match="no residual"):
        residual_adapter(plan)


def test_an_int8_base_may_have_one_too(tmp_path: Path, tiny_folder: Any):
    base = tiny_folder("llama", **WIDE)
    plan = quantised_plan(merge_plan(tmp_path, base, "llama", "CAUSAL_LM"), "int8", residual_rank=2)
    written(plan, base, tmp_path / "out")
    assert all(r.repaired is not None and r.repaired < r.error < 0.02 for r in plan.roundings.values())


def test_writing_makes_two_files_and_syncs_them(tmp_path: Path, tiny_folder: Any):
    from adapterhub_lite.store.fs import FileSystem

    class Watching(FileSystem):
        def __init__(self) -> None:
            self.synced: list[str] = []

        def fsync_dir(self, path: Path) -> None:
            self.synced.append(path.name)
            super().fsync_dir(path)

    base = tiny_folder("llama", **WIDE)
    plan = quantised_plan(merge_plan(tmp_path, base, "llama", "CAUSAL_LM"), "nf4", residual_rank=1)
    fs = Watching()
    folder = write_residual(residual_adapter(plan), tmp_path, fs)
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert all(p.stat().st_mode & 0o777 == MUTABLE for p in folder.iterdir())
    assert fs.synced == ["residual"]
