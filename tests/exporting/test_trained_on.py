"""Adapters that were trained on quantised weights: what an export says of them to every reader."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from adapterhub_lite.exporting.findings import Finding
from adapterhub_lite.exporting.readers import READERS
from adapterhub_lite.exporting.report import ExportReport
from adapterhub_lite.exporting.trained_on import measured_original, quantized_advice, quantized_base

DIGEST = "sha256:" + "a" * 64
FIGURES = "73.0% same next token, KL 0.28 nats"
LOADED = {"peft": {"nf4", "nf4-double", "int8"}, "vllm": {"nf4", "nf4-double"}, "lorax": {"nf4", "nf4-double"}}


def kept(**changes: Any) -> dict[str, Any]:
    """A merge report as the store keeps it."""
    bakes = [
        {"bake": "dequantised", "difference": {"mean_kl": 0.001, "top1_agreement": 0.99}},
        {"bake": "original", "difference": {"mean_kl": 0.283, "top1_agreement": 0.7304}},
    ]
    told = {"quantization": "nf4", "to": "auto", "digest": DIGEST, "adapters": [{"weight": 1.0}], "bakes": bakes}
    return {**told, **changes}


def original(mean_kl: Any, top1: Any) -> list[Any]:
    return [{"bake": "original", "difference": {"mean_kl": mean_kl, "top1_agreement": top1}}]


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8"])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_is_warned(reader, kind):
    found = quantized_base(kind, "smol", "sql@1", READERS[reader], None)
    assert found is not None
    assert (found.rule, found.severity, found.remedy) == ("base_quantization", "warning", "told")
    assert f"trained on {kind} weights of smol" in found.what
    assert "`ahl merge sql@1 --out DIR` measures" in found.what
    assert "ahl merge sql@1 --out DIR" in found.done
    assert ("--to gguf-q8_0" in found.done) is (READERS[reader].form == "gguf")
    loads = kind in LOADED.get(reader, ())
    assert (f"Load the base in {kind}" in found.done) is loads
    assert ("--quantization bitsandbytes" in found.done) is (reader == "vllm" and loads)


@pytest.mark.parametrize("reader", READERS)
def test_what_cannot_be_merged_is_not_sent_to_a_merge(reader):
    found = quantized_base("nf4", "smol", "mood@1", READERS[reader], None, merges=False)
    assert found is not None
    assert "ahl merge" not in found.what + found.done
    loads = "nf4" in LOADED.get(reader, ())
    assert found.done.startswith("Load the base in nf4" if loads else "Serve it here, or with PEFT on a base in nf4")


def test_what_was_measured_is_said():
    found = quantized_base("nf4", "smol", "sql@1", READERS["vllm"], FIGURES)
    assert found is not None
    assert "a merge measured 73.0% same next token, KL 0.28 nats" in found.what
    assert "measures" not in found.what


@pytest.mark.parametrize("kind", ["none", "", None, 4, "awq"])
def test_other_bases_are_not_warned_of(kind):
    assert quantized_base(kind, "smol", "sql@1", READERS["vllm"], None) is None


def test_the_latest_report_on_this_version_counts():
    older = kept(bakes=original(0.5, 0.5))
    assert measured_original([older, kept()], DIGEST, "nf4") == FIGURES
    assert measured_original([kept(), kept(bakes=[])], DIGEST, "nf4") == FIGURES
    assert measured_original([kept(to="gguf-q8_0")], DIGEST, "nf4") == FIGURES
    assert measured_original([kept(task_type="SEQ_CLS")], DIGEST, "nf4") == "73.0% same label, KL 0.28 nats"
    assert measured_original([], DIGEST, "nf4") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"digest": "sha256:" + "b" * 64},
        {"quantization": "int8"},
        {"to": "nf4"},
        {"to": "int8"},
        {"adapters": [{"weight": 0.5}]},
        {"adapters": [{"weight": 1.0}, {"weight": 1.0}]},
        {"adapters": "all"},
        {"bakes": None},
        {"bakes": [None, {"bake": "original"}, {"bake": "original", "difference": []}]},
        {"bakes": original("nan", 0.5)},
        {"bakes": original(0.2, True)},
        {"bakes": original(-0.1, 0.5)},
        {"bakes": original(0.1, 1.5)},
    ],
)
def test_a_report_on_something_else_or_without_figures_does_not(changes):
    assert measured_original([kept(**changes)], DIGEST, "nf4") is None


def test_the_command_that_serves_it_loads_the_base_as_it_was():
    advice = [Finding("advice", "info", text, "told", "") for text in READERS["vllm"].advice]
    found = [one.what for one in quantized_advice(advice, READERS["vllm"], "nf4")]
    assert found[0].startswith("vllm serve BASE --quantization bitsandbytes --enable-lora")
    assert found[1:] == list(READERS["vllm"].advice[1:])
    assert quantized_advice(advice, READERS["vllm"], "int8") == advice
    other = [Finding("base_name", "info", "vllm serve BASE --enable-lora", "told", "")]
    assert quantized_advice(other, READERS["vllm"], "nf4") == other


@pytest.mark.parametrize(
    ("severity", "remedy", "said"),
    [
        ("silently wrong", "rewritten", "would be silently wrong; rewritten"),
        ("silently wrong", "svd", "would be silently wrong; rewritten by SVD"),
        ("silently wrong", "told", "may be silently wrong"),
        ("silently wrong", "refused", "would be silently wrong; refused"),
        ("refused", "rewritten", "would be refused; rewritten"),
        ("refused", "svd", "would be refused; rewritten by SVD"),
        ("refused", "told", "refused by older versions"),
        ("refused", "refused", "refused"),
        ("info", "told", "info"),
        ("info", "svd", "rewritten by SVD"),
        ("info", "rewritten", "rewritten"),
        ("info", "refused", "refused"),
        ("warning", "told", "warning"),
    ],
)
def test_a_verdict_is_of_what_is_written(severity, remedy, said):
    assert Finding("rule", severity, "", remedy, "").verdict == said


def test_what_was_written_is_told_with_what_is_left():
    points = (Finding("head", "refused", "", "told", ""), Finding("layers", "silently wrong", "", "told", ""))
    report = ExportReport("a@1", "", "vllm", None, points, 2, (), None, None)
    caveats = ", but older versions of vllm refuse it (head), and vllm may read it wrongly (layers)."
    assert report.lines() == [f"a@1 can be written for vllm, with rank 2{caveats}"]
    rewritten = (Finding("dora", "silently wrong", "", "svd", ""), Finding("siblings", "refused", "", "rewritten", ""))
    assert ExportReport("a@1", "", "vllm", None, rewritten, 2, (), None, None).lines() == [
        "a@1 can be written for vllm, with rank 2."
    ]


def test_that_the_hubs_weights_may_be_others_is_said():
    from adapterhub_lite.bases.catalog import CATALOG
    from adapterhub_lite.formats.card import Card
    from adapterhub_lite.workflows.export import _other_weights

    name = next(key for key, entry in CATALOG.items() if entry.hub_id)
    hub = CATALOG[name].hub_id
    packaged = Card(base={"name": name}, origin={"kind": "trained"})
    vllm, gguf = READERS["vllm"], READERS["llama.cpp"]
    found = _other_weights(packaged, hub, "sql@1", vllm)
    assert found is not None
    assert f"Serve the folder that `ahl base show {name}` names" in found.done
    assert "ahl merge sql@1 --out DIR" in found.done
    four = replace(packaged, base={"name": name, "quantization": "nf4"})
    quantised = _other_weights(four, hub, "x@1", vllm)
    assert quantised is not None
    assert f"Load the folder that `ahl base show {name}` names in nf4" in quantised.done
    merged = _other_weights(four, hub, "x@1", gguf)
    assert merged is not None
    assert merged.done == "Ship the merge: `ahl merge x@1 --out DIR`."
    whole = _other_weights(packaged, hub, "x@1", vllm, merges=False)
    assert whole is not None
    assert "ahl merge" not in whole.done
    assert (found.rule, found.severity, found.remedy) == ("base_weights", "info", "told")
    assert hub in found.what
    assert _other_weights(packaged, "mine/own", "sql@1", vllm) is None
    assert _other_weights(replace(packaged, base={"name": name, "repo": hub}), hub, "sql@1", vllm) is None
