"""Prints what was tried."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.stress import tally


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if tally.ROWS:
        terminalreporter.section("stress" if tally.LONG else "stress: a sample, make stress tries everything")
        for line in tally.table():
            terminalreporter.write_line(line)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of small_disk.c, compiled: to be preloaded."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler for Linux")
    made = tmp_path_factory.mktemp("library") / "small_disk.so"
    source = Path(__file__).with_name("small_disk.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", made, source, "-ldl"], check=True)
    return str(made)
