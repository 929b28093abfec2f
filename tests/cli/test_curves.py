"""Curves in the terminal and in files, from cards alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.cli.curves import curve_lines
from adapterhub_lite.errors import NotFound, Unsupported
from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import Store
from adapterhub_lite.training.schedule import rate_factor
from adapterhub_lite.workflows.curves import Curve, draw_curves, read_curve
from tests.cli.conftest import Shop, ahl, told
from tests.formats.build import lora_files

_PNG = b"\x89PNG\r\n\x1a\n"
_TRAINING = {
    "learning_rate": 5e-4, "schedule": "cosine", "warmup": 0.1, "epochs": 2.0, "batch_size": 8,
    "gradient_accumulation": 2, "max_steps": None,
}  # fmt: skip


def card(steps: int = 40, **origin: Any) -> Card:
    losses = [3.0 - 2 * i / steps + 0.1 * (-1) ** i for i in range(steps)]
    evaluations = [{"step": s, "loss": 3.2 - 2 * s / steps, "accuracy": s / steps} for s in range(10, steps + 1, 10)]
    return Card(
        origin={"kind": "trained", "losses": losses, "evaluations": evaluations, **origin},
        data={"train": {"rows": 16 * 50}},
        recipe={"training": _TRAINING},
    )


def test_a_card_tells_the_whole_curve() -> None:
    curve = read_curve(card(kept_step=30), "sql@3")
    assert len(curve.losses) == 40
    assert curve.validation()[0] == (10, pytest.approx(2.7))
    assert curve.validation("accuracy")[-1] == (40, 1.0)
    assert curve.kept_step == 30
    assert curve.smoothed[0] == curve.losses[0]
    assert curve.rates == pytest.approx([5e-4 * rate_factor("cosine", i, 40, 0.1) for i in range(40)])


def test_the_rates_of_a_run_that_ended_early_are_those_it_had() -> None:
    early = read_curve(card(ended="stopped early"), "sql@3")
    assert early.rates == pytest.approx([5e-4 * rate_factor("cosine", i, 100, 0.1) for i in range(40)])
    assert early.rates[-1] > read_curve(card(), "sql@3").rates[-1]


def test_cards_that_tell_little_or_nonsense() -> None:
    assert read_curve(Card(origin={"losses": [1.0, 2.0]}), "old@1") == Curve("old@1", (1.0, 2.0))
    assert read_curve(Card(), "none@1") == Curve("none@1")
    told = {
        "losses": [1.0, "x", None, float("nan"), 2.0, True],
        "evaluations": [3, {"step": "x"}, {"step": 1, "loss": "y"}],
    }
    claim = Card(origin={"kind": "imported", "claimed_origin": told, "claimed_recipe": {"training": {"warmup": []}}})
    curve = read_curve(claim, "got@1")
    assert (curve.losses, curve.claimed, curve.rates) == ((1.0, 2.0), True, ())
    assert curve.validation() == []


def test_a_picture_in_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = curve_lines(read_curve(card(), "sql@1"), 60)
    assert all(len(line) <= 60 for line in lines)
    assert lines[0].startswith("3.1 ")
    assert lines[-2].split() == ["1", "step", "40"]
    assert sum(line.count("o") for line in lines[:-2]) == 4
    dots = [[i for i, line in enumerate(lines[:7]) if line.ljust(60)[x] not in " o"] for x in range(5, 58)]
    tops = [rows[0] for rows in dots if rows]
    assert tops[0] < 2
    assert tops[-1] > 4
    assert tops == sorted(tops)  # it falls from left to right
    monkeypatch.setattr("adapterhub_lite.cli.curves.shows", str.isascii)
    assert all(line.isascii() for line in curve_lines(read_curve(card(), "sql@1"), 60))


@pytest.mark.parametrize(("steps", "columns"), [(7, 80), (40, 23), (0, 80)])
def test_no_picture_where_it_would_say_nothing(steps: int, columns: int) -> None:
    assert curve_lines(read_curve(card(steps), "x@1"), columns) == []


def test_a_flat_and_a_long_curve() -> None:
    flat = curve_lines(Curve("x@1", (1.0,) * 20), 40)
    assert [i for i, line in enumerate(flat[:7]) if any(0x2800 < ord(c) < 0x2900 for c in line)] == [3]
    long = curve_lines(Curve("x@1", tuple(1 / i for i in range(1, 200_001))), 40)
    assert long[-2].endswith("step 200,000")


def test_show_draws_the_curve_of_a_version(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.put("sql", lora_files(), card())
    store.put("few", lora_files(seed=1), card(5))
    shown = ahl("show", "sql", "--store", store.path).stdout
    assert "\ncurve:\n" in shown
    assert "step 40\n" in shown
    assert "curve:" not in ahl("show", "few", "--store", store.path).stdout


@pytest.fixture
def two(tmp_path: Path) -> Path:
    store = Store(tmp_path / "store")
    store.put("sql", lora_files(), card())
    store.put("tone", lora_files(seed=1), card(60, kept_step=50))
    store.put("bare", lora_files(seed=2), Card(origin={"kind": "combined"}))
    return store.path


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_show_writes_a_picture(two: Path, tmp_path: Path, ending: str) -> None:
    target = tmp_path / f"curves.{ending}"
    found = told("show", "sql", "--plot", target, "--with", "tone", "--store", two)
    assert found["plot"] == str(target)
    data = target.read_bytes()
    assert data.startswith({"png": _PNG, "svg": b"<?xml", "pdf": b"%PDF"}[ending])
    ahl("show", "sql", "--plot", target, "--with", "tone", "--store", two)
    assert target.read_bytes() == data  # the same curves, the same bytes
    assert [path.name for path in tmp_path.iterdir()] != []
    assert not list(tmp_path.glob(".*"))
    before = sorted(path for path in two.rglob("*") if path.is_file())
    assert target not in before


def test_a_picture_says_what_it_shows(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its texts, read from the figure before it is saved."""
    from matplotlib.figure import Figure

    said: list[str] = []
    lines: list[tuple[str, list[float]]] = []

    def keep(self: Figure, *arguments: Any, **named: Any) -> None:
        from matplotlib.text import Text

        said.extend(text.get_text() for text in self.findobj(Text))
        lines.extend((str(line.get_label()), list(line.get_ydata())) for ax in self.axes for line in ax.get_lines())
        original(self, *arguments, **named)

    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", keep)
    ahl("show", "sql", "--plot", tmp_path / "one.png", "--store", two)
    assert {"Training of sql@1", "loss (nats)", "optimiser step", "learning rate"} <= set(said)
    assert {"each step", "smoothed", "validation"} <= set(said)
    drawn = dict(lines)
    curve = read_curve(card(), "sql@1")
    assert drawn["each step"] == list(curve.losses)
    assert drawn["smoothed"] == curve.smoothed
    assert drawn["validation"] == [value for _, value in curve.validation()]
    assert list(curve.rates) in drawn.values()
    said.clear()
    ahl("show", "sql", "--plot", tmp_path / "two.png", "--with", "tone", "--store", two)
    assert {"Training of sql@1, tone@1", "sql@1", "tone@1"} <= set(said)


def test_what_cannot_be_drawn_is_refused(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curve = read_curve(card(), "sql@1")
    for target, error in ((tmp_path / "x.txt", Unsupported), (tmp_path / "no" / "x.png", NotFound)):
        with pytest.raises(error):
            draw_curves([curve], target)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(Unsupported, match="is a folder"):
        draw_curves([curve], tmp_path / "folder.png")
    bare = ahl("show", "bare", "--plot", tmp_path / "x.png", "--store", two)
    assert bare.exit_code == 1
    assert "tells no losses" in bare.stderr
    assert ahl("show", "sql", "--with", "tone", "--store", two).exit_code == 2
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unsupported, match="matplotlib") as refused:
        draw_curves([curve], tmp_path / "x.png")
    assert "pip install" in refused.value.hint
    assert not (tmp_path / "x.png").exists()


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    """No formula in a name is computed, and none of its signs breaks the picture."""
    odd = Curve(r"$\frac{x_{1}", (2.0, 1.0))
    draw_curves([odd, odd], tmp_path / "odd.png")
    draw_curves([Curve("huge@1", (1e300, -1e300, 5.0))], tmp_path / "huge.png")
    draw_curves([Curve(f"n{i}@1", (2.0, float(i))) for i in range(40)], tmp_path / "many.png")
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(_PNG) for name in ("odd", "huge", "many"))


def test_training_draws_what_it_trained(shop: Shop, tmp_path: Path) -> None:
    store = shutil.copytree(shop.store, tmp_path / "store", copy_function=shutil.copy)
    target = tmp_path / "at-end.png"
    refused = ahl("train", shop.recipe("parrot"), "--store", store, "--plot", tmp_path / "no" / "x.png")
    assert refused.exit_code == 1
    found = told("train", shop.recipe("parrot"), "--store", store, "--plot", target)
    assert found["ref"] == "parrot@2"
    assert target.read_bytes().startswith(_PNG)
    held = json.loads((store / "adapters/parrot/2/card.json").read_bytes())
    assert len(read_curve(Card(**held), "parrot@2").rates) == len(held["origin"]["losses"]) == 3
