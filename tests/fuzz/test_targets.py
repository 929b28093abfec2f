"""Each target a little: any bytes, and changes of what is valid. `make fuzz` goes on for as long as it is told to."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_lite.errors import FormatError
from adapterhub_lite.formats.safetensors_header import Header
from tests.fuzz import __main__ as runner
from tests.fuzz import engine
from tests.fuzz.common import accepted, check_refusal

TARGETS = {name: importlib.import_module(f"tests.fuzz.{name}") for name in runner.TARGETS}
# Mutations of archives compress and check whole files, those of recipes go through YAML.
CHANGES = {"archive": 8, "recipe": 5}


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_are_accepted(name: str) -> None:
    target = TARGETS[name]
    for seed in target.SEEDS:
        target.read(seed)
        target.fuzz(seed)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_bytes(name: str, data: bytes) -> None:
    TARGETS[name].fuzz(data)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60, deadline=None)
@given(number=st.integers(0, 2**63))
def test_changes_of_what_is_valid(name: str, number: int) -> None:
    for step in range(CHANGES.get(name, 30)):
        TARGETS[name].fuzz(engine.made(TARGETS[name], number + step))


def test_mutations_get_through() -> None:
    """Of the changed inputs some are still valid, of every kind: the promises about those are tried too."""
    for name, target in TARGETS.items():
        read = [accepted(target.read, engine.made(target, number)) for number in range(150)]
        assert any(found is not None for found in read), name


# What a target notices


def noticed(name: str, monkeypatch: pytest.MonkeyPatch, where: str, broken: Any) -> None:
    target = TARGETS[name]
    monkeypatch.setattr(f"tests.fuzz.{name}.{where}", broken)
    with pytest.raises(AssertionError):
        list(map(target.fuzz, target.SEEDS))


def test_a_header_that_is_read_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = TARGETS["safetensors_header"].parse_header

    def forgetful(data: bytes) -> Header:
        found = parse(data)
        return Header(dict(list(found.tensors.items())[1:]), found.metadata, found.body_offset)

    noticed("safetensors_header", monkeypatch, "parse_header", forgetful)


def test_a_configuration_that_means_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    write = TARGETS["adapter_config"].adapter_config_bytes
    monkeypatch.setattr(
        "tests.fuzz.adapter_config.adapter_config_bytes", lambda spec: write(spec).replace(b'"r": 2', b'"r": 3')
    )
    with pytest.raises(AssertionError):
        TARGETS["adapter_config"].fuzz(TARGETS["adapter_config"].SEEDS[0])


def test_patterns_that_match_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    noticed("adapter_config", monkeypatch, "first_match", lambda keys, name: None)


def test_a_manifest_of_two_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS["manifest"]
    monkeypatch.setattr(target.Manifest, "to_bytes", lambda self: b"{}")
    with pytest.raises(AssertionError):
        target.fuzz(target.SEEDS[0])


def test_a_path_out_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS["reference"]
    monkeypatch.setattr("adapterhub_lite.store.layout.check_name", lambda text: text)
    monkeypatch.setattr("adapterhub_lite.names.check_name", lambda text, what="": text)
    with pytest.raises((AssertionError, ValueError)):
        target.fuzz(b"../../x")


def test_a_search_that_finds_damaged_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    noticed("query", monkeypatch, "search", lambda entries, text: entries)


def test_refusals_say_something_short() -> None:
    check_refusal(FormatError("x"))
    for message in ("", "x" * 30_000):
        with pytest.raises(AssertionError):
            check_refusal(FormatError(message))
    with pytest.raises(UnicodeEncodeError):
        check_refusal(FormatError("\ud800"))


# The runner


def test_findings_are_kept_and_told(tmp_path: Path) -> None:
    class Broken:
        SEEDS = (b"abc",)

        @staticmethod
        def mutate(data: bytes, rng: Random) -> bytes:
            return data + rng.randbytes(1)

        @staticmethod
        def fuzz(data: bytes) -> None:
            if data not in Broken.SEEDS:
                raise ZeroDivisionError(data)

    told = engine.with_mutations(Broken, 5, tmp_path, 7)
    assert told["executions"] == 1
    assert "ZeroDivisionError" in told["trace"]
    assert Path(told["finding"]).read_bytes() == engine.made(Broken, 7)


def test_the_runner_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runner, "KEPT", tmp_path)
    assert runner.main(["reference", "--seconds", "1", "--engine", "mutate"]) == 0
    said = capsys.readouterr().out
    assert "engine mutate, 1 s each" in said
    assert int(said.splitlines()[1].split()[1].replace(",", "")) > 100
    assert said.splitlines()[1].endswith("none")
    with pytest.raises(SystemExit):
        runner.main(["nothing"])


def test_a_finding_of_the_runner_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = {"executions": 3, "finding": "build/x", "trace": "AssertionError"}
    done = type("Done", (), {"returncode": 0, "stdout": json.dumps(told), "stderr": ""})
    monkeypatch.setattr(runner, "KEPT", tmp_path)
    monkeypatch.setattr(runner.subprocess, "run", lambda *_, **__: done)
    assert runner.main(["reference", "--seconds", "1", "--engine", "mutate"]) == 1
    assert sys.executable
