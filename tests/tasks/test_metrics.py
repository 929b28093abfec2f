"""Metrics against sqlite3 itself and against plain definitions; a hostile query harms nothing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from adapterhub_lite.errors import DataError
from adapterhub_lite.recipe.schema import METRICS
from adapterhub_lite.tasks import metrics
from adapterhub_lite.tasks.metrics import accuracy, exact_match, macro_f1, sql_execution

DATABASE = """
CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL, stock INTEGER);
INSERT INTO item VALUES (1, 'nut', 0.1, 5), (2, 'bolt', 0.2, 7), (3, 'gear', 2.0, 7), (4, 'cog', NULL, 0);
"""


def score(answer: str, reference: str) -> float:
    return sql_execution(answer, reference, {"database": DATABASE})


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("SELECT name FROM item ORDER BY id DESC", "SELECT name FROM item", 1.0),
        ("SELECT name FROM item ORDER BY id DESC", "SELECT name FROM item ORDER BY id", 0.0),
        ("SELECT name FROM item ORDER BY id", "select name from item order by id", 1.0),
        ("SELECT name, id FROM item", "SELECT id, name FROM item", 0.0),
        ("SELECT 0.1 + 0.2", "SELECT 0.3", 1.0),
        ("SELECT 0.30001", "SELECT 0.3", 0.0),
        ("SELECT SUM(price) FROM item", "SELECT 2.3", 1.0),
        ("SELECT DISTINCT stock FROM item", "SELECT stock FROM item", 0.0),
        ("SELECT NULL", "SELECT price FROM item WHERE id = 4", 1.0),
        ("SELECT 0", "SELECT price FROM item WHERE id = 4", 0.0),
        ("SELECT '7'", "SELECT 7", 0.0),
        ("SELECT 2", "SELECT price FROM item WHERE id = 3", 1.0),
        ("SELECT 1, 1 UNION ALL SELECT 1.0, 2", "SELECT 1.0, 1 UNION ALL SELECT 1, 2", 1.0),
        ("SELECT id FROM item WHERE 0", "SELECT id FROM item WHERE id > 9", 1.0),
        ("WITH t AS (SELECT stock s FROM item) SELECT MAX(s) FROM t", "SELECT 7", 1.0),
        ("SELECT", "SELECT 1", 0.0),
        ("", "SELECT 1", 0.0),
        ("SELECT nothing FROM item", "SELECT 1", 0.0),
        ("SELECT 1; SELECT 2", "SELECT 1", 0.0),
        ("SELECT 1\0", "SELECT 1", 0.0),
        ("SELECT '\ud800'", "SELECT 1", 0.0),
    ],
)
def test_sql_execution(answer: str, reference: str, expected: float):
    assert score(answer, reference) == expected


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM item",
        "INSERT INTO item VALUES (9, 'x', 1, 1) RETURNING id",
        "UPDATE item SET stock = 0 RETURNING id",
        "DROP TABLE item",
        "CREATE TABLE other (id)",
        "CREATE TEMP TABLE other (id)",
        "PRAGMA query_only = OFF",
        "PRAGMA table_info(item)",
        "SELECT * FROM pragma_table_info('item')",
        "ATTACH ':memory:' AS other",
        "VACUUM",
        "BEGIN",
        "SELECT load_extension('evil')",
    ],
)
def test_what_is_not_reading_scores_nothing(query: str):
    assert score(query, query if query.startswith("SELECT 1") else "SELECT 1") == 0.0
    with pytest.raises(DataError, match="reference query fails"):
        score("SELECT 1", query)


@pytest.mark.parametrize("query", ["ATTACH '{}' AS other", "VACUUM INTO '{}'"])
def test_no_file_is_made(tmp_path: Path, query: str):
    path = tmp_path / "made.db"
    assert score(query.format(path), "SELECT 1") == 0.0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "query",
    [
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n WHERE i < 0",
        f"SELECT COUNT(*) FROM {', '.join(f'item a{i}' for i in range(30))}",
    ],
)
def test_endless_queries_are_stopped(query: str):
    assert score(query, "SELECT 1") == 0.0


@pytest.mark.parametrize("query", ["length(randomblob(900000000))", "length(hex(zeroblob(400000000)))"])
def test_values_of_a_gigabyte_are_refused(query: str):
    assert score(f"SELECT {query}", "SELECT 1") == 0.0
    assert score(f"SELECT {query} > 1", "SELECT 1") == 0.0


def test_rows_need_a_database():
    with pytest.raises(DataError, match="database"):
        sql_execution("SELECT 1", "SELECT 1", {})
    with pytest.raises(DataError, match="reference query fails"):
        score("SELECT 1", "SELECT missing FROM item")


def test_exact_match_ignores_white_space_only():
    assert exact_match(" a\n b ", "a b", {}) == 1.0
    assert exact_match("A b", "a b", {}) == 0.0
    assert set(metrics.METRICS) == {"rouge_l", "exact_match", "sql_execution"} == set(METRICS)


def test_accuracy_and_macro_f1_by_definition():
    expected = ["a", "a", "a", "b", "b", "c"]
    answers = ["a", "a", "b", "b", "c", "x"]
    assert accuracy(answers, expected) == 3 / 6

    def f1(label: str) -> float:
        true = sum(a == e == label for a, e in zip(answers, expected, strict=True))
        found, there = answers.count(label), expected.count(label)
        precision, recall = true / found if found else 0, true / there
        return 2 * precision * recall / (precision + recall) if true else 0.0

    assert macro_f1(answers, expected) == pytest.approx(sum(map(f1, "abc")) / 3)


COUNTING = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"


@pytest.mark.parametrize(
    "script",
    [
        "ATTACH '{}' AS x; CREATE TABLE x.t (a)",
        "VACUUM INTO '{}'",
        "CREATE TABLE t AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
    ],
)
def test_a_database_script_writes_no_file_and_comes_to_an_end(tmp_path: Path, script: str):
    path = tmp_path / "made.db"
    with pytest.raises(DataError, match="reference query fails"):
        sql_execution("SELECT 1", "SELECT 1", {"database": script.format(path)})
    assert not path.exists()


@pytest.mark.parametrize(
    "query",
    [
        f"{COUNTING} SELECT {', '.join(['zeroblob(999000)'] * 20)} FROM n",
        f"{COUNTING} SELECT max(randomblob(999999)) FROM n",
        f"{COUNTING} SELECT i FROM n",
        "SELECT printf('%.*c', 1000000000, 'x')",
        "SELECT instr(hex(zeroblob(490000)), hex(zeroblob(240000)) || '1')",
        "",
        "-- nothing",
    ],
)
def test_an_answer_cannot_exhaust_the_machine_or_win_by_saying_nothing(query: str):
    assert sql_execution(query, "SELECT 1 WHERE 0", {"database": "CREATE TABLE t (a)"}) == 0.0


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("SELECT a FROM t ORDER\nBY a DESC", "SELECT a FROM t ORDER BY a", 0.0),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", "SELECT a FROM t ORDER BY a DESC", 1.0),
        ("SELECT a FROM t WHERE 'order by' <> ''", "SELECT a FROM t ORDER BY a DESC", 1.0),
        ("SELECT a FROM t", "SELECT a FROM t UNION ALL SELECT a FROM t", 0.0),
    ],
)
def test_order_counts_only_where_the_result_is_ordered(reference: str, answer: str, expected: float):
    row = {"database": "CREATE TABLE t (a); INSERT INTO t VALUES (2), (1), (3)"}
    assert sql_execution(answer, reference, row) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("the cat sat", "The cat sat.", 1.0),
        ("police killed the gunman", "police kill the gunman", 0.75),
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("a b", "a x b y", 2 * 2 / 6),
        ("", "a b", 0.0),
        ("...", "a b", 0.0),
        ("...", "...", 1.0),
        ("+", "-", 0.0),
        ("a a a a", "a", 2 * 1 / 5),
        ("Straße", "STRASSE", 1.0),
        ("今日は晴れ", "今日は雨", 2 * 3 / 9),
        ("3.5 kg", "3.5 lb", 2 * 2 / 6),
    ],
)
def test_rouge_l_is_the_common_part_in_order(answer: str, reference: str, score: float):
    """The second and third: examples of Lin (2004), section 3."""
    assert metrics.rouge_l(answer, reference, {}) == pytest.approx(score)


def test_the_longest_common_subsequence_is_that_of_the_plain_table():
    chance = random.Random(0)
    for _ in range(200):
        first, second = ([chance.choice("abcd") for _ in range(chance.randint(0, 90))] for _ in range(2))
        rows = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, one in enumerate(first):
            for j, other in enumerate(second):
                rows[i + 1][j + 1] = rows[i][j] + 1 if one == other else max(rows[i][j + 1], rows[i + 1][j])
        assert metrics._longest_common(first, second) == rows[-1][-1]


def test_long_answers_are_scored_quickly_enough():
    text = " ".join(str(i % 977) for i in range(20_000))
    assert metrics.rouge_l(text, text, {}) == 1.0
