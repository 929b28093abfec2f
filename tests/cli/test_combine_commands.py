"""`ahl combine`, `ahl conflicts` and `ahl convert`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub_lite.cli.guard import UsageProblem
from adapterhub_lite.cli.mixing import ROWS, read_members, read_share, read_size, share
from adapterhub_lite.store import Store
from adapterhub_lite.workflows import combine_setting
from tests.cli.conftest import Shop, ahl, told


@pytest.fixture(scope="module")
def two(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with parrot@1 and echo@1, of one base, and moods@1 of another."""
    store = tmp_path_factory.mktemp("two") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AHL_CACHE", str(shop.folder / "cache"))
        for recipe, name in (("parrot", "parrot"), ("parrot", "echo"), ("moods", "moods")):
            more = ["-o", "training.seed=3", "-o", "adapter.rank=3"] if name == "echo" else []
            result = ahl("train", shop.recipe(recipe), "--name", name, *more, "--store", store)
            assert result.exit_code == 0, result.stderr
    return store


@pytest.fixture
def shelf(two: Path) -> Iterator[Path]:
    """The store; what a test adds is removed after it."""
    yield two
    store = Store(two)
    for entry in reversed(store.list()):
        if entry.name not in ("parrot", "echo", "moods"):
            store.remove(f"{entry.name}@{entry.version}", force=True)


@pytest.fixture(scope="module")
def two_moods(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two classifiers of one task, by two seeds."""
    store = tmp_path_factory.mktemp("moods") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AHL_CACHE", str(shop.folder / "cache"))
        for name, seed in (("moods", 0), ("mirth", 3)):
            done = ahl("train", shop.recipe("moods"), "--name", name, "-o", f"training.seed={seed}", "--store", store)
            assert done.exit_code == 0, done.stderr
    return store


# --- combine -----------------------------------------------------------------------------------------------------


def test_combine_says_what_was_made_and_measured(shelf: Path) -> None:
    done = ahl("combine", "parrot@1=0.7", "echo@1=-0.3", "--name", "mix", "--store", shelf)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Combined into mix@1: lora, rank 5, ")
    assert lines[1:3] == ["  0.7 * parrot@1 - 0.3 * echo@1, by linear", "  exact: no relative error above rounding"]
    assert lines[3].startswith("  moves logits by up to ")
    table = lines.index("")
    assert lines[table + 1].split() == ["PARENT", "METRIC", "ROWS", "ALONE", "MIX@1", "CHANGE"]
    cells = [line for line in lines[table + 2 :] if len(line.split()) in (5, 6) and line.split()[-1][0] in "+-"]
    begun = [line.split()[0] for line in cells if not line.startswith(" ")]
    assert begun == ["parrot@1", "echo@1"]
    created = told("show", "echo@1", "--store", shelf)["card"]["created"]
    assert f"echo@1 alone was measured {created}, when it was made." in lines
    assert lines[-1].startswith("Measure it again with `ahl eval mix@1`")
    assert "measuring mix on test: 4 rows" in done.stderr
    shown = ahl("show", "mix", "--store", shelf).stdout.splitlines()
    assert "combined" in shown[0]
    assert [line.split(None, 2)[2] for line in shown if line.startswith("made from")] == [
        "0.7 * parrot@1 - 0.3 * echo@1, by linear"
    ]


def test_a_mix_of_two_tasks_says_how_each_is_measured(shelf: Path, shop: Shop, tmp_path: Path) -> None:
    rows = (shop.folder / "parrot-test.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(rows[1:]))
    more = ["-o", f"data.test={tmp_path / 'test.jsonl'}", "-o", "task.max_new_tokens=3", "--name", "short"]
    assert ahl("train", shop.recipe("parrot"), *more, "--store", shelf).exit_code == 0
    done = ahl("combine", "parrot=1", "short=0.5", "--store", shelf)
    assert done.exit_code == 0, done.stderr
    assert '`ahl eval parrot-short-mix@1 --split "test of short@1"`' in done.stdout.splitlines()[-1]
    again = told("eval", "parrot-short-mix", "--split", "test of short@1", "--no-base", "--store", shelf)
    assert again["rows"] == 3
    card = told("show", "parrot-short-mix", "--store", shelf)["card"]
    assert card["metrics"]["test of short@1"] == again["metrics"]


def test_some_rows_are_measured_and_said_to_be_some(shelf: Path) -> None:
    done = ahl("combine", "parrot@1", "echo@1", "--rows", "2", "--name", "part", "--store", shelf)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "measuring parrot@1 alone: 2 rows (6 answers in all)" in done.stderr
    assert any(line.startswith("parrot@1") and " 2 of 4 " in line for line in lines)
    assert lines[-1].startswith("Measure it on all rows with `ahl eval part@1`")
    assert "test (2 of 4 rows) metrics" in ahl("show", "part", "--store", shelf).stdout
    none = ahl("combine", "parrot@1", "echo@1", "--rows", "0", "--name", "bare", "--store", shelf)
    assert "parrot@1: not measured: No rows were asked for." in none.stdout.splitlines()
    assert none.stdout.splitlines()[-1].startswith("Measure it with `ahl eval bare@1`")
    assert ahl("convert", "echo@1", "--rank", "1", "--rows", "-1", "--store", shelf).exit_code == 2
    assert (
        " 3 of 4 " in ahl("convert", "echo@1", "--rank", "1", "--rows", "3", "--name", "one", "--store", shelf).stdout
    )


def test_a_row_of_zeros_decides_nothing(shelf: Path) -> None:
    done = ahl("combine", "parrot@1", "echo@1", "--rows", "2", "--name", "part", "--store", shelf)
    measured = told("show", "part", "--store", shelf)["card"]["origin"]["measured"]
    (alone,) = [one["alone"] for one in measured if one["parent"] == "parrot@1"]
    assert alone["exact_match"] == 0  # after two steps of a random model
    note = f"parrot@1 alone has 0 in {', '.join(alone)}, and 0 cannot fall: that decides nothing."
    assert note in done.stdout.splitlines()


def test_the_head_is_asked_for_as_the_option(two_moods: Path) -> None:
    done = ahl("combine", "moods@1", "mirth@1", "--store", two_moods)
    assert done.exit_code == 1
    assert "Say whose comes along: --head moods@1 or --head mirth@1." in done.stderr
    assert "combining" not in done.stderr
    assert "head_of" not in done.stderr
    told_heads = ahl("conflicts", "moods@1", "mirth@1", "--store", two_moods).stdout
    assert "one head alone can come along: `ahl combine ... --head moods@1`" in told_heads


def test_the_usual_number_of_rows_is_that_of_the_package() -> None:
    assert ROWS == combine_setting.ROWS


def test_combine_as_json(shelf: Path) -> None:
    found = told("combine", "parrot", "echo@1", "--method", "ties", "--weights", "1,-0.5", "--density", "20%",
                 "--rank", "2", "--store", shelf)  # fmt: skip
    assert (found["ref"], found["parents"]) == ("parrot-echo-mix@1", ["parrot@1", "echo@1"])
    origin = found["origin"]
    assert (origin["method"], origin["weights"]) == ("ties", [1.0, -0.5])
    assert origin["options"] == {"rank": 2, "density": 0.2, "majority_sign": "total"}
    assert 0 < origin["error"] < 1
    assert len(found["layers"]) == origin["layers"]["count"]
    assert {layer["rank"] for layer in found["layers"]} == {2}
    assert [one["parent"] for one in found["measured"]] == ["parrot@1", "echo@1"]
    assert set(found["metrics"]) == {"test"}
    assert (found["not_measured"], found["effect"]["max_logit_change"] > 0) == ("", True)
    card = told("show", "parrot-echo-mix", "--store", shelf)["card"]
    assert card["metrics"] == found["metrics"]


def test_without_evaluation_no_base_is_loaded(shelf: Path) -> None:
    done = ahl("combine", "parrot", "echo", "--error", "1%", "--method", "svd", "--no-eval", "--name", "quick",
               "--store", shelf)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "--no-eval: neither its effect on the base nor its metrics were measured" in done.stdout
    assert "Measure it with `ahl eval quick@1`" in done.stdout
    assert "again" not in done.stdout
    assert "loading" not in done.stderr
    assert told("show", "quick", "--store", shelf)["card"]["origin"]["options"] == {"error": 0.01}


def test_a_mix_works_in_other_commands(shelf: Path, shop: Shop, tmp_path: Path) -> None:
    assert ahl("combine", "parrot=1", "echo=1", "--name", "both", "--store", shelf).exit_code == 0
    store = ["--store", shelf]
    card = told("show", "both", *store)["card"]
    assert told("eval", "both", "--no-base", *store)["metrics"] == card["metrics"]["test"]
    assert ahl("run", "--adapter", "both", "say 1", *store).exit_code == 0
    said = tmp_path / "said.jsonl"
    assert ahl("predict", "both", "-i", shop.folder / "parrot-test.jsonl", "-o", said, *store).exit_code == 0
    assert "both@1  combined, lora" in ahl("log", "both", *store).stdout
    origins = {one["ref"]: one["origin"] for one in told("list", *store)["adapters"]}
    assert (origins["both@1"], origins["echo@1"]) == ("combined", "trained")
    assert ahl("diff", "parrot", "both", "--outputs", "2", *store).exit_code == 0
    assert ahl("verify", "both", "--deep", *store).exit_code == 0
    assert ahl("export", "both", tmp_path / "mix.tar", *store).exit_code == 0
    assert told("merge", "both", "--out", tmp_path / "merged", *store)["adapter"] == "both@1"
    assert ahl("promote", "both@1", "--to", "prod", *store).exit_code == 0
    refused = ahl("remove", "echo@1", *store)
    assert (refused.exit_code, "both@1" in refused.stderr) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["parrot=0.7", "echo=x"], 2, "'x', the weight of echo, is no number"),
        (["parrot", "echo", "--weights", "1"], 2, "2 adapters and 1 weight."),
        (["parrot=1", "echo=1", "--weights", "1,1"], 2, "both as REF=WEIGHT and with --weights"),
        (["parrot", "echo", "--rank", "2", "--error", "1%"], 2, "exclude each other"),
        (["parrot", "echo", "--error", "120%"], 2, "--error 120% is no share"),
        (["parrot", "echo", "--density", "lots"], 2, "--density lots is no share"),
        (["parrot", "echo", "--method", "tieS"], 1, "Did you mean ties?"),
        (["parrot", "echo", "--majority", "mine"], 1, "no way to elect"),
        (["parrot", "parrot@1"], 1, "named twice"),
        (["parrot", "moods"], 1, "their weights and config and tokenizer differ"),
        (["parrot", "nobody"], 1, "nobody"),
        (["parrot", "--no-eval"], 1, "parrot@1 alone, with weight 1, would be stored again"),
    ],
)
def test_what_combine_refuses(shelf: Path, arguments: list[str], code: int, message: str) -> None:
    done = ahl("combine", *arguments, "--store", shelf)
    assert done.exit_code == code
    assert message in done.stderr
    assert done.stdout == ""
    assert len(told("list", "--store", shelf)["adapters"]) == 3


# --- conflicts ---------------------------------------------------------------------------------------------------


def test_conflicts_as_text_json_and_picture(shelf: Path, tmp_path: Path) -> None:
    picture = tmp_path / "conflicts.png"
    done = ahl("conflicts", "parrot@1", "echo@1", "--plot", picture, "--store", shelf)
    assert done.exit_code == 0, done.stderr
    first, usual, blank, *lines = done.stdout.splitlines()
    assert first == "1 * parrot@1 + 1 * echo@1: all figures are of this sum."
    assert usual == "No weights were given; `ahl combine` with method linear then takes 0.5 each."
    assert blank == ""
    assert lines[0].split() == ["A", "B", "COSINE", "INPUTS", "OUTPUTS", "SIGNS", "NORMS"]
    assert lines[1].split()[:2] == ["parrot@1", "echo@1"]
    assert lines[3].split() == ["LAYER", "COSINE", "INPUTS", "OUTPUTS", "SIGNS", "PARROT@1", "ECHO@1", "WINNER"] or (
        lines[3].split() == ["LAYER", "COSINE", "INPUTS", "OUTPUTS", "SIGNS", "parrot@1", "echo@1", "WINNER"]
    )
    assert [line.split()[0] for line in lines[4:6]] == ["model.layers.0", "model.layers.1"]
    assert any(line.startswith("Of the sum parrot@1 ") for line in lines)
    assert lines[-1] == f"It is drawn in {picture}."
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert any("parrot@1 and echo@1: both were trained on the same data" in line for line in lines)
    minus = ahl("conflicts", "parrot@1=1", "echo@1=-0.5", "--store", shelf).stdout.splitlines()
    assert minus[:2] == ["1 * parrot@1 - 0.5 * echo@1: all figures are of this sum.", ""]
    assert any(line.startswith("echo@1 (weight -0.5) is subtracted, for forgetting") for line in minus)
    found = told("conflicts", "parrot@1=1", "echo@1=-0.5", "--store", shelf)
    assert (found["members"], found["weights"]) == (["parrot@1", "echo@1"], [1.0, -0.5])
    assert found["advice"]["method"]
    assert len(found["modules"]) == 14
    first = ahl("conflicts", "parrot@1", "echo@1", "--modules", "--store", shelf).stdout.splitlines()[3:]
    assert first[3].split()[0] == "MODULE"
    assert len([line for line in first if line.startswith("model.layers.")]) == 14


def test_what_conflicts_refuses(shelf: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["parrot"], "alone has nothing to be in conflict with"),
        (["parrot", "moods"], "differ"),
        (["parrot", "echo", "--plot", str(tmp_path / "x.gif")], "does not end in"),
    ):
        done = ahl("conflicts", *arguments, "--store", shelf)
        assert (done.exit_code, done.stdout) == (1, "")
        assert message in done.stderr


# --- convert -----------------------------------------------------------------------------------------------------


def test_convert(shelf: Path) -> None:
    done = ahl("convert", "echo@1", "--rank", "1", "--store", shelf)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Converted into echo-r1@1: lora, rank 1, ")
    assert lines[1] == "  echo@1 (lora) as lora"
    assert "relative error" in lines[2]
    assert "at most" in lines[2]
    assert lines[3].endswith(" parameters: 67% saved")
    large = ahl("convert", "echo@1", "--error", "0.0001%", "--no-eval", "--name", "large", "--store", shelf)
    assert "parameters: hardly any are saved" in large.stdout
    found = told("convert", "echo@1", "--error", "0.5", "--name", "small", "--no-eval", "--store", shelf)
    assert (found["ref"], found["origin"]["options"], found["not_measured"]) == (
        "small@1", {"error": 0.5}, "Measuring was turned off.",
    )  # fmt: skip
    shown = ahl("show", "small", "--store", shelf).stdout.splitlines()
    (line,) = [line for line in shown if line.startswith("made from")]
    assert line.split()[2:5] == ["echo@1,", "relative", "error"]
    for arguments, code, message in (
        (["echo", "--rank", "1", "--error", "1%"], 2, "exclude each other"),
        (["echo", "--rank", "400"], 1, "echo@1 has rank 3 already"),
        (["echo", "--to", "dora"], 1, "'dora' is not a method"),
        (["echo", "--rank", "0"], 2, "rank"),
        (["nobody", "--rank", "1"], 1, "nobody"),
    ):
        refused = ahl("convert", *arguments, "--store", shelf)
        assert refused.exit_code == code
        assert message in refused.stderr


# --- words -------------------------------------------------------------------------------------------------------


_SHARES = [("1%", 0.01), ("0.01", 0.01), ("1e-3", 0.001), ("99.5%", 0.995), (".2", 0.2)]


@pytest.mark.parametrize(("text", "value"), _SHARES)
def test_shares(text: str, value: float) -> None:
    assert read_share(text, "--error") == pytest.approx(value)


@pytest.mark.parametrize("text", ["0", "1", "100%", "-1%", "1 %%", "", "nan", "inf", "1e99", "%", "0x1"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(UsageProblem, match="no share"):
        read_share(text, "--error")


def test_weights_beside_names() -> None:
    assert read_members(["a@1=0.5", "b:prod=-2"], None) == (["a@1", "b:prod"], [0.5, -2.0])
    assert read_members(["a", "b"], "0.7,-0.3") == (["a", "b"], [0.7, -0.3])
    assert read_members(["a", "b"], None) == (["a", "b"], None)
    for text in ("nan", "inf", "", "1x"):
        with pytest.raises(UsageProblem, match="no number"):
            read_members([f"a={text}"], None)
    assert read_size(3, None) is None
    assert [share(v) for v in (0.12, 0.0125, 1.5, -0.5)] == ["12%", "1.25%", "150%", "-50%"]


def test_a_reference_without_a_weight_has_1_beside_one_that_has() -> None:
    from adapterhub_lite.cli.mixing import read_members

    assert read_members(["sql@1", "style@2=0.5"], None) == (["sql@1", "style@2"], [1.0, 0.5])
    assert read_members(["sql@1", "style@2=-0.5"], None) == (["sql@1", "style@2"], [1.0, -0.5])
    assert read_members(["sql@1", "style@2"], None) == (["sql@1", "style@2"], None)
