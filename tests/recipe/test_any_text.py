"""Whatever is read, nothing but our own errors escapes."""

from __future__ import annotations

import pickle
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub_lite.errors import FormatError, NotFound, RecipeError
from adapterhub_lite.recipe import (
    load_recipe,
)
from tests.recipe.build import GOOD, write

QUIET = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIGNS = ["\n", "- ", "? ", ": ", "&a", "*a", "!", "|", "'"]
PIECES = st.sampled_from([*GOOD.replace("{", " { ").replace("}", " } ").split(" "), *SIGNS])
FIELDS = st.text(max_size=12) | st.sampled_from(["adapter", "data.train", "task.words"])
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def only_our_errors(source: str, overrides: object = ()) -> None:
    try:
        found = load_recipe(source, overrides)  # type: ignore[arg-type]
    except (RecipeError, NotFound, FormatError) as error:
        str(error).encode()
    else:
        assert pickle.loads(pickle.dumps(found)) == found


@QUIET
@given(st.text(max_size=200) | st.lists(PIECES, max_size=60).map(" ".join) | st.binary(max_size=200))
def test_any_text(folder: Path, text: str | bytes) -> None:
    only_our_errors(write(folder, text.encode("utf-8", "replace") if isinstance(text, str) else text))


@QUIET
@given(st.sampled_from(sorted(set(GOOD))), st.integers(0, len(GOOD)), st.text(max_size=6))
def test_a_good_recipe_with_a_typing_error(folder: Path, gone: str, at: int, put: str) -> None:
    only_our_errors(write(folder, (GOOD[:at] + put + GOOD[at:].replace(gone, "", 1)).encode("utf-8", "replace")))


@QUIET
@given(st.dictionaries(FIELDS, PLAIN, max_size=3))
def test_any_override(folder: Path, overrides: dict[str, object]) -> None:
    only_our_errors(write(folder, GOOD), overrides)


@QUIET
@given(st.lists(st.text(max_size=20), max_size=3))
def test_any_override_text(folder: Path, overrides: list[str]) -> None:
    only_our_errors(write(folder, GOOD), overrides)


@QUIET
@given(st.text(max_size=40))
def test_any_name(library: Path, name: str) -> None:
    only_our_errors(name)
