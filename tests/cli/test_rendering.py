"""Tables, figures and progress as text."""

from __future__ import annotations

import io
import time
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from adapterhub_lite.cli import render
from adapterhub_lite.cli.live import LiveReport
from adapterhub_lite.cli.progress import PlainReport, Smoothed, reporting
from adapterhub_lite.events import Evaluated, Note, Progress, Stage, Step

_COLUMNS = (render.Column("NAME"), render.Column("WHY", 2), render.Column("SIZE", 1, right=True))


def _step(step: int, total: int = 300) -> Step:
    return Step(step, total, step / 100, 2.0, 1e-3, 512.0, 65.0)


def test_a_table_drops_what_does_not_fit() -> None:
    rows = [("a", "because of this", "1 kB"), ("bcd", "no", "10 kB")]
    assert render.table(_COLUMNS, rows, 80) == [
        "NAME  WHY               SIZE",
        "a     because of this   1 kB",
        "bcd   no               10 kB",
    ]
    assert render.table(_COLUMNS, rows, 12) == ["NAME   SIZE", "a      1 kB", "bcd   10 kB"]
    assert render.table(_COLUMNS, rows, 3) == ["NA…", "a", "bcd"]


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
    assert render.age("nonsense") == ""


def test_sparklines() -> None:
    assert render.sparkline([]) == ""
    assert render.sparkline([1, 1]) == "▁▁"
    assert render.sparkline([3, 2, 1]) == "█▅▁"
    assert len(render.sparkline([float(i) for i in range(1000)])) == 48


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
    assert lines[0] == "  download x: 10.0 MB of 100 MB"
    assert len(lines) == 4  # ever more rarely


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
