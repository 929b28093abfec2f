"""A thread's OpenMP pool ends when it is released, and comes again with the next computation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapterhub_lite.kernels import threads
from adapterhub_lite.kernels.threads import release_pool


@pytest.fixture
def three_threads() -> Iterator[None]:
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


def running() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
@pytest.mark.skipif(threads._pause() is None, reason="torch does not run on libgomp")
@pytest.mark.usefixtures("three_threads")
def test_the_pool_ends_and_comes_again() -> None:
    release_pool()
    alone = running()
    x = torch.arange(600_000.0).view(600, 1000)
    expected = x.exp().sum()
    with_pool = running()
    release_pool()
    assert with_pool > alone
    assert running() == alone
    assert x.exp().sum() == expected
    release_pool()
    release_pool()
    assert running() == alone
