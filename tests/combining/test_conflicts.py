"""Conflicts against float64 brute force on whole matrices: cosines, overlaps, signs, shares, winners, advice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapterhub_lite.combining.changes import Change, Changes, changes_of
from adapterhub_lite.combining.conflicts import ConflictReport, conflicts
from adapterhub_lite.combining.low_rank import LowRank
from adapterhub_lite.combining.streamed import BLOCK
from adapterhub_lite.combining.terms import weighted_sum
from adapterhub_lite.errors import AdapterMismatch, Unsupported
from adapterhub_lite.events import Progress
from adapterhub_lite.formats.specs import LoraSpec
from adapterhub_lite.workflows.conflicts_plot import draw_conflicts
from tests.combining import truth

Q, V, MLP = "model.layers.0.q_proj", "model.layers.0.v_proj", "model.layers.10.mlp"


def low_rank(n_out: int, n_in: int, rank: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, n_in, generator=generator, dtype=torch.float64)
    return LowRank(down, torch.randn(n_out, rank, generator=generator, dtype=torch.float64))


def changes(name: str, **modules: LowRank) -> Changes:
    places = {"q": Q, "v": V, "mlp": MLP}
    return Changes(name, {places[key]: Change(matrix) for key, matrix in modules.items()}, {}, LoraSpec(4, 4.0))


def dense(matrix: LowRank) -> torch.Tensor:
    return matrix.up @ matrix.down


def three() -> list[tuple[Changes, float]]:
    """Ranks and modules that differ, and a negative weight."""
    return [
        (changes("a@1", q=low_rank(24, 40, 3, 1), v=low_rank(16, 40, 2, 2), mlp=low_rank(30, 20, 5, 3)), 0.7),
        (changes("b@2", q=low_rank(24, 40, 6, 4), mlp=low_rank(30, 20, 2, 5)), -1.3),
        (changes("c@1", q=low_rank(24, 40, 1, 6), v=low_rank(16, 40, 4, 7)), 0.4),
    ]


def weighted(members: list[tuple[Changes, float]], module: str) -> list[torch.Tensor | None]:
    return [w * dense(c.modules[module].matrix) if module in c.modules else None for c, w in members]


def flat(members: list[tuple[Changes, float]]) -> list[torch.Tensor]:
    """Each member's changes of all modules as one vector."""
    shapes = {m: dense(c.modules[m].matrix).shape for c, _ in members for m in c.modules}
    parts = {m: weighted(members, m) for m in sorted(shapes)}
    return [
        torch.cat([(torch.zeros(shapes[m]) if d[i] is None else d[i]).double().flatten() for m, d in parts.items()])
        for i in range(len(members))
    ]


def brute_overlap(one: torch.Tensor, other: torch.Tensor, rows: bool) -> float:
    spaces = []
    for matrix in (one, other):
        u, values, v = torch.linalg.svd(matrix)
        rank = int((values > 1e-9 * values[0]).sum())
        spaces.append(v[:rank].T if rows else u[:, :rank])
    return float((spaces[0].T @ spaces[1]).square().sum()) / min(s.shape[1] for s in spaces)


def brute_signs(one: torch.Tensor, other: torch.Tensor, density: float) -> tuple[int, int]:
    count = max(1, round(density * one.numel()))
    kept = [m.abs() >= m.abs().flatten().sort(descending=True).values[count - 1] for m in (one, other)]
    both = kept[0] & kept[1]
    return int((both & (one * other < 0)).sum()), int(both.sum())


@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
def test_every_figure_is_that_of_the_whole_matrices(density: float) -> None:
    members = three()
    report = conflicts(members, density)
    assert [place.name for place in report.modules] == [Q, V, MLP]
    assert (report.members, report.weights) == (("a@1", "b@2", "c@1"), (0.7, -1.3, 0.4))
    for place in report.modules:
        deltas = weighted(members, place.name)
        total = sum(d for d in deltas if d is not None)
        for i, delta in enumerate(deltas):
            if delta is None:
                assert (place.norms[i], place.shares[i], place.kept[i]) == (None, None, None)
                continue
            dot = float((delta * total).sum())
            assert place.norms[i] == pytest.approx(float(delta.norm()))
            assert place.shares[i] == pytest.approx(dot / float(total.norm()) ** 2)
            assert place.kept[i] == pytest.approx(dot / float(delta.norm()) ** 2)
        assert sum(share for share in place.shares if share is not None) == pytest.approx(1)
        for met, (i, j) in zip(place.meetings, [(0, 1), (0, 2), (1, 2)], strict=True):
            one, other = deltas[i], deltas[j]
            if one is None or other is None:
                assert (met.cosine, met.inputs, met.outputs, met.sign_conflict, met.both) == (None, None, None, None, 0)
                continue
            assert met.cosine == pytest.approx(float((one * other).sum() / one.norm() / other.norm()))
            assert met.norm_ratio == pytest.approx(float(other.norm() / one.norm()))
            assert met.inputs == pytest.approx(brute_overlap(one, other, rows=True))
            assert met.outputs == pytest.approx(brute_overlap(one, other, rows=False))
            opposite, both = brute_signs(one, other, density)
            assert met.both == both
            assert met.sign_conflict == (pytest.approx(opposite / both) if both else None)


def test_layers_and_the_whole_are_sums_over_modules() -> None:
    members = three()
    report = conflicts(members, 0.3)
    assert [place.name for place in report.layers] == ["model.layers.0", "model.layers.10"]
    vectors = flat(members)
    total = sum(vectors)
    for i, vector in enumerate(vectors):
        assert report.whole.norms[i] == pytest.approx(float(vector.norm()))
        assert report.whole.shares[i] == pytest.approx(float(vector @ total / (total @ total)))
    for met, (i, j) in zip(report.whole.meetings, [(0, 1), (0, 2), (1, 2)], strict=True):
        assert met.cosine == pytest.approx(float(vectors[i] @ vectors[j] / vectors[i].norm() / vectors[j].norm()))
        counts = [
            brute_signs(d[i], d[j], 0.3)
            for d in (weighted(members, m) for m in (Q, V, MLP))
            if d[i] is not None and d[j] is not None
        ]
        assert met.both == sum(both for _, both in counts)
        assert met.sign_conflict == pytest.approx(sum(opposite for opposite, _ in counts) / met.both)
    layer = report.layers[0]
    norms = [float(delta.norm()) for delta in (weighted(members, m)[0] for m in (Q, V)) if delta is not None]
    assert layer.norms[0] == pytest.approx(math.hypot(*norms))
    inputs = [place.meetings[1].inputs for place in report.modules[:2]]
    assert layer.meetings[1].inputs == pytest.approx(sum(one for one in inputs if one is not None) / 2)


def test_signs_are_counted_over_blocks_of_rows() -> None:
    """A matrix of more than one block gives what it gives whole."""
    one, other = low_rank(700, 1024, 2, 1), low_rank(700, 1024, 2, 2)
    assert one.up.shape[0] * one.down.shape[1] > 2 * BLOCK
    met = conflicts([(changes("a", q=one), 1.0), (changes("b", q=other), 1.0)], 0.1).whole.meetings[0]
    opposite, both = brute_signs(dense(one), dense(other), 0.1)
    assert (met.both, met.sign_conflict) == (both, pytest.approx(opposite / both))


def test_rows_evenly_over_a_large_matrix_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterhub_lite.combining.conflicts._MOST", 40 * 10 + 7)
    one, other = low_rank(24, 40, 3, 1), low_rank(24, 40, 3, 2)
    met = conflicts([(changes("a", q=one), 1.0), (changes("b", q=other), 1.0)], 0.3).whole.meetings[0]
    rows = [i * 24 // 10 for i in range(10)]
    opposite, both = brute_signs(dense(one)[rows], dense(other)[rows], 0.3)
    assert (met.both, met.sign_conflict) == (both, pytest.approx(opposite / both))
    assert met.cosine == pytest.approx(
        float((dense(one) * dense(other)).sum() / dense(one).norm() / dense(other).norm())
    )


def test_no_matrix_is_formed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    formed: list[int] = []
    rows = LowRank.rows

    def counted(self: LowRank, start: int, stop: int) -> torch.Tensor:
        formed.append(stop - start)
        return rows(self, start, stop)

    monkeypatch.setattr(LowRank, "rows", counted)
    one, other = low_rank(700, 1024, 2, 1), low_rank(700, 1024, 2, 2)
    conflicts([(changes("a", q=one), 1.0), (changes("b", q=other), 1.0)])
    assert 0 < max(formed) <= BLOCK // 1024 < 700


def test_the_same_change_agrees_in_everything() -> None:
    one = low_rank(24, 40, 3, 1)
    scaled = LowRank(one.down * 2, one.up / 4)
    report = conflicts([(changes("a", q=one), 1.0), (changes("b", q=scaled), 1.0)])
    met = report.whole.meetings[0]
    assert (met.cosine, met.inputs, met.outputs) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))
    assert (met.sign_conflict, met.norm_ratio) == (0, pytest.approx(0.5))
    assert report.whole.kept == (pytest.approx(1.5), pytest.approx(3))
    assert report.whole.winner == "a"
    assert report.advice.method == "linear"
    assert "counts twice" in report.advice.why


def test_opposites_cancel_and_nobody_wins() -> None:
    one = low_rank(24, 40, 3, 1)
    report = conflicts([(changes("a", q=one), 1.0), (changes("b", q=one), -1.0)])
    met = report.whole.meetings[0]
    assert (met.cosine, met.sign_conflict) == (pytest.approx(-1), 1)
    assert (report.whole.shares, report.whole.winner) == ((None, None), None)
    assert report.whole.kept == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    assert report.advice.method == "task_arithmetic"
    assert "b and a agree before weights (cosine +1.00), so this takes from a too" in report.advice.why


def apart(
    *, weights: Sequence[float] = (1.0, 1.0), data: Sequence[str] | None = None, **scales: float
) -> ConflictReport:
    """Changes of one module that share neither inputs nor outputs."""
    down, up = torch.eye(20, dtype=torch.float64), torch.eye(24, dtype=torch.float64)
    members = []
    for i, (name, scale) in enumerate(scales.items()):
        part = slice(3 * i, 3 * i + 3)
        members.append((changes(name, q=LowRank(down[part], scale * up[:, part])), weights[i]))
    return conflicts(members, trained_on=data)


def test_changes_that_do_not_meet_are_added() -> None:
    report = apart(a=1.0, b=1.0)
    met = report.whole.meetings[0]
    assert (met.cosine, met.inputs, met.outputs) == (0, 0, 0)
    assert report.whole.kept == (1, 1)
    assert report.whole.winner is None
    assert report.advice.method == "linear"
    assert "nearly orthogonal in weights, which does not show that their tasks are independent" in report.advice.why
    assert "(--weights 1,1); `ahl combine` measures that." in report.advice.why


def test_what_is_subtracted_is_forgotten() -> None:
    advice = apart(a=1.0, b=1.0, weights=(1.0, -1.0)).advice
    assert advice.method == "task_arithmetic"
    assert advice.why.startswith("b (weight -1) is subtracted, for forgetting what it does: method task_arithmetic ")
    assert "does not show that their tasks are independent, so what is kept may suffer too" in advice.why
    one = low_rank(24, 40, 3, 1)
    opposite = LowRank(one.down, -one.up)
    report = conflicts([(changes("a", q=one), 1.0), (changes("b", q=opposite), -0.5)])
    assert "opposite before weights (cosine -1.00), so that subtracting one strengthens the other" in report.advice.why
    both = apart(a=1.0, b=1.0, weights=(-1.0, -1.0)).advice
    assert both.why.startswith("a (weight -1), b (weight -1) are subtracted, for forgetting what they do")


def test_seeds_of_one_task_are_averaged_however_orthogonal_they_are() -> None:
    advice = apart(a=1.0, b=1.0, data=["d1", "d1"]).advice
    told = "a and b: both were trained on the same data: average them (0.5 each) or take the better one"
    assert advice.why == f"{told}; with these weights what they share is applied 2 times; `ahl combine` measures that."
    half = apart(a=1.0, b=1.0, weights=(0.5, 0.5), data=["d1", "d1"]).advice
    assert half.why == f"{told}; `ahl combine` measures that."
    for data in (["d1", "d2"], ["", ""]):
        assert "same data" not in apart(a=1.0, b=1.0, data=data).advice.why


def test_one_head_alone_comes_along() -> None:
    heads = [{"score.weight": torch.full((2, 12), value)} for value in (1.0, 2.0)]
    one, other = (changes(name, q=low_rank(24, 40, 2, i)) for i, name in enumerate(("a", "b")))
    report = conflicts([(replace(one, head=heads[0]), 1.0), (replace(other, head=heads[1]), 1.0)])
    assert report.advice.notes == (
        "a, b each bring a head, and one head alone can come along: `ahl combine ... --head a`.",
    )
    same = conflicts([(replace(one, head=heads[0]), 1.0), (replace(other, head=heads[0]), 1.0)])
    assert same.advice.notes == ()
    assert conflicts([(replace(one, head=heads[0]), 1.0), (other, 1.0)]).advice.notes == ()


def test_steps_are_computed_on_one_thread_and_the_number_is_as_before() -> None:
    before, seen = torch.get_num_threads(), set()
    rows = LowRank.rows

    def counted(self: LowRank, start: int, stop: int) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        return rows(self, start, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LowRank, "rows", counted)
        torch.set_num_threads(2)
        try:
            conflicts(three())
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)
    assert seen == {1}


def test_the_sum_as_text() -> None:
    assert weighted_sum([("a", 1.0), ("b", -0.5), ("c", 2)]) == "1 * a - 0.5 * b + 2 * c"
    assert weighted_sum([("a", -1.0)]) == "-1 * a"


def test_a_loud_change_is_named() -> None:
    report = apart(quiet=1.0, loud=4.0)
    assert report.whole.winner == "loud"
    assert report.whole.shares == (pytest.approx(1 / 17), pytest.approx(16 / 17))
    assert "loud is 4.0 times that of quiet" in report.advice.why


def test_one_space_of_inputs_used_differently() -> None:
    generator = torch.Generator().manual_seed(3)
    down = torch.randn(4, 40, generator=generator, dtype=torch.float64)
    ups = torch.linalg.qr(torch.randn(24, 8, generator=generator, dtype=torch.float64)).Q
    one, other = LowRank(down, ups[:, :4]), LowRank(down, ups[:, 4:])
    report = conflicts([(changes("a", q=one), 1.0), (changes("b", q=other), 1.0)])
    met = report.whole.meetings[0]
    assert (met.inputs, met.outputs) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    assert report.advice.method == "dare_ties"


def test_directions_that_are_rounding_do_not_count_as_overlap() -> None:
    """Factors with a column that does nothing: the rank is that of the product."""
    one, other = low_rank(24, 40, 2, 1), low_rank(24, 40, 2, 2)
    padded = LowRank(torch.cat([one.down, other.down[:1]]), torch.cat([one.up, other.up[:, :1] * 1e-12], 1))
    plain = conflicts([(changes("a", q=one), 1.0), (changes("b", q=other), 1.0)]).whole.meetings[0]
    found = conflicts([(changes("a", q=padded), 1.0), (changes("b", q=other), 1.0)]).whole.meetings[0]
    assert (found.inputs, found.outputs) == (pytest.approx(plain.inputs), pytest.approx(plain.outputs))


def test_a_member_of_weight_zero_changes_nothing() -> None:
    report = conflicts([(changes("a", q=low_rank(24, 40, 2, 1)), 1.0), (changes("b", q=low_rank(24, 40, 2, 2)), 0.0)])
    assert (report.whole.norms[1], report.whole.shares, report.whole.winner) == (None, (pytest.approx(1), None), "a")
    assert report.whole.meetings[0].cosine is None
    assert report.advice.why == "b has the weight 0, so there is nothing to settle."


def test_an_order_by_layers_and_events() -> None:
    seen: list[Progress] = []
    conflicts(three(), on_event=lambda event: seen.append(event) if isinstance(event, Progress) else None)
    assert (seen[0].done, seen[-1].done, seen[-1].total) == (0, 3, 3)


def test_refusals() -> None:
    one = changes("a", q=low_rank(24, 40, 2, 1))
    with pytest.raises(Unsupported, match="alone"):
        conflicts([(one, 1.0)])
    for density in (0.0, 1.5, float("nan")):
        with pytest.raises(Unsupported, match="density"):
            conflicts([(one, 1.0), (one, 1.0)], density)
    with pytest.raises(AdapterMismatch, match=r"\[24, 40\] in a, \[24, 41\] in b"):
        conflicts([(one, 1.0), (changes("b", q=low_rank(24, 41, 2, 1)), 1.0)])
    huge = LowRank(torch.full((1, 40), 1e200, dtype=torch.float64), torch.full((24, 1), 1e200, dtype=torch.float64))
    with pytest.raises(AdapterMismatch, match="too large"):
        conflicts([(one, 1.0), (changes("b", q=huge), 1.0)])


def test_the_plain_form_is_json_and_the_picture_a_png(tmp_path: Path) -> None:
    import json

    report = conflicts(three())
    told = json.loads(json.dumps(report.to_dict()))
    assert (told["members"], len(told["modules"]), len(told["layers"])) == (["a@1", "b@2", "c@1"], 3, 2)
    assert told["whole"]["meetings"][0]["cosine"] == report.whole.meetings[0].cosine
    for suffix, start in ((".png", b"\x89PNG\r\n\x1a\n"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        path = tmp_path / f"conflicts{suffix}"
        draw_conflicts(report, path)
        assert path.read_bytes().startswith(start)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["conflicts.pdf", "conflicts.png", "conflicts.svg"]
    parts = [(changes(f"m{i}", q=low_rank(8, 8, 1, i), mlp=low_rank(8, 8, 1, i + 50)), 1.0) for i in range(12)]
    draw_conflicts(conflicts(parts), tmp_path / "many.svg")
    assert "0.7 * a@1 - 1.3 * b@2 + 0.4 * c@1" in (tmp_path / "conflicts.svg").read_text()
    assert "the 30 of 66 pairs that agree least" in (tmp_path / "many.svg").read_text()
    with pytest.raises(Unsupported, match="does not end in"):
        draw_conflicts(report, tmp_path / "conflicts.gif")


def test_a_change_of_full_rank_is_not_taken_for_none() -> None:
    dora = truth.lora(3, "dora")
    with pytest.raises(Unsupported, match="dora-3 is of full rank"):
        conflicts([(changes_of(dora, truth.weight_of, whole=True), 1.0), (truth.changes(truth.lora(1)), 1.0)])


def test_weights_that_are_too_large_are_to_blame() -> None:
    with pytest.raises(AdapterMismatch, match=r"too large to compare.*smaller weights"):
        conflicts([(truth.changes(truth.lora(seed)), 1e200) for seed in (1, 2)])
