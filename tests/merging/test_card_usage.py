"""The code that stands in a merged model's README answers as base + adapter do, run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from adapterhub_lite.bases.load import load_base
from adapterhub_lite.merging.report import Thresholds
from adapterhub_lite.runtime.runtime import Runtime
from adapterhub_lite.store import Store
from adapterhub_lite.workflows.merge import merge
from adapterhub_lite.workflows.merge_card import merged_card
from tests.merging.build import INSTRUCT, peft_folder, stored
from tests.merging.test_report import a_report

LOOSE = Thresholds(max_kl=1e9, min_top1=0.0, max_lost=1e9, max_metric_drop=1.0)


def code_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


@pytest.mark.parametrize(
    ("family", "kind", "system"), [("llama", "CAUSAL_LM", 'Say "it" `so`.'), ("t5", "SEQ_2_SEQ_LM", None)]
)
def test_the_code_of_the_card_answers_as_the_runtime(tmp_path, tiny_folder, family, kind, system):
    folder, store = tiny_folder(family), Store(tmp_path / "store")
    base = load_base(str(folder), device="cpu")
    peft_folder(tmp_path / "peft", folder, family)
    task = {**INSTRUCT, "template": "Q: {question}", "max_new_tokens": 6, **({"system": system} if system else {})}
    ref = stored(store, "mine", tmp_path / "peft", base, task, tmp_path / "data")
    merge(ref, tmp_path / "out", store=store, base=base, thresholds=LOOSE, metric_rows=0)
    code = code_of((tmp_path / "out" / "README.md").read_text("utf-8")).replace("{question}", "how many boats?")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True, check=True
    )
    runtime = Runtime(base, store)
    assert done.stdout.rstrip("\n") == runtime.answer("Q: how many boats?", ref, max_new_tokens=6)[0].rstrip("\n")


def test_nothing_in_a_task_ends_the_block_of_code():
    task = {"type": "instruct", "system": "```\n# evil", "template": '"""```', "max_new_tokens": 5}
    for chats in (True, False):
        card = merged_card(a_report(), {"architectures": ["LlamaForCausalLM"]}, task, chats)
        assert card.count("```") == 2
        compile(code_of(card), "card", "exec")
