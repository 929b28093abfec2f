"""The training benchmark on tiny models: that both sides do the same work, and how it is told; not how fast."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases.load import load_base
from benchmarks import training, training_gpu, training_memory, training_plan, training_speed, training_together
from benchmarks.training_cases import Case, classify_case, instruct_case
from benchmarks.training_sides import CANDIDATES, DEFAULTS, Peer, Run, Update, run_ours, run_peer

pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE: tuple[str, dict[str, Any]] = ("llama", {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
})  # fmt: skip
SAME = replace(DEFAULTS, same_order=True)
FLAT = next(peer for peer in CANDIDATES if peer.flat and not peer.autocast and peer.dtype == torch.float32)
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the built-in recipes, wherever this runs."""
    monkeypatch.delenv("AHL_DATA", raising=False)


def _start(case: Case, tmp_path: Path) -> Path:
    folder = tmp_path / "start"
    folder.mkdir(exist_ok=True)
    return case.export(folder)


@pytest.mark.parametrize(("quantize", "peer"), [("none", SAME), ("none", FLAT), ("nf4", SAME)])
def test_both_sides_make_the_same_updates(
    tiny_folder: Callable[..., Path], tmp_path: Path, quantize: str, peer: Peer
) -> None:
    base = load_base(str(tiny_folder("llama")), quantize)
    case = instruct_case(base, 4, rows=3, quantize=quantize).trained(learning_rate=5e-3)
    ours, theirs = run_ours(case), run_peer(case, peer, _start(case, tmp_path))
    assert len(ours.updates) == len(theirs.updates) == 4
    assert [u.tokens for u in ours.updates] == [u.tokens for u in theirs.updates]
    assert ours.tokens == theirs.tokens == case.tokens == sum(len(e.ids) for e in case.examples)
    losses = [u.loss for u in ours.updates]
    assert losses == pytest.approx([u.loss for u in theirs.updates], rel=1e-3)  # Trainer tells four digits
    assert len(set(losses)) == 4
    padding = sum(u.padded for u in theirs.updates) - theirs.tokens
    assert padding == 0 if peer.flat else padding > 0


def test_trainer_in_its_own_order_takes_the_same_rows(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    case = instruct_case(load_base(str(tiny_folder("llama"))), 3, rows=2)
    theirs = run_peer(case.seeded(1), DEFAULTS, _start(case, tmp_path))
    assert len(theirs.updates) == 3
    assert theirs.tokens == case.tokens


def test_a_classifier_learns_the_same(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    case = classify_case(load_base(str(tiny_folder("bert", **CALM))), 4, rows=3).trained(learning_rate=5e-3)
    ours, theirs = run_ours(case), run_peer(case, SAME, _start(case, tmp_path))
    assert ours.tokens == theirs.tokens
    assert [u.loss for u in ours.updates] == pytest.approx([u.loss for u in theirs.updates], rel=1e-3)


def test_another_run_of_the_peer_is_seen_in_the_losses(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    case = instruct_case(load_base(str(tiny_folder("llama"))), 4, rows=3).trained(learning_rate=2e-2)
    start, ours = _start(case, tmp_path), run_ours(case)
    assert training_speed.same_losses(ours, run_peer(case, SAME, start), "Trainer").met
    slower = run_peer(case.trained(learning_rate=1e-6), SAME, start)
    assert training_speed.same_losses(ours, slower, "Trainer").met is False


def _run(*updates: tuple[float, int, float]) -> Run:
    return Run([Update(seconds, tokens, loss, tokens) for seconds, tokens, loss in updates])


def test_the_first_update_is_not_timed_and_tokens_weigh() -> None:
    run = _run((50.0, 10, 4.0), (1.0, 100, 3.0), (3.0, 300, 2.0), (2.0, 200, 1.0))
    assert run.per_thousand == pytest.approx(10.0)
    assert run.last_half == pytest.approx(1.5)
    assert run.tokens == 610


def test_losses_apart_or_other_work_miss_the_goal() -> None:
    ours, near = _run((1, 5, 2.0), (1, 5, 1.0)), _run((1, 5, 9.0), (1, 5, 1.005))
    assert training_speed.same_losses(ours, near, "peer").met
    assert not training_speed.same_losses(ours, _run((1, 5, 2.0), (1, 5, 1.02)), "peer").met
    assert not training_speed.same_losses(ours, _run((1, 5, 2.0), (1, 6, 1.0)), "peer").met
    assert not training_speed.same_losses(ours, _run((1, 5, 2.0), (1, 2, 1.0), (1, 3, 1.0)), "peer").met


def test_learners_get_different_rows_of_one_length(tiny_folder: Callable[..., Path]) -> None:
    cases = training_together.cases_of(load_base(str(tiny_folder("llama"))), 3, 4, 16)
    rows = [tuple(e.ids) for case in cases for e in case.examples]
    assert [len(case.order()) for case in cases] == [4, 4, 4]
    assert {len(row) for row in rows} == {16}
    assert len(set(rows)) == 12
    training_together.check_equal(cases)
    assert training_together.seconds(cases) > 0


def test_memory_is_that_of_a_process_of_its_own(tiny_folder: Callable[..., Path]) -> None:
    case = instruct_case(load_base(str(tiny_folder("llama"))), 1)
    for side in ("ours", "peer"):
        found = training_memory._measured(side, case)
        assert found["base"] > 50e6
        assert 1e6 < found["above"] < 2e9


def test_large_shapes_run_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    made = training_gpu.random_base
    bases: list[Any] = []

    def exact(name: str, shape: Any, device: str, **more: Any) -> Any:
        bases.append(made(name, shape, device, "float32", **more))
        return bases[-1]

    monkeypatch.setattr(training_gpu, "random_base", exact)
    asked: list[Any] = []
    chosen = training_gpu.setup_of
    monkeypatch.setattr(
        training_gpu, "setup_of", lambda some, base: (asked.append(some[0].recipe), chosen(some, base))[1]
    )
    speed, *losses, memory, whole = training_gpu.shape_rows("tiny", SHAPE, "cpu", 3, 1, 32)
    assert speed.figure is not None
    assert speed.peer is not None
    assert [row.met for row in losses] == [True, True]
    assert memory.what.startswith("peak memory above the base, tiny in NF4 with quantised scales")
    assert memory.what.endswith("checkpointing, offload, table_on_host")
    assert whole.what.startswith("peak memory in all")
    assert [base.quantization for base in bases[-2:]] == ["nf4-double"] * 2
    nested = [
        next(m.weight.quant_state.nested for m in base.model.modules() if type(m).__name__ == "Linear4bit")
        for base in (bases[0], bases[-1])
    ]
    assert nested == [False, True]
    # What is measured is what a recipe asks for.
    least, config = asked[-1], asked[-1].training
    assert least.quantize == "nf4-double"
    assert (config.pack_tokens, config.checkpointing, config.offload, config.table_on_host) == (32, True, True, True)
    assert asked[0].training.checkpointing == "auto"
    base = made("tiny", SHAPE, "cpu", "float32")
    assert base.memory.quantized > 0
    (row,) = training_gpu.together_rows(base, 3, 1, 2, 16)
    assert row.goal == ">= 2 x"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {row.skipped for row in training_gpu.rows(2, 1)} == {"no GPU here"}


GOALS = {
    "speed": [">= 10 x", ">= 5 x", ">= 3 x", ">= 6 x"],
    "loss": [
        "within 1%, equal tokens",
        "within 1%, equal tokens",
        "within 15%, equal tokens",
        "within 1%, equal tokens",
    ],
    "together": [">= 2 x"],
    "memory": ["<= 0.4", "<= 0.4", "<= 0.4"],
    "roof": [">= 0.25"],
}


def test_the_quick_form_measures_everything_against_its_peer(
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(training, "BASE", str(tiny_folder("llama")))
    monkeypatch.setattr(training, "ENCODER", str(tiny_folder("bert", **CALM)))
    monkeypatch.setattr(
        training_memory, "_measured", lambda side, case: {"base": 100, "above": 30 if side == "ours" else 60}
    )
    monkeypatch.setattr(training_plan, "_run", lambda mode, trial: {"peak": 9.0, "above": 3.0, "seconds": 2.0})
    monkeypatch.setattr(training_speed, "roof", lambda: {torch.float32: 2e9, torch.bfloat16: 1e9})
    training.main(["--quick", "--json", str(tmp_path / "figures.json")])
    found = json.loads((tmp_path / "figures.json").read_text())
    for part, goals in GOALS.items():
        assert [row["goal"] for row in found if row["part"] == part and row["goal"]] == goals
    assert all(row["met"] for row in found if row["part"] == "loss")
    assert all(row["met"] is None for row in found if row["part"] != "loss")  # so little work judges nothing else
    for row in found:
        if row["peer"] and row["part"] in ("speed", "together"):
            assert row["figure"] == pytest.approx(row["peer"]["p50"] / row["ours"]["p50"])
    share = next(row for row in found if row["part"] == "roof" and row["goal"])
    parameters = sum(p.numel() for p in load_base(training.BASE).model.parameters())
    assert share["figure"] == pytest.approx(4 * parameters * 1000 / share["ours"]["p50"] / 2e9)
    assert [row["figure"] for row in found if row["part"] == "memory"] == [0.5, 0.5, 0.5]
    assert len([row for row in found if row["part"] == training_plan.PART]) == 3 + len(training_plan.QUICK)
    said = capsys.readouterr().out
    assert all(row["what"] in said for row in found)
    assert "peft" in said
    assert "tokens/s" in said
