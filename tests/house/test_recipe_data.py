"""The data that the project wrote: reproducible, runnable, and with test parts that share nothing with training."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "recipes" / "data"
SPLITS = ("train", "validation", "test")
KINDS = ("LOC", "ORG", "PER")


def rows(name: str, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / name / f"{split}.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("name", ["sql", "entities"])
def test_the_generator_makes_exactly_the_shipped_data(tmp_path, name):
    subprocess.run([sys.executable, str(DATA / name / "generate.py"), "--out", str(tmp_path)], check=True)
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (DATA / name / f"{split}.jsonl").read_bytes()


def test_tagged_sentences_of_the_parts_share_no_name_and_no_sentence():
    names, bare = [], []
    for split in SPLITS:
        some = rows("entities", split)
        assert all(len(row["tokens"]) == len(row["tags"]) for row in some)
        assert {tag for row in some for tag in row["tags"]} <= {"O", *(f"{p}-{t}" for p in "BI" for t in KINDS)}
        pairs = [list(zip(row["tokens"], row["tags"], strict=True)) for row in some]
        names.append({word for row in pairs for word, tag in row if tag != "O"})
        bare.append({" ".join(tag[2:] or word for word, tag in row if tag[0] != "I") for row in pairs})
        assert len({" ".join(row["tokens"]) for row in some}) == len(some)
    for held in (names, bare):
        assert min(map(len, held)) >= 12
        assert not held[2] & (held[0] | held[1])
        assert not held[0] & held[1]


def test_sql_schemas_of_the_parts_are_disjoint():
    tables = [{t for r in rows("sql", s) for t in re.findall(r"CREATE TABLE (\w+)", r["schema"])} for s in SPLITS]
    assert min(map(len, tables)) >= 8
    assert not tables[0] & tables[1]
    assert not tables[0] & tables[2]
    assert not tables[1] & tables[2]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_reference_query_finds_something_in_its_database(split):
    for row in rows("sql", split):
        with closing(sqlite3.connect(":memory:")) as database:
            database.executescript(row["database"])
            assert database.execute(row["sql"]).fetchall(), row["question"]


def test_every_training_query_runs_on_its_schema():
    for row in rows("sql", "train"):
        with closing(sqlite3.connect(":memory:")) as database:
            database.executescript(row["schema"].replace("\n", ";\n") + ";")
            database.execute(row["sql"])


def sequences(text: str, length: int) -> set[tuple[str, ...]]:
    words = re.sub(r"[^\w\s]", " ", text.casefold()).split()
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


@pytest.mark.parametrize(("name", "column", "least"), [("reviews", "review", 400), ("topics", "text", 300)])
def test_test_texts_share_no_five_words_with_training_texts(name, column, least):
    texts = {split: [r[column] for r in rows(name, split)] for split in SPLITS}
    everything = [t for part in texts.values() for t in part]
    assert len(everything) >= least
    assert len(set(everything)) == len(everything)
    seen = set().union(*(sequences(t, 5) for t in texts["train"] + texts["validation"]))
    assert [t for t in texts["test"] if sequences(t, 5) & seen] == []


@pytest.mark.parametrize("name", ["reviews", "topics"])
def test_labels_are_balanced(name):
    for split in SPLITS:
        counts = Counter(r["label"] for r in rows(name, split))
        assert len(set(counts.values())) == 1
