"""Make the small text-to-SQL data set of the demo: schema and question in, one query out.

    python recipes/data/sql/generate.py --out DIR

writes train.jsonl, validation.jsonl and test.jsonl (by default beside this file).  Every
schema of schemas.py gets one small invented database; questions and queries are drawn
together from templates, and a query is kept only if sqlite3 runs it on that database, finds
something, and finds something else than the near misses a model would write (the filter
left out, one of two conditions dropped).  The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

from schemas import SCHEMAS, Column, Schema, Split, Table

Value = str | int | float
Row = dict[str, Value]

SIZES: dict[Split, int] = {"train": 700, "validation": 60, "test": 120}
NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}
ATTEMPTS = 60

PLURAL_FORMS = (
    "List the {outs} of the {things} {mod}.",
    "What are the {outs} of the {things} {mod}?",
    "Show the {outs} of all {things} {mod}.",
    "Give the {outs} of the {things} {rel} {clause}.",
    "Find the {outs} of all {things} {rel} {clause}.",
)
# The bare forms ask for the label; those with "name" only where the label is a name or a title.
WHICH_FORMS = ("Which {things} {clause}?", "Name the {things} {mod}.", "Name all {things} {rel} {clause}.")
LOOKUP_FORMS = (
    "What is the {out} of {one}?",
    "Give the {out} of {one}.",
    "Tell me the {out} of {one}.",
    "Find the {out} of {one}.",
    "Show the {out} of {one}.",
)
COUNT_FORMS = (
    "How many {things} {clause}?",
    "Count the {things} {mod}.",
    "What is the number of {things} {mod}?",
    "Give the number of {things} {rel} {clause}.",
    "Count how many {things} {clause}.",
)
COUNT_ALL_FORMS = (
    "How many {things} are there?",
    "Count all the {things}.",
    "What is the total number of {things}?",
    "How many {things} are listed in total?",
    "Give the number of {things}.",
)
AGGREGATE_FORMS = (
    "What is the {word} {noun} of {group}?",
    "Give the {word} {noun} of {group}.",
    "Find the {word} {noun} of {group}.",
    "Show the {word} {noun} of {group}.",
    "For {group}, what is the {word} {noun}?",
)
TOP_FORMS = (
    "List the {outs} of the {n} {things} with the {adj} {nouns}, {adj} first.",
    "What are the {outs} of the {n} {things} with the {adj} {nouns}, starting with the {adj}?",
    "Show the {outs} of the {n} {things} that have the {adj} {nouns}, {adj} first.",
    "Sort the {things} by {noun}, {adj} first, and give the {outs} of the first {n}.",
    "Find the {n} {things} with the {adj} {nouns} and list their {outs}, {adj} first.",
)
TOP_SUPERLATIVE_FORMS = (
    "List the {outs} of the {n} {sup} {things}, {sup} first.",
    "What are the {outs} of the {n} {sup} {things}, starting with the {sup}?",
    "Show the {outs} of the {n} {sup} {things}, beginning with the {sup}.",
)
EXTREME_FORMS = (
    "What is the {out} of the {thing} with the {adj} {noun}?",
    "Give the {out} of the {thing} with the {adj} {noun}.",
    "Show the {out} of the {thing} that has the {adj} {noun}.",
    "Find the {thing} with the {adj} {noun} and give its {out}.",
    "Tell me the {out} of the {thing} with the {adj} {noun}.",
)
EXTREME_WHICH_FORMS = ("Which {thing} has the {adj} {noun}?", "Name the {thing} with the {adj} {noun}.")
EXTREME_SUPERLATIVE_FORMS = ("What is the {out} of the {sup} {thing}?", "Give the {out} of the {sup} {thing}.")
GROUP_COUNT_FORMS = (
    "How many {things} are there for each {key}?",
    "Count the {things} per {key}.",
    "For each {key}, how many {things} are there?",
    "Show each {key} with the number of {things} for that {key}.",
    "Give the number of {things} by {key}.",
    "List every {key} and count the {things} for it.",
)
GROUP_AVERAGE_FORMS = (
    "What is the average {noun} of the {things} for each {key}?",
    "For each {key}, give the average {noun} of the {things}.",
    "Show the average {noun} of the {things} per {key}.",
    "List each {key} with the average {noun} of the {things} for that {key}.",
    "Find the mean {noun} of the {things} by {key}.",
)
DISTINCT_FORMS = (
    "What are the different {keys} of the {things}?",
    "List the distinct {keys} of the {things}.",
    "Show every {key} in the list of {things}, without repeats.",
    "Which {keys} appear in the list of {things}? Give each one once.",
    "Give all the unique {keys} in the list of {things}.",
)
STARTS_FORMS = (
    "List the {outs} of the {things} whose {out} starts with '{prefix}'.",
    "Which {things} have {a_out} that starts with '{prefix}'?",
    "What are the {outs} of the {things} whose {out} begins with '{prefix}'?",
    "Show all {thing} {outs} that start with '{prefix}'.",
    "Find the {things} whose {out} begins with '{prefix}' and list their {outs}.",
)
PAIR_FORMS = (
    "For each of the {things} {mod}, show the {out} and the {owner} {label}.",
    "List the {outs} and {owner} {labels} of all {things} {mod}.",
    "Show the {outs} and {owner} {labels} of the {things} {rel} {clause}.",
    "Give the {outs} of all {things} {mod}, together with the {owner} {labels}.",
    "What are the {outs} and {owner} {labels} of the {things} {rel} {clause}?",
)
LINK_COUNT_FORMS = (
    "For each {owner}, show the {label} and the number of {things}.",
    "Show the {label} of every {owner} with the number of {things} for that {owner}.",
    "Count the {things} per {owner} {label}.",
    "How many {things} are there for each {owner} {label}?",
    "List each {owner} {label} and count the {things} for that {owner}.",
)


class Redraw(Exception):
    """What was drawn cannot be asked about this database: draw again."""


@dataclass(frozen=True)
class World:
    """A schema with its rows, and the database that holds them."""

    schema: Schema
    rows: dict[str, list[Row]]
    ddl: str
    script: str
    database: sqlite3.Connection

    @property
    def table(self) -> Table:
        return self.schema.table

    def column(self, table: Table, column: Column) -> list[Value]:
        return [row[column.name] for row in self.rows[table.name]]

    def run(self, sql: str) -> list[tuple[Value, ...]]:
        return self.database.execute(sql).fetchall()


@dataclass(frozen=True)
class Filter:
    """One condition: its SQL, and its English as a clause with a plural verb."""

    sql: str
    clause: str
    mod: str
    column: Column


@dataclass(frozen=True)
class Draft:
    """A question and its query, and queries whose results must differ from it."""

    question: str
    sql: str
    rivals: tuple[str, ...] = ()


Family = Callable[[random.Random, World], Draft]


# Databases


def ddl_of(schema: Schema) -> str:
    lines = []
    for table in schema.tables:
        parts = [f"{column.name} {column.sql_type}" for column in table.columns]
        if schema.link and table is schema.link.parent:
            parts.insert(0, "id INTEGER PRIMARY KEY")
        elif table.with_id:
            parts.insert(0, "id INTEGER")
        if schema.link and table is schema.table:
            parts.append(f"{schema.link.key} INTEGER REFERENCES {schema.link.parent.name}(id)")
        lines.append(f"CREATE TABLE {table.name} ({', '.join(parts)})")
    return "\n".join(lines)


def fill_column(rng: random.Random, column: Column, count: int) -> list[Value]:
    """`count` values: all different, except in a text column, where every value occurs."""
    if column.kind == "label":
        return list(rng.sample(column.values, count))
    if column.kind == "text":
        values = list(column.values)
        rng.shuffle(values)
        more = rng.choices(values, weights=range(len(values) + 2, 2, -1), k=count - len(values))
        values += more
        rng.shuffle(values)
        return list(values)
    if column.kind == "date":
        first, last = date(int(column.low), 1, 1), date(int(column.high), 12, 31)
        days = rng.sample(range((last - first).days + 1), count)
        return [(first + timedelta(days=day)).isoformat() for day in days]
    return list(rng.sample(grid(column), count))


def grid(column: Column) -> list[float]:
    """Every value a number column may hold."""
    steps = round((column.high - column.low) / column.step) + 1
    if isinstance(column.step, float):
        return [round(column.low + step * column.step, 2) for step in range(steps)]
    return [int(column.low) + step * column.step for step in range(steps)]


def fill_table(rng: random.Random, schema: Schema, table: Table) -> list[Row]:
    parent = schema.link.parent if schema.link else None
    sizes = (6, 6) if table is parent else (12, 14) if parent else (12, 20)
    count = min(rng.randint(*sizes), len(table.label.values))
    columns = {column.name: fill_column(rng, column, count) for column in table.columns}
    numbers: list[Value] = list(range(1, count + 1))
    if table.with_id or table is parent:
        columns = {"id": numbers, **columns}
    if schema.link and table is schema.table:
        owners: list[Value] = [*range(1, 7), *rng.choices(range(1, 7), (5, 4, 3, 2, 1, 1), k=count - 6)]
        rng.shuffle(owners)
        columns[schema.link.key] = owners
    return [{name: values[index] for name, values in columns.items()} for index in range(count)]


def build(schema: Schema, seed: int) -> World:
    rng = random.Random(f"{seed} {schema.table.name}")
    rows = {table.name: fill_table(rng, schema, table) for table in schema.tables}
    ddl = ddl_of(schema)
    lines = [line + ";" for line in ddl.split("\n")]
    for table, records in rows.items():
        tuples = ", ".join("(" + ", ".join(map(literal, record.values())) + ")" for record in records)
        lines.append(f"INSERT INTO {table} VALUES {tuples};")
    script = "\n".join(lines)
    database = sqlite3.connect(":memory:")
    database.execute("PRAGMA foreign_keys = ON")
    database.executescript(script)
    return World(schema, rows, ddl, script, database)


# Words


def plain(value: Value) -> str:
    """A value as written in a question: 4, not 4.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def literal(value: Value) -> str:
    return f"'{value}'" if isinstance(value, str) else plain(value)


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeio" else "a ") + noun


def modifier(template: str, clause: str, relative: str) -> str:
    """The clause put after a noun: "are in Leeds" as "in Leeds", "have wings" as "with wings"."""
    verb, _, rest = clause.partition(" ")
    if verb == "have":
        return f"with {rest}"
    if verb in ("are", "were") and not template.startswith("are {"):
        return rest
    return f"{relative} {clause}"


def mention(table: Table, value: Value) -> str:
    """One row, named in a question."""
    shown = f"'{value}'" if table.quoted else str(value)
    return shown if table.person else f"the {table.singular} {shown}"


def say(rng: random.Random, forms: tuple[str, ...], **words: str) -> str:
    question = rng.choice(forms).format(**words)
    return question[0].upper() + question[1:]


def bare_forms(table: Table, forms: tuple[str, ...]) -> tuple[str, ...]:
    named = table.label.name in ("name", "title")
    return tuple(form for form in forms if named or not form.startswith("Name"))


def table_words(table: Table) -> dict[str, str]:
    return {"things": table.plural, "thing": table.singular, "rel": table.relative}


# Conditions


def made_filter(table: Table, column: Column, sql: str, template: str, shown: str) -> Filter:
    clause = template.replace("{#}", "{}").format(shown)
    return Filter(sql, clause, modifier(template, clause, table.relative), column)


def columns_of(table: Table, *kinds: str) -> list[Column]:
    return [column for column in table.columns if column.kind in kinds]


def choose(rng: random.Random, columns: list[Column]) -> Column:
    if not columns:
        raise Redraw
    return rng.choice(columns)


def equals(rng: random.Random, world: World, table: Table, prefix: str = "") -> Filter:
    column = choose(rng, columns_of(table, "text"))
    value = rng.choice(world.column(table, column))
    return made_filter(table, column, f"{prefix}{column.name} = {literal(value)}", column.clause, str(value))


def number_template(rng: random.Random, column: Column) -> str:
    """The clause of a number column, or one that names the column: "have a price {}"."""
    named = f"have {with_article(column.noun)} {{}}"
    if not column.clause:
        return named
    return named if not column.noun.startswith("number of") and rng.random() < 0.35 else column.clause


def comparison_words(rng: random.Random, column: Column, template: str, sign: str) -> str:
    if column.kind in ("year", "date"):
        return "after" if sign == ">" else "before"
    if template.startswith("have a") and template.endswith(" {}"):
        return rng.choice(("above", "over", "greater than") if sign == ">" else ("below", "under"))
    less = "fewer than" if "{#}" in template else "less than"
    return "more than" if sign == ">" else less


def template_of(rng: random.Random, column: Column) -> str:
    return number_template(rng, column) if column.kind == "number" else column.clause


def threshold(rng: random.Random, world: World, table: Table, column: Column) -> Value:
    """A value that splits the rows: one of theirs or, for a number, a rounder one nearby."""
    values = sorted(world.column(table, column))
    value = rng.choice(values[1:-1])
    if column.kind == "number" and isinstance(value, (int, float)) and rng.random() < 0.7:
        return round_near(value, column)
    return value


def round_near(value: float, column: Column) -> float:
    coarse = column.step * 10 if (column.high - column.low) / column.step > 60 else column.step * 5
    rounded = round(round(value / coarse) * coarse, 2)
    return rounded if column.low < rounded < column.high else value


def compares(rng: random.Random, world: World, table: Table, prefix: str = "", kinds: str = "number year") -> Filter:
    column = choose(rng, columns_of(table, *kinds.split()))
    value = threshold(rng, world, table, column)
    sign = "<" if rng.random() < (0.3 if column.kind == "date" else 0.4) else ">"
    template = template_of(rng, column)
    shown = f"{comparison_words(rng, column, template, sign)} {plain(value)}"
    return made_filter(table, column, f"{prefix}{column.name} {sign} {literal(value)}", template, shown)


def within(rng: random.Random, world: World, table: Table) -> Filter:
    """A BETWEEN whose ends no row holds, so that counting the ends in or out is the same."""
    column = choose(rng, columns_of(table, "number", "year"))
    values = world.column(table, column)
    ends = [end for end in grid(column) if end not in values]
    if column.kind == "number":
        ends = [end for end in ends if round_near(end, column) == end] or ends
    if len(ends) < 2:
        raise Redraw
    low, high = sorted(rng.sample(ends, 2))
    sql = f"{column.name} BETWEEN {plain(low)} AND {plain(high)}"
    return made_filter(table, column, sql, template_of(rng, column), f"between {plain(low)} and {plain(high)}")


# Families over one table


def outputs(rng: random.Random, table: Table, used: tuple[Column, ...]) -> list[Column]:
    """The columns to select: mostly the label, sometimes another or both."""
    others = [column for column in table.columns[1:] if column not in used]
    draw = rng.random()
    if draw < 0.6 or not others:
        return [table.label]
    other = rng.choice(others)
    return [other] if draw < 0.8 else [table.label, other]


def select_where(rng: random.Random, table: Table, condition: Filter) -> Draft:
    columns = outputs(rng, table, (condition.column,))
    forms = PLURAL_FORMS + (bare_forms(table, WHICH_FORMS) if columns == [table.label] else ())
    outs = " and ".join(column.nouns for column in columns)
    question = say(rng, forms, outs=outs, mod=condition.mod, clause=condition.clause, **table_words(table))
    base = f"SELECT {', '.join(column.name for column in columns)} FROM {table.name}"
    return Draft(question, f"{base} WHERE {condition.sql}", (base,))


def select_equal(rng: random.Random, world: World) -> Draft:
    table = world.table
    if rng.random() < 0.6:
        return select_where(rng, table, equals(rng, world, table))
    column, value = rng.choice(table.columns[1:]), rng.choice(world.column(table, table.label))
    base = f"SELECT {column.name} FROM {table.name}"
    question = say(rng, LOOKUP_FORMS, out=column.noun, one=mention(table, value))
    return Draft(question, f"{base} WHERE {table.label.name} = {literal(value)}")


def select_compare(rng: random.Random, world: World) -> Draft:
    return select_where(rng, world.table, compares(rng, world, world.table))


def select_between(rng: random.Random, world: World) -> Draft:
    return select_where(rng, world.table, within(rng, world, world.table))


def select_date(rng: random.Random, world: World) -> Draft:
    return select_where(rng, world.table, compares(rng, world, world.table, kinds="date"))


def select_and(rng: random.Random, world: World) -> Draft:
    table = world.table
    first = equals(rng, world, table)
    second = equals(rng, world, table) if rng.random() < 0.25 else compares(rng, world, table, kinds="number year date")
    if first.column == second.column:
        raise Redraw
    clause = f"{first.clause} and {second.clause}"
    both = Filter(f"{first.sql} AND {second.sql}", clause, f"{table.relative} {clause}", first.column)
    draft = select_where(rng, table, both)
    base = draft.rivals[0]
    return Draft(draft.question, draft.sql, (base, f"{base} WHERE {first.sql}", f"{base} WHERE {second.sql}"))


def any_filter(rng: random.Random, world: World) -> Filter:
    if rng.random() < 0.5:
        return equals(rng, world, world.table)
    return compares(rng, world, world.table, kinds="number year date")


def count_rows(rng: random.Random, world: World) -> Draft:
    table = world.table
    base = f"SELECT COUNT(*) FROM {table.name}"
    if rng.random() < 0.2:
        return Draft(say(rng, COUNT_ALL_FORMS, **table_words(table)), base)
    condition = any_filter(rng, world)
    question = say(rng, COUNT_FORMS, mod=condition.mod, clause=condition.clause, **table_words(table))
    return Draft(question, f"{base} WHERE {condition.sql}", (base,))


def aggregate(rng: random.Random, world: World) -> Draft:
    table = world.table
    function = rng.choice(("MAX", "MIN", "AVG", "SUM"))
    columns = columns_of(table, "number", *(("year", "date") if function in ("MAX", "MIN") else ()))
    column = choose(rng, [column for column in columns if column.additive or function != "SUM"])
    word = {
        "MAX": column.adjectives[0],
        "MIN": column.adjectives[1],
        "AVG": rng.choice(("average", "average", "mean")),
        "SUM": rng.choice(("total", "total", "combined")),
    }[function]
    base, group = f"SELECT {function}({column.name}) FROM {table.name}", f"all {table.plural}"
    if rng.random() < 0.5:
        question = say(rng, AGGREGATE_FORMS, word=word, noun=column.noun, group=group)
        return Draft(question, base)
    condition = any_filter(rng, world)
    if condition.column == column:
        raise Redraw
    group = f"the {table.plural} {condition.mod}"
    question = say(rng, AGGREGATE_FORMS, word=word, noun=column.noun, group=group)
    return Draft(question, f"{base} WHERE {condition.sql}", (base,))


def top_rows(rng: random.Random, world: World) -> Draft:
    table, side, limit = world.table, int(rng.random() < 0.35), rng.randint(2, 5)
    column = choose(rng, columns_of(table, "number", "year", "date"))
    columns = outputs(rng, table, (column,))
    words = table_words(table) | {
        "outs": " and ".join(out.nouns for out in columns),
        "n": rng.choice((str(limit), NUMBER_WORDS[limit])),
        "adj": column.adjectives[side],
        "noun": column.noun,
        "nouns": column.nouns,
    }
    forms: tuple[str, ...] = TOP_FORMS
    if column.superlatives and rng.random() < 0.5:
        forms, words["sup"] = TOP_SUPERLATIVE_FORMS, column.superlatives[side]
    base = f"SELECT {', '.join(out.name for out in columns)} FROM {table.name} ORDER BY {column.name}"
    order = ("DESC", "ASC")[side]
    return Draft(say(rng, forms, **words), f"{base} {order} LIMIT {limit}", (f"{base} {order}",))


def extreme_row(rng: random.Random, world: World) -> Draft:
    table, side = world.table, int(rng.random() < 0.35)
    column = choose(rng, columns_of(table, "number", "year", "date"))
    others = [other for other in table.columns[1:] if other != column]
    out = table.label if rng.random() < 0.6 else rng.choice(others)
    words = table_words(table) | {"out": out.noun, "adj": column.adjectives[side], "noun": column.noun}
    forms = EXTREME_FORMS + (bare_forms(table, EXTREME_WHICH_FORMS) if out == table.label else ())
    if table.person:
        forms = tuple(form for form in forms if "its" not in form)
    if column.superlatives and rng.random() < 0.5:
        forms, words["sup"] = EXTREME_SUPERLATIVE_FORMS, column.superlatives[side]
    order = ("DESC", "ASC")[side]
    sql = f"SELECT {out.name} FROM {table.name} ORDER BY {column.name} {order} LIMIT 1"
    return Draft(say(rng, forms, **words), sql)


def group_count(rng: random.Random, world: World) -> Draft:
    table = world.table
    key = choose(rng, columns_of(table, "text"))
    question = say(rng, GROUP_COUNT_FORMS, key=key.noun, **table_words(table))
    return Draft(question, f"SELECT {key.name}, COUNT(*) FROM {table.name} GROUP BY {key.name}")


def group_average(rng: random.Random, world: World) -> Draft:
    table = world.table
    key, column = choose(rng, columns_of(table, "text")), choose(rng, columns_of(table, "number"))
    question = say(rng, GROUP_AVERAGE_FORMS, key=key.noun, noun=column.noun, **table_words(table))
    return Draft(question, f"SELECT {key.name}, AVG({column.name}) FROM {table.name} GROUP BY {key.name}")


def distinct(rng: random.Random, world: World) -> Draft:
    table = world.table
    key = choose(rng, columns_of(table, "text"))
    question = say(rng, DISTINCT_FORMS, key=key.noun, keys=key.nouns, **table_words(table))
    tail = f"{key.name} FROM {table.name}"
    return Draft(question, f"SELECT DISTINCT {tail}", (f"SELECT {tail}",))


def starts_with(rng: random.Random, world: World) -> Draft:
    table, label = world.table, world.table.label
    value = str(rng.choice(world.column(table, label)))
    prefix = value[: rng.choice((1, 1, 1, 2, 3, 4))]
    if prefix != prefix.strip():
        raise Redraw
    words = {"out": label.noun, "outs": label.nouns, "a_out": with_article(label.noun), "prefix": prefix}
    base = f"SELECT {label.name} FROM {table.name}"
    question = say(rng, STARTS_FORMS, **words, **table_words(table))
    return Draft(question, f"{base} WHERE {label.name} LIKE '{prefix}%'", (base,))


# The family over two tables


def joined(schema: Schema) -> str:
    assert schema.link is not None
    child, parent = schema.table.name, schema.link.parent.name
    return f"FROM {child} JOIN {parent} ON {child}.{schema.link.key} = {parent}.id"


def parent_filter(rng: random.Random, world: World) -> Filter:
    """A condition on the parent, said of the child: "were written by authors from Spain"."""
    table, link = world.table, world.schema.link
    assert link is not None
    parent, prefix = link.parent, f"{link.parent.name}."
    if rng.random() < 0.4:
        value = rng.choice(world.column(parent, parent.label))
        sql, whom = f"{prefix}{parent.label.name} = {literal(value)}", str(value)
        return made_filter(table, parent.label, sql, link.clause, whom)
    text = bool(columns_of(parent, "text")) and (rng.random() < 0.7 or not columns_of(parent, "number"))
    condition = equals(rng, world, parent, prefix) if text else compares(rng, world, parent, prefix)
    return made_filter(table, condition.column, condition.sql, link.clause, f"{parent.plural} {condition.mod}")


def join_filter(rng: random.Random, world: World) -> Draft:
    table, condition = world.table, parent_filter(rng, world)
    columns = outputs(rng, table, ())
    forms = PLURAL_FORMS + (bare_forms(table, WHICH_FORMS) if columns == [table.label] else ())
    outs = " and ".join(column.nouns for column in columns)
    question = say(rng, forms, outs=outs, mod=condition.mod, clause=condition.clause, **table_words(table))
    picked = ", ".join(f"{table.name}.{column.name}" for column in columns)
    base = f"SELECT {picked} {joined(world.schema)}"
    return Draft(question, f"{base} WHERE {condition.sql}", (base,))


def join_lookup(rng: random.Random, world: World) -> Draft:
    table, link = world.table, world.schema.link
    assert link is not None
    out, value = rng.choice(link.parent.columns), rng.choice(world.column(table, table.label))
    one = f"the {link.parent.singular} of {mention(table, value)}"
    base = f"SELECT {link.parent.name}.{out.name} {joined(world.schema)}"
    sql = f"{base} WHERE {table.name}.{table.label.name} = {literal(value)}"
    return Draft(say(rng, LOOKUP_FORMS, out=out.noun, one=one), sql, (base,))


def join_pair(rng: random.Random, world: World) -> Draft:
    table, link = world.table, world.schema.link
    assert link is not None
    prefix, parent = f"{table.name}.", link.parent
    condition = compares(rng, world, table, prefix, kinds="number year date")
    words = {"out": table.label.noun, "outs": table.label.nouns, "owner": parent.singular}
    words |= {"label": parent.label.noun, "labels": parent.label.nouns}
    question = say(rng, PAIR_FORMS, mod=condition.mod, clause=condition.clause, **words, **table_words(table))
    base = f"SELECT {prefix}{table.label.name}, {parent.name}.{parent.label.name} {joined(world.schema)}"
    return Draft(question, f"{base} WHERE {condition.sql}", (base,))


def join_count(rng: random.Random, world: World) -> Draft:
    table, condition = world.table, parent_filter(rng, world)
    base = f"SELECT COUNT(*) {joined(world.schema)}"
    question = say(rng, COUNT_FORMS, mod=condition.mod, clause=condition.clause, **table_words(table))
    return Draft(question, f"{base} WHERE {condition.sql}", (base,))


def join_group(rng: random.Random, world: World) -> Draft:
    table, link = world.table, world.schema.link
    assert link is not None
    label = f"{link.parent.name}.{link.parent.label.name}"
    words = {"owner": link.parent.singular, "label": link.parent.label.noun}
    question = say(rng, LINK_COUNT_FORMS, **words, **table_words(table))
    return Draft(question, f"SELECT {label}, COUNT(*) {joined(world.schema)} GROUP BY {label}")


def join(rng: random.Random, world: World) -> Draft:
    families: list[Family] = [join_filter, join_lookup, join_pair, join_count, join_group]
    return rng.choices(families, (45, 17, 18, 12, 8))[0](rng, world)


FAMILIES: dict[str, tuple[Family, float]] = {
    "equal": (select_equal, 11),
    "compare": (select_compare, 9),
    "and": (select_and, 8),
    "count": (count_rows, 9),
    "aggregate": (aggregate, 10),
    "top": (top_rows, 7),
    "extreme": (extreme_row, 7),
    "group_count": (group_count, 5),
    "group_average": (group_average, 5),
    "distinct": (distinct, 4),
    "starts_with": (starts_with, 4),
    "between": (select_between, 4),
    "date": (select_date, 4),
    "join": (join, 17),
}


# Drawing and checking


def sound(world: World, draft: Draft) -> bool:
    """Whether the query finds something, unlike its rivals, and with no row twice."""
    rows = world.run(draft.sql)
    if not rows or all(value in (0, None) for value in rows[0]):
        return False
    if len({*rows}) != len(rows):
        return False
    return all(sorted(rows) != sorted(world.run(rival)) for rival in draft.rivals)


def plan(rng: random.Random, size: int) -> list[str]:
    """A shuffled list of family names, in the proportions of FAMILIES."""
    total = sum(weight for _, weight in FAMILIES.values())
    exact = {name: size * weight / total for name, (_, weight) in FAMILIES.items()}
    names = [name for name, share in exact.items() for _ in range(int(share))]
    by_rest = sorted(exact, key=lambda name: int(exact[name]) - exact[name])
    names += by_rest[: size - len(names)]
    rng.shuffle(names)
    return names


def suits(family: str, world: World) -> bool:
    if world.schema.link or family == "join":
        return bool(world.schema.link) and family == "join"
    return family != "date" or bool(columns_of(world.table, "date"))


def draw(rng: random.Random, family: str, world: World, taken: set[tuple[str, str]]) -> Draft | None:
    for _ in range(ATTEMPTS):
        try:
            draft = FAMILIES[family][0](rng, world)
        except Redraw:
            continue
        fresh = (world.ddl, draft.sql) not in taken and (world.ddl, draft.question) not in taken
        if fresh and sound(world, draft):
            return draft
    return None


def examples(rng: random.Random, worlds: list[World], size: int) -> Iterator[tuple[str, World, Draft]]:
    """`size` drafts with their families, spread evenly over the schemas."""
    taken: set[tuple[str, str]] = set()
    uses: Counter[str] = Counter()
    for family in plan(rng, size):
        fitting = [world for world in worlds if suits(family, world)]
        rng.shuffle(fitting)
        for world in sorted(fitting, key=lambda world: uses[world.ddl]):
            draft = draw(rng, family, world, taken)
            if draft:
                break
        else:
            raise RuntimeError(f"no {family} question is left")
        taken |= {(world.ddl, draft.sql), (world.ddl, draft.question)}
        uses[world.ddl] += 1
        yield family, world, draft


def check_schemas() -> None:
    """No table name twice, and no column list in two splits."""
    names: set[str] = set()
    splits: dict[tuple[str, ...], str] = {}
    for schema in SCHEMAS:
        for table in schema.tables:
            assert table.name not in names, table.name
            names.add(table.name)
            columns = tuple(column.name for column in table.columns)
            assert splits.setdefault(columns, schema.split) == schema.split, columns


def generate(seed: int) -> dict[Split, list[tuple[str, dict[str, str]]]]:
    """Every split as (family, row) pairs."""
    check_schemas()
    made: dict[Split, list[tuple[str, dict[str, str]]]] = {}
    for split, size in SIZES.items():
        worlds = [build(schema, seed) for schema in SCHEMAS if schema.split == split]
        made[split] = []
        for family, world, draft in examples(random.Random(f"{seed} {split}"), worlds, size):
            row = {"schema": world.ddl, "question": draft.question, "sql": draft.sql}
            if split != "train":
                row["database"] = world.script
            made[split].append((family, row))
    questions = [{row["question"] for _, row in rows} for rows in made.values()]
    assert len(set.union(*questions)) == sum(map(len, questions)), "a question in two splits"
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the text-to-SQL data set of the demo.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for split, rows in generate(options.seed).items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for _, row in rows]
        (options.out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{split}: {len(lines)} rows")


if __name__ == "__main__":
    main()
