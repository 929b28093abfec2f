"""The runtime benchmark in its quick form on tiny models: what it measures and how it tells it; not how fast."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import runtime, runtime_encoder

FIGURES = {
    "switch among 8 residents": ">= 200 x",
    "load to first logits": ">= 20 x",
    "load 3 / 1 adapters, the first time": "<= 3.45 x",
    "load 3 / 1 adapters, in memory used before": "<= 3.45 x",
    "the machine's new memory for 3 / 1": "",
    "switch among 4 residents": "<= 1.2 x",
    "base alone, 1 rows x 3 tokens (1 of 1 texts equal)": ">= 1.5 x",
    "base alone, 4 rows x 3 tokens (4 of 4 texts equal)": ">= 1.5 x",
    "4 rows, 1 adapters, 3 tokens (4 of 4 texts equal)": ">= 3.5 x",
    "4 rows, 4 adapters, 3 tokens (4 of 4 texts equal)": ">= 8 x",
    "retention, 4 rows, 1 adapters": ">= 0.85",
    "retention, 4 rows, 4 adapters": ">= 0.85",
    "6 adapters registered, 4 active": ">= 0.98",
    "8 rows, 4 classifiers, texts of our own": ">= 3 x",
    "8 rows, 4 classifiers, equal lengths": "",
}


@pytest.mark.filterwarnings("ignore")
def test_the_quick_form_measures_everything_against_its_peer(
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runtime, "BASE", str(tiny_folder("llama", max_position_embeddings=511)))
    monkeypatch.setattr(runtime_encoder, "ENCODER", str(tiny_folder("bert")))
    monkeypatch.delenv("AHL_DATA", raising=False)
    runtime.main(["--quick", "--json", str(tmp_path / "figures.json")])
    found = json.loads((tmp_path / "figures.json").read_text())
    bounds = [row for row in found if row["what"].startswith("the frozen products")]
    assert [row["figure"] > 0 for row in bounds] == [True, True]
    rows = [row for row in found if row["part"] != "compiled" and row not in bounds]
    swaps, *decoding = [row for row in found if row["part"] == "compiled"]
    assert swaps["what"].startswith("6 swaps among ranks 1 to 64")
    assert swaps["figure"] == 0
    assert swaps["goal"] == "none after"
    assert swaps["told"].endswith("at first, 0 after"), "nothing failed"
    assert [row["skipped"] for row in decoding if not row["ours"]] in ([], ["no CUDA device"] * 4)
    assert {row["what"].partition(":")[0]: row["goal"] for row in rows} == FIGURES
    for row in rows:
        ours, peer = row["ours"]["p50"], row["peer"]["p50"]
        ratios = (peer / ours, ours / peer)
        limit = row["what"].rpartition("limit ")[2] if "retention" in row["what"] else "1"
        assert any(row["figure"] == pytest.approx(r / float(limit), rel=0.02) for r in ratios), row["what"]
        assert row["met"] is None  # so little work judges nothing
    said = capsys.readouterr().out
    assert all(row["what"] in said for row in rows)
    assert "peft" in said
    assert "torch" in said
