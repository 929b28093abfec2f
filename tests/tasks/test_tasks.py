"""Rows, prompts and tasks: what is read, what the model sees, and what is refused, with the line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_lite.errors import DataError, Unsupported
from adapterhub_lite.tasks import rows as reading
from adapterhub_lite.tasks.prompts import chat_ids, completion_ids, fill, prompt_ids
from adapterhub_lite.tasks.registry import make_task
from adapterhub_lite.tasks.rows import Rows, read_jsonl
from adapterhub_lite.tasks.task import IGNORED
from tests import tiny

TOKENIZERS = {kind: tiny.tokenizer(kind) for kind in ("causal", "encoder", "seq2seq")}


def rows(*items: dict) -> Rows:
    return Rows(tuple(items), tuple(range(1, len(items) + 1)), "some.jsonl", "0" * 64)


def instruct(**changes):
    config = {"type": "instruct", "prompt": "q", "completion": "a", "max_new_tokens": 8, "metrics": ["exact_match"]}
    return make_task({**config, **changes})


def classify(**changes):
    return make_task({"type": "classify", "text": "t", "label": "y", **changes})


class TestRows:
    def test_lines_and_digest(self, tmp_path: Path):
        path = tmp_path / "data.jsonl"
        path.write_bytes(b'{"a": 1}\r\n\n   \n{"a": "\xc3\xa9\xe2\x80\xa8x"}')
        found = read_jsonl(path)
        assert list(found) == [{"a": 1}, {"a": "é\u2028x"}]
        assert found.lines == (1, 4)
        assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert found.summary().items() >= {"source": "data.jsonl", "sha256": found.sha256, "rows": 2}.items()

    @pytest.mark.parametrize(
        ("line", "why"),
        [
            (b'{"a": "\xff"}', "UTF-8"),
            (b"{'a': 1}", "not JSON"),
            (b'{"a": 1} {"a": 2}', "not JSON"),
            (b"[" * 100_000, "not JSON"),
            (b"[1]", "not a JSON object"),
            (b'"text"', "not a JSON object"),
            (b"null", "not a JSON object"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path: Path, line: bytes, why: str):
        path = tmp_path / "data.jsonl"
        path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
        with pytest.raises(DataError, match=rf"data\.jsonl, line 3: .*{why}"):
            read_jsonl(path)

    def test_the_first_bad_line_is_told_in_full_the_others_by_number(self, tmp_path: Path):
        path = tmp_path / "data.jsonl"
        path.write_bytes(b'{"a": 1}\nx\n{"a": 2}\n' + b"[1]\n" + b'{"a": "\xff"}\n' * 6)
        with pytest.raises(DataError, match=r"line 2: not JSON .*7 more cannot be read: lines 4, 5, 6, 7, 8, \.\.\."):
            read_jsonl(path)
        path.write_bytes(b'{"a": 1}\nx\n{"a": 2}\n')
        with pytest.raises(DataError) as error:
            read_jsonl(path)
        assert "more" not in str(error.value)

    def test_a_line_too_long(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(reading, "MAX_LINE_BYTES", 50)
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps({"a": "x" * 30}) + "\n" + json.dumps({"a": "x" * 60}))
        with pytest.raises(DataError, match="line 2: longer than 50"):
            read_jsonl(path)

    @pytest.mark.parametrize("content", [b"", b"\n \n\t\n"])
    def test_no_rows(self, tmp_path: Path, content: bytes):
        (tmp_path / "data.jsonl").write_bytes(content)
        with pytest.raises(DataError, match="holds no rows"):
            read_jsonl(tmp_path / "data.jsonl")

    def test_no_file(self, tmp_path: Path):
        with pytest.raises(DataError, match="cannot be read"):
            read_jsonl(tmp_path / "data.jsonl")
        with pytest.raises(DataError, match="cannot be read"):
            read_jsonl(tmp_path)

    @pytest.mark.parametrize("row", [{"b": 1}, {"a": None, "b": 1}])
    def test_a_missing_field_is_named_with_its_line(self, row: dict):
        found = Rows((row,), (17,), "some.jsonl", "")
        with pytest.raises(DataError, match=r"some\.jsonl, line 17: no field 'a'.*b"):
            found.field(0, "a")

    def test_all_rows_that_lack_a_field_are_told(self):
        found = Rows(({"a": 1}, {"b": 1}, {"a": 2}, {"a": None}), (1, 2, 3, 5), "some.jsonl", "")
        with pytest.raises(DataError, match=r"line 2: no field 'a'. It has: b. 1 more lack it: line 5\."):
            found.field(1, "a")


class TestFill:
    def test_braces(self):
        assert fill("{a}{{b}} {c}}}", {"a": "{b}", "c": "{{x}}"}) == "{b}{b} {{x}}}"

    @given(st.text(), st.text())
    def test_values_are_never_read_as_templates(self, first: str, second: str):
        assert fill("<{a}|{b}>", {"a": first, "b": second}) == f"<{first}|{second}>"

    @pytest.mark.parametrize("template", ["{a.__class__}", "{a[0]}", "{0}", "{missing}", "{}"])
    def test_only_fields(self, template: str):
        with pytest.raises(DataError, match=r"needs field|is not usable"):
            fill(template, {"a": "x"})


class TestPrompts:
    def test_the_chat_template_is_transformers(self):
        tokenizer = TOKENIZERS["causal"]
        talk = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
        expected = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert chat_ids(tokenizer, talk) == prompt_ids(tokenizer, "hi", "be kind") == expected

    def test_without_template_it_is_text(self):
        tokenizer = TOKENIZERS["seq2seq"]
        assert prompt_ids(tokenizer, "hi", "be kind") == tokenizer("be kind\n\nhi")["input_ids"]
        with pytest.raises(Unsupported):
            chat_ids(tokenizer, [{"role": "user", "content": "hi"}])

    def test_a_completion_ends(self):
        for tokenizer in TOKENIZERS.values():
            assert tokenizer.convert_ids_to_tokens(completion_ids(tokenizer, "ab")) == ["a", "b", "</s>"]


class TestInstruct:
    def test_the_loss_is_on_the_completion_alone(self):
        tokenizer = TOKENIZERS["causal"]
        (found,) = instruct(system="S").examples(rows({"q": "hi", "a": "yo"}), tokenizer, "causal", 512)
        assert tokenizer.decode(found.ids) == "<s>system: S</s><s>user: hi</s><s>assistant: yo</s>"
        supervised = [i for i, label in enumerate(found.labels) if label != IGNORED]
        assert [found.ids[i] for i in supervised] == [found.labels[i] for i in supervised]
        assert tokenizer.decode([found.labels[i] for i in supervised]) == "yo</s>"

    def test_an_encoder_decoder_reads_and_writes(self):
        tokenizer = TOKENIZERS["seq2seq"]
        (found,) = instruct().examples(rows({"q": "hi", "a": "yo"}), tokenizer, "seq2seq", 512)
        assert (tokenizer.decode(found.ids), tokenizer.decode(found.labels)) == ("hi</s>", "yo</s>")

    def test_a_template_makes_the_prompt(self):
        task = instruct(template="{x}: {q}")
        assert task.inputs(rows({"x": "{q}", "q": "Q"})) == ["{q}: Q"]

    @pytest.mark.parametrize("kind", ["causal", "seq2seq"])
    def test_answers_that_lose_their_end_are_told(self, kind: str):
        items = rows({"q": "x", "a": "y"}, {"q": "x", "a": "y" * 60}, {"q": "x", "a": "y" * 80})
        task, tokenizer = instruct(), TOKENIZERS[kind]
        whole = task.examples(items, tokenizer, kind, 999)
        need = max(len(e.ids) if kind == "causal" else len(e.labels) for e in whole)
        assert task.examples(items, tokenizer, kind, need) == whole
        assert task.remarks == []
        cut = task.examples(items, tokenizer, kind, need - 1)
        assert cut[:2] == whole[:2]
        assert cut[2].labels == whole[2].labels[: need - 1]
        assert cut[2].ids == whole[2].ids[: need - 1]
        task.examples(items, tokenizer, kind, 50)
        one, two = task.remarks
        assert f"1 rows are longer than max_length {need - 1} (line 3)" in one
        assert "2 rows are longer than max_length 50 (lines 2, 3)" in two
        assert all(f"training.max_length {need} would hold them all" in text for text in (one, two))

    def test_an_answer_of_which_nothing_is_left_is_refused(self):
        items = rows({"q": "x", "a": "y"}, {"q": "x" * 90, "a": "y"}, {"q": "x" * 80, "a": "y"})
        with pytest.raises(DataError, match=r"2 rows have prompts of max_length 60 tokens or more \(lines 2, 3\)"):
            instruct().examples(items, TOKENIZERS["causal"], "causal", 60)

    def test_an_answer_without_a_token_is_refused(self):
        """Possible where the tokenizer has no end token; a batch of such rows would have no loss."""
        tokenizer = tiny.tokenizer()
        tokenizer.eos_token = None
        with pytest.raises(DataError, match="line 2: the completion is empty"):
            instruct().examples(rows({"q": "x", "a": "y"}, {"q": "x", "a": ""}), tokenizer, "causal", 99)

    def test_following_the_advice_helps(self):
        items = rows({"q": "x" * 50, "a": "y" * 60}, {"q": "x", "a": "y" * 200})
        with pytest.raises(DataError) as caught:
            instruct().examples(items, TOKENIZERS["causal"], "causal", 40)
        advised = int(caught.value.hint.split("max_length to ")[1].split(",")[0])
        task = instruct()
        assert len(task.examples(items, TOKENIZERS["causal"], "causal", advised)) == 2
        assert task.remarks == []

    def test_missing_columns_are_found_before_training(self):
        with pytest.raises(DataError, match="no field 'a'"):
            instruct().prepare(rows({"q": "x", "b": "y"}))
        with pytest.raises(DataError, match="no field 'q'"):
            instruct().examples(rows({"a": "x"}), TOKENIZERS["causal"], "causal", 99)

    def test_an_encoder_writes_nothing(self):
        with pytest.raises(Unsupported):
            instruct().examples(rows({"q": "x", "a": "y"}), TOKENIZERS["encoder"], "encoder", 99)

    def test_metrics_are_means(self):
        items = rows({"a": "x"}, {"a": "y"}, {"a": "z"}, {"a": "w"})
        assert instruct().metrics(items, ["x", "y", "no", ""]) == {"exact_match": 0.5}


class TestClassify:
    def test_labels_are_learnt_in_order_and_kept(self):
        task = classify()
        task.prepare(rows({"t": "1", "y": "no"}, {"t": "2", "y": "maybe"}, {"t": "3", "y": 7}))
        assert task.labels == task.config["labels"] == ["7", "maybe", "no"]
        assert task.targets(rows({"t": "", "y": 7}, {"t": "", "y": "no"})) == [0, 2]

    @pytest.mark.parametrize("labels", [None, ["no", "yes"]])
    def test_an_unknown_label_is_named_with_its_line(self, labels):
        task = classify(labels=labels)
        task.prepare(rows({"t": "1", "y": "no"}, {"t": "2", "y": "yes"}))
        with pytest.raises(DataError, match=r"line 2: label 'perhaps' is unknown.*no, yes"):
            task.examples(rows({"t": "", "y": "no"}, {"t": "", "y": "perhaps"}), TOKENIZERS["encoder"], "encoder", 64)

    def test_a_label_that_the_recipe_lacks(self):
        with pytest.raises(DataError, match="'other' is unknown"):
            classify(labels=["a", "b"]).prepare(rows({"t": "", "y": "a"}, {"t": "", "y": "other"}))

    def test_one_label_is_none(self):
        with pytest.raises(DataError, match="1 label"):
            classify().prepare(rows({"t": "", "y": "a"}, {"t": "", "y": "a"}))

    def test_an_encoder_gets_class_and_cut_text(self):
        tokenizer = TOKENIZERS["encoder"]
        task = classify(labels=["a", "b"])
        (found,) = task.examples(rows({"t": "hello world", "y": "b"}), tokenizer, "encoder", 8)
        assert found.labels == [1]
        assert found.ids == tokenizer("hello world", truncation=True, max_length=8)["input_ids"]
        assert len(found.ids) == 8

    def test_a_causal_base_writes_the_labels_word(self):
        tokenizer = TOKENIZERS["causal"]
        task = classify(labels=["a", "b"], words={"a": "bad", "b": "good"}, template="{t}?")
        (found,) = task.examples(rows({"t": "film {x}", "y": "b"}), tokenizer, "causal", 99)
        assert tokenizer.decode(found.ids) == "<s>user: film {x}?</s><s>assistant: good</s>"
        assert tokenizer.decode([i for i in found.labels if i != IGNORED]) == "good</s>"
        with pytest.raises(DataError, match=r"line 1.*max_length 20"):
            task.examples(rows({"t": "film", "y": "b"}), tokenizer, "causal", 20)

    def test_an_encoder_decoder_is_refused(self):
        with pytest.raises(Unsupported):
            classify(labels=["a", "b"]).encode("x", TOKENIZERS["seq2seq"], "seq2seq", 9)


def test_an_unknown_task():
    with pytest.raises(Unsupported, match="instruct"):
        make_task({"type": "rank"})
