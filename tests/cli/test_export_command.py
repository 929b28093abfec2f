"""`ahl export --for READER`, and the command without it as it ever was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import Store
from adapterhub_lite.store.reports import keep_report
from tests.cli.conftest import Shop, ahl, told


def test_without_a_reader_nothing_is_new(shop: Shop, tmp_path: Path) -> None:
    result = ahl("export", "parrot@1", tmp_path / "out", "--store", shop.store)
    assert result.stdout == f"parrot@1 -> {tmp_path / 'out'}\n"
    assert {f.name for f in (tmp_path / "out").iterdir()} >= {"adapter_config.json", "card.json", "manifest.json"}
    made = told("export", "parrot@1", tmp_path / "one.tar", "--store", shop.store)
    assert set(made) == {"ref", "digest", "path"}


def test_for_vllm(shop: Shop, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = ahl("export", "parrot", out, "--for", "vllm", "--base-name", "org/base", "--store", shop.store)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "would be silently wrong; rewritten: base_name"
    assert "  -> written as org/base" in lines[2:5]
    assert f"parrot@1 -> {out} for vllm, with rank 2." in lines
    assert any("modules, relative error" in line for line in lines)
    assert any(line.startswith("vllm serve BASE --enable-lora --max-lora-rank 16") for line in lines)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert Store(shop.store).export("parrot@1", tmp_path / "plain")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (out, tmp_path / "plain"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_check_writes_nothing(shop: Shop, tmp_path: Path) -> None:
    result = ahl("export", "parrot", "--for", "lorax", "--check", "--store", shop.store)
    assert result.exit_code == 0, result.stderr
    assert "padded_rank" in result.stdout
    assert "parrot@1 can be written for lorax, with rank 16." in result.stdout.splitlines()
    assert ahl("export", "parrot", tmp_path / "out", "--for", "lorax", "--check", "--store", shop.store).exit_code == 0
    assert not (tmp_path / "out").exists()


def test_as_json(shop: Shop, tmp_path: Path) -> None:
    found = told("export", "parrot", tmp_path / "out", "--for", "sglang", "--store", shop.store)
    assert (found["ref"], found["reader"], found["path"]) == ("parrot@1", "sglang", str(tmp_path / "out"))
    assert found["error"] < 1e-6
    assert {"rule", "severity", "what", "remedy", "done", "error"} == set(found["findings"][0])
    checked = told("export", "parrot", "--for", "sglang", "--check", "--store", shop.store)
    assert checked["path"] is None
    assert checked["layers"] == []


@pytest.mark.parametrize("check", [(), ("--check",)])
def test_a_refusal_is_told_and_fails(shop: Shop, tmp_path: Path, check: tuple[str, ...]) -> None:
    result = ahl("export", "moods", tmp_path / "out", "--for", "lorax", "--store", shop.store, *check)
    assert result.exit_code == 1
    assert "refused: head\n" in result.stdout
    assert "-> Without its head it gives no labels" in result.stdout
    assert ("nothing was written" in result.stderr) is not bool(check)
    assert not (tmp_path / "out").exists()
    found = told("export", "moods", tmp_path / "out", "--for", "lorax", "--store", shop.store, *check, code=1)
    assert "head" in [one["rule"] for one in found["findings"] if one["remedy"] == "refused"]


def test_ranks_are_cut_when_asked(shop: Shop, tmp_path: Path) -> None:
    found = told("export", "parrot", tmp_path / "out", "--for", "peft", "--rank", "1", "--store", shop.store)
    assert found["rank"] == 1
    assert 0 < found["error"] < 1
    assert {layer["rank"] for layer in found["layers"]} == {1}
    one = next(one for one in found["findings"] if one["rule"] == "rank")
    assert one["error"] == pytest.approx(found["error"], rel=1e-3)
    text = ahl("export", "parrot", tmp_path / "more", "--for", "vllm", "--error", "90%", "--store", shop.store).stdout
    assert "(error " in text


def test_for_ollama(shop: Shop, tmp_path: Path) -> None:
    result = ahl("export", "parrot", tmp_path / "out", "--for", "ollama", "--store", shop.store)
    assert result.exit_code == 1
    assert "--base-name" in result.stdout
    name = ("--base-name", "smol:135m")
    assert ahl("export", "parrot", tmp_path / "out", "--for", "ollama", *name, "--store", shop.store).exit_code == 0
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM smol:135m\n")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["parrot"], 2, "Missing argument 'TARGET'"),
        (["parrot", "out", "--check"], 2, "--for vllm"),
        (["parrot", "out", "--rank", "4"], 2, "--for vllm"),
        (["parrot", "out", "--for", "vlm"], 1, "'vlm' is no reader"),
        (["parrot", "out", "--for", "vllm", "--error", "lots"], 2, "--error 1%"),
        (["parrot", "out", "--for", "vllm", "--error", "100%"], 2, "--error 1%"),
        (["parrot", "out", "--for", "vllm", "--max-rank", "17"], 1, "--max-rank is one of"),
        (["nothing", "out", "--for", "vllm"], 1, "There is no adapter nothing"),
    ],
)
def test_wrong_usage(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments, code, says) -> None:
    monkeypatch.chdir(tmp_path)
    result = ahl("export", *arguments, "--store", shop.store)
    assert result.exit_code == code
    assert says in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_narrow_terminal_loses_nothing(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    text = ahl("export", "parrot", "--for", "lorax", "--check", "--store", shop.store).stdout
    assert all(len(line) <= 60 for line in text.splitlines() if not line.startswith("Serve it"))
    assert "padded_rank" in text


@pytest.mark.parametrize("columns", [None, "100", "120", "400"])
def test_findings_are_blocks_of_lines_that_fit(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: str | None
) -> None:
    monkeypatch.setenv("COLUMNS", columns) if columns else monkeypatch.delenv("COLUMNS")
    text = ahl("export", "moods", "--for", "vllm", "--check", "--store", shop.store).stdout
    blocks = text.partition("\n\n")[0].splitlines()
    assert max(map(len, blocks)) <= 100 + len(shop.causal)  # no word is broken, nor a path
    assert [line for line in blocks if not line.startswith("  ")] == [
        "refused by older versions: head",
        "may be silently wrong: base_name",
    ]
    assert " ".join(text.split()).count("from 2026-09 on it loads the head of a sequence classifier") == 1


def test_the_last_line_says_what_the_findings_do(shop: Shop) -> None:
    text = ahl("export", "moods", "--for", "vllm", "--check", "--base-name", "org/b", "--store", shop.store).stdout
    said = next(line for line in text.splitlines() if "can be written" in line)
    assert said == "moods@1 can be written for vllm, with rank 2, but older versions of vllm refuse it (head)."
    text = ahl("export", "parrot", "--for", "vllm", "--check", "--store", shop.store).stdout
    assert "with rank 2, but vllm may read it wrongly (base_name)." in text
    text = ahl("export", "parrot", "--for", "vllm", "--check", "--base-name", "org/b", "--store", shop.store).stdout
    assert "parrot@1 can be written for vllm, with rank 2." in text.splitlines()


def test_a_command_stays_on_one_line() -> None:
    from adapterhub_lite.cli.commands.export import _wrapped

    text = "Load it there, or serve what `ahl merge sql@1 --out DIR` writes, anywhere."
    for limit in range(30, 90):
        lines = _wrapped(text, limit, "  -> ", "     ")
        assert " ".join(" ".join(lines).split()) == f"-> {text}"
        assert sum("`ahl merge sql@1 --out DIR`" in line for line in lines) == 1
        assert max(map(len, lines)) <= max(limit, 33)


def test_a_largest_rank_that_was_given_is_spoken_of(shop: Shop) -> None:
    asked = ("--for", "vllm", "--max-rank", "1", "--check", "--store", shop.store)
    result = ahl("export", "parrot", *asked)
    text = " ".join(result.stdout.split())
    assert result.exit_code == 1
    assert "rank 2 is above your --max-rank 1" in text
    assert "--max-rank 8, or cut it: --rank 1, or --error 1%." in text
    assert "16 unless set" not in text


def test_what_was_trained_on_quantised_weights_is_warned_of(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Store.card

    def quantised(self: Store, ref: object) -> Card:
        found = card(self, ref)  # type: ignore[arg-type]
        return replace(found, base={**found.base, "quantization": "nf4"})

    monkeypatch.setattr(Store, "card", quantised)
    out = tmp_path / "out"
    result = ahl("export", "parrot", out, "--for", "vllm", "--base-name", "org/b", "--store", shop.store)
    assert result.exit_code == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert result.stdout.startswith("warning: base_quantization\n")
    assert "trained on nf4 weights" in text
    assert "`ahl merge parrot@1 --out DIR` measures" in text
    assert "with rank 2, but mind the warning above (base_quantization)." in text
    assert "vllm serve BASE --quantization bitsandbytes --enable-lora" in text
    assert any("`ahl merge parrot@1 --out DIR`" in line for line in result.stdout.splitlines())
    report = json.loads((out / "export_report.json").read_text())
    assert (report["findings"][0]["rule"], report["findings"][0]["severity"]) == ("base_quantization", "warning")
    told = {"quantization": "nf4", "to": "auto", "digest": report["digest"], "adapters": [{"weight": 1.0}]}
    bake = {"bake": "original", "difference": {"mean_kl": 0.283, "top1_agreement": 0.7304}}
    data = json.dumps({**told, "bakes": [bake]}).encode()
    kept = keep_report(shop.store, "parrot", 1, {"merge_report.json": data})
    try:
        text = ahl("export", "parrot", "--for", "vllm", "--check", "--store", shop.store).stdout
    finally:
        (kept / "merge_report.json").unlink()
        kept.rmdir()
    assert "a merge measured 73.0% same next token, KL 0.28 nats" in " ".join(text.split())
