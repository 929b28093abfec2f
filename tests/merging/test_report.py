"""The report of a merge: its verdict, its JSON and its page, and where the store keeps it."""

from __future__ import annotations

import errno
import json
import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from adapterhub_lite.errors import InvalidName, StoreError
from adapterhub_lite.merging.report import (
    TARGETS,
    BakeFigures,
    Check,
    LayerError,
    Member,
    MergeReport,
    TaskFigure,
    Thresholds,
    compare_logits,
)
from adapterhub_lite.merging.report_html import to_html
from adapterhub_lite.store.reports import keep_report, kept_reports
from adapterhub_lite.workflows.merge_card import merged_card
from tests.store.faulty import Crash, Failing

HOSTILE = '<script src="http://evil/x.js">alert("1")</script>&\'"'


def a_report(**changes) -> MergeReport:
    torch.manual_seed(0)
    expected = [torch.randn(5, 7), torch.randn(3, 7)]
    difference = compare_logits(expected, [t + 1e-3 * torch.randn_like(t) for t in expected])
    given = {
        "adapter": "sql@1",
        "digest": "a" * 64,
        "base": "tiny",
        "out": "/somewhere/merged",
        "bake": "original",
        "quantization": "none",
        "dtype": "auto",
        "changed_tensors": 2,
        "tensors": 9,
        "bytes": 1000,
        "seconds": 1.0,
        "difference": difference.named(["first prompt", "second prompt"]),
        "effect_kl": 0.5,
        "adapters": (Member("sql@1", "a" * 64, 1.0),),
        "metrics": (TaskFigure("sql@1", "exact_match", 100, 100, 0.80, 0.79),),
        "layers": (
            LayerError("model.layers.0.mlp.up_proj.weight", "float32", 1e-7, 1e-5, 0.1, 1e-6, 1.0),
            LayerError("model.embed_tokens.weight", "float32", 0.0, 1e-5),
        ),
        "created": "2026-01-31T12:00:00Z",
        "libraries": {"torch": "2.0"},
        **changes,
    }
    return MergeReport(**given)


def test_no_figure_above_its_limit_passes():
    assert not a_report(thresholds=Thresholds(max_kl=0.0)).passed
    (kl, *_) = a_report(thresholds=Thresholds(max_kl=1e-12)).checks
    assert kl.value > 1e-12
    assert not kl.passed
    drop = TaskFigure("sql@1", "exact_match", 50, 50, 0.80, 0.78)
    assert drop.drop > 0.02  # by rounding alone
    assert a_report(metrics=(drop,)).passed


def test_what_a_metric_cannot_tell_is_said():
    def said(rows: int, reference: float) -> str:
        report = a_report(metrics=(TaskFigure("sql@1", "exact_match", rows, 100, reference, reference),))
        return next(line for line in report.lines() if line.startswith("exact_match"))

    assert said(100, 0.8).endswith("(+0.0%)")
    assert said(5, 0.8).endswith("a single row is 20.0% of them")
    assert "it decides nothing" in said(100, 0.0)


def test_a_classifier_is_spoken_of_in_texts_and_labels():
    report = a_report(task_type="SEQ_CLS")
    assert any("over 8 texts" in line and "same label" in line for line in report.lines())
    assert report.checks[1].name == "same label"
    assert "next token" not in to_html(report)
    assert "next token" not in "".join(report.lines())


def test_a_good_merge_passes_and_every_threshold_is_told():
    report = a_report()
    assert report.passed
    assert [check.limit for check in report.checks] == [0.01, 0.95, 0.25, 0.02, 1e-5]
    assert all(f"{check.limit:g}" in to_html(report) for check in report.checks)
    assert report.lines()[-1].startswith("passed: mean KL")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"thresholds": Thresholds(max_kl=1e-9)}, "mean KL"),
        ({"thresholds": Thresholds(min_top1=1.1)}, "same next token"),
        ({"effect_kl": 1e-9}, "adapter's effect"),
        ({"metrics": (TaskFigure("sql@1", "exact_match", 100, 100, 0.80, 0.77),)}, "drop in exact_match"),
        ({"layers": (LayerError("a.weight", "float32", 0.1, 1e-5, 0.1, 1.0, 0.0),)}, "relative error of a.weight"),
        ({"layers": (LayerError("a.weight", "float32", math.nan, 1e-5),)}, "relative error of a.weight"),
        ({"layers": (LayerError("a.weight", "missing", math.inf, 0.0),)}, "relative error of a.weight"),
        ({"difference": compare_logits([torch.zeros(2, 3)], [torch.full((2, 3), math.nan)])}, "mean KL"),
    ],
)
def test_each_figure_can_fail_the_merge(changes, says):
    report = a_report(**changes)
    assert not report.passed
    assert says in " ".join(check.name for check in report.failures)
    assert report.lines()[-1].startswith("FAILED")
    assert '<span class="verdict failed">' in to_html(report)


def test_a_figure_at_its_threshold_passes():
    assert Check("a", 0.8 - 0.1, "<=", 0.7).passed
    assert Check("a", 0.1 + 0.2, ">=", 0.3).passed
    assert not Check("a", math.nan, "<=", math.inf).passed
    assert not Check("a", math.nan, ">=", 0.0).passed


def test_without_logits_each_layer_must_keep_the_adapters_change():
    layers = tuple(LayerError(f"{i}.weight", "nf4", 0.1, 0.2, 0.05, 2.0, kept) for i, kept in enumerate((0.9, 0.7)))
    report = a_report(difference=None, effect_kl=None, metrics=(), layers=layers, forward="none")
    assert [check.name for check in report.failures] == ["share of the change that 1.weight keeps"]
    assert replace(report, thresholds=Thresholds(max_lost=0.3)).passed


def test_nothing_compared_is_no_pass():
    assert not a_report(difference=None, metrics=(), layers=()).passed


def test_every_target_has_thresholds_and_few_bits_have_wider_ones():
    assert {to for to in TARGETS if Thresholds.of(to) != Thresholds()} == {"nf4", "int8"}
    assert Thresholds.of("nf4").max_kl > Thresholds.of("int8").max_kl > Thresholds.of("auto").max_kl


def test_the_json_is_strict_whatever_the_figures():
    report = a_report(layers=(LayerError("a.weight", "missing", math.inf, 0.0, math.nan),))
    text = json.dumps(report.to_dict(), allow_nan=False)
    told = json.loads(text)
    assert (told["layers"][0]["error"], told["passed"]) == ("inf", False)
    assert told["checks"][0]["passed"] is True


def hostile_report() -> MergeReport:
    return a_report(
        adapter=HOSTILE,
        base=HOSTILE,
        out=HOSTILE,
        adapters=(Member(HOSTILE, HOSTILE, 1.0),),
        base_fingerprint=HOSTILE,
        base_origin=HOSTILE,
        notes=(HOSTILE,),
        libraries={HOSTILE: HOSTILE},
        metrics=(TaskFigure(HOSTILE, HOSTILE, 1, 2, 0.5, 0.5),),
        layers=(LayerError(HOSTILE, HOSTILE, 0.1, 0.2, 0.1, 0.1, 1.0),),
        bakes=(BakeFigures(HOSTILE, compare_logits([torch.zeros(1, 2)], [torch.zeros(1, 2)]), HOSTILE, 0.5, 0.5, 1),),
        difference=compare_logits([torch.zeros(2, 3)], [torch.ones(2, 3)]).named([HOSTILE]),
        created=HOSTILE,
    )


def test_the_page_stands_alone_and_escapes_what_users_wrote():
    page = to_html(hostile_report())
    assert "<script" not in page
    assert 'src="' not in page
    without_text = re.sub(r">[^<]*<", "><", page)
    assert "http:" not in without_text
    assert "https:" not in without_text
    assert "@import" not in page
    assert "url(" not in page
    assert "default-src 'none'" in page
    assert page.count("&lt;script") > 10


def test_the_page_is_well_formed_and_its_pictures_hold_every_layer_and_prompt():
    for report in (a_report(), hostile_report()):
        body = to_html(report).split("<body>")[1].split("</body>")[0].replace("<br>", "<br/>")
        tree = ElementTree.fromstring(f"<body>{body}</body>")
        assert len(tree.findall(".//svg")) == 3
    page = to_html(a_report())
    for text in ("first prompt", "second prompt", "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
        assert text in page


def test_the_histogram_counts_every_logit():
    report = a_report()
    assert report.difference is not None
    assert sum(count for _, count in report.difference.histogram) == 8 * 7
    a, b = torch.zeros(1, 3), torch.tensor([[0.0, 2e-3, 50.0]])
    counts = [pair for pair in compare_logits([a], [b]).histogram if pair[1]]
    assert [count for _, count in counts] == [1, 1, 1]
    lows = [low for low, _ in counts]
    assert lows[0] == 0.0
    assert lows[1] == pytest.approx(1e-3)
    assert lows[2] == pytest.approx(10**1.5)


def test_the_rows_of_a_difference_add_up_to_it():
    torch.manual_seed(1)
    a, b = [torch.randn(4, 6), torch.randn(9, 6)], [torch.randn(4, 6), torch.randn(9, 6)]
    found = compare_logits(a, b)
    alone = [compare_logits([x], [y]) for x, y in zip(a, b, strict=True)]
    assert [row.kl for row in found.rows] == pytest.approx([one.mean_kl for one in alone])
    assert found.mean_kl == pytest.approx((4 * alone[0].mean_kl + 9 * alone[1].mean_kl) / 13)
    assert found.max_logit == max(one.max_logit for one in alone)


def test_the_card_of_a_merged_model_claims_no_licence_and_cannot_be_broken_out_of():
    card = merged_card(a_report(base_origin="hub org/model"), {"architectures": ["LlamaForCausalLM"]})
    assert "license: unknown" in card
    assert "base_model: org/model" in card
    assert "`" + "a" * 64 + "`" in card
    hostile = merged_card(hostile_report(), {})
    outside = re.sub(r"`[^`\n]*`", "", hostile)  # code is shown as it is
    assert "<script" not in outside.replace("\\<script", "")
    assert "base_model" not in hostile


# -- kept in the store ------------------------------------------------------------------------------------------------

FILES = {"merge_report.json": b'{"passed": true}', "merge_report.html": b"<html>"}


def test_reports_are_kept_beside_the_versions_and_read_back(tmp_path):
    folders = [keep_report(tmp_path, "sql", 1, FILES) for _ in range(2)]
    assert all(folder.parent == tmp_path / "reports" / "sql" / "1" for folder in folders)
    assert len(set(folders)) == 2
    assert [told for _, told in kept_reports(tmp_path, "sql", 1)] == [{"passed": True}] * 2
    assert kept_reports(tmp_path, "sql", 2) == []
    assert list((tmp_path / "tmp").iterdir()) == []
    (folders[0] / "merge_report.json").chmod(0o644)
    (folders[0] / "merge_report.json").write_text("{broken")
    assert [folder for folder, _ in kept_reports(tmp_path, "sql", 1)] == [folders[1]]


@pytest.mark.parametrize("error", [Crash(), OSError(errno.ENOSPC, "full")])
def test_a_report_is_whole_or_not_there(tmp_path, error):
    for at in range(1, 60):
        root = tmp_path / str(at)
        root.mkdir()
        fs = Failing(at, error)
        try:
            keep_report(root, "sql", 1, FILES, fs)
        except (Crash, OSError):
            there = [p for p in (root / "reports").rglob("*") if p.is_file()] if (root / "reports").exists() else []
            assert {p.name for p in there} in (set(), set(FILES))
        else:
            if fs.count < at:
                return
    raise AssertionError("never completed")


def test_names_of_reports_are_checked(tmp_path):
    with pytest.raises(InvalidName):
        keep_report(tmp_path, "../sql", 1, FILES)
    with pytest.raises(ValueError, match="names"):
        keep_report(tmp_path, "sql", 1, {"../x.json": b""})
    (tmp_path / "reports").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError):
        keep_report(tmp_path, "sql", 1, FILES)
    assert not (tmp_path / "elsewhere").exists()
