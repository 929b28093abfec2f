"""The live display of training: what it says, in how much room, and that it leaves nothing behind."""

from __future__ import annotations

import io
import math
import re
from itertools import pairwise

import pytest
from rich.console import Console

from adapterhub_lite.cli.learners import Learner, Trail, details, rows
from adapterhub_lite.cli.live import LiveReport
from adapterhub_lite.cli.progress import PlainReport
from adapterhub_lite.events import Evaluated, Event, Note, Progress, Stage, Step
from adapterhub_lite.training.stopping import Watch

NAMES = ("sql", "tone-of-voice", "a_very_long_name_of_an_adapter_x")


def step(number: int, learner: str = "", total: int = 300) -> Step:
    loss = 0.5 + 2 * math.exp(-number / 100)
    return Step(number, total, number / 100, loss, 1e-3, 512.0, 65.0, learner, loss + 0.01, 2_100_000_000)


def run(count: int, learners: tuple[str, ...] = ("",), every: int = 50) -> list[Event]:
    """What is heard of a run up to a step; validation is best at step 100."""
    found: list[Event] = [Stage("training")]
    for number in range(1, count + 1):
        for name in learners:
            found.append(step(number, name))
            if number % every == 0:
                loss = 0.6 + abs(number - 100) / 200
                best = {"loss": 0.6 if number >= 100 else loss, "step": min(number, 100)}
                found.append(Evaluated("validation", number, {"loss": loss}, name, best))
    return found


def screen(events: list[Event], width: int = 100, height: int = 24, **settings: object) -> tuple[str, str]:
    """What the terminal shows after these events, and everything that was written to it by the end."""
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=width, height=height, color_system=None, **settings)  # type: ignore[arg-type]
    with LiveReport(console=console) as report:
        for event in events:
            report(event)
        shown = io.StringIO()
        Console(file=shown, width=width, height=height).print(report._picture())
    return shown.getvalue(), written.getvalue()


def test_one_learner_is_shown_with_all_that_is_known() -> None:
    shown, _ = screen(run(160))
    first, facts, validation, way = shown.splitlines()
    assert re.search(r"training ━+╸? +160/300  eta 1:05  512 tokens/s  memory 2.1 GB", first)
    assert facts == "  loss 0.904  smoothed 0.914  lr 1.0e-03  epoch 1.6"
    assert validation == "  validation (step 150)  loss 0.850  best loss 0.600 (step 100)"
    assert re.fullmatch(r"  [▁▂▃▄▅▆▇█]{20,48} 2\.\d+ to 0\.\d+", way)


@pytest.mark.parametrize("width", [10, 24, 40, 60, 200])
@pytest.mark.parametrize("learners", [("",), NAMES])
def test_no_line_is_wider_than_the_terminal(width: int, learners: tuple[str, ...]) -> None:
    shown, _ = screen(run(160, learners), width)
    drawn = shown.splitlines()[1:]  # rich cuts the line of the bar itself
    assert all(len(line) <= width for line in drawn)
    if width >= 40:
        wanted = ("160/300", "0.914", "65" if width > 200 else "1:05")
        assert all(fact in shown for fact in wanted)


def test_lines_are_cut_also_where_a_name_alone_is_too_long() -> None:
    learner = Learner(NAMES[2])
    learner.hear(step(3))
    for width in (1, 5, 9, 17, 30):
        assert all(len(line) <= width for line in [*rows([learner], width, 10), *details(learner, width)])


def test_nothing_is_lost_on_a_narrow_terminal() -> None:
    wide, narrow = (screen(run(160), width)[0] for width in (100, 32))
    figures = [word for word in wide.split() if any(c.isdigit() for c in word)][:-2]  # but the ends of the way
    assert [word for word in figures if word not in narrow] == []


def test_learners_have_a_line_each_and_lose_columns_before_names() -> None:
    lines = screen(run(160, NAMES), 140)[0].splitlines()
    assert "training 3 adapters" in lines[0]
    assert "1,536 tokens/s" in lines[0]
    assert lines[1].split() == ["step", "smoothed", "validation", "best", "lr", "loss", "tokens/s"]
    assert lines[2].split()[:7] == ["sql", "160/300", "0.914", "0.850", "0.600", "(100)", "1.0e-03"]
    assert lines[4].startswith("a_very_long_name_of_an_…  160/300")
    narrow = screen(run(160, NAMES), 40)[0].splitlines()
    assert [line.split()[0] for line in narrow[-3:]] == ["sql", "tone-of-voice", "a_very_long_name_of_…"]
    assert narrow[-4].split() == ["step", "smoothed"]


def test_more_learners_than_lines() -> None:
    names = tuple(f"n{i}" for i in range(9))
    lines = screen(run(3, names), 80, 11)[0].splitlines()
    assert len(lines) <= 10
    assert lines[-1] == "and 6 more"


def test_who_has_left_is_marked() -> None:
    events = run(50, NAMES[:2])
    events += [step(number, "sql") for number in range(51, 60)]
    lines = screen(events, 100)[0].splitlines()
    assert "59/300" in lines[2]
    assert "ended 50" in lines[3]


def test_what_remains_of_a_run() -> None:
    ended = [*run(300), Progress("measuring on test", 1, 4, "rows"), Note("stored sql@1")]
    _, written = screen(ended)
    assert written.count("trained 300 steps: loss 0.610, 512 tokens/s") == 1
    shown, written = screen([*run(57), Stage("next")])
    assert "ended after step 57 of 300" in written
    assert "57/300" not in shown
    _, written = screen(run(57, NAMES[:2]))  # broken off by an error: the display is left
    assert "sql: ended after step 57 of 300" in written
    assert "tone-of-voice: ended after step 57 of 300" in written


def test_no_colour_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    def colours() -> list[str]:
        console = Console(file=io.StringIO(), force_terminal=True, width=90, color_system="standard")
        with LiveReport(console=console) as report:
            for event in (*run(60), Note("odd", "warning")):
                report(event)
        return re.findall(r"\x1b\[(?:\d+;)*(?:3|4|9)\d[;m]", console.file.getvalue())  # type: ignore[attr-defined]

    assert colours()
    monkeypatch.setenv("NO_COLOR", "1")
    assert colours() == []


def test_a_trail_keeps_the_whole_run_in_little_room() -> None:
    trail = Trail()
    for value in range(10_000):
        trail.push(float(value))
    values = trail.values()
    assert 32 <= len(values) <= 128
    assert list(values) == sorted(values)
    assert values[0] < 100
    assert values[-1] > 9_800
    width = values[1] - values[0]
    assert [b - a for a, b in pairwise(values)] == pytest.approx([width] * (len(values) - 1))


def test_names_cannot_steer_the_terminal() -> None:
    learner = Learner("a\x1b[2J")
    learner.hear(step(3))
    assert "\x1b" not in "".join([*rows([learner], 80, 10), *details(learner, 80)])


def test_plain_lines_name_the_best_where_it_is_another(capsys: pytest.CaptureFixture[str]) -> None:
    report = PlainReport()
    for event in run(150):
        report(event)
    lines = capsys.readouterr().err.splitlines()
    assert "  validation: loss 0.600 (step 100)" in lines
    assert "  validation: loss 0.850 (step 150), best loss 0.600 (step 100)" in lines
    assert any(line.endswith("memory 2.1 GB") for line in lines)


def test_the_best_so_far_is_told_by_the_figure_that_decides() -> None:
    watch = Watch("accuracy")
    assert watch.told == {}
    for number, value in ((10, 0.5), (20, 0.8), (30, 0.7)):
        watch.see(number, {"loss": 1.0, "accuracy": value})
    assert watch.told == {"accuracy": 0.8, "step": 20}
