"""The store benchmark in its quick form: what it measures and how it tells it. Nothing here is about how fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as entry
from benchmarks import store, store_cli, store_lookup, store_make, store_mlflow, store_writes
from benchmarks.rows import Sample, faster, in_turn, slower, within

ROOT = Path(__file__).parents[2]
MLFLOW = "one Store / MLflow's registry on SQLite"
GOALS = {
    "put of 256 KB from files / cp -r, sha256sum": ">= 0.7 x",
    "3 processes x 4 puts on one name": "12 versions, none lost or twice",
    "ahl --help": "<= 2 x",
    "ahl list, 5 adapters": "<= 2 x",
    "ahl show NAME, 5 adapters": "<= 2 x",
    "resolve(name), 100 names, one Store": "<= 0.2 ms",
    "resolve(name), 100 names, a new Store each time": "<= 0.2 ms",
    "new Store / reading PEFT folders until the name is found": ">= 200 x",
    "resolve(name), a new Store each time: 200 names": "<= 1.5 x",
    "resolve(name), one Store, names it has not seen: 200 names": "<= 1.5 x",
    "resolve(name), one Store, names it has seen: 200 names": "<= 1.5 x",
    "list(), 200 names, the first since they were stored": "<= 1 s",
    "list(), 200 names, again, a new Store each time": "<= 1 s",
    "list(), 200 names, after a put": "<= 1 s",
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The result of `--quick --json FILE`, and what it printed."""
    folder = tmp_path_factory.mktemp("quick")
    command = [sys.executable, "-m", "benchmarks", "store", "--quick", "--json", str(folder / "figures.json")]
    scratch = folder / "scratch"
    scratch.mkdir()
    env = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert list(scratch.iterdir()) == []
    return json.loads((folder / "figures.json").read_text()), done.stdout


def test_every_part_is_measured(quick: tuple[dict[str, Any], str]) -> None:
    rows = quick[0]["rows"]
    assert {row["part"] for row in rows} == {"put", "writers", "list", "command line", "lookup", "growth"}
    assert {row["what"]: row["skipped"] for row in rows if row["skipped"]} == {MLFLOW: "run with --with-mlflow"}
    names = {row["what"] for row in rows}
    for command in (
        "--help",
        "list, 5",
        "show NAME, 5",
        "log NAME, 5",
        "search NAME, 5",
        "list, 100",
        "search NAME, 100",
    ):
        assert any(name.startswith(f"ahl {command}") for name in names), command
    for count in (100, 200):
        assert f"list(), {count} names, after a put" in names
    for what in ("resolve(name@N), a new Store each time", "put of a version"):
        assert f"{what}: 20 versions" in names


def test_goals_stand_beside_figures_and_few_adapters_are_not_judged_by_them(quick: tuple[dict[str, Any], str]) -> None:
    rows = quick[0]["rows"]
    assert {row["what"]: row["goal"] for row in rows if row["goal"]} == GOALS
    assert [row["met"] for row in rows if row["goal"] and row["part"] != "writers"] == [None] * (len(GOALS) - 1)


def test_figures_follow_from_times(quick: tuple[dict[str, Any], str]) -> None:
    for row in quick[0]["rows"]:
        if row["skipped"]:
            continue
        for sample in (row["ours"], row["peer"]):
            assert sample is None or (0 < sample["p50"] <= sample["p95"] and sample["count"] >= 1), row["what"]
        if row["peer"]:
            times = row["ours"]["p50"] / row["peer"]["p50"]
            expected = 1 / times if row["told"].endswith("as fast") else times
            assert row["figure"] == pytest.approx(expected), row["what"]
            assert row["peer_name"]
        elif row["ours"]:
            assert row["figure"] == row["ours"]["p50"]


def test_writers_lose_nothing(quick: tuple[dict[str, Any], str]) -> None:
    (row,) = [row for row in quick[0]["rows"] if row["part"] == "writers"]
    assert row["met"] is True
    assert row["figure"] > 0
    assert row["told"].endswith("puts/s")


def test_the_table_says_what_the_file_says(quick: tuple[dict[str, Any], str]) -> None:
    result, printed = quick
    lines = printed.splitlines()
    for row in result["rows"]:
        line = next(line for line in lines if line.strip().startswith(row["what"]) and row["peer_name"] in line)
        assert row["told"] in line or row["told"] in printed
        assert f"goal {row['goal']}" in printed
    for what in ("processor", "file system", "python", "adapterhub-lite", "typer", "peft"):
        assert f"{what} {result['machine'][what]}" in printed
    assert result["quick"] is True
    assert all(seconds >= 0 for seconds in result["set_up_seconds"].values())


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, benchmarks.store; print([m for m in ('torch', 'numpy', 'peft', 'mlflow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_options_are_not_names(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran = []
    monkeypatch.setattr(store, "main", lambda: ran.append("store"))
    assert entry.main(["--quick", "--json", "figures.json", "store"]) == 0
    assert entry.main(["store", "--json", "figures.json", "--with-mlflow"]) == 0
    assert ran == ["store", "store"]
    assert entry.main(["nothing"]) == 2
    assert "no benchmark 'nothing'" in capsys.readouterr().err


def test_samples_and_goals() -> None:
    ours, peer = Sample.of([0.1, 0.3, 0.2]), Sample.of([0.4] * 19 + [9.0])
    assert (ours.p50, ours.p95, ours.count) == (0.2, 0.3, 3)
    assert (peer.p50, peer.p95) == (0.4, 9.0)
    assert Sample.of([float(value) for value in range(100)]).p95 == 95.0
    row = faster("part", "what", ours, "cp", peer, 2.0)
    assert (row.figure, row.goal, row.met) == (2.0, ">= 2 x", True)
    assert faster("part", "what", ours, "cp", peer, 2.1).met is False
    assert slower("part", "what", peer, "cp", ours, 2.0).met is True
    assert slower("part", "what", peer, "cp", ours, 1.9).met is False
    assert within("part", "what", ours, 0.2).met is True
    assert within("part", "what", ours, 0.1).met is False
    assert (slower("part", "what", ours, "cp", peer).goal, slower("part", "what", ours, "cp", peer).met) == ("", None)
    assert str(within("part", "what", ours, 0.1)).endswith("goal <= 100 ms: MISSED")


def test_works_take_turns() -> None:
    order = []

    def work(name: str) -> Any:
        def run(turn: int) -> list[float]:
            order.append((turn, name))
            return [] if name == "c" else [float(turn)]

        return run

    found = in_turn({name: work(name) for name in "abc"}, rounds=3)
    assert "".join(name for _, name in order) == "cab" + "abc" + "bca" + "cab"
    assert found == {name: Sample.of([0.0, 1.0, 2.0]) for name in "ab"}


def test_growth_is_the_large_store_s_time_over_the_small_one_s() -> None:
    row = store_lookup._grown("lookup", {"10": Sample.of([1.0]), "2000": Sample.of([3.0])}, (10, 2000), "names", 1.5)
    assert (row.what, row.peer_name, row.figure, row.met) == ("lookup: 2,000 names", "at 10", 3.0, False)


def test_the_command_line_s_goals_are_for_a_small_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (tmp_path / "few", 2), (tmp_path / "many", 3)
    for path, count in (few, many):
        store_make.fill_names(path, count)
    seconds = {"import peft": 6.0, "pass": 0.1, str(tmp_path / "hello.py"): 0.5}
    turns = []

    def fake(command: list[str], store: Path, every: int, turn: int) -> list[float]:
        turns.append((command[-1], every))
        return [seconds.get(command[-1], 0.25)]

    monkeypatch.setattr(store_cli, "_running", fake)
    rows = list(store_cli.commands(tmp_path, few, many, rounds=6, peft=2))
    assert {(row.what, row.peer_name, row.figure) for row in rows if row.goal} == {
        (what, peer, figure)
        for what in ("ahl --help", "ahl list, 2 adapters", "ahl show NAME, 2 adapters")
        for peer, figure in (("typer", 0.5), ("import peft", 24.0))
    }
    assert {every for last, every in turns if last == "import peft"} == {3}
    assert {every for last, every in turns if last != "import peft"} == {1}


def test_a_slow_peer_runs_in_some_rounds_only(tmp_path: Path) -> None:
    empty = [sys.executable, "-c", "pass"]
    taken = [len(store_cli._running(empty, tmp_path, 3, turn)) for turn in (-1, 0, 1, 2, 3)]
    assert taken == [1, 1, 0, 0, 1]


def test_a_lost_or_doubled_version_is_seen(tmp_path: Path) -> None:
    made = store_make.fill_versions
    made(tmp_path / "store", "shared", 3)
    told = lambda numbers, count=3: store_writes.missing_or_twice(tmp_path / "store", numbers, count)  # noqa: E731
    assert told([3, 1, 2]) == ""
    assert "1 of them twice" in told([1, 2, 2])
    assert "3 versions" in told([1, 2, 3, 4], count=4)
    opened = store_lookup.Store(tmp_path / "store")
    opened.put("shared", store_make.tiny_files(), store_make.card_of(0))
    assert "1 contents are lost" in told([1, 2, 3, 4], count=4)


def test_a_store_that_lacks_versions_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_make, "_put_all", lambda *arguments: None)
    with pytest.raises(RuntimeError, match="has 0 of 4"):
        store_make.fill_names(tmp_path / "store", 4)


def test_the_scan_finds_the_folder_with_the_name(tmp_path: Path) -> None:
    store_make.peft_folders(tmp_path / "runs", 5)
    assert store_lookup.scan(tmp_path / "runs", store_make.name_of(3)) == tmp_path / "runs" / "run-000003"
    with pytest.raises(LookupError):
        store_lookup.scan(tmp_path / "runs", "absent")


FAKE_CLIENT = """
import json
from types import SimpleNamespace as Model

class MlflowClient:
    def __init__(self, tracking_uri, registry_uri):
        self.file = registry_uri.removeprefix("sqlite:///")
    def _names(self):
        return open(self.file).read().split()
    def create_registered_model(self, name):
        open(self.file, "a").write(name + "\\n")
    def create_model_version(self, name, source):
        assert name in self._names()
    def get_registered_model(self, name):
        return Model(name=name if name in self._names() else "another")
    def get_model_version(self, name, version):
        return self.get_registered_model(name)
    def search_registered_models(self, filter_string):
        return [self.get_registered_model(filter_string.split("'")[1])]
    def search_model_versions(self, filter_string, max_results):
        return self.search_registered_models(filter_string)
"""


@pytest.fixture
def fake_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for MLflow that keeps names in a text file; the folder that the registry is kept in."""
    (tmp_path / "mlflow.py").write_text(FAKE_CLIENT)
    for package in ("mlflow_skinny", "sqlalchemy"):
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: 1.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(store_mlflow, "BUILD", tmp_path)
    monkeypatch.setattr(store_mlflow, "_python", lambda: Path(sys.executable))
    return tmp_path


def test_mlflows_registry_is_made_once_and_asked_in_turn(fake_mlflow: Path) -> None:
    with store_mlflow.Registry(4) as registry:
        assert registry.seconds > 0
        assert registry.versions["mlflow-skinny"] == "1.0"
        for call in registry.calls:
            assert len(registry.ask(call, [store_make.name_of(number) for number in (3, 1)])) == 2
        store_make.fill_names(fake_mlflow / "store", 4)
        store_make.peft_folders(fake_mlflow / "runs", 4)
        rows = list(store_lookup.lookups(fake_mlflow / "store", fake_mlflow / "runs", 4, registry))
    beside = [row for row in rows if row.peer_name == "mlflow"]
    best = min(beside, key=lambda row: row.peer.p50 if row.peer else 0.0)
    told = [row.what.rpartition(" ")[2] for row in beside]
    assert told == [*registry.calls, best.what.rpartition(" ")[2]]
    search = f"one Store / MLflow {store_lookup.SEARCH}"
    assert {row.what for row in beside if row.goal} == {best.what, search}
    with store_mlflow.Registry(4) as again:
        assert again.seconds == 0


def test_a_wrong_answer_of_mlflow_is_no_figure(fake_mlflow: Path) -> None:
    with store_mlflow.Registry(2) as registry, pytest.raises(RuntimeError, match=r"mlflow\.log says why"):
        registry.ask(registry.calls[0], ["absent"])
    assert "asked for absent, got another" in (fake_mlflow / "mlflow.log").read_text()
