"""What several files of this room's tests begin with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.runtime.test_encoder import Zoo


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """zoo(family, ...): an encoder with adapters of every kind, made once a file."""
    from tests.runtime.test_encoder import Zoo

    made: dict[tuple[str, ...], Zoo] = {}

    def one(*what: str) -> Zoo:
        if what not in made:
            made[what] = Zoo(tmp_path_factory.mktemp("base"), *what)
        return made[what]

    yield one
    for each in made.values():
        each.close()
