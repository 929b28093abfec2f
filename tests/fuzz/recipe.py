"""Any bytes as a recipe: refused with an error of ours, or one that written as plain YAML is the same again."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path
from random import Random

import yaml

from adapterhub_lite.recipe import Recipe, load_recipe, recipe_dict
from tests.fuzz.common import accepted, mutate_bytes
from tests.recipe.build import GOOD, LEAST

SEEDS = (
    GOOD.encode(),
    LEAST.encode(),
    b"""\
name: sql
base: smollm2-135m-instruct
quantize: nf4
task:
  type: instruct
  template: "Schema: {schema} Question: {question}"
  completion: query
  system: |
    You write SQL.
  metrics: [exact_match]
data:
  train: {hub: org/set, split: train, revision: 0123456789012345678901234567890123456789}
  test: {hub: org/set, split: test, config: main}
adapter: {type: dora, rank: 16, alpha: 32, targets: [q_proj, v_proj], dropout: 0.05}
training: {epochs: 2, batch_size: 8, learning_rate: 5.0e-4, max_length: 512, seed: 1}
""",
)
WORDS = (
    b": ", b"- ", b"\n", b"  ", b"&a ", b"*a", b"!!python/object/apply:os.system ", b"!!str ", b"|", b">", b"'", b'"',
    b"{", b"}", b"[", b"]", b"? ", b"---\n", b"...\n", b"%YAML 1.1\n", b"<<: ", b"${HOME}", b"null", b"~", b"yes",
    b"1e309", b"0x10", b"0o7", b"1_000", b".inf", b"\t", b"\x85", b"\xef\xbb\xbf", b"\\u0000", b"type: prefix", b"seed",
)  # fmt: skip

_FOLDER = tempfile.TemporaryDirectory(prefix="ahl-fuzz-")
_FILE = Path(_FOLDER.name) / "recipe.yaml"


def read(data: bytes) -> Recipe:
    """The parser."""
    _FILE.write_bytes(data)
    return load_recipe(_FILE, check_files=False)


def fuzz(data: bytes) -> None:
    """Accepted: its plain form is read as the same recipe, and it can be sent to another process."""
    recipe = accepted(read, data)
    if recipe is None:
        return
    told = recipe_dict(recipe)
    again = recipe_dict(read(yaml.safe_dump(told, sort_keys=False, allow_unicode=True).encode()))
    assert again == told
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def mutate(data: bytes, rng: Random) -> bytes:
    """Of bytes, or of lines."""
    if rng.random() < 0.6:
        return mutate_bytes(data, rng, WORDS)
    lines = data.splitlines(keepends=True)
    for _ in range(rng.randint(1, 3)):
        if lines:
            at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
            lines[at : at + rng.randrange(2)] = [lines[other]] * rng.randrange(3)
    return b"".join(lines)
