"""Tables, figures and progress as text."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from adapterhub_lite.adapters.compare import Comparison, Overlap
from adapterhub_lite.cli import render
from adapterhub_lite.cli.differences import difference_lines
from adapterhub_lite.cli.live import LiveReport
from adapterhub_lite.cli.progress import Pace, PlainReport, Smoothed, amount, reporting
from adapterhub_lite.events import Evaluated, Note, Progress, Stage, Step
from adapterhub_lite.formats.card import Card
from adapterhub_lite.store import Store
from adapterhub_lite.workflows.difference import Change, MetricChange
from tests.cli.conftest import Shop, ahl
from tests.cli.test_diff_command import difference
from tests.formats.build import lora_files

_COLUMNS = (render.Column("NAME"), render.Column("WHY", 2), render.Column("SIZE", 1, right=True))


def _step(step: int, total: int = 300) -> Step:
    return Step(step, total, step / 100, 2.0, 1e-3, 512.0, 65.0)


def test_a_table_puts_what_does_not_fit_below() -> None:
    rows = [("a", "because of this", "1 kB"), ("bcd", "no", "10 kB")]
    assert render.table(_COLUMNS, rows, 80) == [
        "NAME  WHY               SIZE",
        "a     because of this   1 kB",
        "bcd   no               10 kB",
    ]
    assert render.table(_COLUMNS, rows, 20) == [
        "NAME   SIZE",
        "a      1 kB",
        "  WHY because of",
        "  this",
        "bcd   10 kB",
        "  WHY no",
    ]
    narrow = ["a", "  WHY", "  because", "  of this", "  SIZE 1", "  kB", "bcd", "  WHY no", "  SIZE 10", "  kB"]
    assert render.table(_COLUMNS, rows, 9) == render.table(_COLUMNS, rows, 1) == narrow
    assert render.table(_COLUMNS, [("", "", "")], 20) == ["NAME  WHY  SIZE", ""]


def test_a_picture_goes_before_a_figure_does() -> None:
    columns = (render.Column("NAME"), render.Column("COSINE", 1), render.Column("", picture=True))
    rows = [("a", "+0.5", "####"), ("b", "-1.0", "########")]
    assert render.table(columns, rows, 22)[2] == "b     -1.0    ########"
    assert render.table(columns, rows, 21) == ["NAME  COSINE", "a     +0.5", "b     -1.0"]
    assert render.table(columns, rows, 11) == ["a", "  COSINE", "  +0.5", "b", "  COSINE", "  -1.0"]


def _figures(text: str) -> list[str]:
    return [word for word in text.split() if any(c.isdigit() for c in word)]


def _assert_whole_on_every_screen(shown: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the width, every word with a digit in it is there, if across two lines."""
    monkeypatch.delenv("COLUMNS")
    piped = shown()
    assert _figures(piped)
    for columns in (200, 80, 40, 20, 5):
        monkeypatch.setenv("COLUMNS", str(columns))
        squeezed = "".join(shown().split())
        assert [word for word in _figures(piped) if word not in squeezed] == [], columns


@pytest.mark.parametrize("command", ["list", "show sql", "log sql", "verify", "search sql"])
def test_no_figure_is_lost_on_a_narrow_screen(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")
    card = Card(
        base={"name": "smollm2-135m-instruct", "quantization": "nf4", "fingerprint": {"digest": "7a" * 32}},
        metrics={"test": {"sql_execution": 0.719, "exact_match": 0.283}},
        origin={"kind": "trained", "losses": [2.5, 1.25]},
        created="2020-01-31T12:34:56Z",
    )
    store.put("sql", lora_files(), card)
    store.alias("sql", "prod", 1)
    _assert_whole_on_every_screen(lambda: ahl(*command.split(), "--store", store.path).stdout, monkeypatch)


def test_no_figure_of_a_comparison_is_lost_on_a_narrow_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = tuple(Overlap(f"model.layers.{i}.self_attn", "delta", 1.25, 3.5, 0.123 * i) for i in range(15))
    found = difference(
        weights=Comparison("lora", layers, layers, (Overlap("whole", "delta", 4.75, 5.5, 6.0),)),
        metrics=(MetricChange("validation", "sql_execution", 0.512, 0.768, False),),
        recipe=(Change("training.learning_rate", 0.00125, 0.0375),),
        made=(Change("adapter.parameters", 4884480, 230400),),
    )
    _assert_whole_on_every_screen(lambda: "\n".join(difference_lines(found)), monkeypatch)
    monkeypatch.setenv("COLUMNS", "40")
    assert all(len(line) <= 40 for line in difference_lines(found) if line.startswith("  "))
    none = difference(weights=Comparison("lora", (), (), (Overlap("whole", "delta", 4.75, 5.5, 6.0),)))
    assert any("4.75" in line for line in difference_lines(none))


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (4_881_000, "4.9 MB"), (2e12, "2000 GB"), (None, "")]
)
def test_sizes(count: float | None, text: str) -> None:
    assert render.size(count) == text


@pytest.mark.parametrize(("count", "text"), [(0.2, "0 s"), (59.4, "59 s"), (200, "3:20"), (7500, "2:05:00")])
def test_durations(count: float, text: str) -> None:
    assert render.seconds(count) == text


@pytest.mark.parametrize(
    ("ago", "text"),
    [(5, "just now"), (125, "2 min ago"), (7300, "2 h ago"), (90_000, "1 day ago"), (3 * 86_400 + 5, "3 days ago")],
)
def test_ages(ago: int, text: str) -> None:
    then = datetime.now(UTC) - timedelta(seconds=ago)
    assert render.age(then.strftime("%Y-%m-%dT%H:%M:%SZ")) == text


def test_ages_beyond_use_are_dates() -> None:
    assert render.age("2020-01-31T12:00:00Z") == "2020-01-31"
    assert render.age("2999-01-31T12:00:00Z") == "2999-01-31"  # another machine's clock
    assert render.age("nonsense") == render.age("2020-01-31") == ""


def test_sparklines() -> None:
    assert render.sparkline([]) == ""
    assert render.sparkline([1, 1]) == "▁▁"
    assert render.sparkline([3, 2, 1]) == "█▅▁"
    assert len(render.sparkline([float(i) for i in range(1000)])) == 48


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_pictures_are_of_characters_that_the_output_has(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    plain = encoding != "utf-8"
    assert render.sparkline([3, 2, 1]) == ("#=_" if plain else "█▅▁")
    assert render.sparkline([float(i) for i in range(8)]) == ("_.:-=+*#" if plain else "▁▂▃▄▅▆▇█")
    assert render.cut("abcdef", 5) == ("ab..." if plain else "abcd…")
    rows = (Overlap("half", "delta", 2.0, 2.0, 2.0), Overlap("little", "delta", 2.0, 2.0, 0.25))
    recipe = (Change("task.system", "x" * 300, "x" * 299 + "y"),)
    text = "\n".join(difference_lines(difference(weights=Comparison("lora", rows, rows, ()), recipe=recipe)))
    assert ("+0.500  ####\n" in text) == plain
    assert ("+0.500  ████\n" in text) != plain
    text.encode(encoding)


def test_show_in_ascii_has_no_escapes(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterhub_lite.cli.render.shows", lambda text: text.isascii())
    (line,) = [line for line in ahl("show", "parrot", "--store", shop.store).stdout.splitlines() if "loss  " in line]
    assert re.fullmatch(r"loss +#[_.:=+*#-]+ [\d.]+ -> [\d.]+, 3 steps", line)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 rows"), (1, "1 row"), (2000, "2,000 rows"), (None, "None rows"), (1.0, "1.0 row")]
)
def test_one_of_a_thing_is_not_many(count: float | None, text: str) -> None:
    assert render.counted(count, "rows") == text


def test_amounts_of_progress() -> None:
    said = [amount(Progress("x", done, total, unit)) for done, total, unit in ((0, 1, "rows"), (1, 0, "tensors"))]
    assert said == ["0 of 1 row", "1 tensor"]
    assert amount(Progress("x", 1200, 3000, "rows")) == "1,200 of 3,000 rows"
    assert amount(Progress("x", 4_000_000, 0, "B")) == "4.0 MB"


def test_an_imported_version_shows_when_it_came_and_when_it_was_made(shop: Shop, tmp_path: Path) -> None:
    exported = tmp_path / "out"
    store = shutil.copytree(shop.store, tmp_path / "store", copy_function=shutil.copy)
    there = Store(tmp_path / "there")
    old = Card(origin={"kind": "trained", "losses": [1.0]}, created="2020-01-31T12:00:00Z")
    there.put("old", lora_files(), old)
    there.export("old", exported)
    ahl("import", exported, "--name", "old", "--store", store)
    text = ahl("show", "old", "--store", store).stdout
    received = Store(store).received("old")
    assert received is not None
    assert text.splitlines()[0] == f"old@1: lora, imported just now ({received['time']})"
    assert re.search(r"^trained +2020-01-31T12:00:00Z, by its maker's word$", text, re.MULTILINE)
    log = ahl("log", "old", "--store", store).stdout
    assert "imported, lora" in log
    assert "received" not in text + log
    here = ahl("show", "parrot", "--store", store).stdout
    card = json.loads((store / "adapters/parrot/1/card.json").read_bytes())
    assert here.startswith(f"parrot@1: lora, trained {render.age(card['created'])} ({card['created']})")
    assert "maker's word" not in here


def test_printable_escapes_what_steers_a_terminal() -> None:
    assert render.printable("a\x1b[2Jé\n\u202e") == "a\\x1b[2Jé\\n\\u202e"
    assert render.printable("a\n\tb", keep_lines=True) == "a\n\tb"


def test_smoothing_starts_unbiased() -> None:
    smoothed = Smoothed()
    assert smoothed.push(4.0) == pytest.approx(4.0)
    assert 2.0 < smoothed.push(2.0) < 4.0


def test_plain_progress_of_training_is_about_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    report = PlainReport()
    report(Stage("training parrot"))
    for step in range(1, 301):
        report(_step(step))
        if step == 100:
            report(Evaluated("validation", 100, {"loss": 0.5}))
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == ""
    assert 10 <= len(lines) <= 14
    assert lines[1].startswith("  step 30/300: loss 2.000, eta 1:05, 512 tokens/s, lr 1.0e-03, epoch 0.3")
    assert "  validation: loss 0.500 (step 100)" in lines
    assert lines[-1].startswith("  step 300/300")


def test_plain_progress_speaks_of_slow_work_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    report = PlainReport()
    for done in range(100):
        report(Progress("download x", done * 10**6, 10**8, "B"))
        now[0] += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "  download x: 10.0 MB of 100 MB, eta 1:30"
    assert len(lines) == 4  # ever more rarely


def test_pace_tells_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = Pace()

    def told(title: str, at: float, done: int, total: int = 10) -> str:
        now[0] = at
        return pace.facts(Progress(title, done, total, "rows"))

    assert told("a", 0, 4) == "4 of 10 rows"
    assert told("a", 1, 5) == "5 of 10 rows"  # too early
    assert told("a", 30, 6) == "6 of 10 rows, eta 1:00"  # two took half a minute
    assert told("a", 40, 10) == "10 of 10 rows"
    assert told("a", 50, 1) == "1 of 10 rows"  # the same work again
    assert told("a", 60, 2) == "2 of 10 rows, eta 1:20"
    assert told("b", 90, 3, total=0) == told("b", 99, 3, total=0) == "3 rows"


def test_terse_progress_says_warnings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    report = PlainReport(terse=True)
    for event in (Stage("loading"), Note("all is well"), Note("the base\x1b differs", "warning"), _step(1, 1)):
        report(event)
    assert capsys.readouterr().err == "warning: the base\\x1b differs\n"


@pytest.mark.parametrize("columns", [30, 200])
@pytest.mark.parametrize("terse", [False, True])
def test_live_progress(columns: int, terse: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=columns, color_system=None)
    with LiveReport(terse, console) as report:
        for event in (
            Stage("loading [base]"),
            Progress("download x", 1, 2, "B"),
            Progress("download x", 2, 2, "B"),
            Note("stored"),
            Note("odd", "warning"),
            *(_step(step, 3) for step in (1, 2)),
            Evaluated("validation", 2, {"loss": 0.5}),
            _step(3, 3),
            Progress("of unknown length", 5, 0),
        ):
            report(event)
    text = screen.getvalue()
    assert "warning: odd" in text
    assert ("stored" in text) != terse
    if columns == 200 and not terse:
        assert "loading [base]" in text
        assert "trained 3 steps: loss 2.000" in text


def test_reporting_is_plain_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with reporting() as listener:
        assert isinstance(listener, PlainReport)
    monkeypatch.setattr("sys.stderr", _Terminal())
    monkeypatch.setenv("TERM", "dumb")
    with reporting() as listener:
        assert isinstance(listener, PlainReport)
    monkeypatch.setenv("TERM", "xterm")
    with reporting() as listener:
        assert isinstance(listener, LiveReport)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True
