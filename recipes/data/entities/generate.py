"""Make the tagged sentences of the `entities` recipe: python recipes/data/entities/generate.py --out DIR."""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

from sentences import NAMES, TEST, TRAIN, VALIDATION

SEED = 0
# Fillings of each sentence; one that has no place for a name occurs once.
SPLITS = {"train": (TRAIN, 10), "validation": (VALIDATION, 4), "test": (TEST, 5)}


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    for split, (sentences, times) in SPLITS.items():
        rows = make(split, sentences.strip().splitlines(), times)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{split}.jsonl").write_text(text, encoding="utf-8")


def make(split: str, sentences: list[str], times: int) -> list[dict[str, list[str]]]:
    """Rows of words and tags, shuffled; no row occurs twice."""
    chance = random.Random(f"{SEED} {split}")
    rows: dict[str, dict[str, list[str]]] = {}
    for sentence in sentences:
        for _ in range(times if "{" in sentence else 1):
            row = fill(sentence, NAMES[split], chance)
            rows[" ".join(row["tokens"])] = row
    made = list(rows.values())
    chance.shuffle(made)
    return made


def fill(sentence: str, names: dict[str, object], chance: random.Random) -> dict[str, list[str]]:
    """One sentence with names: its words, and their tags in IOB2."""
    tokens: list[str] = []
    tags: list[str] = []
    used: set[str] = set()
    for part in sentence.split():
        place = re.fullmatch(r"\{(\w+)\}", part)
        words = name(names[place[1]], used, chance).split() if place else [part]
        tokens += words
        tags += [f"{'I' if i else 'B'}-{place[1]}" if place else "O" for i in range(len(words))]
    return {"tokens": tokens, "tags": tags}


def name(known: object, used: set[str], chance: random.Random) -> str:
    """A name that the sentence does not have yet; of two parts the first now and then stands alone."""
    while True:
        if isinstance(known, tuple):
            first, last = (chance.choice(part.split()) for part in known)
            found = chance.choice([f"{first} {last}", f"{first} {last}", first])
        else:
            found = chance.choice(str(known).split("|"))
        if found not in used:
            used.add(found)
            return found


if __name__ == "__main__":
    main()
