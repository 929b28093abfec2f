"""What holds for every test: no network, a store of its own, quiet libraries, one thread."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read by the libraries when they are first imported, so they are set before anything else.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    BITSANDBYTES_NOWELCOME="1",
)
# Processes that test beside each other (pytest-xdist) have a core each.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

import pytest

from adapterhub_lite.places import cache_root

_CACHE = cache_root()
_LOOPBACK = ("127.", "::1", "localhost")


class NetworkReached(AssertionError):
    """A test tried to leave this machine."""


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AHL_HOME and AHL_CACHE are folders of this test's own; of the user's cache only bases and built code are seen."""
    home, cache = tmp_path / "ahl-home", tmp_path_factory.mktemp("ahl-cache")
    (_CACHE / "kernels").mkdir(parents=True, exist_ok=True)
    for shared in ("bases", "fingerprints.json", "kernels"):
        (cache / shared).symlink_to(_CACHE / shared)
    monkeypatch.setenv("AHL_HOME", str(home))
    monkeypatch.setenv("AHL_CACHE", str(cache))
    return home


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets reach this machine only."""
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))


def _guarded(connect: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: socket.socket, address: Any) -> Any:
        if isinstance(address, tuple) and not str(address[0]).startswith(_LOOPBACK):
            raise NetworkReached(f"a test tried to reach {address}")
        return connect(self, address)

    return guarded


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny models run fastest on one thread, also when other work shares the cores."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(family, **changes) -> the folder of a tiny checkpoint, made once."""
    from tests import tiny

    made: dict[str, Path] = {}

    def folder(family: str, **changes: Any) -> Path:
        key = f"{family} {sorted(changes.items())}"
        if key not in made:
            made[key] = tiny.save(family, tmp_path_factory.mktemp(family), **changes)
        return made[key]

    return folder


@pytest.fixture(scope="session")
def tiny_base(tiny_folder: Callable[..., Path]) -> Callable[..., Any]:
    """(family, quantize, **changes) -> a tiny base, loaded once: whatever a test does, it must leave it as it was."""
    from adapterhub_lite.bases.load import load_base

    made: dict[str, Any] = {}

    def base(family: str, quantize: str = "none", **changes: Any) -> Any:
        key = f"{family} {quantize} {sorted(changes.items())}"
        if key not in made:
            made[key] = load_base(str(tiny_folder(family, **changes)), quantize, device="cpu")
        return made[key]

    return base
