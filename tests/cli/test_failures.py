"""What a failed command says, and its exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.cli.guard import guarded
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
    endless = ["train", shop.recipe("parrot"), "-o", "training.epochs=10000", "--store", str(store)]
    process = subprocess.Popen([*AHL, *endless], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("training"):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted; nothing was stored"
    assert "Traceback" not in err
    assert Store(store).names() == []


def test_a_closed_pipe_ends_quietly(shop: Shop) -> None:
    for arguments in (["list", "--store", str(shop.store)], ["verify", "--store", str(shop.store)], ["--help"]):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([*AHL, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
        os.close(write)
        assert (done.returncode, done.stderr) == (141, ""), arguments
