"""What a failed command says, and its exit code."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.cli.diagnosis import diagnose
from adapterhub_lite.cli.guard import guarded
from adapterhub_lite.cli.render import Unwritten, put, remark, say
from adapterhub_lite.errors import NotFound
from adapterhub_lite.store import Store
from tests.cli.conftest import Shop, ahl, told

AHL = [sys.executable, "-m", "adapterhub_lite.cli"]


def _raise(error: BaseException) -> Callable[..., None]:
    def fail(**_: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["show", "nothing"], 1, "There is no adapter nothing"),
        (["show", "Bad Name"], 1, "not a valid adapter name"),
        (["show", "x@0"], 1, "not a version"),
        (["export", "nothing", "out"], 1, "There is no adapter nothing"),
        (["import", "no-folder", "--name", "x"], 1, "does not exist"),
        (["train", "sqll"], 1, "Did you mean sql?"),
        (["run", "--adapter", "nothing", "hi"], 1, "There is no adapter nothing"),
        (["run", "--base", "nonsense", "hi"], 1, "There is no base 'nonsense'"),
        (["predict", "x", "--input", "a"], 2, "--output"),
        (["lst"], 2, "'list'"),
        (["list", "--nonsense"], 2, "--nonsense"),
        (["show"], 2, "REF"),
        (["show", "a", "b"], 2, "b"),
    ],
)
def test_errors_are_one_line_with_a_code(arguments: list[str], code: int, part: str) -> None:
    result = ahl(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert part in result.stderr
    if code == 1:
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_errors_as_json() -> None:
    error = told("show", "nothing", code=1)["error"]
    assert error["type"] == "NotFound"
    assert "nothing" in error["message"]
    assert "ahl list" in error["hint"]


def test_a_bug_is_named_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert guarded(_raise(ZeroDivisionError("boom")), as_json=True) == 70
    said = capsys.readouterr()
    assert said.err.startswith("bug: ZeroDivisionError: boom (test_failures.py:")
    assert said.err.count("\n") == 1
    assert json.loads(said.out)["error"]["type"] == "Bug"
    monkeypatch.setenv("AHL_DEBUG", "1")
    guarded(_raise(ZeroDivisionError("boom")))
    assert "Traceback" in capsys.readouterr().err


def test_errors_of_the_system_and_of_steering_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(_raise(PermissionError(13, "Permission denied", "/a"))) == 1
    assert capsys.readouterr().err == "error: /a: Permission denied.\n"
    assert guarded(_raise(NotFound("\x1b[2J", "b"))) == 1
    assert capsys.readouterr().err == "error: \\x1b[2J b\n"


def test_interrupted_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    fail = _raise(KeyboardInterrupt())
    assert guarded(fail) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_in_training_stores_nothing(shop: Shop, tmp_path: Path) -> None:
    store = tmp_path / "store"
    changes = ["-o", "training.epochs=10000", "-o", "training.checkpoint_every=1"]
    endless = ["train", shop.recipe("parrot"), *changes, "--store", str(store)]
    process = subprocess.Popen([*AHL, *endless], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while not list(store.glob("runs/*/checkpoint-*")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    last = err.splitlines()[-1]
    assert last.startswith("Stopped after step ")
    told = shlex.split(last.partition("Go on with: ")[2])
    assert told == ["ahl", *endless, "--resume"]
    assert "Traceback" not in err
    assert Store(store).names() == []


def test_a_closed_pipe_ends_quietly(shop: Shop) -> None:
    for arguments in (["list", "--store", str(shop.store)], ["verify", "--store", str(shop.store)], ["--help"]):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [*AHL, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, check=False, env=_buffered()
        )
        os.close(write)
        assert (done.returncode, done.stderr) == (141, ""), arguments


# --- nowhere to write ----------------------------------------------------------------------------------------------

_COMMANDS = [
    ["--help"],
    ["--version"],
    ["list"],
    ["list", "--json"],
    ["show", "parrot"],
    ["log", "parrot"],
    ["search", "parrot", "--json"],
    ["show", "nothing", "--json"],
    ["train", "--help"],
    ["recipes"],
    ["verify", "--json"],
]


def _buffered() -> dict[str, str]:
    """The environment, with the streams as they are for most: what fails to be written stays in them."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def _redirected(arguments: list[str], redirection: str, shop: Shop) -> subprocess.CompletedProcess[str]:
    """`ahl` with its streams as a shell redirects them."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *AHL, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**_buffered(), "AHL_HOME": str(shop.store)},
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", _COMMANDS, ids=" ".join)
def test_output_onto_a_full_disk_is_one_line(arguments: list[str], shop: Shop) -> None:
    done = _redirected(arguments, ">/dev/full", shop)
    assert done.returncode == 1
    first = ["error: There is no adapter nothing"] if "nothing" in arguments else []
    said = done.stderr.splitlines()
    assert said[-1] == "error: The output could not be written: No space left on device."
    assert len(said) == 1 + len(first)
    assert all(line.startswith(start) for line, start in zip(said, first, strict=False))


@pytest.mark.parametrize("arguments", [["list"], ["--help"], ["show", "parrot", "--json"], ["recipes"]], ids=" ".join)
def test_closed_streams_give_a_code_and_no_trace(arguments: list[str], shop: Shop) -> None:
    done = _redirected(arguments, ">&-", shop)
    assert (done.returncode, done.stderr) == (1, "error: The output could not be written: Bad file descriptor.\n")
    whole = _redirected(arguments, "", shop)
    for redirection in ("2>&-", "<&-", "2>&- <&-"):
        done = _redirected(arguments, redirection, shop)
        assert (done.returncode, done.stdout, done.stderr) == (0, whole.stdout, "")
    assert _redirected(arguments, ">&- 2>&-", shop).returncode == 1
    assert _redirected(["show", "nothing"], "2>&-", shop).returncode == 1


def test_a_closed_stream_leaves_its_number_to_no_file(shop: Shop) -> None:
    program = (
        "import os, sys; from adapterhub_lite.cli.main import answer; answer(['--version']);"
        "sys.exit(min(os.open(os.devnull, os.O_RDONLY), 3))"
    )
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", program], check=False)
    assert done.returncode == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_work_goes_on_when_progress_cannot_be_told(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = _redirected(["train", shop.recipe("parrot"), "--store", str(tmp_path / "new")], "2>/dev/full", shop)
    assert done.returncode == 0
    assert Store(tmp_path / "new").versions("parrot") == [1]
    done = _redirected(["show", "nothing"], "2>/dev/full", shop)
    assert (done.returncode, done.stdout) == (1, "")
    done = _redirected(["show", "nothing", "--json"], "2>/dev/full", shop)
    assert (done.returncode, json.loads(done.stdout)["error"]["type"]) == (1, "NotFound")
    with open("/dev/full", "w", buffering=1, encoding="utf-8") as full:
        monkeypatch.setattr("sys.stderr", full)
        remark("nobody hears this")
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            full.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(("code", "ended"), [(0, 1), (130, 130)])
def test_what_is_left_in_the_stream_fails_in_one_line(code: int, ended: int) -> None:
    program = f"from adapterhub_lite.cli import main; main.answer = lambda _: print('late') or {code}; main.main()"
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=_buffered(),
        )
    said = "error: The output could not be written: No space left on device.\n"
    assert (done.returncode, done.stderr) == (ended, said)


def test_an_unwritten_result_is_told_from_other_errors_of_the_system(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert guarded(_raise(OSError(28, "No space left on device", "/data"))) == 1
    assert capsys.readouterr().err == "error: /data: No space left on device.\n"
    assert guarded(_raise(Unwritten(5, "Input/output error")), as_json=True) == 1
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "error: The output could not be written: Input/output error.\n")
    assert guarded(_raise(Unwritten(32, "Broken pipe"))) == 141
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stdout", _Full())
    for write in (put, say):
        with pytest.raises(Unwritten, match="No space"):
            write("text")


class _Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


# --- what the doctor says of places ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["folder", "file", None])
def test_a_store_inside_a_checkout_is_noticed(mark: str | None, tmp_path: Path) -> None:
    if mark == "folder":
        (tmp_path / ".git").mkdir()
    elif mark == "file":  # a worktree
        (tmp_path / ".git").write_text("gitdir: elsewhere")
    (tmp_path / "deep").mkdir()
    facts = [fact for fact in diagnose(Store(tmp_path / "deep" / "store")) if fact.name == "git"]
    assert [fact.state for fact in facts] == (["warning"] if mark else [])
    if mark:
        assert str(tmp_path) in facts[0].value
        assert "AHL_HOME" in facts[0].reason
