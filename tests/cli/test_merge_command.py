"""`ahl merge` from end to end on a tiny base: every target, several adapters, refusals, reports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Shop, ahl, told

LOOSE = ["--max-kl", "1e9", "--min-top1", "0", "--max-lost", "1e9", "--max-metric-drop", "1"]
FILES = {"merge_report.json", "merge_report.html", "README.md"}


@pytest.mark.parametrize("to", ["auto", "float32", "bfloat16", "float16", "nf4", "int8", "gguf-f16", "gguf-q8_0"])
def test_every_target_gives_a_folder_that_plain_transformers_loads(shop: Shop, tmp_path: Path, to: str) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "merged"
    found = told("merge", "parrot", "--out", out, "--to", to, *LOOSE, "--store", shop.store)
    assert (found["passed"], found["to"], found["adapters"][0]["ref"]) == (True, to, "parrot@1")
    assert found["metrics"][0]["rows"] == 4
    assert {path.name for path in out.iterdir()} >= FILES
    assert json.loads((out / "merge_report.json").read_text()) == found
    more = {"gguf_file": "model.gguf"} if to.startswith("gguf") else {}
    assert AutoModelForCausalLM.from_pretrained(out, **more) is not None


def test_no_library_draws_its_bars_into_the_output(
    shop: Shop, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = ahl("merge", "parrot", "--out", tmp_path / "merged", "--to", "gguf-f16", *LOOSE, "--store", shop.store)
    assert result.exit_code == 0, result.stderr
    written = capfd.readouterr()
    assert "it/s" not in written.err + written.out + result.stderr + result.stdout


def test_a_classifier_keeps_its_head_and_its_metric(shop: Shop, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    found = told("merge", "moods", "--out", tmp_path / "merged", "--store", shop.store)
    assert found["metrics"][0]["metric"] == "accuracy"
    assert found["metrics"][0]["reference"] == found["metrics"][0]["merged"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.id2label == {0: "glad", 1: "sad"}


def test_the_text_tells_every_threshold(shop: Shop, tmp_path: Path) -> None:
    result = ahl("merge", "parrot@1=0.5", "--out", tmp_path / "merged", "--store", shop.store)
    assert result.exit_code == 0, result.stderr
    for part in ("0.5*parrot@1", "(<= 0.01)", "(>= 0.95)", "(<= 0.25)", "(<= 0.02)", "passed", "merge_report.html"):
        assert part in result.stdout


def test_two_adapters_with_weights(shop: Shop, tmp_path: Path) -> None:
    store = shutil.copytree(shop.store, tmp_path / "store")
    trained = ahl("train", shop.recipe("parrot"), "-o", "training.seed=7", "--name", "second", "--store", store)
    assert trained.exit_code == 0, trained.stderr
    arguments = ["merge", "parrot@1,second@1", "--weights", "0.7,0.3", "--out", tmp_path / "merged"]
    found = told(*arguments, "--store", store)
    assert [member["weight"] for member in found["adapters"]] == [0.7, 0.3]
    shown = ahl("show", "second@1", "--store", store).stdout
    assert "merges:" in shown
    assert str(tmp_path / "merged") in shown


def test_a_failed_merge_leaves_its_report_in_the_store_alone(shop: Shop, tmp_path: Path) -> None:
    arguments = ["merge", "parrot", "--out", tmp_path / "merged", "--to", "nf4", "--max-kl", "0"]
    result = ahl(*arguments, "--store", shop.store)
    assert result.exit_code == 1
    assert "mean KL" in result.stderr
    assert "The report is kept in" in result.stderr
    assert list(tmp_path.glob("*merged*")) + list(tmp_path.glob(".*merged*")) == []
    error = told(*arguments, "--store", shop.store, code=1)["error"]
    assert error["type"] == "MergeFailed"
    assert "FAILED" in ahl("show", "parrot", "--store", shop.store).stdout


def test_only_tensors_are_verified_where_that_is_asked_for(shop: Shop, tmp_path: Path) -> None:
    found = told("merge", "parrot", "--out", tmp_path / "merged", "--verify", "weights", "--store", shop.store)
    assert (found["difference"], found["forward"], found["passed"]) == (None, "none", True)
    assert any("No logits were compared" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["parrot", "--to", "nf5"], "Did you mean nf4"),
        (["parrot", "--dtype", "floaty"], "is not a target"),
        (["parrot,moods", "--weights", "1"], "1 weights for 2 adapters"),
        (["parrot", "--weights", "one"], "not a number"),
        (["parrot", "--residual", "4"], "4 bits"),
        (["parrot,moods"], "made for"),
        (["nobody"], "nobody"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(shop: Shop, tmp_path: Path, arguments: list[str], says: str) -> None:
    result = ahl("merge", *arguments, "--out", tmp_path / "merged", "--store", shop.store)
    assert result.exit_code == 1
    assert says in result.stderr
    assert not (tmp_path / "merged").exists()


_STOPPED = """
import os, signal, sys, time
from adapterhub_lite.merging import merge
from adapterhub_lite.merging.journal import Work
from adapterhub_lite.cli.app import run

own = Work.note
def note(work, file):
    own(work, file)
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(30)
Work.note = note
sys.exit(run(sys.argv[2:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_merge_that_is_stopped_says_how_to_go_on(shop: Shop, tmp_path: Path, number: int, code: int) -> None:
    out = tmp_path / "merged"
    arguments = ["merge", "parrot", "--out", str(out), "--verify", "weights", "--store", str(shop.store)]
    ended = subprocess.run(
        [sys.executable, "-c", _STOPPED, str(int(number)), *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == code, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last == "broken off; no folder appeared, and the same command goes on with what is durable"
    assert not out.exists()
    assert len(list(tmp_path.glob(".merged.merging-*"))) == 1
    again = ahl(*arguments)
    assert again.exit_code == 0, again.stderr
    assert "taken over" in again.stderr
    assert [path.name for path in tmp_path.iterdir() if "merg" in path.name] == ["merged"]
